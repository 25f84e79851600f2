"""How often rows are read again: what a trace of row numbers says about caches, batches and pages.

A *trace* is the row numbers of a table in the order they were read, int64 ``[n]``; ``previous`` and ``earlier`` are
what `previous_reads` found in it, where the caller has that already. Everything here is exact and counts in O(n log n),
so that traces of tens of millions of reads take seconds. The tests compare it with plain simulations, which keep a
cache in a dictionary and read row by row.
"""

import dataclasses

import numpy as np

PAGE_BYTES = 4096
"""What a disk read fetches at least, and what the page cache keeps."""


@dataclasses.dataclass(frozen=True)
class RowReuse:
    """How unevenly a trace reads its rows."""

    num_reads: int
    """Reads in the trace."""
    num_rows: int
    """Distinct rows among them."""
    num_read_once: int
    """Rows that were read only once, which no cache helps."""
    rows_by_reads: tuple[tuple[int, int], ...]
    """How many rows were read from 2**k to 2**(k+1) - 1 times, as (2**k, rows), for every k with such rows."""
    coverage: tuple[tuple[int, float], ...]
    """Share of the reads that went to the most-read rows, as (rows, share), for 1, 10, 100, … and all rows."""


def row_reuse(rows: np.ndarray) -> RowReuse:
    """Count how often each row was read."""
    counts = np.sort(np.unique(rows, return_counts=True)[1])[::-1]
    exponents = np.bincount(np.frexp(counts.astype(np.float64))[1] - 1) if len(counts) else np.empty(0, np.int64)
    total = np.cumsum(counts)
    steps = [10**power for power in range(19) if 10**power < len(counts)] + [len(counts)] * bool(len(counts))
    return RowReuse(
        num_reads=len(rows),
        num_rows=len(counts),
        num_read_once=int((counts == 1).sum()),
        rows_by_reads=tuple((1 << k, int(found)) for k, found in enumerate(exponents.tolist()) if found),
        coverage=tuple((step, float(total[step - 1] / len(rows))) for step in steps),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class HitCurve:
    """How many reads a cache answers, for every size it could have."""

    hits: np.ndarray
    """Reads that a cache of c rows answers, for every c: int64 ``[largest useful size + 1]``, never decreasing."""
    num_reads: int
    """Reads that the cache was asked for."""

    @classmethod
    def from_sizes(cls, sizes: np.ndarray) -> "HitCurve":
        """Make the curve from the rank of every read, integers ``[n]``.

        The rank is the number of rows ahead of the read's row in the cache, -1 where no cache answers: a larger cache
        does.
        """
        found = sizes[sizes >= 0]
        hits = np.concatenate([[0], np.cumsum(np.bincount(found))]) if len(found) else np.zeros(1, np.int64)
        return cls(hits.astype(np.int64), len(sizes))

    @property
    def highest(self) -> float:
        """Hit rate of a cache that keeps every row: the other reads are the first ones of their rows."""
        return float(self.hits[-1] / max(1, self.num_reads))

    def hit_rate(self, cache_rows: int) -> float:
        """Share of the reads that a cache of ``cache_rows`` rows answers."""
        return float(self.hits[min(max(cache_rows, 0), len(self.hits) - 1)] / max(1, self.num_reads))

    def rows_for(self, hit_rate: float) -> int | None:
        """Smallest cache, in rows, that reaches a hit rate; None where none does."""
        # Compared as the rates are computed, so that asking for a rate that was given finds its size.
        rates = self.hits / max(1, self.num_reads)
        place = int(np.searchsorted(rates, hit_rate, side="left"))
        return place if place < len(rates) else None


def previous_reads(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find for every read the one before it of the same row.

    Returns the place of the earlier read, -1 where there is none, and how many earlier ones there are; both ``[n]``,
    int32 for traces below 2**31 reads.
    """
    size = len(rows)
    kind = np.int32 if size < 2**31 else np.int64
    order = np.argsort(rows, kind="stable").astype(kind)
    ordered = rows[order]
    same = np.zeros(size, bool)
    np.equal(ordered[1:], ordered[:-1], out=same[1:])
    del ordered
    previous, earlier = np.full(size, -1, kind), np.empty(size, kind)
    again = np.flatnonzero(same)
    previous[order[again]] = order[again - 1]
    del again
    # Place in the run of equal rows: distance from where that run began.
    places = np.arange(size, dtype=kind)
    earlier[order] = places - np.maximum.accumulate(np.where(same, 0, places)) if size else places
    return previous, earlier


def lru_distances(rows: np.ndarray, previous: np.ndarray | None = None) -> np.ndarray:
    """Count for every read the distinct rows read since its row was last read (its stack distance): integers ``[n]``.

    A cache that forgets the least recently used row answers a read exactly if it holds more rows than that. The first
    read of a row has -1. Between a read at t and the one before it at p lie t - p - 1 reads. Those of them whose row
    was read already since p must not be counted again: they are the earlier reads whose own predecessor lies after p.

    Source: Mattson et al., “Evaluation techniques for storage hierarchies”, IBM Systems Journal 9, 1970; counting by
    order as in Olken, 1981.
    """
    if previous is None:
        previous = previous_reads(rows)[0]
    again = np.flatnonzero(previous >= 0).astype(previous.dtype)
    before = previous[again]
    distances = np.full(len(rows), -1, previous.dtype)
    distances[again] = again - before - 1 - _larger_before(_ranks(before, len(rows)))
    return distances


def lfu_ranks(rows: np.ndarray, previous: np.ndarray | None = None, earlier: np.ndarray | None = None) -> np.ndarray:
    """Count for every read the rows that had been read more often, or as often and more recently: integers ``[n]``.

    A cache of c rows that keeps the c rows read most often so far answers a read exactly if that number is below c.
    Such a cache also counts the reads of rows that it does not hold, and lets no other row in. Only its own reads move
    a row forward. The first read of a row has -1.

    The read at t finds its row with a count of k. Rows with a higher count: reads before t that were the k+1st of their
    row. Rows of equal count and more recent: k-th reads since p, the read before, less those whose row has been read
    again, which are the k+1st reads before t whose predecessor lies after p.
    """
    if previous is None or earlier is None:
        previous, earlier = previous_reads(rows)
    size = len(rows)
    kind = previous.dtype
    # All reads by (count their row had, time): `start[k]` is where those that found a count of k begin.
    order = np.argsort(earlier, kind="stable").astype(kind)
    counts = np.bincount(earlier)
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    place = np.empty(size, kind)
    place[order] = np.arange(size, dtype=kind)
    again = order[start[1] :] if len(counts) else order  # those that found a count of 1 and more, by (count, time)
    found = earlier[again].astype(np.int64)
    before = previous[again].astype(np.int64)
    higher = place[again] - start[found]
    # Reads that found k - 1, before t: those keys are sorted, being by (count, time).
    keys = np.repeat(np.arange(len(counts), dtype=np.int64) * size, counts) + order
    equal = np.searchsorted(keys, (found - 1) * size + again) - place[before] - 1
    del keys
    # Counted within each count: predecessors are put in ranks of their own for each, so that none is larger across.
    ranks = np.empty(len(again), kind)
    ranks[np.argsort(found * size + before, kind="stable")] = np.arange(len(again), dtype=kind)
    result = np.full(size, -1, kind)
    result[again] = higher + equal - _larger_before(ranks)
    return result


def pinned_ranks(trained: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rank the row of every read by how often the trace ``trained`` read it: int64 ``[n]``, -1 for rows it never read.

    A cache that holds the c rows which ``trained`` read most, and never others, answers the ranks below c. Among rows
    read equally often the lower number comes first. With ``trained`` the same trace, this is the best that any set
    fixed from the beginning can do, which nobody can know ahead: the bound for a pinned set.
    """
    known, counts = np.unique(trained, return_counts=True)
    ranks = np.empty(len(known), np.int64)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(len(known))
    if not len(known):
        return np.full(len(rows), -1, np.int64)
    places = np.minimum(np.searchsorted(known, rows), len(known) - 1)
    return np.where(known[places] == rows, ranks[places], -1)


def count_in_batches(previous: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Count the distinct rows of every batch, int64; ``starts`` is the first read of each, increasing, from 0."""
    if not len(starts):
        return np.zeros(0, np.int64)
    lengths = np.diff(np.append(starts, len(previous)))
    new = previous < np.repeat(starts.astype(previous.dtype), lengths)
    return np.add.reduceat(new, starts, dtype=np.int64)


def previous_pages(rows: np.ndarray, row_bytes: int) -> tuple[np.ndarray, int]:
    """Find for every touch of a page the one before it, as `previous_reads` does for rows.

    Rows of ``row_bytes`` follow each other from the beginning of a page. Returns the places ``[n * most]`` for
    `count_in_batches`, and ``most``: the largest number of pages that a row lies on. Rows on fewer pages touch their
    last one again, which counts nothing.
    """
    first, last = rows * row_bytes // PAGE_BYTES, (rows * row_bytes + row_bytes - 1) // PAGE_BYTES
    most = int((last - first).max(initial=0)) + 1
    touched = first if most == 1 else np.minimum(first[:, None] + np.arange(most), last[:, None]).reshape(-1)
    return previous_reads(touched)[0], most


def _ranks(values: np.ndarray, bound: int) -> np.ndarray:
    """Ranks of distinct numbers in ``[0, bound)``, of their type."""
    there = np.zeros(bound, bool)
    there[values] = True
    return (np.cumsum(there, dtype=values.dtype) - 1)[values] if bound else values


def _larger_before(permutation: np.ndarray) -> np.ndarray:
    """Count for every number of a permutation of 0 … m-1 the larger ones that stand before it.

    Bit by bit from the highest: a larger number before it has equal bits above some bit, a 1 there and the other a 0.
    The numbers are kept grouped by the bits above, in their old order within a group, so one running sum over the
    bits counts them for all groups at once.
    """
    size, kind = len(permutation), permutation.dtype
    values, counts = permutation, np.zeros(size, kind)
    places = np.arange(size, dtype=kind)
    for bit in range(max(0, size - 1).bit_length() - 1, -1, -1):
        start = values >> (bit + 1) << (bit + 1)  # a group of equal bits above begins at its smallest number
        ones = (values >> bit & 1).astype(bool)
        before = np.cumsum(ones, dtype=kind)
        before -= ones
        before -= before[start]
        counts += np.where(ones, 0, before)
        # Zeros move to the front of the group and ones behind, both in their order: the next bit's groups.
        to = np.where(ones, start + (1 << bit) + before, places - before)
        moved_values, moved_counts = np.empty_like(values), np.empty_like(counts)
        moved_values[to], moved_counts[to] = values, counts
        values, counts = moved_values, moved_counts
    return counts[permutation]
