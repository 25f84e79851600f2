"""How often each row of a table is read, counted as a text goes by, in bounded memory."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from engram_lm.hashing.counting import NgramCounter, NgramEntries, scattered

__all__ = ["HitCounter", "RowHits", "log_ranks", "zipf_exponent"]

# Dimension key: N rows, P rows that are read at once, R ranks.

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
        """Find how hot the hottest rows are.

        Args:
            ranks: Ranks, 1 for the row that is read most often, int64 ``[R]``.

        Returns:
            How often the row of each rank is read, 0 beyond the last row that is, int64 ``[R]``; and the share of all
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

    If all counts of a table fit into the budget, 8 bytes a row, they are one array. Of a larger table only the rows
    that were read are held, 16 bytes each and three times that while merging. If even those are too many, a random half
    of the rows is dropped, and so on; the counts of the rows that stay are still exact (see `NgramCounter`).

    Args:
        num_rows: Rows of the table.
        max_bytes: The budget.
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
    """Fit s in hits ~ rank**-s, by least squares of logarithms over ranks that are spread evenly on that axis.

    Args:
        ranks: From `log_ranks`, int64 ``[R]``.
        hits: How often the row of each rank is read, int64 ``[R]``; ranks with fewer than 5 reads do not count.

    Returns:
        The exponent; NaN if fewer than 5 ranks count.
    """
    counted = hits >= _LEAST_HITS
    if counted.sum() < _LEAST_RANKS:
        return float("nan")
    return -float(np.polyfit(np.log(ranks[counted]), np.log(hits[counted]), 1)[0])
