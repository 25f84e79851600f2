"""How often each row of a table is read, counted as a text goes by, in bounded memory."""

import dataclasses
from collections.abc import Sequence

import numpy as np

__all__ = ["HitCounter", "RowHits", "log_ranks", "zipf_exponent"]

# Dimension key: N rows, P rows that are read in one go, R ranks.

# A row that is held apart takes its number and its count, three times over while two lists of them are merged.
_HELD_BYTES = 48
_MERGE_AT = 1 << 16
# The golden ratio as a fraction of 2**64: its multiples spread evenly.
_SCATTER = np.uint64(0x9E3779B97F4A7C15)
# A rank counts for the fit of the exponent where its row has so many hits: below, hits go down in steps.
_LEAST_HITS = 5
_LEAST_RANKS = 5


@dataclasses.dataclass(frozen=True, eq=False)
class RowHits:
    """Rows that were read at least once, and how often."""

    rows: np.ndarray
    """Row numbers, ascending, int64 ``[N]``."""
    counts: np.ndarray
    """Times each was read, exact, int64 ``[N]``."""
    share: float = 1.0
    """Share of the table's rows that was looked at: 1, or a power of one half."""

    @property
    def num_rows_hit(self) -> float:
        """Rows that were read; an estimate where only a share of them was looked at."""
        return len(self.rows) / self.share

    def between(self, first: int, end: int) -> "RowHits":
        """Those of one stretch of the table, from ``first`` to before ``end``."""
        low, high = np.searchsorted(self.rows, [first, end])
        return RowHits(self.rows[low:high], self.counts[low:high], self.share)

    @classmethod
    def joined(cls, parts: "Sequence[RowHits]") -> "RowHits":
        """Add up what several read from one table; of different shares the smallest is left."""
        share = min(part.share for part in parts)
        parts = [_sampled(part, share) for part in parts]
        return _merged(parts, share)

    def at_ranks(self, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find how hot the hottest rows are.

        Args:
            ranks: Ranks, from 1 for the row that is read most often, int64 ``[R]``.

        Returns:
            Times that the row of each rank is read, 0 beyond the last row that is, int64 ``[R]``; and the share of all
            reads that go to the rows up to that rank, NaN without any read, float64 ``[R]``.
        """
        if not len(self.counts):
            return np.zeros(len(ranks), np.int64), np.full(len(ranks), np.nan)
        hot = np.sort(self.counts)[::-1]
        places = np.maximum(np.rint(ranks * self.share).astype(np.int64), 1) - 1
        inside = np.minimum(places, len(hot) - 1)
        return np.where(places < len(hot), hot[inside], 0), np.cumsum(hot)[inside] / hot.sum()


class HitCounter:
    """Counts reads row by row.

    A table whose counts, 8 bytes a row, fit into the budget has all of them in one array. Of a larger one only the rows
    that were read are held, 16 bytes each and three times that while merging. Where even those are too many, a random
    half of the rows is let go, and so on: the counts of the rows that stay are exact all the same.

    Args:
        num_rows: Rows of the table.
        max_bytes: The budget.

    Source: distinct sampling, Gibbons, “Distinct Sampling for Highly-Accurate Answers to Distinct Values Queries and
    Event Reports”, VLDB 2001.
    """

    def __init__(self, num_rows: int, max_bytes: int) -> None:
        self._counts = np.zeros(num_rows, np.int64) if 8 * num_rows <= max_bytes else None
        self._max_rows = max(1, max_bytes // _HELD_BYTES)
        self._held = _NOTHING
        self._waiting: list[RowHits] = []

    def add(self, rows: np.ndarray) -> None:
        """Count reads: row numbers within the table, repeats allowed, int64 ``[P]``."""
        if self._counts is not None:
            np.add.at(self._counts, rows, 1)
            return
        distinct, counts = np.unique(rows, return_counts=True)
        self._waiting.append(_sampled(RowHits(distinct, counts.astype(np.int64)), self._held.share))
        # Merged when they have become as many as those held: each row is then sorted a few times only.
        if sum(len(part.rows) for part in self._waiting) >= min(max(len(self._held.rows), _MERGE_AT), self._max_rows):
            self._merge()

    def hits(self) -> RowHits:
        """Return what was counted so far."""
        if self._counts is not None:
            rows = np.flatnonzero(self._counts)
            return RowHits(rows, self._counts[rows])
        self._merge()
        return self._held

    def _merge(self) -> None:
        share = self._held.share
        held = _merged([self._held, *self._waiting], share)
        self._waiting = []
        while len(held.rows) > self._max_rows:
            share /= 2
            held = _sampled(held, share)
        self._held = held


def log_ranks(num_ranks: float, points: int = 64) -> np.ndarray:
    """Spread ranks evenly on a logarithmic axis, from 1 to the last, int64 ``[R]``, at most ``points`` of them."""
    last = max(1.0, float(num_ranks))
    return np.unique(np.rint(np.geomspace(1.0, last, points)).astype(np.int64))


def zipf_exponent(ranks: np.ndarray, hits: np.ndarray) -> float:
    """Fit s in hits ~ rank**-s, by least squares of logarithms over ranks that are spread evenly on that axis.

    Args:
        ranks: As from `log_ranks`, int64 ``[R]``.
        hits: Times that the row of each rank is read, int64 ``[R]``; ranks with fewer than 5 do not count.

    Returns:
        The exponent; NaN where fewer than 5 ranks count.
    """
    counted = hits >= _LEAST_HITS
    if counted.sum() < _LEAST_RANKS:
        return float("nan")
    return -float(np.polyfit(np.log(ranks[counted]), np.log(hits[counted]), 1)[0])


_NOTHING = RowHits(np.zeros(0, np.int64), np.zeros(0, np.int64))


def _sampled(hits: RowHits, share: float) -> RowHits:
    """Keep the rows of a share, which is a power of one half: those whose scattered bits begin with zeros."""
    if hits.share <= share:
        return hits
    num_bits = round(-np.log2(share))
    kept = (hits.rows.astype(np.uint64) * _SCATTER) >> np.uint64(64 - num_bits) == 0
    return RowHits(hits.rows[kept], hits.counts[kept], share)


def _merged(parts: Sequence[RowHits], share: float) -> RowHits:
    rows, places = np.unique(np.concatenate([part.rows for part in parts]), return_inverse=True)
    counts = np.zeros(len(rows), np.int64)
    np.add.at(counts, places.reshape(-1), np.concatenate([part.counts for part in parts]))
    return RowHits(rows, counts, share)
