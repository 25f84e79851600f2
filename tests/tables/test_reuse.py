"""What is computed for all cache sizes at once is what a cache in a dictionary does, read by read."""

import collections

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engram_lm.tables.around.reuse import (
    HitCurve,
    count_in_batches,
    lfu_ranks,
    lru_distances,
    pinned_ranks,
    previous_pages,
    previous_reads,
    row_reuse,
)


@st.composite
def traces(draw):
    """Uniform, Zipf and repeating traces, some empty, of small and far row numbers."""
    size, seed = draw(st.integers(0, 130)), draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    kind = draw(st.sampled_from(["uniform", "zipf", "loop", "one"]))
    rows = {
        "uniform": random.integers(0, draw(st.integers(1, 40)), size),
        "zipf": random.zipf(1.3, size) % 50,
        "loop": np.arange(size) % draw(st.integers(1, 20)),
        "one": np.full(size, 7),
    }[kind]
    return rows.astype(np.int64) * draw(st.sampled_from([1, 2**40 + 1]))


def lru_hits(rows, size):
    cache, hits = collections.OrderedDict(), []
    for row in rows.tolist():
        hits.append(row in cache)
        cache[row] = None
        cache.move_to_end(row)
        if len(cache) > size:
            cache.popitem(last=False)
    return np.array(hits, bool)


def lfu_hits(rows, size):
    """The cache holds the rows of the highest (count, time of last read); a row that is not among them stays out."""
    cache, reads, hits = set(), {}, []
    for time, row in enumerate(rows.tolist()):
        hits.append(row in cache)
        reads[row] = (reads.get(row, (0, 0))[0] + 1, time)
        cache.add(row)
        if len(cache) > size:
            cache.remove(min(cache, key=reads.__getitem__))
    return np.array(hits, bool)


def pinned_hits(trained, rows, size):
    most = sorted(collections.Counter(trained.tolist()).items(), key=lambda item: (-item[1], item[0]))
    pinned = {row for row, _ in most[:size]}
    return np.array([row in pinned for row in rows.tolist()], bool)


@given(traces())
def test_every_read_is_answered_by_exactly_the_caches_that_would_answer_it(rows):
    half = len(rows) // 2
    for sizes, plain in (
        (lru_distances(rows), lambda size: lru_hits(rows, size)),
        (lfu_ranks(rows), lambda size: lfu_hits(rows, size)),
        (pinned_ranks(rows, rows), lambda size: pinned_hits(rows, rows, size)),
        (pinned_ranks(rows[:half], rows[half:]), lambda size: pinned_hits(rows[:half], rows[half:], size)),
    ):
        curve = HitCurve.from_sizes(sizes)
        for size in (0, 1, 2, 3, 5, 8, 13, 200):
            hits = plain(size)
            assert np.array_equal((sizes >= 0) & (sizes < size), hits)
            assert curve.hit_rate(size) == (hits.mean() if len(hits) else 0)


@given(traces(), st.integers(1, 40), st.integers(1, 10_000))
def test_rows_and_pages_of_batches_are_those_of_sets(rows, batch, row_bytes):
    starts = np.arange(0, len(rows), batch)
    batches = [rows[first : first + batch].tolist() for first in starts]
    previous, earlier = previous_reads(rows)
    assert earlier.tolist() == [rows[:place].tolist().count(row) for place, row in enumerate(rows)]
    assert count_in_batches(previous, starts).tolist() == [len(set(one)) for one in batches]

    def pages(row):
        return set(range(row * row_bytes // 4096, (row * row_bytes + row_bytes - 1) // 4096 + 1))

    places, most = previous_pages(rows, row_bytes)
    expected = [len(set().union(*map(pages, one))) for one in batches]
    assert count_in_batches(places, starts * most).tolist() == expected


def test_batches_may_have_any_bounds():
    rows = np.array([5, 5, 6, 5, 6, 7, 7])
    assert count_in_batches(previous_reads(rows)[0], np.array([0, 1, 4])).tolist() == [1, 2, 2]


def test_a_large_zipf_trace_is_counted_like_by_a_dictionary():
    rows = np.random.default_rng(1).zipf(1.2, 60_000).astype(np.int64) % 20_011
    for size in (10, 1000, 9000):
        assert ((lru := lru_distances(rows)) < size).sum() - (lru < 0).sum() == lru_hits(rows, size).sum()
    # All rows that were ever read fit: everything but first reads is a hit, whatever the policy.
    unique = len(np.unique(rows))
    for sizes in (lru_distances(rows), lfu_ranks(rows)):
        assert HitCurve.from_sizes(sizes).hit_rate(unique) == 1 - unique / len(rows)


def test_the_smallest_cache_for_a_hit_rate_reaches_it_and_one_row_less_does_not():
    rows = np.random.default_rng(2).zipf(1.3, 5000).astype(np.int64) % 500
    curve = HitCurve.from_sizes(lru_distances(rows))
    for wanted in (0.1, 0.5, curve.hit_rate(100), curve.highest):
        size = curve.rows_for(wanted)
        assert curve.hit_rate(size) >= wanted > curve.hit_rate(size - 1)
    assert curve.rows_for(0.0) == 0
    assert curve.rows_for(curve.highest + 1e-9) is None


def test_reuse_counts_rows_by_how_often_they_were_read():
    reads = {3: 1, 4: 1, 5: 2, 6: 3, 7: 4, 8: 9}
    found = row_reuse(np.array([row for row, times in reads.items() for _ in range(times)]))
    assert (found.num_reads, found.num_rows, found.num_read_once) == (20, 6, 2)
    assert found.rows_by_reads == ((1, 2), (2, 2), (4, 1), (8, 1))
    assert found.coverage == ((1, 9 / 20), (6, 1.0))
    assert row_reuse(np.empty(0, np.int64)).coverage == ()
