"""Two families of questions made of a text: what a model recalls of it, and what it reads in its context.

A question is the beginning of a sentence, and its answer the next word, a rare one, to be chosen among four.

*Recall*: the text states the sentence, and the question gives nothing but its beginning. For a model that was trained
on the text, the answer is in the weights or nowhere; for another model it is a guess.

*Reading*: the question first states the sentence with another one of the four words in place of its own, then an
unrelated sentence, then the beginning. The answer is the word that was stated, which is in the context and nowhere
else, and the weights may speak against it.

Both families have the same beginnings and the same choices; what differs is where the answer is.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from engram_lm.errors import DataError, check_whole
from engram_lm.evaluation.tasks import TaskItem
from engram_lm.evaluation.token_text import WORD

FAMILIES = ("recall", "reading")
"""Names of the families."""
NUM_CHOICES = 4
"""Words to choose from."""

_SENTENCE = re.compile(r"[^.!?\n]+")
_SHORTEST, _LONGEST = 5, 160
"""Words before the answer at least, and characters of a sentence's beginning at most."""
_SHORTEST_WORD = 4
"""Letters of an answer at least."""
_NEAR = 24
"""Other answers of about the same length, of which the wrong choices are drawn."""


class _Fact(NamedTuple):
    """A sentence that the text states."""

    beginning: str
    word: str

    def names(self, word: str) -> bool:
        """Whether a word occurs in the sentence, whatever its case."""
        return word.casefold() in f"{self.beginning} {self.word}".casefold()


def recall_questions(
    texts: Iterable[str], *, num_questions: int = 256, seed: int = 0, rare_below: int = 10
) -> tuple[TaskItem, ...]:
    """Make questions of a text; the same for the same text and numbers.

    Args:
        texts: Documents, best of the text that the model was trained on.
        num_questions: Questions of each family, at most.
        seed: Chooses sentences and choices.
        rare_below: An answer is a word that occurs less often than this in all documents.

    Returns:
        First the questions of the family ``recall``, then those of ``reading``.

    Raises:
        DataError: The text has too few sentences with rare words.
    """
    check_whole(num_questions=num_questions, rare_below=rare_below)
    documents = list(texts)
    counts = Counter(word.casefold() for text in documents for word in WORD.findall(text))
    chance = random.Random(seed)
    found: dict[str, str | None] = {}
    for text in documents:
        for fact in _facts(text, counts, rare_below, chance):
            # A beginning that is continued in two ways has no answer.
            found[fact.beginning] = fact.word if found.get(fact.beginning, fact.word) == fact.word else None
    facts = [_Fact(beginning, word) for beginning, word in found.items() if word is not None]
    words = sorted({fact.word for fact in facts}, key=lambda word: (word[0].isupper(), len(word), word))
    if len(words) <= NUM_CHOICES:
        raise DataError(
            f"the text has {len(words)} rare words that follow at least {_SHORTEST} others in their sentence, and "
            f"questions take more than {NUM_CHOICES}; name a longer text"
        )
    places = {word: place for place, word in enumerate(words)}
    chosen = chance.sample(facts, len(facts))
    recall: list[TaskItem] = []
    reading: list[TaskItem] = []
    for fact in chosen:
        if len(recall) == num_questions:
            break
        first = max(0, min(places[fact.word] - _NEAR // 2, len(words) - _NEAR))
        near = [word for word in words[first : first + _NEAR + 1] if word != fact.word and not fact.names(word)]
        if len(near) < NUM_CHOICES - 1:
            continue
        stated, *others = chance.sample(near, NUM_CHOICES - 1)
        choices = chance.sample([fact.word, stated, *others], NUM_CHOICES)
        some = chance.sample(chosen, min(len(chosen), _NEAR))
        between = next((other for other in some if not any(map(other.names, choices))), None)
        context = f"{fact.beginning} {stated}.\n"
        if between is not None:
            context += f"{between.beginning} {between.word}.\n"
        recall.append(_item("recall", len(recall), fact.beginning, fact.word, choices))
        reading.append(_item("reading", len(reading), context + fact.beginning, stated, choices))
    return (*recall, *reading)


def _facts(text: str, counts: Counter[str], rare_below: int, chance: random.Random) -> Iterator[_Fact]:
    """Yield at most one fact of each sentence."""
    for match in _SENTENCE.finditer(text):
        sentence = match.group().strip()
        words = list(WORD.finditer(sentence))
        possible = [
            word
            for number, word in enumerate(words)
            if number >= _SHORTEST
            and word.start() <= _LONGEST
            and sentence[word.start() - 1] == " "
            and sentence[word.start() - 2] != " "
            and len(word.group()) >= _SHORTEST_WORD
            and counts[word.group().casefold()] < rare_below
            and word.group().casefold() not in (one.group().casefold() for one in words[:number])
        ]
        if possible:
            word = chance.choice(possible)
            yield _Fact(sentence[: word.start() - 1], word.group())


def _item(family: str, index: int, prompt: str, answer: str, choices: Iterable[str]) -> TaskItem:
    spaced = tuple(f" {choice}" for choice in choices)
    return TaskItem(id=f"{family}-{index}", family=family, prompt=prompt, answer=f" {answer}", choices=spaced)
