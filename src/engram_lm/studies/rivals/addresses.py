"""Other addresses for N-grams, computed from their row numbers: layers need no tokens for them.

The rows of an order's heads are the remainders of one number by different primes, so that together they tell N-grams
apart: 4 heads of 20,000 rows give 57 bits.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_lm.hashing.counting import frequent_ngrams, ngram_rows
from engram_lm.hashing.spec import HashSpec

# Dimension key: O orders, K heads of one.

_STEP, *_MULTIPLIERS = -7046029254386353131, -4658895280553007687, -7723592293110705685
"""The step of splitmix64 and the multipliers of its finalizer, odd 64-bit numbers as two's complement."""
_COUNTED_TOKENS, _PIECE_TOKENS = 1 << 24, 1 << 15
"""Tokens of a text that are counted at most, in pieces that lie evenly in it."""


def fingerprints(rows: Tensor, num_heads: int) -> Tensor:
    """Mix the rows of each order's heads, int64 ``[..., O * K]``, into one number, int64 ``[..., O]``."""
    mixed = torch.zeros_like(rows[..., ::num_heads])
    for head in range(num_heads):
        mixed = scattered(mixed + rows[..., head::num_heads], head)
    return mixed


def scattered(numbers: Tensor, salt: int) -> Tensor:
    """Map int64 numbers one to one to others that look random, another way for each salt.

    Source: the finalizer of splitmix64 (Steele, Lea and Flood, 2014).
    """
    step = (salt + 1) * _STEP
    mixed = numbers + ((step + (1 << 63)) % (1 << 64) - (1 << 63))
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        mixed = (mixed ^ _shifted(mixed, shift)) * multiplier
    return mixed ^ _shifted(mixed, 31)


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """Shift to the right, filling up with zeros: torch fills up with the sign."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)


def frequent_fingerprints(spec: HashSpec, tokens: Any, number: int) -> list[tuple[Tensor, Tensor]]:
    """Count the N-grams of a text, and find the most frequent of each order that occur twice or more.

    Args:
        spec: The hash of a model whose memory is read by one layer.
        tokens: Raw tokens ``[num_tokens]``; of a long text, pieces are counted that lie evenly in it.
        number: N-grams of each order at most.

    Returns:
        For each order the `fingerprints` of its N-grams, int64 ``[N]``, and how often they were counted, int64 ``[N]``.
    """
    if len(tokens) > _COUNTED_TOKENS:
        starts = np.linspace(0, len(tokens) - _PIECE_TOKENS, _COUNTED_TOKENS // _PIECE_TOKENS).astype(int)
        tokens = np.concatenate([tokens[start : start + _PIECE_TOKENS] for start in starts])
    result = []
    for found in frequent_ngrams(spec, np.asarray(tokens[:]), num_ngrams=max(1, number)).values():
        found = found.first(int((found.counts > 1).sum()))
        rows = torch.from_numpy(ngram_rows(spec, found, spec.layers[0]))
        result.append((fingerprints(rows, spec.num_heads)[:, 0], torch.from_numpy(found.counts)))
    return result
