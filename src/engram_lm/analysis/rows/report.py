"""What a report says of rows beside how often they are read: compression and heads, neighbours of frequent N-grams."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from engram_lm.analysis.rows.collisions import CollisionStudy, collision_study
from engram_lm.analysis.rows.neighbours import Neighbours, nearest_ngrams
from engram_lm.analysis.subject import Subject
from engram_lm.errors import ConfigError
from engram_lm.hashing.counting import FrequentNgrams, frequent_ngrams

__all__ = ["compression_and_heads", "neighbours_of_frequent"]

_HEADS = (1, 2, 4, 8)
_NUM_COMPARED = 1 << 14
"""Frequent N-grams of each order among which neighbours are looked for."""


def compression_and_heads(subject: Subject, tokens: np.ndarray) -> CollisionStudy:
    """Measure what token compression and other numbers of heads would do to collisions, with the model's rows.

    Args:
        subject: A model with memory.
        tokens: The text, integers ``[num_tokens]``.
    """
    spec = subject.spec
    assert spec is not None
    rows = sum(spec.primes[0][: spec.num_heads])
    fitting = tuple(heads for heads in _HEADS if rows >= 2 * heads)
    return collision_study(subject.tokenizer, tokens, rows_per_order=rows, orders=spec.orders, heads=fitting)


def neighbours_of_frequent(
    subject: Subject, tokens: np.ndarray, *, num_ngrams: int = 2, k: int = 6
) -> list[Neighbours]:
    """Find what lies nearest to the most frequent N-grams of each order that hold a letter, in every block's memory.

    Args:
        subject: A model with memory.
        tokens: The text, integers ``[num_tokens]``.
        num_ngrams: N-grams of each order.
        k: Neighbours of each.

    Raises:
        MismatchError: The tables are not at hand.
    """
    spec = subject.spec
    assert spec is not None
    counted = frequent_ngrams(spec, tokens, num_ngrams=_NUM_COMPARED)
    found = []
    for order in spec.orders:
        for ngram in _with_letters(subject.tokenizer, counted[order], num_ngrams):
            for block in subject.memories:
                # A row that was never written has no direction.
                with contextlib.suppress(ConfigError):
                    found.append(nearest_ngrams(subject, ngram, counted, block=block, k=k, min_count=2, num_promoted=4))
    return found


def _with_letters(tokenizer: Any, ngrams: FrequentNgrams, number: int) -> Iterator[list[int]]:
    for tokens in ngrams.tokens.tolist():
        if number and min(tokens) >= 0 and any(map(str.isalpha, tokenizer.decode(tokens[-1:]))):
            number -= 1
            yield tokens
