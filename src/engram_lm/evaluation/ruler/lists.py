"""Words to count: the common ones of a list (``cwe``), and the frequent ones of a coded text (``fwe``)."""

import itertools
import math
import random
from collections.abc import Sequence

from engram_lm.evaluation.ruler.sample import Draft
from engram_lm.evaluation.ruler.words import ADJECTIVES, NOUNS, draw_different

_NUM_COMMON = 10
_SHORT_LENGTH = 4096
"""Tokens below which lists repeat their words less often."""
_SHORT_LIST = 8192
"""Tokens below which there are enough words that nothing was done to."""
_MOST_COINED = 100_000
_CODED_LETTERS = 6
_ALPHA = 2.0
"""How fast frequencies fall: the word of rank r has a share of r^-alpha."""
_ZETA = math.pi**2 / 6
"""The sum of r^-2 over all ranks."""


def common_words(chance: random.Random, length: int) -> Draft:
    """List words, ten of which occur 30 times and all others 3 times; ask for the ten.

    A list of 40 words with its answer comes first, as published. Where ``length`` is below 4,096 tokens, words occur
    6 times and once, and the example has 20 words.
    """
    pool = _word_pool(chance, length)
    short = length < _SHORT_LENGTH
    size, example_common, example_rare = (20, 3, 1) if short else (40, 10, 3)
    often, seldom = (6, 1) if short else (30, 3)
    example_words, pool = pool[:size], pool[size:]
    # No common word is part of another word of the list: an answer is looked for as a part of what was generated.
    text = " ".join(pool)
    common = list(itertools.islice((word for word in pool if text.count(word) == 1), _NUM_COMMON))
    rare = [word for word in pool if word not in common]
    shuffling = chance.getrandbits(64)
    example = _numbered(example_words, example_common, example_rare, random.Random(shuffling + 1))
    example = f"{_question(example)} {_PREFIX} {_lines(example_words[:_NUM_COMMON])}\n"
    return Draft(
        write=lambda size: (
            example + _question(_numbered([*common, *rare[:size]], often, seldom, random.Random(shuffling)))
        ),
        prefix=_PREFIX,
        answers=tuple(common),
        least=_NUM_COMMON,
        most=len(rare),
    )


def _word_pool(chance: random.Random, length: int) -> list[str]:
    """Draw more different words than a list of ``length`` tokens can have.

    Beyond the words that there are, two nouns are written as one word: a list of 131,072 tokens has some 7,000.
    """
    known = dict.fromkeys([*NOUNS, *ADJECTIVES])
    number = len(known) if length < _SHORT_LIST else len(known) + min(length // 6, _MOST_COINED)
    words = draw_different(number, lambda: chance.choice(NOUNS) + chance.choice(NOUNS), known)
    return chance.sample(words, len(words))


_PREFIX = "Answer: The top 10 words that appear most often in the list are:"


def _question(context: str) -> str:
    return (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        f"appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
    )


def _numbered(words: Sequence[str], often: int, seldom: int, chance: random.Random) -> str:
    listed = [*list(words[:_NUM_COMMON]) * often, *list(words[_NUM_COMMON:]) * seldom]
    chance.shuffle(listed)
    return _lines(listed)


def _lines(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


def frequent_words(chance: random.Random, length: int) -> Draft:
    """Write a text of coded words whose frequencies follow a power law; ask for the three most frequent.

    The most frequent of all is a row of dots, which the question says to ignore. There are as many different words as
    a fiftieth of ``length``, at least 10.
    """
    number = max(10, length // 50)
    words = draw_different(number, lambda: "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=_CODED_LETTERS)))
    ranked, shuffling = ["...", *words][:number], chance.getrandbits(64)

    def write(size: int) -> str:
        counts = (int(size * rank**-_ALPHA / _ZETA) for rank in range(1, number + 1))
        text = [word for word, count in zip(ranked, counts, strict=True) for _ in range(count)]
        random.Random(shuffling).shuffle(text)
        return (
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            f"appeared coded words. {' '.join(text)}\nQuestion: Do not provide any explanation. Please ignore the dots "
            "'....'. What are the three most frequently appeared words in the above coded text?"
        )

    return Draft(
        write=write,
        prefix="Answer: According to the coded text above, the three most frequently appeared words are:",
        answers=tuple(ranked[1:4]),
        least=100,  # from here on the first five frequencies differ
    )
