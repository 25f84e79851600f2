"""Which rows a text reads: how full the tables are, how hot their hottest rows, and which N-grams share rows."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from engram_lm.analysis.protocol import ModelAnalysis, ModelFindings, PlainResult, Reading
from engram_lm.analysis.rows.collisions import NgramCollisions, TextNgrams, ngram_collisions
from engram_lm.analysis.subject import Subject
from engram_lm.errors import check_whole
from engram_lm.hashing import HashSpec
from engram_lm.hashing.counting import NgramCounter, NgramEntries, scattered

# Dimension key: N rows, P rows that are read at once, R ranks, G blocks with memory, O orders, K heads of one order,
# T tables.

# A row that is held takes its number and its count, three times over while two lists of them are merged.
_HELD_BYTES = 48
# Ranks count for the fit of the exponent if their row has this many hits: below that, hits go down in steps.
_LEAST_HITS = 5
_LEAST_RANKS = 5


@dataclasses.dataclass(frozen=True, eq=False)
class RowHits:
    """Rows that were read at least once, and how often."""

    rows: np.ndarray
    """Row numbers, ascending, int64 ``[N]``."""
    counts: np.ndarray
    """Number of times each was read, exact, int64 ``[N]``."""
    share: float = 1.0
    """Share of the table's rows that was counted: 1, or a power of one half."""

    @property
    def num_rows_hit(self) -> float:
        """Number of rows that were read; an estimate if only a share of the rows was counted."""
        return len(self.rows) / self.share

    def between(self, first: int, end: int) -> "RowHits":
        """Return those of one stretch of the table, from ``first`` to before ``end``."""
        low, high = np.searchsorted(self.rows, [first, end])
        return RowHits(self.rows[low:high], self.counts[low:high], self.share)

    @classmethod
    def joined(cls, parts: "Sequence[RowHits]") -> "RowHits":
        """Add up what several read from one table; the result has the smallest of their shares."""
        share = min(part.share for part in parts)
        entries = NgramEntries.joined([part._sampled(share) for part in parts])
        return cls(entries.keys.astype(np.int64), entries.counts, share)

    def _sampled(self, share: float) -> NgramEntries:
        keys = self.rows.astype(np.uint64)
        entries = NgramEntries(keys, {}, {"counts": self.counts})
        num_bits = round(-np.log2(share))
        return entries.chosen(scattered(keys) >> np.uint64(64 - num_bits) == 0) if num_bits else entries

    def at_ranks(self, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find how hot the rows of some ranks are, 1 for the row that is read most often, int64 ``[R]``.

        Returns how often the row of each rank is read, 0 beyond the last row that is, int64 ``[R]``; and the share of
        all reads that go to the rows up to that rank, NaN without any read, float64 ``[R]``.
        """
        if not len(self.counts):
            return np.zeros(len(ranks), np.int64), np.full(len(ranks), np.nan)
        hot = np.sort(self.counts)[::-1]
        places = np.maximum(np.rint(ranks * self.share).astype(np.int64), 1) - 1
        inside = np.minimum(places, len(hot) - 1)
        return np.where(places < len(hot), hot[inside], 0), np.cumsum(hot)[inside] / hot.sum()


class HitCounter:
    """Counts reads row by row.

    If all counts of a table fit into the budget, 8 bytes a row, they are one array. Of a larger table only the rows
    that were read are held, 16 bytes each and three times that while merging. If even those are too many, a random half
    of the rows is dropped, and so on; the counts of the rows that stay are still exact (see `NgramCounter`).
    """

    def __init__(self, num_rows: int, max_bytes: int) -> None:
        self._counts = np.zeros(num_rows, np.int64) if 8 * num_rows <= max_bytes else None
        self._sparse = NgramCounter(max(1, max_bytes // _HELD_BYTES))

    def add(self, rows: np.ndarray) -> None:
        """Count reads: row numbers within the table, repeats allowed, int64 ``[P]``."""
        if self._counts is not None:
            np.add.at(self._counts, rows, 1)
        else:
            self._sparse.add(rows.astype(np.uint64))

    def hits(self) -> RowHits:
        """Return what was counted so far."""
        if self._counts is not None:
            rows = np.flatnonzero(self._counts)
            return RowHits(rows, self._counts[rows])
        entries = self._sparse.entries()
        return RowHits(entries.keys.astype(np.int64), entries.counts, self._sparse.share)


def log_ranks(num_ranks: float, points: int = 64) -> np.ndarray:
    """Spread ranks evenly on a logarithmic axis, from 1 to the last, int64 ``[R]``, at most ``points`` of them."""
    last = max(1.0, float(num_ranks))
    return np.unique(np.rint(np.geomspace(1.0, last, points)).astype(np.int64))


def zipf_exponent(ranks: np.ndarray, hits: np.ndarray) -> float:
    """Fit s in hits ~ rank**-s, by least squares of logarithms over the ranks of `log_ranks`, int64 ``[R]``.

    ``hits`` are how often the row of each rank is read, int64 ``[R]``. Ranks with fewer than 5 reads do not count; NaN
    if fewer than 5 ranks do.
    """
    counted = hits >= _LEAST_HITS
    if counted.sum() < _LEAST_RANKS:
        return float("nan")
    return -float(np.polyfit(np.log(ranks[counted]), np.log(hits[counted]), 1)[0])


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
    """s in hits ~ rank**-s, fitted to `hits`; see `zipf_exponent`; float64 ``[T]``."""
    zipf_exponent_by_order: np.ndarray
    """The same for one order, float64 ``[T, O]``."""
    collisions: NgramCollisions | None
    """Collisions among the frequent N-grams. None if the tokens of the text were not given."""

    @property
    def occupancy(self) -> np.ndarray:
        """Share of each head's rows that was read, float64 ``[G, O, K]``."""
        return np.asarray(self.num_rows_hit / self.num_rows)

    @property
    def occupancy_by_block(self) -> np.ndarray:
        """Share of the rows of all heads that the block read, float64 ``[G]``."""
        return np.asarray(self.num_rows_hit.sum((1, 2)) / self.num_rows.sum((1, 2)))


class RowUse(ModelAnalysis):
    """Counts the rows that models with memory read. Feed it with `engram_lm.analysis.read_text`.

    Every living position counts, whether its values are finite or not: which rows are read depends on the tokens alone.

    Args:
        tokens: The tokens of the text as `read_text` gets them, integers ``[num_tokens]``, or a `TextNgrams` of them.
            They are needed only for the collisions, which belong to the whole text and not to single windows.
        min_count: The least number of positions at which a frequent N-gram occurs.
        max_ngrams: N-grams of each order to compare, at most; the most frequent ones are taken.
        max_bytes: Budget of all counts together, in equal parts for each block of each model; see `HitCounter`.

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

    def why_not(self, subject: Subject) -> str | None:
        """Apply to the models with memory."""
        return None if subject.memories else "it has no memory"

    def sums_for(self, subject: Subject, applied: Sequence[Subject]) -> "_Counts":
        """Return counts of zero, with an equal part of the budget for each block of each model."""
        return _Counts(subject, self.max_bytes // sum(len(one.memories) for one in applied))

    def scratch_bytes_per_token(self, subjects: Sequence[Subject]) -> int:
        """Return what counting the rows of one position and block takes."""
        return max((32 * subject.spec.num_heads_total for subject in subjects if subject.spec), default=0)

    def result(self) -> ModelFindings[RowUsage]:
        """Return what was counted, and the text's N-grams, a `TextNgrams`."""
        models = {name: counts.usage(self._collisions(counts.spec)) for name, counts in self.sums.items()}
        return ModelFindings(models, self.left_out, self.ngrams)

    def _collisions(self, spec: HashSpec) -> NgramCollisions | None:
        if self.ngrams is None:
            return None
        return ngram_collisions(spec, self.ngrams.frequent(spec), min_count=self.min_count)


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
            rows = reading.rows.get(block)
            if rows is None:
                # The model was given memory vectors; the rows behind them follow from the tokens.
                rows = self.spec.rows_for_layers(reading.codes)[self.layers[block]]
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
        by_column = [
            [hits[block].between(first, end).num_rows_hit for first, end in itertools.pairwise(starts[block])]
            for block in self.blocks
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
            num_rows_hit=np.array(by_column).reshape(-1, *grid),
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
