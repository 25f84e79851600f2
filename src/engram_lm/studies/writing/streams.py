"""What models read: text of another kind than they were trained on, and invented facts that are told once."""

import importlib.metadata
import itertools
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from engram_lm.errors import DataError
from engram_lm.studies.suppression.families import ATTRIBUTES, FIRST_NAMES, LAST_NAMES
from engram_lm.training.data.documents import Document, draw, pack, read_documents
from engram_lm.training.data.text_source import STANDARD_LIBRARY

DESCRIPTIONS = "python:package-descriptions"
"""Names the descriptions of the packages that are installed: English in Markdown or reStructuredText."""
NUM_CHOICES = 4
"""Answers that a fact is chosen among."""


class Domain(NamedTuple):
    """Text of one kind, divided into streams that share nothing."""

    validation: np.ndarray
    """For the choice of rates and shares, which no result uses; int32 ``[N + 1]``."""
    streams: tuple[np.ndarray, ...]
    """One for each seed, int32 ``[N + 1]``."""


def open_domain(source: str, tokenizer: Any, *, num_streams: int, num_tokens: int, max_bytes: int) -> Domain:
    """Read text of one kind: its documents, in an order that their contents decide, are laid end to end and divided.

    Args:
        source: A source of text as `engram_lm.training.data.text_source.TextSource` names it, or `DESCRIPTIONS`.
        tokenizer: The models' tokenizer.
        num_streams: Streams to make, beside the one for validation.
        num_tokens: Tokens that each of them predicts.
        max_bytes: Text to read at most.

    Raises:
        DataError: There is too little text.
    """
    documents = _descriptions() if source == DESCRIPTIONS else read_documents((source,), max_bytes=max_bytes).documents
    wanted, parts, found = (num_streams + 1) * (num_tokens + 1), list[np.ndarray](), 0
    for document in sorted(documents, key=lambda one: draw(one.digest)):
        if found >= wanted:
            break
        parts.append(pack([document], tokenizer))
        found += len(parts[-1])
    if found < wanted:
        raise DataError(
            f"{source} gives {found:,} tokens, and {num_streams + 1} streams of {num_tokens:,} take {wanted:,}; lower "
            "--stream-tokens or --seeds, or name other --domains"
        )
    validation, *streams = np.split(np.concatenate(parts)[:wanted], num_streams + 1)
    return Domain(validation, tuple(streams))


def name_of(source: str) -> str:
    """What tables and figures call a source."""
    known = {STANDARD_LIBRARY: "Python's sources", DESCRIPTIONS: "package descriptions"}
    return known.get(source, source.rstrip("/").rpartition("/")[2])


def _descriptions() -> list[Document]:
    """The descriptions of installed packages, each once."""
    found: dict[str, str] = {}
    for package in importlib.metadata.distributions():
        text = package.metadata.get_payload() or package.metadata.get("Description")  # type: ignore[attr-defined]
        if isinstance(text, str) and text.strip():
            found.setdefault(text, package.metadata["Name"])
    return [Document(name, text) for text, name in found.items()]


class Fact(NamedTuple):
    """Something about an invented person."""

    prompt: str
    """The sentence without its last word."""
    choices: tuple[str, ...]
    """What the last word may be; the first is the true one."""

    @property
    def sentence(self) -> str:
        """How the fact is told."""
        return f"{self.prompt}{self.choices[0]}.\n"


def invent_facts(number: int, seed: int) -> list[Fact]:
    """Invent facts about people, no two about the same one; the same for the same numbers."""
    chance = random.Random(seed)
    names = chance.sample([*itertools.product(FIRST_NAMES, LAST_NAMES)], number)
    kinds = list(ATTRIBUTES.values())
    facts = []
    for first, last in names:
        about = chance.choice(kinds)
        words = chance.sample(about.values, NUM_CHOICES)
        wording = about.wordings[0].format(name=f"{first} {last}")
        facts.append(Fact(wording, tuple(f" {word}" for word in words)))
    return facts


def tell(facts: Sequence[Fact], text: np.ndarray, tokenizer: Any, *, chunk: int) -> np.ndarray:
    """Put facts into a text, one at the beginning of every second chunk that a model reads.

    Args:
        facts: The facts, each of which is told once.
        text: Tokens to tell them in, int32, as many as the chunks take.
        tokenizer: The models' tokenizer.
        chunk: Tokens of a chunk.

    Returns:
        Tokens, int32 ``[2 * len(facts) * chunk + 1]``; the first is only read.
    """
    parts, used = [text[:1]], 1
    for number in range(2 * len(facts)):
        told = _encode(tokenizer, facts[number // 2].sentence)[:chunk] if number % 2 == 0 else []
        rest = text[used : used + chunk - len(told)]
        parts += [np.array(told, dtype=np.int32), rest]
        used += len(rest)
    return np.concatenate(parts)


class Question(NamedTuple):
    """A fact as it is asked for: one of its answers behind its prompt."""

    tokens: np.ndarray
    """Prompt and answer, int64 ``[N]``."""
    first: int
    """The first token of the answer."""


def ask(facts: Sequence[Fact], tokenizer: Any) -> list[list[Question]]:
    """Write the questions: for each fact one for each choice, the true one first."""
    return [
        [
            Question(np.array([*prompt, *_encode(tokenizer, choice)], dtype=np.int64), len(prompt))
            for choice in fact.choices
        ]
        for fact in facts
        for prompt in [_encode(tokenizer, fact.prompt)]
    ]


def _encode(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return found
