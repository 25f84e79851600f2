"""Text with notes to find again, and needles in haystacks of the same kind.

Small models cannot answer RULER's questions. They can learn one way of asking from their text, if the text asks often:
lines of the form ``note amber castle`` stand between lines of Python's standard library. A key, here ``amber``, keeps
its value within a document and is noted again, with gaps from one line to the whole document, every gap as likely as
one of half the length. The value of a key that was noted before can be read, and it cannot be known otherwise.

Finding a key and what follows it takes attention that small models learn late. After a million tokens with 8 keys and 8
values, models find the only note of a haystack, and of several notes they tell which values occur but not whose they
are (docs/findings.md). With 16 keys or more, after fewer tokens, none had learned even that.
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from engram_lm.errors import ConfigError, DataError, check_whole
from engram_lm.evaluation.ruler.words import ADJECTIVES, NOUNS
from engram_lm.training.data.documents import read_documents


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoteOptions:
    """How much text there is, and how it is made."""

    num_documents: int = 200
    """Documents of the text, at least 2."""
    lines_per_document: int = 250
    """Lines of code in a document, at least 4."""
    notes_per_line: int = 4
    """Notes behind each of them, at least 1."""
    new: float = 0.1
    """Share of the notes that have a key for the first time, as long as there are keys left."""
    num_keys: int = 16
    """Keys that there are, at least 8, which is how many are hidden in a haystack; every document has all of them."""
    num_values: int = 16
    """Values that there are, at least 2."""
    seed: int = 0
    """Decides everything but the lines of code."""

    def __post_init__(self) -> None:
        check_whole(at_least=2, num_documents=self.num_documents)
        check_whole(at_least=4, lines_per_document=self.lines_per_document)
        check_whole(notes_per_line=self.notes_per_line)
        check_whole(at_least=0, seed=self.seed)
        check_whole(at_least=8, num_keys=self.num_keys)
        check_whole(at_least=2, num_values=self.num_values)
        if self.num_keys > len(ADJECTIVES) or self.num_values > len(NOUNS):
            raise ConfigError(
                f"there are {len(ADJECTIVES)} keys and {len(NOUNS)} values at most, not {self.num_keys} and "
                f"{self.num_values}"
            )
        if not 0 < self.new < 1:
            raise ConfigError(f"NoteOptions.new is a share above 0 and below 1, not {self.new}")

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys."""
        return ADJECTIVES[: self.num_keys]

    @property
    def values(self) -> tuple[str, ...]:
        """The values."""
        return NOUNS[: self.num_values]


def note(key: str, value: str = "") -> str:
    """A line that notes a value; up to the value where there is none."""
    return f"note {key} {value}".rstrip()


def code_lines(number: int) -> list[str]:
    """The first lines of code of the standard library, without indentation and empty lines, of 8 to 60 characters.

    Raises:
        DataError: There are not so many.
    """
    found: list[str] = []
    for document in read_documents((), max_bytes=number * 120).documents:
        lines = (" ".join(line.split()) for line in document.text.split("\n"))
        found += [line for line in lines if 8 <= len(line) <= 60 and line.isascii() and not line.startswith("note ")]
        if len(found) >= number:
            return found[:number]
    raise DataError(f"the standard library has {len(found):,} such lines, and {number:,} were asked for")


def make_documents(options: NoteOptions, lines: Sequence[str]) -> Iterator[str]:
    """Write the documents of a text, each with its own lines of code, keys and values."""
    per_document = options.lines_per_document
    if len(lines) < per_document * options.num_documents:
        raise DataError(
            f"the text needs {per_document * options.num_documents:,} lines of code, and there are {len(lines):,}"
        )
    for number in range(options.num_documents):
        chance = random.Random(f"{options.seed}/{number}")
        notes = _notes(options, chance)
        parts = [
            line
            for code in lines[number * per_document : (number + 1) * per_document]
            for line in (code, *itertools.islice(notes, options.notes_per_line))
        ]
        yield "\n".join(parts) + "\n"


def _notes(options: NoteOptions, chance: random.Random) -> Iterator[str]:
    keys, values = chance.sample(options.keys, options.num_keys), dict[str, str]()
    last: dict[str, int] = {}  # the place at which a key was noted last
    for place in itertools.count():
        if not last or (len(values) < len(keys) and chance.random() < options.new):
            key = keys[len(values)]
            values[key] = chance.choice(options.values)
        else:
            wanted = place - math.exp(chance.uniform(0.0, math.log(max(place, 2))))
            key = min(last, key=lambda one: abs(last[one] - wanted))
        last[key] = place
        yield note(key, values[key])


class Needles(NamedTuple):
    """A haystack, and notes that are to be found again."""

    lines: list[str]
    """Lines of the haystack, the notes among them."""
    asked: list[tuple[str, str]]
    """Keys and values, in the order in which they are asked for behind the haystack."""


def hide(
    num_needles: int, options: NoteOptions, lines: Sequence[str], length: int, tokenizer: Any, chance: random.Random
) -> Needles:
    """Hide notes at random places of lines of code, so many of them that haystack and questions fit into a length."""
    asked = [(key, chance.choice(options.values)) for key in chance.sample(options.keys, num_needles)]
    places = [chance.random() for _ in asked]
    questions = "".join(note(*one) + "\n" for one in asked)
    room = length - 2 * len(tokenizer(questions).input_ids) - 2
    sizes = [len(one) for one in tokenizer([f"{line}\n" for line in lines[: max(room, 1)]]).input_ids]
    number = total = 0
    while number < len(sizes) and total + sizes[number] <= room:
        total, number = total + sizes[number], number + 1
    hidden = sorted((int(place * number), note(*one)) for place, one in zip(places, asked, strict=True))
    haystack = list(lines[:number])
    for place, line in reversed(hidden):
        haystack.insert(place, line)
    chance.shuffle(asked)
    return Needles(haystack, asked)
