"""``engram-lm table bench``: measured on real files, cold only where the kernel says that they are."""

import json
import mmap
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.raw_safetensors import write_raw

from engram_lm.cli import main
from engram_lm.errors import ConfigError
from engram_lm.serving.bench.tables import Bench, draw_rows, synthetic_table
from engram_lm.tables import MappedTable, packed_layout, tensor_layout
from engram_lm.tables.files.safetensors_file import read_header
from engram_lm.tables.tiers.page_cache import drop_from_memory, resident_share

PAGE, NAME = mmap.PAGESIZE, "model.memory_tables.1.weight"


@pytest.fixture
def table_file(tmp_path):
    """8 MiB of rows of 256 bytes, on the disk rather than only in memory."""
    path = tmp_path / "model.safetensors"
    write_raw(path, {NAME: ("BF16", (1 << 15, 128), os.urandom(8 << 20))})
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    return path


def measured(capsys, *arguments):
    assert main(["table", "bench", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def can_be_dropped(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    return resident_share(path) == 0


def test_the_kernel_tells_which_pages_of_a_file_are_in_memory(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(64 * PAGE + 5))
    assert resident_share(path) == 1.0
    if not can_be_dropped(path):
        pytest.skip("this file system keeps its files in memory")
    assert resident_share(path) == 0.0
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(descriptor, 1, 7 * PAGE)
    os.close(descriptor)
    assert 1 / 65 <= resident_share(path) < 0.5
    (tmp_path / "empty").write_bytes(b"")
    assert resident_share(tmp_path / "empty") == 0.0


def test_pages_that_are_mapped_are_not_called_cold(table_file):
    header = read_header(table_file)
    table = MappedTable(tensor_layout([header[NAME]]))
    table.gather(torch.arange(1 << 15))
    assert drop_from_memory(table_file) > 0.9
    table.close()
    left = drop_from_memory(table_file)
    assert left < 0.001 or not can_be_dropped(table_file)


def test_every_tier_and_size_is_measured_cold_and_warm(capsys, table_file):
    options = ("--tier", "mmap,file,host", "--rows", "1,500", "--rounds", 2, "--prefetch")
    found = measured(capsys, table_file, *options)
    assert (found["num_rows"], found["width"], found["dtype"], found["record_bytes"]) == (1 << 15, 128, "bfloat16", 256)
    cases = [(result["tier"], result["gather_rows"]) for result in found["results"]]
    assert cases == [(tier, count) for count in (1, 500) for tier in ("mmap", "file", "host")]
    dropped = can_be_dropped(table_file)
    for result in found["results"]:
        states = ["warm"] + ["cold"] * (dropped and result["tier"] != "host")
        for state in states:
            rate = result["gather_rows"] / result[f"{state}_seconds"]
            assert result[f"{state}_rows_per_second"] == pytest.approx(rate)
            assert result[f"{state}_gigabytes_per_second"] == pytest.approx(rate * 256 / 1e9)
            assert 0 < result[f"{state}_prefetch_call_seconds"] < result[f"{state}_seconds_with_prefetch"]
        if "cold" in states:
            assert result["cold"] == "files dropped in 2 of 2 rounds"
            assert result["largest_resident_share_before_cold"] < 0.001
            assert result["cold_seconds_after_prefetch_and_compute"] > 0
            assert result["cold_seconds"] > result["warm_seconds"], result
        else:
            assert "cold_seconds" not in result and result["cold"].startswith("none: ")
    assert [tier["is_in_files"] for tier in found["tiers"]] == [True, True, False]
    # Every tier is asked for the same rows.
    assert len({result["distinct_rows"] for result in found["results"] if result["gather_rows"] == 500}) == 1


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no file system in memory")
def test_where_files_cannot_be_dropped_no_number_is_called_cold(capsys):
    path = Path("/dev/shm") / f"engram-test-{os.getpid()}.safetensors"
    try:
        write_raw(path, {NAME: ("BF16", (512, 8), os.urandom(512 * 16))})
        assert main(["table", "bench", str(path), "--tier", "mmap", "--rows", "4", "--rounds", "2"]) == 0
        printed = capsys.readouterr().out
        assert "none: 100.0% of a file stayed in memory after it was dropped" in printed
        (result,) = measured(capsys, path, "--tier", "mmap", "--rows", 4, "--rounds", 1)["results"]
        assert "cold_seconds" not in result and result["warm_rows_per_second"] > 0
    finally:
        path.unlink()


def test_a_synthetic_table_is_written_measured_and_removed(capsys, tmp_path):
    options = ("--folder", tmp_path, "--tier", "mmap", "--rows", 16, "--rounds", 1, "--distribution", "uniform")
    found = measured(capsys, "--synthetic", "3000x24", *options)
    assert (found["source"], found["num_rows"], found["width"]) == ("3000x24", 3000, 24)
    assert not list(tmp_path.iterdir())
    with synthetic_table(100, 3, tmp_path) as path:
        rows = packed_layout(path).load_records(0, 100).view(torch.bfloat16)
        assert rows.shape == (100, 3) and rows.isfinite().all() and len(rows.unique()) > 150
    with pytest.raises(OSError, match="choose another folder"), synthetic_table(2**39, 2**20, tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_drawn_rows_follow_their_distribution():
    random = np.random.default_rng(0)
    rows = draw_rows("zipf", 1000, 200_000, random)
    assert rows.min() >= 0 and rows.max() < 1000
    counts = np.sort(np.bincount(rows, minlength=1000))[::-1]
    ranks = np.arange(1, 1001)
    expected = np.log1p(1 / ranks) / np.log(1001) * 200_000
    assert counts[:20] == pytest.approx(expected[:20], rel=0.06)
    assert len(np.unique(rows)) == 1000, "popular rows are spread over the table without falling together"
    popular = np.argsort(-np.bincount(rows))[:10]
    assert np.abs(np.diff(np.sort(popular))).min() > 1
    uniform = np.bincount(draw_rows("uniform", 10, 100_000, random))
    assert uniform == pytest.approx(np.full(10, 10_000), rel=0.05)
    large = draw_rows("zipf", 384_006_168, 1000, random)
    assert large.min() >= 0 and large.max() < 384_006_168
    assert draw_rows("zipf", 1, 5, random).tolist() == [0] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one table"),
        ({"source": "a", "synthetic": "3x4"}, "exactly one table"),
        ({"synthetic": "3"}, "ROWSxWIDTH"),
        ({"synthetic": "0x4"}, "ROWSxWIDTH"),
        ({"source": "a", "folder": Path()}, "where --synthetic writes"),
        ({"source": "a", "rows": "1,0"}, "--rows takes numbers"),
        ({"source": "a", "rows": "many"}, "--rows takes numbers"),
        ({"source": "a", "rounds": 0}, "--rounds must be"),
        ({"source": "a", "tier": ","}, "at least one tier"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Bench(**options)
