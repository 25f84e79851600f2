"""Needles in a haystack, and a chain of variables to follow: eight tasks and ``vt``."""

import dataclasses
import itertools
import random
import uuid
from collections.abc import Sequence
from typing import Literal

from engram_lm.evaluation.ruler.essay import Essay
from engram_lm.evaluation.ruler.sample import Draft
from engram_lm.evaluation.ruler.words import ADJECTIVES, NOUNS, draw_different

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_DEPTHS = 40
"""Places of a haystack, spread evenly, that a needle in an essay is put at."""
_CHAIN_HOPS = 4

Kind = Literal["words", "numbers", "uuids"]
"""What keys or values are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needles:
    """Settings of a task that hides sentences of the form “the number for this key is that value”."""

    haystack: Literal["noise", "essay", "needles"]
    """What they are hidden in: one line again and again, prose, or other needles."""
    keys: Kind = "words"
    """What a needle is found by."""
    values: Kind = "numbers"
    """What it tells."""
    num_keys: int = 1
    """Keys that there are needles for."""
    num_values: int = 1
    """Needles for each key, each with a value of its own."""
    num_queries: int = 1
    """Keys that are asked about."""

    def draft(self, chance: random.Random, essay: Essay) -> Draft:
        """Draw keys, values and places, and let the haystack around them have any size."""
        keys = draw_different(self.num_keys, lambda: _draw(self.keys, chance))
        values = draw_different(self.num_keys * self.num_values, lambda: _draw(self.values, chance))
        owners = [key for key in keys for _ in range(self.num_values)]
        needles = [self._sentence(key, value) for key, value in zip(owners, values, strict=True)]
        chance.shuffle(needles)
        asked = chance.sample(range(self.num_keys), self.num_queries)
        answers = [values[key * self.num_values + place] for key in asked for place in range(self.num_values)]
        if self.haystack == "essay":
            depths = sorted(chance.sample(range(_DEPTHS), len(needles)))
            places = [depth / (_DEPTHS - 1) for depth in depths]
        else:
            places = sorted(chance.random() for _ in needles)
        others = random.Random(chance.getrandbits(64))
        lines: list[str] = []  # of a haystack of needles, drawn as far as they were needed
        known = set(keys)

        def other(number: int) -> str:
            while len(lines) <= number:
                key = _draw(self.keys, others)
                if key not in known:
                    lines.append(self._sentence(key, _draw(self.values, others)))
            return lines[number]

        def write(size: int) -> str:
            if self.haystack == "essay":
                return self._ask(" ".join(_insert(essay.sentences(size), needles, places)), keys, asked)
            hay = [NOISE if self.haystack == "noise" else other(number) for number in range(size)]
            return self._ask("\n".join(_insert(hay, needles, places)), keys, asked)

        queries, kind = _listed([keys[key] for key in asked]), self._kind
        verb = "is" if len(answers) == 1 else "are"
        prefix = f"The special magic {kind} for {queries} mentioned in the provided text {verb}"
        return Draft(write=write, prefix=prefix, answers=tuple(answers))

    @property
    def _kind(self) -> str:
        """What is asked for, in the number that it is asked for in."""
        return self.values[:-1] if self.num_queries * self.num_values == 1 else self.values

    def _sentence(self, key: str, value: str) -> str:
        return f"One of the special magic {self.values} for {key} is: {value}."

    def _ask(self, context: str, keys: Sequence[str], asked: Sequence[int]) -> str:
        kind, queries = self._kind, _listed([keys[key] for key in asked])
        if kind == self.values:
            intro, question = f"Some special magic {kind} are hidden", f"What are all the special magic {kind}"
        else:
            intro, question = f"A special magic {kind} is hidden", f"What is the special magic {kind}"
        return (
            f"{intro} within the following text. Make sure to memorize it. I will quiz you about the {kind} "
            f"afterwards.\n{context}\n{question} for {queries} mentioned in the provided text?"
        )


NEEDLES = {
    "niah_single_1": Needles(haystack="noise"),
    "niah_single_2": Needles(haystack="essay"),
    "niah_single_3": Needles(haystack="essay", values="uuids"),
    "niah_multikey_1": Needles(haystack="essay", num_keys=4),
    "niah_multikey_2": Needles(haystack="needles"),
    "niah_multikey_3": Needles(haystack="needles", keys="uuids", values="uuids"),
    "niah_multivalue": Needles(haystack="essay", num_values=4),
    "niah_multiquery": Needles(haystack="essay", num_keys=4, num_queries=4),
}
"""Settings by task, as published."""


def variable_tracking(chance: random.Random, length: int) -> Draft:
    """Hide a chain of five variables, each assigned the one before it, and ask for all that have the first one's value.

    A short example with other variables and its answer comes first, as published; where ``length`` is below 4,096
    tokens, it has less haystack.
    """
    example_names = draw_different(_CHAIN_HOPS + 1, lambda: _letters(3, chance))
    names = draw_different(_CHAIN_HOPS + 1, lambda: _letters(5, chance))
    values = draw_different(2, lambda: str(chance.randrange(10_000, 100_000)))
    example_places, places = (sorted(chance.random() for _ in names) for _ in range(2))
    size = 15 if length >= 4096 else 3
    example = _chain(example_names, values[0], example_places, size)
    example += f" {_chain_prefix(values[0])} {' '.join(example_names)}\n\n"
    return Draft(
        write=lambda size: example + _chain(names, values[1], places, size),
        prefix=_chain_prefix(values[1]),
        answers=tuple(names),
    )


def _chain(names: Sequence[str], value: str, places: Sequence[float], size: int) -> str:
    assignments = [f"VAR {names[0]} = {value}"]
    assignments += [f"VAR {name} = VAR {before}" for before, name in itertools.pairwise(names)]
    context = "\n".join(_insert([NOISE] * size, assignments, places))
    return (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"{context}\nQuestion: Find all variables that are assigned the value {value} in the text above."
    )


def _chain_prefix(value: str) -> str:
    # With the published spelling of “assigned”: models have been compared with it.
    return (
        "Answer: According to the chain(s) of variable assignment in the text above, "
        f"{_CHAIN_HOPS + 1} variables are assgined the value {value}, they are:"
    )


def _insert(hay: Sequence[str], needles: Sequence[str], places: Sequence[float]) -> list[str]:
    """Put needles, in order, between the parts of a haystack, at places from 0 (first) to 1 (last)."""
    result, used = list[str](), 0
    for needle, place in zip(needles, places, strict=True):
        stop = int(place * len(hay))
        result += [*hay[used:stop], needle]
        used = stop
    return [*result, *hay[used:]]


def _draw(kind: Kind, chance: random.Random) -> str:
    if kind == "words":
        return f"{chance.choice(ADJECTIVES)}-{chance.choice(NOUNS)}"
    if kind == "numbers":
        return str(chance.randrange(1_000_000, 10_000_000))
    return str(uuid.UUID(int=chance.getrandbits(128), version=4))


def _letters(number: int, chance: random.Random) -> str:
    return "".join(chance.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=number))


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])}, and {words[-1]}"
