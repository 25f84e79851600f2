"""Which rows a fact is read from: the N-grams that end with its subject, in every wording."""

# Dimension key: P expressions, K heads of all orders and all blocks, L length.

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from engram_lm.adapt.fact_edit import FactEdit
from engram_lm.adapt.patchable import PatchableMemory
from engram_lm.adapt.row_patch_fit import read_facts
from engram_lm.errors import ConfigError
from engram_lm.tokenizing import text_tokens

_MANY_REFERENCE_TOKENS = 1 << 20
"""Tokens of the reference text, from its beginning, in which words that precede others are counted."""


@dataclasses.dataclass(frozen=True, eq=False)
class Wording:
    """One text of a fact as tokens."""

    fact: int
    """Number of its fact."""
    prompt: tuple[int, ...]
    """Tokens before the answer, with what the tokenizer puts in front of a text."""
    answer: tuple[int, ...]
    """Tokens of the answer."""
    text: str
    """The wording."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and answer."""
        return self.prompt + self.answer


@dataclasses.dataclass(frozen=True, eq=False)
class Expressions:
    """The ways in which facts are spelled, and the rows that each of them reads.

    An *expression* is what the last token of a subject looks like to the memory: its N-grams. In most texts they are
    the same few, because they lie inside the subject; where a subject is a single token, each word before it makes
    another expression.
    """

    fact: np.ndarray
    """Number of the fact of each, int64 ``[P]``."""
    rows: np.ndarray
    """Rows that each uses, blocks after one another, int64 ``[P, K]``; -1 where a head is left alone."""


def read_wordings(tokenizer: Any, facts: Sequence[FactEdit], answers: Sequence[str] | None = None) -> list[Wording]:
    """Turn all wordings of facts into tokens, with their answers, or with others in their place."""
    found = []
    for number, fact in enumerate(facts):
        answer = fact.answer if answers is None else answers[number]
        for text, read in zip(fact.wordings, read_facts(tokenizer, [(w, answer) for w in fact.wordings]), strict=True):
            found.append(Wording(number, read.prompt_tokens, read.target_tokens, text))
    return found


def subject_span(tokenizer: Any, text: str, subject: str) -> tuple[np.ndarray, int, int]:
    """Tokenize a text as its model reads it, and find the tokens of a subject that stands in it for the last time.

    Returns:
        The tokens, int64 ``[L]``, the place of the subject's last token, and how many tokens lie inside it.

    Raises:
        ConfigError: The tokenizer does not say which letters a token stands for.
    """
    tokens = text_tokens(tokenizer, text)
    try:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except NotImplementedError as error:
        raise ConfigError(
            "the tokenizer does not say which letters its tokens stand for, so a subject cannot be found in a text; "
            "load the fast tokenizer (use_fast=True), or leave the subject of the facts empty"
        ) from error
    # Not inside a longer word, where the text has it outside of one; some languages put no spaces between words.
    name = subject.strip() or subject
    whole = [found.start() for found in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", text)]
    start = whole[-1] if whole else text.rindex(name)
    end = start + len(name)
    spans = encoding["offset_mapping"]
    last = max(place for place, (first, _) in enumerate(spans) if first < end)
    # A token may begin with the space before the subject.
    inside = sum(first < end and after > start and text[first:start].strip() == "" for first, after in spans)
    return tokens, last + len(tokens) - len(spans), inside


def find_expressions(
    memory: PatchableMemory,
    tokenizer: Any,
    facts: Sequence[FactEdit],
    *,
    num_contexts: int,
    reference: np.ndarray | None = None,
) -> Expressions:
    """Find the expressions of facts.

    Rows of the longest N-gram that lies inside the subject are used: every text that names the subject reads them, and
    other subjects that end in the same tokens read shorter ones. Where a subject is one token, it has none: there the
    N-grams of each wording are used, and of the lowest order those with other words before the subject, the
    ``num_contexts`` words that stand most often before such subjects and in the reference text.

    Raises:
        ConfigError: A fact reads no row: its positions are dead tokens of the hash's segments.
    """
    spec = memory.spec
    whole = spec.num_heads_total
    found: dict[tuple[int, tuple[int, ...]], None] = {}
    single: list[tuple[int, int]] = []
    before: Counter[int] = Counter()

    def note(number: int, tokens: np.ndarray, place: int, used: Sequence[int]) -> None:
        rows = _rows_at(memory, tokens, place)
        if rows is None:
            return
        orders = np.tile(np.repeat(spec.orders, spec.num_heads), len(spec.blocks))
        found.setdefault((number, tuple(np.where(np.isin(orders, used), rows, -1).tolist())))

    # A row that stands for a token alone would be read wherever the token occurs.
    shortest = next((order for order in spec.orders if order > 1), 1)
    for number, fact in enumerate(facts):
        if not fact.subject:
            for text in fact.wordings:
                tokens = text_tokens(tokenizer, text)
                note(number, tokens, len(tokens) - 1, spec.orders)
            continue
        spans = [subject_span(tokenizer, text, fact.subject) for text in fact.wordings]
        alone = [subject_span(tokenizer, text, fact.subject) for text in (fact.subject, f" {fact.subject.strip()}")]
        for tokens, place, inside in (*spans, *alone):
            if inside >= shortest:
                note(number, tokens, place, [max(order for order in spec.orders if order <= inside)])
        for tokens, place, inside in spans:
            if inside < shortest:
                note(number, tokens, place, spec.orders)
                before.update(tokens[max(place - 1, 0) : place].tolist())
                single.append((number, int(tokens[place])))
    if single and num_contexts:
        if reference is not None:
            before.update(reference[:_MANY_REFERENCE_TOKENS].tolist())
        for word, _ in before.most_common(num_contexts):
            for number, token in dict.fromkeys(single):
                note(number, np.array([word, token]), 1, [shortest])
    reached = {number for number, _ in found}
    if lost := [fact.prompt for number, fact in enumerate(facts) if number not in reached]:
        raise ConfigError(f"the fact {lost[0]!r:.200} reads no row: its tokens are dead tokens of the hash's segments")
    keys = sorted(found)
    rows = np.array([rows for _, rows in keys], dtype=np.int64).reshape(len(keys), whole * len(spec.blocks))
    return Expressions(np.array([number for number, _ in keys], dtype=np.int64), rows)


def _rows_at(memory: PatchableMemory, tokens: np.ndarray, place: int) -> np.ndarray | None:
    """Rows that all heads of all blocks read at a place, int64 ``[K]``; None where memory is silent there."""
    spec = memory.spec
    codes = spec.encode(tokens[None, : place + 1])
    if codes[0, -1] < 0:
        return None
    by_layer = spec.rows_for_layers(codes)
    return np.concatenate([by_layer[layer][0, -1] for layer in spec.layers])
