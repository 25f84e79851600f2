"""Which N-grams of a text share a row: exact counts for the rows of a layer.

Two N-grams *collide* in a column (one order, one head) if they differ and read the same row.
"""

# Dimension key: B batch, L length, P positions that are text, N rows, H heads of all orders.

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from engram_lm.errors import RowRangeError
from engram_lm.hashing.counting import ngram_keys, ngrams_of
from engram_lm.hashing.spec import HashSpec


@dataclasses.dataclass(frozen=True, eq=False)
class RowCollisions:
    """How many N-grams of a text read each row of one layer. All arrays are int64 ``[N]``, an entry for each row."""

    rows: np.ndarray
    """Row numbers, offsets included."""
    orders: np.ndarray
    """Order of the N-grams that can read the row; 0 for rows that are padding."""
    heads: np.ndarray
    """Hash head of that order, from 0; -1 for padding."""
    num_ngrams: np.ndarray
    """Number of distinct N-grams that read it."""
    num_positions: np.ndarray
    """Number of positions of the text that read it."""


def row_collisions(
    spec: HashSpec, layer: int, tokens: Any, rows: Any = None, *, besides: Iterable[Any] = ()
) -> RowCollisions:
    """Count, for each row of a layer, the distinct N-grams and the positions of a text that read it.

    The text is raw tokens ``[num_tokens]``, or ``[B, L]``, where each of the B sequences starts anew. The counts are
    for the given ``rows``, integers ``[N]`` in any order, or for all rows that the text reads, ascending. N-grams of
    the texts in ``besides`` are not counted, so that only the *other* N-grams remain.

    Raises:
        ConfigError: The layer has no memory.
        RowRangeError: A row is outside the layer's table.
        TokenError: A token is outside the vocabulary.
    """
    offsets = np.array(spec.offsets(layer))
    codes = spec.encode(np.atleast_2d(np.asarray(tokens)))
    text = codes >= 0
    rows_PH, ngrams = spec.rows_for_layers(codes)[layer][text], ngrams_of(spec, codes)[text]
    others = [spec.encode(np.asarray(text)[None]) for text in besides]
    left_out = [ngrams_of(spec, other)[other >= 0] for other in others]
    hit, num_ngrams, num_positions = [], [], []
    for place, order in enumerate(spec.orders):
        keys_P = ngram_keys(ngrams[:, -order:], spec.num_canonical)
        distinct, first, inverse = np.unique(keys_P, return_index=True, return_inverse=True)
        counted = np.ones(len(distinct), bool)
        for other in left_out:
            counted &= ~np.isin(distinct, ngram_keys(other[:, -order:], spec.num_canonical))
        for column in range(place * spec.num_heads, (place + 1) * spec.num_heads):
            # The N-gram decides the row of a column, so the first place of each stands for all of them.
            found, readers = np.unique(rows_PH[first, column][counted], return_counts=True)
            hit.append(found)
            num_ngrams.append(readers)
            num_positions.append(np.unique(rows_PH[counted[inverse], column], return_counts=True)[1])
    # Columns follow one another in the table, so the rows that were found ascend.
    hit_N, *counts_N = (np.concatenate(parts).astype(np.int64) for parts in (hit, num_ngrams, num_positions))
    if rows is not None:
        wanted = np.asarray(rows, dtype=np.int64).reshape(-1)
        outside = wanted[(wanted < 0) | (wanted >= spec.num_rows(layer))]
        if len(outside):
            raise RowRangeError(
                f"row {outside[0]} is outside the table of layer {layer}, which has rows 0 to "
                f"{spec.num_rows(layer) - 1}; the rows are probably of another HashSpec"
            )
        # A last entry answers for rows that nothing reads.
        places = np.searchsorted(hit_N, wanted)
        known = np.append(hit_N, -1)[places] == wanted
        counts_N = [np.where(known, np.append(counts, 0)[places], 0) for counts in counts_N]
        hit_N = wanted
    columns = np.searchsorted(offsets, hit_N, side="right") - 1
    padding = hit_N >= sum(spec.primes[spec.layers.index(layer)])
    orders = np.where(padding, 0, np.array(spec.orders)[columns // spec.num_heads])
    return RowCollisions(hit_N, orders, np.where(padding, -1, columns % spec.num_heads), *counts_N)
