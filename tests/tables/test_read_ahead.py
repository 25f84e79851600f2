"""Reading ahead changes when rows are read, and nothing else. Order is held by events, never by the clock."""

import copy
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.raw_safetensors import write_raw
from tests.tables.test_cache import CountedTable

from engram_lm.errors import CheckpointError, ConfigError, RowRangeError, TableClosedError
from engram_lm.tables import MappedTable, ResidentTable, tensor_layout
from engram_lm.tables.around.cache import CachedTable
from engram_lm.tables.around.read_ahead import _PATIENCE, ReadAheadTable
from engram_lm.tables.files.safetensors_file import read_header

NUM_ROWS, WIDTH = 200, 6
WEIGHT = torch.randn(NUM_ROWS, WIDTH, generator=torch.Generator().manual_seed(5))
LONG = 20


class GatedTable(MappedTable):
    """Rows in a mapped file whose reads wait until they are let through."""

    def __init__(self, layout, dtype=None):
        super().__init__(layout, dtype)
        self.gate, self.begun, self.reads, self.failing = threading.Event(), threading.Event(), [], None
        self.gate.set()

    def _read(self, numbers):
        self.begun.set()
        assert self.gate.wait(LONG)
        if self.failing is not None:
            raise self.failing
        self.reads.append((threading.current_thread().name, numbers.tolist()))
        return super()._read(numbers)

    def in_background(self):
        return [rows for thread, rows in self.reads if thread.startswith("engram-read-ahead")]

    def in_gather(self):
        return [rows for thread, rows in self.reads if not thread.startswith("engram-read-ahead")]


@pytest.fixture
def below(tmp_path):
    write_raw(tmp_path / "file", {"w": ("F32", (NUM_ROWS, WIDTH), WEIGHT.numpy().tobytes())})
    return GatedTable(tensor_layout([read_header(tmp_path / "file")["w"]]))


@pytest.fixture
def table(below):
    made = ReadAheadTable(below)
    yield made
    below.gate.set()
    made.close()


def rows_of(*numbers):
    return torch.tensor(numbers)


def test_prefetch_returns_before_anything_is_read_and_gather_takes_what_it_brought(table, below):
    below.gate.clear()
    rows = torch.tensor([[9, 3, 3], [199, 0, 9]])
    ticket = table.prefetch(rows)
    assert below.begun.wait(LONG) and not below.reads, "a thread is at the gate, and this one is past the prefetch"
    assert (ticket.num_rows, ticket.num_bytes) == (4, 4 * WIDTH * 4)
    below.gate.set()
    assert torch.equal(table.gather(rows), WEIGHT[rows])
    assert below.in_background() == [[0, 3, 9, 199]] and below.in_gather() == []
    stats = table.stats()
    assert (stats["staged_rows"], stats["used_rows"], stats["wasted_rows"], stats["held_bytes"]) == (4, 4, 0, 0)
    assert torch.equal(table.gather(rows), WEIGHT[rows]) and len(below.in_gather()) == 1, "dropped after use"


def test_gather_waits_for_its_own_rows_only(table, below):
    below.gate.clear()
    table.prefetch(rows_of(1, 2, 3))
    assert below.begun.wait(LONG)
    found = []
    other = threading.Thread(target=lambda: found.append(table.gather(rows_of(1, 2))))
    other.start()
    below.gate.set()
    other.join(LONG)
    assert torch.equal(found[0], WEIGHT[[1, 2]])
    below.gate.clear()
    table.prefetch(rows_of(50, 51))
    # What waits at the gate is not what is asked for now: rows 3 is staged already.
    assert torch.equal(table.gather(rows_of(3)), WEIGHT[[3]])
    assert below.in_gather() == []
    below.gate.set()


def test_a_request_is_put_together_from_several_batches_and_the_table(table, below):
    table.prefetch(rows_of(1, 2, 3))
    table.prefetch(rows_of(3, 4))
    rows = rows_of(4, 9, 1, 3, 9, 2, 100)
    assert torch.equal(table.gather(rows), WEIGHT[rows])
    assert sorted(below.in_background()) == [[1, 2, 3], [3, 4]] and below.in_gather() == [[9, 9, 100]]


def test_rows_that_two_batches_share_are_left_to_the_batch_that_has_all(table, below):
    table.prefetch(rows_of(1, 2, 3))
    table.prefetch(rows_of(3, 4))
    assert torch.equal(table.gather(rows_of(3, 4)), WEIGHT[[3, 4]])
    assert torch.equal(table.gather(rows_of(1, 2, 3)), WEIGHT[[1, 2, 3]])
    assert below.in_gather() == [] and table.stats()["wasted_rows"] == 0


def test_a_batch_read_in_pieces_stays_until_its_last_row(table, below):
    table.prefetch(torch.arange(10))
    for piece in (rows_of(0, 1, 2, 3), rows_of(3, 4, 5), rows_of(6, 7, 8, 9)):
        assert torch.equal(table.gather(piece), WEIGHT[piece])
    assert below.in_gather() == [] and table.stats()["held_bytes"] == 0


def test_bytes_on_the_way_are_bounded_and_what_goes_beyond_is_skipped(below):
    row_bytes = WIDTH * 4
    table = ReadAheadTable(below, max_bytes=5 * row_bytes)
    below.gate.clear()
    table.prefetch(torch.arange(3))
    ticket = table.prefetch(torch.arange(10, 13))
    assert ticket.num_rows == 3
    table.prefetch(torch.arange(20, 22))
    assert (table.stats()["skipped"], table.stats()["held_bytes"]) == (1, 5 * row_bytes)
    below.gate.set()
    for start, stop in ((0, 3), (10, 13), (20, 22)):
        assert torch.equal(table.gather(torch.arange(start, stop)), WEIGHT[start:stop])
    assert below.in_gather() == [[10, 11, 12]] and table.stats()["held_bytes"] == 0
    table.prefetch(torch.arange(5))
    assert table.stats()["skipped"] == 1
    table.close()


def test_rows_nobody_comes_for_are_given_up(table):
    table.prefetch(torch.arange(7))
    table._batches[0].values.result()
    for _ in range(_PATIENCE + 1):
        assert table.stats()["held_bytes"]
        table.gather(rows_of(100))
    stats = table.stats()
    assert (stats["held_bytes"], stats["wasted_rows"], stats["used_rows"]) == (0, 7, 0)


def test_a_failed_read_raises_at_the_gather_that_wants_its_rows(table, below):
    below.failing = CheckpointError("the file was cut")
    table.prefetch(rows_of(1, 2))
    table._batches[0].values.exception()
    below.failing = None
    assert torch.equal(table.gather(rows_of(7)), WEIGHT[[7]])
    with pytest.raises(CheckpointError, match="the file was cut"):
        table.gather(rows_of(2, 7))
    assert torch.equal(table.gather(rows_of(2, 7)), WEIGHT[[2, 7]]), "asked again, it is read again"
    assert (table.stats()["failed_prefetches"], table.stats()["held_bytes"]) == (1, 0)


def test_numbers_outside_the_table_are_refused_at_gather_by_number(table):
    for bad in (rows_of(3, NUM_ROWS), rows_of(-1, 3), torch.tensor([1.0])):
        table.prefetch(bad)
        with pytest.raises(RowRangeError):
            table.gather(bad)
    assert torch.equal(table.gather(rows_of(3)), WEIGHT[[3]])


def test_closing_cancels_what_has_not_begun_waits_for_the_rest_and_refuses_afterwards(below):
    table = ReadAheadTable(below, num_threads=1)
    below.gate.clear()
    table.prefetch(rows_of(1))
    assert below.begun.wait(LONG)
    table.prefetch(rows_of(2))
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("engram-read-ahead")]
    failed = []

    def gather():
        try:
            table.gather(rows_of(2))
        except TableClosedError as error:
            failed.append(error)

    waiting = threading.Thread(target=gather)
    waiting.start()
    while not table._batches[1].values._condition._waiters:
        assert waiting.is_alive()
    closing = threading.Thread(target=table.close)
    closing.start()
    waiting.join(LONG)
    assert failed and closing.is_alive(), "the row that is being read is waited for"
    below.gate.set()
    closing.join(LONG)
    assert below.in_background() == [[1]] and not any(thread.is_alive() for thread in threads[-1:])
    for use in (table.gather, table.prefetch, below.gather):
        with pytest.raises(TableClosedError):
            use(rows_of(1))
    table.close()


def test_several_threads_ask_ahead_and_gather(below):
    table, wrong = ReadAheadTable(below, max_bytes=3000), []

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(60):
            rows = torch.randint(NUM_ROWS, (20,), generator=generator)
            table.prefetch(rows)
            wrong.extend([seed] * (not torch.equal(table.gather(rows), WEIGHT[rows])))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = table.stats()
    assert not wrong and stats["used_rows"] and stats["used_rows"] + stats["wasted_rows"] <= stats["staged_rows"]
    table.close()


@given(
    st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 30), max_size=12)), max_size=20),
    st.integers(1, 600),
)
def test_any_order_of_asking_and_gathering_gives_the_table_s_own_rows(steps, max_bytes):
    table = ReadAheadTable(CachedTable(CountedTable(WEIGHT), 500), max_bytes=max_bytes)
    try:
        for ahead, numbers in steps:
            rows = torch.tensor(numbers, dtype=torch.int64)
            if ahead:
                table.prefetch(rows)
            else:
                assert torch.equal(table.gather(rows), WEIGHT[rows])
            assert table.stats()["held_bytes"] <= max_bytes
    finally:
        table.close()
    stats = table.stats()
    assert stats["used_rows"] + stats["wasted_rows"] == stats["staged_rows"]


def test_any_table_can_be_wrapped_and_copied():
    table = ReadAheadTable(ResidentTable(WEIGHT), max_bytes=1000, num_threads=1)
    other = copy.deepcopy(table)
    assert (other.max_bytes, other.num_threads, other.table is table.table) == (1000, 1, False)
    rows = torch.tensor([[5, 6], [6, 7]])
    other.prefetch(rows)
    out = torch.empty(2, 2, WIDTH)
    assert other.gather(rows, out=out) is out and torch.equal(out, WEIGHT[rows])
    with pytest.raises(ConfigError, match="expected"):
        other.gather(rows, out=torch.empty(3, WIDTH))
    for options in ({"max_bytes": 0}, {"num_threads": 0}):
        with pytest.raises(ConfigError):
            ReadAheadTable(ResidentTable(WEIGHT), **options)
    assert np.isclose(table.stats()["staged_rows"], 0)
    table.close()
    other.close()
