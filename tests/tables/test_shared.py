"""One copy for all processes: loaded once, whole or absent, gone with its last user, however that one ended."""

import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.raw_safetensors import random_e4m3, write_raw

from engram_lm.errors import CheckpointError, MismatchError, SharedCopyError, TableClosedError
from engram_lm.tables import MappedTable, SharedTable, tensor_layout
from engram_lm.tables.files.safetensors_file import read_header

ROWS, WIDTH = 5000, 64
SPAWN = multiprocessing.get_context("spawn")
PICKED = torch.tensor([0, ROWS - 1, 17, 17, 2500])


def layout_in(folder, rows=ROWS, seed=1):
    folder.mkdir(exist_ok=True)
    scales = np.random.default_rng(seed).integers(100, 150, rows * 2, dtype=np.uint8).tobytes()
    tensors = {
        "w": ("F8_E4M3", (rows, WIDTH), random_e4m3(rows * WIDTH, seed)),
        "s": ("F8_E8M0", (rows, 2), scales),
    }
    write_raw(folder / "file", tensors)
    header = read_header(folder / "file")
    return tensor_layout([header["w"]], scales=[header["s"]])


def use(layout, folder, ready, release, answers):
    """Open, tell, wait, close."""
    ready.wait()
    table = SharedTable(layout, folder=folder)
    answers.put((table.loaded_here, table.gather(PICKED).view(torch.uint8).tolist()))
    release.wait()
    table.close()


def stop_in_the_middle(layout, folder, answers):
    """Load, and stop for good after the first piece."""

    def stop(done_bytes, num_bytes):
        answers.put(os.getpid())
        time.sleep(600)

    SharedTable(layout, folder=folder, progress=stop)


def load_with_small_files(layout, folder, answers):
    """Load where files may have 100,000 bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        SharedTable(layout, folder=folder)
    except SharedCopyError as error:
        answers.put((str(error), sorted(os.listdir(folder))))


@pytest.fixture
def start():
    """Start processes that are certainly gone afterwards."""
    started = []

    def starting(target, *arguments):
        started.append(SPAWN.Process(target=target, args=arguments))
        started[-1].start()
        return started[-1]

    yield starting
    for process in started:
        if process.is_alive():
            process.kill()
        process.join()


def kinds(folder):
    return sorted(Path(name).suffix for name in os.listdir(folder))


def test_of_three_processes_at_once_one_loads_all_read_the_same_and_the_last_removes(tmp_path, start):
    layout, folder = layout_in(tmp_path / "source"), tmp_path / "shared"
    folder.mkdir()
    ready, answers, releases = SPAWN.Event(), SPAWN.Queue(), [SPAWN.Event() for _ in range(3)]
    processes = [start(use, layout, folder, ready, release, answers) for release in releases]
    ready.set()
    found = [answers.get(timeout=60) for _ in processes]
    assert sorted(loaded for loaded, _ in found) == [False, False, True]
    expected = MappedTable(layout).gather(PICKED).view(torch.uint8).tolist()
    assert [rows for _, rows in found] == [expected] * 3
    for release, process in zip(releases[:2], processes[:2], strict=True):
        release.set()
        process.join(30)
        assert kinds(folder) == [".gate", ".records"]
    processes[2].kill()
    processes[2].join()
    assert kinds(folder) == [".gate", ".records"], "nobody could clean up"
    other = SharedTable(layout_in(tmp_path / "other", rows=3), folder=folder)
    assert sorted(os.listdir(folder)) == [other.path.with_suffix(".gate").name, other.path.name]
    other.close()
    assert os.listdir(folder) == []


def test_a_loader_that_is_stuck_is_named_and_one_that_is_killed_is_replaced(tmp_path, start):
    layout, folder = layout_in(tmp_path / "source", rows=200_000), tmp_path / "shared"
    folder.mkdir()
    answers = SPAWN.Queue()
    process = start(stop_in_the_middle, layout, folder, answers)
    pid = answers.get(timeout=60)
    assert kinds(folder) == [".gate", ".part"]
    begin = time.monotonic()
    with pytest.raises(SharedCopyError, match=rf"waited 0.3 seconds for process {pid} \(\d+ of \d+ bytes loaded\)"):
        SharedTable(layout, folder=folder, wait_seconds=0.3)
    assert time.monotonic() - begin < 5
    os.kill(pid, signal.SIGKILL)
    process.join()
    assert kinds(folder) == [".gate", ".part"]
    table = SharedTable(layout, folder=folder, wait_seconds=5)
    assert table.loaded_here and kinds(folder) == [".gate", ".records"]
    rows = torch.arange(0, 200_000, 7)
    assert torch.equal(table.gather(rows), MappedTable(layout).gather(rows))
    table.close()
    assert os.listdir(folder) == []


def test_a_forked_child_keeps_the_copy_while_it_reads(tmp_path):
    layout, folder = layout_in(tmp_path / "source"), tmp_path / "shared"
    folder.mkdir()
    table = SharedTable(layout, folder=folder)
    # The descriptor that a forked process would inherit holds the same lock.
    inherited = os.dup(table._leave.peek()[2][1])
    table.close()
    assert kinds(folder) == [".gate", ".records"]
    os.close(inherited)
    again = SharedTable(layout, folder=folder)
    assert not again.loaded_here
    again.close()
    assert os.listdir(folder) == []


def test_two_tables_of_one_process_are_two_users_and_a_closed_one_refuses(tmp_path):
    layout, folder = layout_in(tmp_path / "source"), tmp_path / "shared"
    folder.mkdir()
    seen = []
    one = SharedTable(layout, folder=folder, progress=lambda done, total: seen.append((done, total)))
    two = SharedTable(layout, torch.float32, folder=folder)
    assert (one.loaded_here, two.loaded_here) == (True, False)
    assert seen[-1][0] == seen[-1][1] == one.path.stat().st_size
    one.close()
    one.close()
    assert kinds(folder) == [".gate", ".records"], "the other one reads it still"
    with pytest.raises(TableClosedError):
        one.gather(PICKED)
    assert torch.equal(two.gather(PICKED), MappedTable(layout, torch.float32).gather(PICKED))
    assert not two._records.flags.writeable
    stats = two.stats()
    assert (stats["tier"], stats["loaded_here"], stats["path"]) == ("shared", False, str(two.path))
    two.close()
    SharedTable(layout, folder=folder).gather(PICKED)
    assert os.listdir(folder) == [], "a table that is dropped is closed"


def test_a_folder_that_is_too_small_is_refused_before_anything_is_written(tmp_path):
    layout, folder = layout_in(tmp_path / "source"), tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system needs the right to mount: {mounted.stderr.strip()}")
    try:
        expected = 4096 + layout.stored_bytes
        with pytest.raises(SharedCopyError, match=rf"expected {expected} bytes, but \d+ are free.*--shm-size=1g"):
            SharedTable(layout, folder=folder)
        assert kinds(folder) == [".gate"]
        small = SharedTable(layout_in(tmp_path / "little", rows=100), folder=folder)
        assert small.gather(torch.tensor([99])).shape == (1, WIDTH)
        small.close()
        assert os.listdir(folder) == []
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_room_that_runs_out_while_loading_leaves_nothing_behind(tmp_path, start):
    layout, folder = layout_in(tmp_path / "source"), tmp_path / "shared"
    folder.mkdir()
    answers = SPAWN.Queue()
    start(load_with_small_files, layout, folder, answers)
    message, left = answers.get(timeout=60)
    assert os.strerror(errno.EFBIG) in message and "--shm-size" in message
    assert [Path(name).suffix for name in left] == [".gate"]
    table = SharedTable(layout, folder=folder)
    assert table.loaded_here
    table.close()


def test_a_copy_of_another_geometry_or_a_broken_source_is_refused_by_name(tmp_path):
    layout, folder = layout_in(tmp_path / "source"), tmp_path / "shared"
    folder.mkdir()
    table = SharedTable(layout, folder=folder)
    os.truncate(table.path, table.path.stat().st_size - 1)
    with pytest.raises(MismatchError, match=rf"in {4096 + layout.stored_bytes} bytes, found .* bytes; remove it"):
        SharedTable(layout, folder=folder)
    with open(table.path, "r+b") as file:
        file.truncate(4096 + layout.stored_bytes)
        file.write(b'{"identity": 0}'.ljust(4096))
    with pytest.raises(MismatchError, match="copy of another table"):
        SharedTable(layout, folder=folder)
    table.close()
    missing = tmp_path / "nowhere"
    with pytest.raises(SharedCopyError, match="nowhere is no folder"):
        SharedTable(layout, folder=missing)
    os.truncate(tmp_path / "source" / "file", 1000)
    with pytest.raises(CheckpointError, match="was cut"):
        SharedTable(layout, folder=folder)
    assert kinds(folder) == [".gate"]
