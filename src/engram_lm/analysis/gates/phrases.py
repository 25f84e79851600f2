"""N-grams of a text as people read them, each with its mean gates: what a page looks typed words up in."""

import dataclasses
from typing import Any

import numpy as np

from engram_lm.analysis.token_text import REPLACEMENT, spelled
from engram_lm.hashing.counting import NgramEntries

__all__ = ["Phrase", "frequent_phrases"]

# Dimension key: N N-grams, G blocks with memory, S streams.


@dataclasses.dataclass(frozen=True, eq=False)
class Phrase:
    """An N-gram of a text and how far it opened the gates."""

    text: str
    """What it spells where it first occurs."""
    last: str
    """What its last token spells; the gate belongs to that token."""
    order: int
    """Tokens in it."""
    count: int
    """Positions of the text at which it was looked up."""
    fired: np.ndarray
    """For each block the positions at which it added most to the gate's score, int64 ``[G]``."""
    gates: np.ndarray
    """Mean gate over those positions, NaN if there are none, float64 ``[G, S]``."""


def frequent_phrases(
    entries: NgramEntries, tokenizer: Any, *, num_frequent: int = 1000, num_open: int = 500, min_count: int = 2
) -> tuple[Phrase, ...]:
    """Choose the N-grams of a text that fired most often, and those that opened the gates widest.

    N-grams that spell nothing by themselves (only space, or pieces of a character) are left out.

    Args:
        entries: From `engram_lm.analysis.gates.averages.GateFindings.ngrams`.
        tokenizer: The model's tokenizer.
        num_frequent: How many of the most frequent ones to take.
        num_open: How many of those with the highest mean gate over blocks and streams to add.
        min_count: The least number of positions at which one of those fired.

    Returns:
        The chosen ones, the one that fired most often first.
    """
    if not len(entries):
        return ()
    gate_sums, fired = entries.sums["gate_sums"], entries.sums["fired"].sum(1)
    means = gate_sums.sum((1, 2)) / np.maximum(fired * gate_sums.shape[2], 1)
    frequent = np.lexsort([entries.keys, -fired])[:num_frequent]
    candidates = np.flatnonzero(fired >= min_count)
    wide = candidates[np.lexsort([entries.keys[candidates], -means[candidates]])][:num_open]
    chosen = np.union1d(frequent, wide)
    chosen = chosen[fired[chosen] > 0]
    chosen = chosen[np.lexsort([entries.keys[chosen], -fired[chosen]])]
    phrases = (_phrase(entries, place, tokenizer) for place in chosen.tolist())
    return tuple(phrase for phrase in phrases if phrase is not None)


def _phrase(entries: NgramEntries, place: int, tokenizer: Any) -> Phrase | None:
    tokens = [token for token in entries.first["tokens"][place].tolist() if token >= 0]
    text = spelled(tokenizer, tokens)
    last = text[len(spelled(tokenizer, tokens[:-1])) :] if len(tokens) > 1 else text
    if REPLACEMENT in text or not last.strip():
        return None
    fired, sums = entries.sums["fired"][place], entries.sums["gate_sums"][place]
    gates = np.divide(sums, fired[:, None], out=np.full(sums.shape, np.nan), where=fired[:, None] > 0)
    return Phrase(text, last, int(entries.first["orders"][place]), int(entries.counts[place]), fired, gates)
