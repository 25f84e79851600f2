"""N-grams of a text as people read them, each with its mean gates: what a page looks typed words up in."""

import dataclasses
from typing import Any

import numpy as np

from engram_lm.analysis.gates.ngram_table import NgramEntries

__all__ = ["Phrase", "frequent_phrases"]

# Dimension key: N N-grams, G blocks with memory, S streams.

_REPLACEMENT = "\ufffd"


@dataclasses.dataclass(frozen=True, eq=False)
class Phrase:
    """An N-gram that opened, or did not open, the gates of a text."""

    text: str
    """What it spells, where it first occurs."""
    last: str
    """What its last token spells: the gate is that token's."""
    order: int
    """Tokens in it."""
    count: int
    """Positions of the text at which it was looked up."""
    fired: np.ndarray
    """Positions at which it added most to the gate's score, by block, int64 ``[G]``."""
    gates: np.ndarray
    """Mean gate over those, NaN where there are none, float64 ``[G, S]``."""


def frequent_phrases(
    entries: NgramEntries, tokenizer: Any, *, num_frequent: int = 1000, num_open: int = 500, min_count: int = 2
) -> tuple[Phrase, ...]:
    """Choose the N-grams of a text that fired most often, and those that opened the gates widest.

    N-grams that spell nothing by themselves (space alone, pieces of a character) are left out.

    Args:
        entries: Of `engram_lm.analysis.gates.averages.GateStatistics.entries`.
        tokenizer: The model's.
        num_frequent: How many of the most frequent ones to take.
        num_open: How many of those with the highest mean gate over blocks and streams to add.
        min_count: Positions at which one of those fired at least.

    Returns:
        The chosen, the one that fired most often first.
    """
    fired = entries.fired.sum(1)
    means = entries.gate_sums.sum((1, 2)) / np.maximum(fired * entries.gate_sums.shape[2], 1)
    frequent = np.lexsort([entries.keys, -fired])[:num_frequent]
    candidates = np.flatnonzero(fired >= min_count)
    wide = candidates[np.lexsort([entries.keys[candidates], -means[candidates]])][:num_open]
    chosen = np.union1d(frequent, wide)
    chosen = chosen[fired[chosen] > 0]
    chosen = chosen[np.lexsort([entries.keys[chosen], -fired[chosen]])]
    phrases = (_phrase(entries, place, tokenizer) for place in chosen.tolist())
    return tuple(phrase for phrase in phrases if phrase is not None)


def _phrase(entries: NgramEntries, place: int, tokenizer: Any) -> Phrase | None:
    tokens = [token for token in entries.tokens[place].tolist() if token >= 0]

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    text = decode(tokens)
    last = text[len(decode(tokens[:-1])) :] if len(tokens) > 1 else text
    if _REPLACEMENT in text or not last.strip():
        return None
    fired = entries.fired[place]
    gates = np.full(entries.gate_sums[place].shape, np.nan)
    known = fired > 0
    gates[known] = entries.gate_sums[place][known] / fired[known, None]
    return Phrase(text, last, int(entries.orders[place]), int(entries.counts[place]), fired, gates)
