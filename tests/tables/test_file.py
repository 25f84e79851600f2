"""Reading files by position: what the shared suite of all tiers cannot see of it."""

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
from engram_lm.tables.tiers.page_cache import (
    PAGE_BYTES,
    drop_from_memory,
    request_missing,
    request_pages,
    resident_share,
)


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


def test_all_pages_of_rows_are_asked_for_and_only_when_some_are_missing(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(os.urandom(400 * PAGE_BYTES))
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        if drop_from_memory(file) != 0:
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


def test_rows_in_memory_are_read_here_and_others_by_the_pool(tmp_path, monkeypatch):
    import engram_lm.tables.tiers.file as module

    layout, rows = written(tmp_path, "FP8 with one scale", num_rows=4000)
    numbers = torch.randperm(4000)
    for missing, read_ahead, direct, by_pool in (
        (False, True, False, False), (True, True, False, True), (False, False, False, True), (False, True, True, True),
    ):  # fmt: skip
        monkeypatch.setattr(module, "request_missing", lambda *_, missing=missing: missing)
        table = FileTable(layout, num_threads=3, read_ahead=read_ahead, direct=direct)
        assert torch.equal(table.gather(numbers), rows[numbers])
        assert (len(next(iter(table._held.values())).pool._threads) > 0) == by_pool
        table.close()
