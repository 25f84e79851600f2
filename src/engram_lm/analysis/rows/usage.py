"""Which rows a text reads: how full the tables are, how hot their hottest rows, and which N-grams share rows."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from engram_lm.analysis.plain_values import PlainResult, plain
from engram_lm.analysis.protocol import Analysis, Reading, applicable
from engram_lm.analysis.rows.collisions import NgramCollisions, ngram_collisions
from engram_lm.analysis.rows.hits import HitCounter, RowHits, log_ranks, zipf_exponent
from engram_lm.analysis.rows.text_ngrams import TextNgrams
from engram_lm.analysis.subject import Subject
from engram_lm.errors import TokenError, check_whole
from engram_lm.hashing import HashSpec

__all__ = ["RowFindings", "RowUsage", "RowUse"]

# Dimension key: G blocks with memory, O orders, K heads of one order, T tables, R ranks.


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class RowUsage(PlainResult):
    """The rows that one model read in a text. What has no value is NaN (None in `to_dict`)."""

    also = ("occupancy", "occupancy_by_block")

    blocks: tuple[int, ...]
    """Blocks that read memory, counted from 0: axis G."""
    orders: tuple[int, ...]
    """N-gram orders: axis O."""
    num_heads: int
    """Hash heads per order: axis K."""
    tables: tuple[tuple[int, ...], ...]
    """Blocks that read each table, axis T: one block each, or all of them if they share one table."""
    num_positions: int
    """Positions at which rows were read."""
    num_dead: int
    """Positions left out because no N-gram ends there."""
    row_share: float
    """Share of the rows that was counted: 1, or less if not all rows that were read could be held. Numbers of rows,
    ranks and `covered` are then estimates from that share."""
    num_rows: np.ndarray
    """Rows of each head, int64 ``[G, O, K]``."""
    num_rows_hit: np.ndarray
    """Rows of each head that the block read at least once, float64 ``[G, O, K]``."""
    num_table_rows: np.ndarray
    """Rows of each table, without padding, int64 ``[T]``."""
    num_table_rows_hit: np.ndarray
    """Rows of each table that any of its blocks read, float64 ``[T]``."""
    ranks: np.ndarray
    """Ranks of rows, 1 for the one that is read most often, spread evenly on a logarithmic axis, int64 ``[R]``."""
    hits: np.ndarray
    """How often the row of each rank is read, over all heads of a table, int64 ``[T, R]``."""
    hits_by_order: np.ndarray
    """The same among the rows of one order, int64 ``[T, O, R]``."""
    covered: np.ndarray
    """Share of all reads that go to the rows up to a rank, float64 ``[T, R]``: what a cache with that number of rows
    would answer at best."""
    zipf_exponent: np.ndarray
    """s in hits ~ rank**-s, fitted to `hits`; see `engram_lm.analysis.rows.hits.zipf_exponent`; float64 ``[T]``."""
    zipf_exponent_by_order: np.ndarray
    """The same for one order, float64 ``[T, O]``."""
    collisions: NgramCollisions | None
    """Collisions among the frequent N-grams. None if the tokens of the text were not given, or some of them are ids
    that no tokenizer produces."""

    @property
    def occupancy(self) -> np.ndarray:
        """Share of each head's rows that was read, float64 ``[G, O, K]``."""
        occupancy: np.ndarray = self.num_rows_hit / self.num_rows
        return occupancy

    @property
    def occupancy_by_block(self) -> np.ndarray:
        """Share of the rows of all heads that the block read, float64 ``[G]``."""
        occupancy: np.ndarray = self.num_rows_hit.sum((1, 2)) / self.num_rows.sum((1, 2))
        return occupancy


@dataclasses.dataclass(frozen=True, eq=False)
class RowFindings:
    """The rows that several models read in one text."""

    models: Mapping[str, RowUsage]
    """The usage of each model, by its name."""
    left_out: Mapping[str, str]
    """Models that read no rows, and why."""
    ngrams: TextNgrams | None
    """The text's N-grams, for more questions about them; not among the plain values."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"models": plain(self.models), "left_out": plain(self.left_out)}


class RowUse(Analysis):
    """Counts the rows that models with memory read. Feed it with `engram_lm.analysis.read_text`.

    Every living position counts, whether its values are finite or not: which rows are read depends on the tokens alone.

    Args:
        tokens: The tokens of the text as `read_text` gets them, integers ``[num_tokens]``, or a `TextNgrams` of them.
            They are needed only for the collisions, which belong to the whole text and not to single windows.
        min_count: The least number of positions at which a frequent N-gram occurs.
        max_ngrams: N-grams of each order to compare, at most; the most frequent ones are taken.
        max_bytes: Budget of all counts together, in equal parts for each block of each model; see
            `engram_lm.analysis.rows.hits.HitCounter`.

    Raises:
        ConfigError: A number is below 1.
    """

    wants: frozenset[str] = frozenset()

    def __init__(
        self, tokens: Any = None, *, min_count: int = 2, max_ngrams: int = 1 << 16, max_bytes: int = 1 << 28
    ) -> None:
        check_whole(min_count=min_count, max_ngrams=max_ngrams, max_bytes=max_bytes)
        self.min_count, self.max_bytes = min_count, max_bytes
        known = tokens is None or isinstance(tokens, TextNgrams)
        self.ngrams = tokens if known else TextNgrams(tokens, max_ngrams=max_ngrams)
        self._counts: dict[str, _Counts] = {}
        self._left_out: dict[str, str] = {}

    def start(self, subjects: Sequence[Subject]) -> str | None:
        """Apply to the models with memory."""
        readers = [subject for subject in subjects if subject.memories]
        num_counters = sum(len(subject.memories) for subject in readers)
        self._counts = {subject.name: _Counts(subject, self.max_bytes // num_counters) for subject in readers}
        self._left_out = {subject.name: "it has no memory" for subject in subjects if not subject.memories}
        return applicable(self._left_out, subjects)

    def scratch_bytes_per_token(self, subjects: Sequence[Subject]) -> int:
        """Return what counting the rows of one position and block takes."""
        return max((32 * subject.spec.num_heads_total for subject in subjects if subject.spec), default=0)

    def update(self, readings: Sequence[Reading]) -> None:
        """Count the rows of some windows."""
        for reading in readings:
            if reading.subject.name in self._counts:
                self._counts[reading.subject.name].add(reading)

    def result(self) -> RowFindings:
        """Return what was counted."""
        models = {name: counts.usage(self._collisions(counts.spec)) for name, counts in self._counts.items()}
        return RowFindings(models, dict(self._left_out), self.ngrams)

    def _collisions(self, spec: HashSpec) -> NgramCollisions | None:
        if self.ngrams is None:
            return None
        try:
            return ngram_collisions(spec, self.ngrams.frequent(spec), min_count=self.min_count)
        except TokenError:
            # An attached memory treats ids that no tokenizer produces as dead; they belong to no N-gram.
            return None


class _Counts:
    """What is counted for one model."""

    def __init__(self, subject: Subject, max_bytes: int) -> None:
        assert subject.spec is not None
        self.spec, self.blocks = subject.spec, tuple(subject.memories)
        self.layers = {block: self.spec.layers[self.spec.blocks.index(block)] for block in self.blocks}
        self.counters = {block: HitCounter(self.spec.num_rows(self.layers[block]), max_bytes) for block in self.blocks}
        self.num_positions = self.num_dead = 0
        self.tables = (self.blocks,) if self.spec.shared_table else tuple((block,) for block in self.blocks)

    def add(self, reading: Reading) -> None:
        self.num_positions += int(reading.active.sum())
        self.num_dead += int((~reading.active).sum())
        for block in self.blocks:
            rows = _rows(reading, self.spec, block, self.layers[block])
            self.counters[block].add(rows[reading.active.to(rows.device)].flatten().cpu().numpy())

    def usage(self, collisions: NgramCollisions | None) -> RowUsage:
        spec, grid = self.spec, (len(self.spec.orders), self.spec.num_heads)
        primes = {block: spec.primes[spec.blocks.index(block)] for block in self.blocks}
        starts = {block: (*spec.offsets(self.layers[block]), sum(primes[block])) for block in self.blocks}
        hits = {block: counter.hits() for block, counter in self.counters.items()}
        of_table = [RowHits.joined([hits[block] for block in table]) for table in self.tables]
        of_order = [
            [
                rows.between(starts[table[0]][first], starts[table[0]][first + spec.num_heads])
                for first in range(0, spec.num_heads_total, spec.num_heads)
            ]
            for table, rows in zip(self.tables, of_table, strict=True)
        ]
        ranks = log_ranks(max(rows.num_rows_hit for rows in of_table))
        curves = [rows.at_ranks(ranks) for rows in of_table]
        by_order = np.array([[rows.at_ranks(ranks)[0] for rows in orders] for orders in of_order])
        return RowUsage(
            blocks=self.blocks,
            orders=spec.orders,
            num_heads=spec.num_heads,
            tables=self.tables,
            num_positions=self.num_positions,
            num_dead=self.num_dead,
            row_share=min(rows.share for rows in of_table),
            num_rows=np.array([primes[block] for block in self.blocks]).reshape(-1, *grid),
            num_rows_hit=np.array([_by_column(hits[block], starts[block]) for block in self.blocks]).reshape(-1, *grid),
            num_table_rows=np.array([sum(primes[table[0]]) for table in self.tables]),
            num_table_rows_hit=np.array([rows.num_rows_hit for rows in of_table]),
            ranks=ranks,
            hits=np.array([hits for hits, _ in curves]),
            hits_by_order=by_order,
            covered=np.array([covered for _, covered in curves]),
            zipf_exponent=np.array([zipf_exponent(ranks, hits) for hits, _ in curves]),
            zipf_exponent_by_order=np.array([[zipf_exponent(ranks, hits) for hits in orders] for orders in by_order]),
            collisions=collisions,
        )


def _rows(reading: Reading, spec: HashSpec, block: int, layer: int) -> Tensor:
    """Rows that a block read, int64 [B, L, H]."""
    if block in reading.rows:
        return reading.rows[block]
    # The model was handed memory vectors; the rows behind them follow from the tokens.
    rows: Tensor = spec.rows_for_layers(reading.codes)[layer]
    return rows


def _by_column(hits: RowHits, starts: Sequence[int]) -> list[float]:
    return [hits.between(first, end).num_rows_hit for first, end in itertools.pairwise(starts)]
