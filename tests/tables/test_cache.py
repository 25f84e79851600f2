"""A cache changes how often the table below is read, and nothing else."""

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.raw_safetensors import write_raw

from engram_lm.errors import CheckpointError, ConfigError, RowRangeError, TableClosedError
from engram_lm.tables import MappedTable, RecordTable, RowCodec, tensor_layout
from engram_lm.tables.around.cache import CachedTable, most_frequent
from engram_lm.tables.files.safetensors_file import read_header

NUM_ROWS, WIDTH = 60, 4
RECORD = 2 * WIDTH
WEIGHT = torch.randn(NUM_ROWS, WIDTH, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
BYTES = WEIGHT.view(torch.uint8).numpy()
POLICIES = ("clock", "lru")


class CountedTable(RecordTable):
    """Rows in memory that count what is read of them, and fail when told to."""

    def __init__(self, weight=WEIGHT):
        super().__init__(RowCodec(weight.shape[1], weight.dtype), len(weight))
        self.weight, self.reads, self.failing, self.asked = weight, [], None, []
        self._held, self.tier = weight, "counted"

    def _read_from(self, held, numbers):
        if self.failing is not None:
            raise self.failing
        self.reads.append(numbers.copy())
        return self.codec.encode(self.weight[torch.from_numpy(numbers)])

    def prefetch(self, rows):
        self.asked.append(rows.tolist())
        return super().prefetch(rows)

    def __reduce__(self):
        return CountedTable, (self.weight,)


def held_bytes(cache):
    return sum(array.nbytes for array in vars(cache).values() if isinstance(array, np.ndarray))


@given(
    policy=st.sampled_from(POLICIES),
    capacity=st.integers(RECORD + 17, 2500),
    pinned=st.lists(st.integers(0, NUM_ROWS - 1), max_size=1),
    requests=st.lists(st.lists(st.integers(0, NUM_ROWS - 1), max_size=70), min_size=1, max_size=12),
)
def test_any_requests_give_the_table_s_own_bytes_within_the_capacity(policy, capacity, pinned, requests):
    table = CountedTable()
    cache = CachedTable(table, capacity, policy=policy, pinned_rows=pinned)
    assert held_bytes(cache) <= capacity
    table.reads.clear()
    for request in requests:
        rows = torch.tensor(request, dtype=torch.int64)
        assert torch.equal(cache.gather(rows), WEIGHT[rows])
        # Each place holds what its label says, and no row lies in two places.
        labels = cache._rows.reshape(-1)
        assert np.array_equal(cache._records[labels >= 0], BYTES[labels[labels >= 0]])
        assert len(np.unique(labels[labels >= 0])) == (labels >= 0).sum()
    stats, asked = cache.stats(), sum(map(len, requests))
    assert stats["used_bytes"] <= held_bytes(cache) <= capacity
    assert stats["hits"] + stats["misses"] == asked == stats["gathered_rows"]
    assert stats["saved_bytes"] == (asked - sum(map(len, table.reads))) * RECORD
    assert stats["evictions"] + (cache._rows >= 0).sum() <= sum(map(len, table.reads))
    assert not pinned or not any(np.isin(pinned, read).any() for read in table.reads)


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_that_fit_are_read_once_and_repeats_of_a_request_together(policy):
    table = CountedTable()
    cache = CachedTable(table, 100 * NUM_ROWS, policy=policy)
    rows = torch.tensor([[7, 7, 3], [59, 0, 3]])
    assert torch.equal(cache.gather(rows), WEIGHT[rows])
    assert [read.tolist() for read in table.reads] == [[0, 3, 7, 59]]
    assert torch.equal(cache.gather(rows), WEIGHT[rows])
    assert len(table.reads) == 1
    stats = cache.stats()
    assert (stats["hits"], stats["misses"], stats["evictions"]) == (6, 6, 0)
    assert (stats["hit_rate"], stats["saved_bytes"]) == (0.5, 8 * RECORD)
    assert stats["used_bytes"] >= 4 * RECORD


def one_set(policy, places):
    """A cache of a single set, so that the order of giving way is the textbook's."""
    cache = CachedTable(CountedTable(), places * (RECORD + (16 if policy == "lru" else 10)), policy=policy)
    assert cache._rows.shape == (1, places)
    return cache


def read(cache, *rows):
    for row in rows:
        cache.gather(torch.tensor([row]))
    return set(cache._rows.reshape(-1).tolist())


def test_lru_gives_up_the_row_that_was_not_read_for_longest():
    cache = one_set("lru", 3)
    assert read(cache, 1, 2, 3, 1, 4) == {1, 3, 4}
    assert read(cache, 3, 5) == {3, 4, 5}
    assert cache.stats()["evictions"] == 2


def test_the_clock_passes_by_what_was_read_again_and_only_once():
    cache = one_set("clock", 3)
    assert read(cache, 1, 2, 3, 1, 4) == {1, 3, 4}, "1 was read again, so the hand goes on to 2"
    assert read(cache, 5) == {1, 4, 5}, "the hand stands at 3"
    assert read(cache, 6) == {4, 5, 6}, "the hand came round to 1, whose mark is spent"


def test_a_long_scan_does_not_push_out_what_is_read_often():
    cache, often = one_set("clock", 16), list(range(8))
    for row in range(8, 60):
        read(cache, *often, row)
    assert set(often) <= read(cache)


@pytest.mark.parametrize("policy", POLICIES)
def test_pinned_rows_never_give_way_and_need_no_reading(policy):
    table, pinned = CountedTable(), [5, 9, 5]
    cache = CachedTable(table, 2 * (RECORD + 8) + 40, policy=policy, pinned_rows=pinned)
    assert np.concatenate(table.reads).tolist() == [5, 9]
    table.reads.clear()
    for start in range(0, NUM_ROWS, 10):
        cache.gather(torch.arange(start, start + 10))
    table.reads.clear()
    assert torch.equal(cache.gather(torch.tensor([9, 5])), WEIGHT[[9, 5]])
    assert not table.reads and cache.stats()["pinned_rows"] == 2
    alone = CachedTable(CountedTable(), 2 * (RECORD + 8), policy=policy, pinned_rows=pinned)
    assert torch.equal(alone.gather(torch.arange(NUM_ROWS)), WEIGHT)
    assert alone.stats()["used_bytes"] == 2 * (RECORD + 8)


def test_the_most_frequent_rows_of_a_trace_are_as_many_as_fit():
    trace = [np.array([[3, 3], [8, 1]]), np.array([8, 3, 2, 1])]
    assert most_frequent(trace, 3 * (RECORD + 8), RECORD).tolist() == [3, 1, 8]
    assert most_frequent(trace[0], 10**6, RECORD).tolist() == [3, 1, 8]
    assert most_frequent([], 10**6, RECORD).tolist() == []
    CachedTable(CountedTable(), 3 * (RECORD + 8), pinned_rows=most_frequent(trace, 3 * (RECORD + 8), RECORD))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_failure_below_is_raised_and_leaves_the_cache_as_it_was(policy):
    table = CountedTable()
    cache = CachedTable(table, 40 * RECORD, policy=policy)
    cache.gather(torch.arange(5))
    before = cache.stats()
    table.failing = CheckpointError("the disk is gone")
    with pytest.raises(CheckpointError, match="the disk is gone"):
        cache.gather(torch.arange(3, 9))
    assert torch.equal(cache.gather(torch.arange(5)), WEIGHT[:5]), "what is here needs no disk"
    table.failing = None
    rows = torch.arange(NUM_ROWS)
    assert torch.equal(cache.gather(rows), WEIGHT)
    after = cache.stats()
    assert (after["misses"] - before["misses"], after["hits"] - before["hits"]) == (NUM_ROWS - 5, 10)


@pytest.mark.parametrize("policy", POLICIES)
def test_several_threads_share_one_cache(policy, tmp_path):
    weight = torch.randn(4000, WIDTH).to(torch.bfloat16)
    write_raw(tmp_path / "file", {"w": ("BF16", (4000, WIDTH), weight.view(torch.uint8).numpy().tobytes())})
    table = MappedTable(tensor_layout([read_header(tmp_path / "file")["w"]]))
    cache, wrong = CachedTable(table, 20_000, policy=policy), []

    def gather(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(60):
            rows = (torch.rand(300, generator=generator) ** 3 * 4000).long()
            wrong.extend([seed] * (not torch.equal(cache.gather(rows), weight[rows])))

    threads = [threading.Thread(target=gather, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = cache.stats()
    assert not wrong and stats["hits"] + stats["misses"] == 4 * 60 * 300
    assert 0.1 < stats["hit_rate"] < 1 and stats["evictions"] and stats["used_bytes"] <= 20_000
    assert stats["tier"] == "mmap"


def test_only_rows_that_are_not_here_are_asked_for_ahead():
    table = CountedTable()
    cache = CachedTable(table, 100 * NUM_ROWS, pinned_rows=[4])
    cache.gather(torch.tensor([1, 2]))
    ticket = cache.prefetch(torch.tensor([[1, 4, 8], [8, 9, 2]]))
    assert table.asked == [[8, 9]] and (ticket.num_rows, ticket.num_bytes) == (5, 5 * RECORD)
    cache.prefetch(torch.tensor([1, 4]))
    assert len(table.asked) == 1


def test_rows_outside_the_table_a_closed_table_and_impossible_caches_are_refused():
    table = CountedTable()
    cache = CachedTable(table, 1000)
    for bad in (-1, NUM_ROWS):
        with pytest.raises(RowRangeError, match=str(bad)):
            cache.gather(torch.tensor([0, bad]))
    with pytest.raises(RowRangeError, match=str(NUM_ROWS)):
        CachedTable(table, 1000, pinned_rows=[NUM_ROWS])
    for options, message in (
        ({"capacity_bytes": RECORD}, f"record of {RECORD} bytes"),
        ({"capacity_bytes": 100, "pinned_rows": range(20)}, "20 pinned rows"),
        ({"capacity_bytes": 1000, "policy": "fifo"}, "clock, lru, not 'fifo'"),
    ):
        with pytest.raises(ConfigError, match=message):
            CachedTable(table, **options)
    cache.close()
    assert table._closed
    for use in (lambda: cache.gather(torch.tensor([0])), lambda: cache.prefetch(torch.tensor([0]))):
        with pytest.raises(TableClosedError):
            use()


def test_copies_begin_empty_with_the_same_pinned_rows():
    cache = CachedTable(CountedTable(), 1000, policy="lru", pinned_rows=[3])
    cache.gather(torch.arange(9))
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert (other.policy, other.capacity_bytes, other.stats()["pinned_rows"]) == ("lru", 1000, 1)
        assert other.stats()["misses"] == 0 and torch.equal(other.gather(torch.arange(NUM_ROWS)), WEIGHT)
    assert torch.equal(cache.load_records(2, 5).view(torch.bfloat16), WEIGHT[2:5])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_row_that_two_threads_read_at_once_is_kept_once(policy):
    both = threading.Barrier(2, timeout=20)

    class Meeting(CountedTable):
        def _read(self, numbers):
            both.wait()
            return super()._read(numbers)

    cache = CachedTable(Meeting(), 2000, policy=policy)
    threads = [threading.Thread(target=cache.gather, args=(torch.arange(9),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    labels = cache._rows[cache._rows >= 0]
    assert sorted(labels.tolist()) == list(range(9)) and cache.stats()["evictions"] == 0


class UnaskedTable(CountedTable):
    """One that has nothing to do when it is asked ahead."""

    prefetch = RecordTable.prefetch


def test_a_cache_reads_ahead_where_the_table_below_does():
    assert CachedTable(CountedTable(), 4096).reads_ahead
    assert not CachedTable(UnaskedTable(), 4096).reads_ahead
