"""Reading files by position: what the shared suite of all tiers cannot see of it."""

import mmap
import multiprocessing
import os
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from tests.tables.tiers import written

from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.tables import FileTable, HostTable, MappedTable, RowCodec, RowLayout
from engram_lm.tables.layout import Extent, Part
from engram_lm.tables.tiers import async_reads, scattered_copy
from engram_lm.tables.tiers.async_reads import AsyncReads
from engram_lm.tables.tiers.page_cache import PAGE_BYTES, drop_pages, request_missing, request_pages
from engram_lm.tables.tiers.residency import resident_share
from engram_lm.tables.tiers.scattered_copy import ScatteredCopy


def test_systems_that_forbid_the_kernel_copy_read_row_by_row(tmp_path, monkeypatch):
    layout, rows = written(tmp_path, "FP8 with block scales")
    monkeypatch.setattr(scattered_copy, "_process_vm_readv", lambda: None)
    assert torch.equal(FileTable(layout).gather(torch.arange(101)), rows)


def test_rows_are_copied_by_the_kernel_where_it_can(tmp_path, monkeypatch):
    layout, rows = written(tmp_path, "F32")
    table = FileTable(layout)
    monkeypatch.setattr(FileTable, "_read_each", None)
    assert torch.equal(table.gather(torch.arange(101)), rows)


def test_a_file_system_without_direct_reads_is_refused_by_name():
    file = "/sys/kernel/mm/transparent_hugepage/enabled"
    if not os.path.exists(file):
        pytest.skip("no such file")
    part = Part(8, (Extent(file, 0, 2, 8),))
    with pytest.raises(ConfigError, match=rf"{file}.*O_DIRECT.*direct=False"):
        FileTable(RowLayout(RowCodec(2, torch.float32), (part,)), direct=True)


@pytest.mark.parametrize("options", [{"num_threads": 0}, {"num_threads": 2000}, {"num_threads": 1.5}])
def test_impossible_numbers_of_threads_are_refused(tmp_path, options):
    layout, _ = written(tmp_path, "F32")
    with pytest.raises(ConfigError, match="num_threads"):
        FileTable(layout, **options)


def _gather(table, rows):
    os._exit(0 if torch.equal(table.gather(torch.arange(101)), rows) else 1)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("read_ahead", [True, False])
def test_a_forked_process_reads_on(tmp_path, read_ahead):
    layout, rows = written(tmp_path, "F32", num_rows=101)
    table = FileTable(layout, read_ahead=read_ahead, num_threads=4)
    assert torch.equal(table.gather(torch.arange(101)), rows), "the threads have started"
    child = multiprocessing.get_context("fork").Process(target=_gather, args=(table, rows))
    child.start()
    child.join(20)
    assert child.exitcode == 0


def test_no_descriptor_stays_after_the_tables_are_closed(tmp_path):
    layout, _ = written(tmp_path, "F32")
    before = len(os.listdir("/proc/self/fd"))
    tables = [FileTable(layout), FileTable(layout, direct=True), MappedTable(layout)]
    for table in tables:
        table.gather(torch.arange(101))
        table.close()
    assert len(os.listdir("/proc/self/fd")) == before
    os.truncate(layout.files[0], 10)
    with pytest.raises(CheckpointError):
        FileTable(layout)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_process_that_ends_with_tables_open_ends_in_silence(tmp_path):
    layout, _ = written(tmp_path, "F32")
    code = (
        "import pickle, sys, torch\n"
        "from engram_lm.tables import FileTable, MappedTable\n"
        "layout = pickle.load(sys.stdin.buffer)\n"
        "tables = [FileTable(layout), MappedTable(layout), FileTable(layout, direct=True)]\n"
        "for table in tables:\n"
        "    table.gather(torch.arange(101))\n"
        # Kept until the modules are emptied, which the code of their classes then finds empty.
        "torch.kept = tables\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(layout), capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_copy_that_ends_after_the_table_was_closed_leaves_no_file_behind(tmp_path):
    if scattered_copy._pwritev() is None:
        pytest.skip("no files in memory here")
    (data, mapping), copy = mapped(tmp_path, 60), ScatteredCopy()

    class ClosesLate(list):
        def append(self, item):
            copy.close()
            super().append(item)

    copy._idle = ClosesLate()
    assert copy.copy(addresses(mapping, [3]), out := np.empty((1, 100), np.uint8)) and np.array_equal(out[0], data[3])
    assert not copy._idle


def test_all_pages_of_rows_are_asked_for_and_only_when_some_are_missing(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(os.urandom(400 * PAGE_BYTES))
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        drop_pages(descriptor)
        if resident_share(file) != 0:
            pytest.skip("this file system does not give pages back, or does not say")
        # The last of these lies on two pages, the long row below on four.
        offsets = np.array([20, 41, 100]) * PAGE_BYTES + np.array([0, 7, PAGE_BYTES - 3])
        assert request_missing(descriptor, offsets, 10)
        request_pages(descriptor, np.array([200 * PAGE_BYTES - 1]), 2 * PAGE_BYTES + 2)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and resident_share(file) < 8 / 400:
            time.sleep(0.005)
        assert resident_share(file) == 8 / 400
        assert not request_missing(descriptor, offsets, 10)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("kind", [FileTable, MappedTable])
def test_cold_rows_are_asked_for_before_they_are_read(tmp_path, kind, monkeypatch):
    module = __import__(kind.__module__, fromlist=["request_missing"])
    asked = []
    monkeypatch.setattr(module, "request_missing", lambda *request: asked.append(request[1:]))
    layout, _ = written(tmp_path, "FP8 with block scales")
    kind(layout).gather(torch.tensor([5, 9]))
    starts = [part.extents[0].start_bytes for part in layout.parts]
    assert [(offsets.tolist(), size) for offsets, size in asked] == [
        ([starts[0] + 350, starts[0] + 630], 70), ([starts[1] + 15, starts[1] + 27], 3),
    ]  # fmt: skip


def test_a_table_larger_than_the_memory_is_not_loaded(tmp_path, monkeypatch):
    import engram_lm.tables.tiers.host as host

    layout, _ = written(tmp_path, "F32")
    monkeypatch.setattr(host, "available_bytes", lambda: 101 * 70 * 4 - 1)
    with pytest.raises(ConfigError, match=r"takes 28280 bytes, 28279 bytes .* tier='mmap'"):
        HostTable(layout)


def test_loading_a_table_takes_its_own_size_and_a_bounded_buffer(tmp_path, monkeypatch):
    import engram_lm.tables.tiers.host as host

    layout, rows = written(tmp_path, "F32")
    monkeypatch.setattr(host, "_PIECE_BYTES", 7 * 280)
    loaded, load = [], RowLayout.load_records
    monkeypatch.setattr(RowLayout, "load_records", lambda *a: loaded.append(a[2] - a[1]) or load(*a))
    assert torch.equal(HostTable(layout).gather(torch.arange(101)), rows)
    assert max(loaded) == 7 and sum(loaded) == 101


def addresses(mapping, rows):
    """Where the rows of a mapping of 100-byte rows are."""
    return np.frombuffer(mapping, np.uint8, count=1).ctypes.data + np.asarray(rows, dtype=np.uint64) * np.uint64(100)


def mapped(folder, num_rows):
    data = np.random.default_rng(1).integers(0, 256, (num_rows, 100), dtype=np.uint8)
    (folder / "rows").write_bytes(data.tobytes())
    with open(folder / "rows", "rb") as file:
        return data, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@pytest.mark.parametrize("way", ["file", "process"])
def test_pieces_are_copied_to_their_places_and_a_lost_page_is_told_and_kills_nobody(tmp_path, way, monkeypatch):
    if way == "process":
        monkeypatch.setattr(scattered_copy, "_pwritev", lambda: None)
    elif scattered_copy._pwritev() is None:
        pytest.skip("no files in memory here")
    else:
        monkeypatch.setattr(scattered_copy, "_process_vm_readv", lambda: None)
    (data, mapping), copy = mapped(tmp_path, 6000), ScatteredCopy()
    rows = np.random.default_rng(2).integers(0, 6000, 5300)
    wide, places = np.zeros((6000, 150), np.uint8), np.random.default_rng(3).permutation(6000)[:5300]
    assert copy.copy(addresses(mapping, rows), wide[:, 20:120], places)
    assert np.array_equal(wide[places, 20:120], data[rows]) and not wide[:, :20].any() and not wide[:, 120:].any()
    out = np.empty((5300, 100), np.uint8)
    assert copy.copy(addresses(mapping, rows), out) and np.array_equal(out, data[rows])
    os.truncate(tmp_path / "rows", PAGE_BYTES)
    assert not copy.copy(addresses(mapping, [0, 5999]), out[:2])
    assert copy.copy(addresses(mapping, [3]), out[:1]) and np.array_equal(out[0], data[3]), "the next one is fine"


def test_a_piece_longer_than_the_file_in_memory_is_copied_without_it(tmp_path):
    size = scattered_copy._FILE_BYTES + 8
    (tmp_path / "long").write_bytes(np.arange(2 * size, dtype=np.uint8).tobytes())
    layout = RowLayout(RowCodec(size // 4, torch.float32), (Part(size, (Extent(str(tmp_path / "long"), 0, 2, size),)),))
    found = FileTable(layout).read_records(torch.tensor([1, 0]))
    assert torch.equal(found, layout.load_records(0, 2).flip(0))


def test_direct_reads_are_the_kernel_s_own_where_it_can_and_threads_elsewhere(tmp_path, monkeypatch):
    layout, rows = written(tmp_path, "FP8 with block scales", num_rows=4000)
    table, numbers = FileTable(layout, direct=True, num_threads=3), torch.randperm(4000)
    threads = []
    monkeypatch.setattr(table._pool, "run", lambda call, tasks: threads.append(len(tasks)) or list(map(call, tasks)))
    assert torch.equal(table.gather(numbers), rows[numbers])
    if not threads:
        monkeypatch.setattr(async_reads, "_calls", lambda: None)
        assert torch.equal(table.gather(numbers), rows[numbers])
    assert threads, "somebody read"
    table.close()


def test_more_asynchronous_reads_than_the_queue_holds_arrive_each_at_its_place_and_bad_ones_say_so(tmp_path):
    if async_reads._calls() is None or async_reads._calls().setup(1) is None:
        pytest.skip("this system has no asynchronous reads")
    count, block = 3 * async_reads._DEPTH + 5, 4096
    data = np.random.default_rng(4).integers(0, 256, (count, block), dtype=np.uint8)
    (tmp_path / "blocks").write_bytes(data.tobytes())
    order = np.random.default_rng(5).permutation(count)
    offsets, sizes = order * block, np.full(count, block)
    offsets[7], offsets[300] = -block, count * block
    buffer = np.frombuffer(mmap.mmap(-1, count * block), np.uint8)
    descriptor, reads = os.open(tmp_path / "blocks", os.O_RDONLY | os.O_DIRECT), AsyncReads()
    try:
        found = reads.read(descriptor, offsets, sizes, buffer.ctypes.data + np.arange(count, dtype=np.uint64) * block)
    finally:
        os.close(descriptor)
        reads.close()
    fine = np.setdiff1d(np.arange(count), [7, 300])
    assert (found[fine] == block).all() and found[7] < 0 and found[300] == 0
    assert np.array_equal(buffer.reshape(count, block)[fine], data[order[fine]])


def test_systems_with_neither_copy_nor_files_in_memory_read_row_by_row(tmp_path, monkeypatch):
    layout, rows = written(tmp_path, "F32")
    monkeypatch.setattr(scattered_copy, "_process_vm_readv", lambda: None)
    monkeypatch.setattr(scattered_copy, "_pwritev", lambda: None)
    each, read = [], FileTable._read_each
    monkeypatch.setattr(FileTable, "_read_each", lambda *request: each.append(1) or read(*request))
    assert torch.equal(FileTable(layout).gather(torch.arange(101)), rows) and each
