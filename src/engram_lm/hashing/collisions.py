"""Which N-grams of a text share a row: exact counts, by row and by column of the hash.

Two N-grams *collide* in a column (one order, one head) if they differ and read the same row. What an N-gram is, and
what tells two of them apart, is said in `engram_lm.hashing.counting`.
"""

# Dimension key: B batch, L length, P positions that are text, N rows, H heads of all orders.

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from engram_lm.errors import RowRangeError
from engram_lm.hashing.counting import ngram_keys, ngrams_of
from engram_lm.hashing.spec import HashSpec

__all__ = ["ColumnCollisions", "RowCollisions", "row_collisions"]


@dataclasses.dataclass(frozen=True)
class ColumnCollisions:
    """How crowded one column of a layer's table is."""

    order: int
    """Tokens in its N-grams."""
    head: int
    """Which hash head of that order, from 0."""
    num_rows: int
    """Rows that the column has."""
    num_rows_hit: int
    """Rows that at least one N-gram reads."""
    num_ngrams: int
    """Distinct N-grams."""
    num_colliding_ngrams: int
    """Those of them whose row another N-gram reads too."""


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
    """Distinct N-grams that read it."""
    num_positions: np.ndarray
    """Positions of the text that read it."""
    spec: HashSpec
    """The hash."""
    layer: int
    """The layer's published id."""

    def columns(self) -> tuple[ColumnCollisions, ...]:
        """Sum up each column, in the order of the table. Only the rows held here count, so count all rows for this."""
        found = []
        for column, num_rows in enumerate(self.spec.primes[self.spec.layers.index(self.layer)]):
            order, head = self.spec.orders[column // self.spec.num_heads], column % self.spec.num_heads
            counts = self.num_ngrams[(self.orders == order) & (self.heads == head)]
            found.append(
                ColumnCollisions(
                    order=order,
                    head=head,
                    num_rows=num_rows,
                    num_rows_hit=int((counts > 0).sum()),
                    num_ngrams=int(counts.sum()),
                    num_colliding_ngrams=int(counts[counts > 1].sum()),
                )
            )
        return tuple(found)


def row_collisions(
    spec: HashSpec,
    layer: int,
    tokens: Any,
    rows: Any = None,
    *,
    besides: Iterable[Any] = (),
    min_positions: int = 1,
    attention_mask: Any = None,
    position_ids: Any = None,
) -> RowCollisions:
    """Count, for each row of a layer, the distinct N-grams and the positions of a text that read it.

    Args:
        spec: The hash, with its token map.
        layer: The layer's published id.
        tokens: The text, integers ``[num_tokens]`` or ``[B, L]``; each of the B sequences starts anew.
        rows: The rows to count for, integers ``[N]`` in any order; all rows that the text reads, ascending, where None.
        besides: Texts of tokens, integers ``[num_tokens]`` each, whose N-grams are not counted, so that only the
            *other* N-grams remain.
        min_positions: Count only N-grams that occur at this many positions of the text or more, to find the collisions
            among frequent ones.
        attention_mask: Of the shape of ``tokens``; 0 marks padding.
        position_ids: As for `HashSpec.encode`.

    Returns:
        The counts, an entry for each of the rows.

    Raises:
        ConfigError: The layer has no memory.
        RowRangeError: A row is outside the layer's table.
        TokenMapError: No token map is bound.
        TokenError: A token is outside the vocabulary.
    """
    offsets = np.array(spec.offsets(layer))
    codes = _encode(spec, np.asarray(tokens), attention_mask, position_ids)
    text = codes >= 0
    rows_PH, ngrams = spec.rows_for_layers(codes)[layer][text], ngrams_of(spec, codes)[text]
    others = [_encode(spec, np.asarray(text)[None], None, None) for text in besides]
    left_out = [ngrams_of(spec, other)[other >= 0] for other in others]
    hit, num_ngrams, num_positions = [], [], []
    for place, order in enumerate(spec.orders):
        keys_P = ngram_keys(ngrams[:, -order:], spec.vocab_size)
        distinct, first, inverse, counts = np.unique(keys_P, return_index=True, return_inverse=True, return_counts=True)
        counted = counts >= min_positions
        for other in left_out:
            counted &= ~np.isin(distinct, ngram_keys(other[:, -order:], spec.vocab_size))
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
        _check_rows(spec, layer, wanted)
        counts_N = [_look_up(hit_N, counts, wanted) for counts in counts_N]
        hit_N = wanted
    columns = np.searchsorted(offsets, hit_N, side="right") - 1
    padding = hit_N >= sum(spec.primes[spec.layers.index(layer)])
    return RowCollisions(
        rows=hit_N,
        orders=np.where(padding, 0, np.array(spec.orders)[columns // spec.num_heads]),
        heads=np.where(padding, -1, columns % spec.num_heads),
        num_ngrams=counts_N[0],
        num_positions=counts_N[1],
        spec=spec,
        layer=layer,
    )


def _encode(spec: HashSpec, tokens: np.ndarray, attention_mask: Any, position_ids: Any) -> np.ndarray:
    """Return codes, int64 ``[B, L]``; a text without a batch becomes a batch of one."""
    if tokens.ndim == 1:
        tokens = tokens[None]
        attention_mask, position_ids = (
            None if value is None else np.asarray(value)[None] for value in (attention_mask, position_ids)
        )
    codes: np.ndarray = spec.encode(tokens, attention_mask, position_ids)
    return codes


def _look_up(known: np.ndarray, counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the counts of wanted rows, 0 where a row is not known; ``known`` is ascending."""
    if not len(known):
        return np.zeros(len(wanted), np.int64)
    places = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where(known[places] == wanted, counts[places], 0)


def _check_rows(spec: HashSpec, layer: int, rows: np.ndarray) -> None:
    outside = rows[(rows < 0) | (rows >= spec.num_rows(layer))]
    if len(outside):
        raise RowRangeError(
            f"row {outside[0]} is outside the table of layer {layer}, which has rows 0 to {spec.num_rows(layer) - 1}; "
            "the rows are probably of another HashSpec"
        )
