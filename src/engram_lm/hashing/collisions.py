"""Which N-grams of a text share a row: exact counts, by row and by column of the hash.

Two N-grams *collide* in a column (one order, one head) where they differ and read the same row. An N-gram is here what
the hash sees of it: canonical tokens, and the fill where a look-back is blocked.
"""

# Dimension key: B batch, L length, P positions that are text, C distinct N-grams, N rows, H heads of all orders.

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from engram_lm.errors import RowRangeError
from engram_lm.hashing.rows import numpy_sight
from engram_lm.hashing.spec import HashSpec

__all__ = ["ColumnCollisions", "RowCollisions", "ngram_ids", "row_collisions"]


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
    """Those of them whose row another one reads too."""


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
        """Sum up each column, in the order of the table. Meant for all rows: of some, only those are counted."""
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


def ngram_ids(
    spec: HashSpec, tokens: Any, *, attention_mask: Any = None, position_ids: Any = None
) -> dict[int, np.ndarray]:
    """Number the distinct N-grams of a text, for each order of a hash.

    Args:
        spec: The hash, with its token map.
        tokens: Raw token ids, integers ``[num_tokens]`` or ``[B, L]``; each of the B sequences starts anew.
        attention_mask: Of the same shape; 0 marks padding.
        position_ids: As for `HashSpec.encode`.

    Returns:
        Order to int64 numbers in the shape of ``tokens``: equal where the hash sees the same canonical tokens, from 0
        without a gap, and -1 where a position is no text and so reads nothing.

    Raises:
        TokenMapError: No token map is bound.
        TokenError: A token is outside the vocabulary.
        MismatchError: Mask or positions have another shape.

    Cost: one sort of the positions per distance, and some arrays of eight bytes per token.
    """
    tokens = np.asarray(tokens)
    codes = _encode(spec, tokens, attention_mask, position_ids)
    return {order: ids.reshape(tokens.shape) for order, (ids,) in _ids(spec, [codes]).items()}


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
        besides: Texts of tokens, integers ``[num_tokens]`` each, whose N-grams are not counted: what remains are
            the *other* N-grams.
        min_positions: Count only N-grams that the text has at least so often: collisions among frequent ones.
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
    others = [_encode(spec, np.asarray(text)[None], None, None) for text in besides]
    ids = _ids(spec, [codes, *others])
    text = codes >= 0
    rows_PH = spec.rows_for_layers(codes)[layer][text]
    found, ngrams, positions = [], [], []
    for column in range(spec.num_heads_total):
        ids_P, *ids_besides = ids[spec.orders[column // spec.num_heads]]
        ids_P = ids_P[text]
        # The N-gram decides the row of a column, so the first place of each stands for all of them.
        distinct, first, inverse, counts = np.unique(ids_P, return_index=True, return_inverse=True, return_counts=True)
        counted = counts >= min_positions
        for ids_other in ids_besides:
            counted &= ~np.isin(distinct, ids_other)
        row_C, row_P = rows_PH[first, column][counted], rows_PH[counted[inverse], column]
        hit, num_ngrams = np.unique(row_C, return_counts=True)
        found.append(hit)
        ngrams.append(num_ngrams)
        positions.append(np.unique(row_P, return_counts=True)[1])
    # Columns follow one another in the table, so what is found is ascending.
    hit, num_ngrams, num_positions = (np.concatenate(parts).astype(np.int64) for parts in (found, ngrams, positions))
    if rows is not None:
        wanted = np.asarray(rows, dtype=np.int64).reshape(-1)
        _check_rows(spec, layer, wanted)
        num_ngrams, num_positions = (_look_up(hit, counts, wanted) for counts in (num_ngrams, num_positions))
        hit = wanted
    columns = np.searchsorted(offsets, hit, side="right") - 1
    padding = hit >= sum(spec.primes[spec.layers.index(layer)])
    return RowCollisions(
        rows=hit,
        orders=np.where(padding, 0, np.array(spec.orders)[columns // spec.num_heads]),
        heads=np.where(padding, -1, columns % spec.num_heads),
        num_ngrams=num_ngrams,
        num_positions=num_positions,
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


def _ids(spec: HashSpec, texts: Sequence[np.ndarray]) -> dict[int, list[np.ndarray]]:
    """Number the N-grams of several texts of codes together: order to an array for each text."""
    alive = np.concatenate([codes.reshape(-1) for codes in texts]) >= 0
    seen = [numpy_sight(spec, np.pad(codes, ((0, 0), (spec.context, 0)), constant_values=-1)) for codes in texts]
    ends = np.cumsum([codes.size for codes in texts])[:-1]
    numbers = np.zeros(int(alive.sum()), np.int64)
    found = {}
    for distance in range(spec.orders[-1]):
        tokens = np.concatenate([sight[distance].reshape(-1) for sight in seen])[alive]
        # An N-gram is the shorter one and one token more. Numbers stay below the count of positions, so the pair fits
        # int64: 2**31 tokens times 2**32 positions.
        numbers = np.unique(numbers * spec.vocab_size + tokens, return_inverse=True)[1].reshape(-1)
        if distance + 1 in spec.orders:
            ids = np.full(len(alive), -1, np.int64)
            ids[alive] = numbers
            parts = np.split(ids, ends)
            found[distance + 1] = [part.reshape(codes.shape) for part, codes in zip(parts, texts, strict=True)]
    return found


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
