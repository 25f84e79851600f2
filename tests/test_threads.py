"""The command settles how threads wait and how many there are, where nobody else has, before torch is loaded."""

import os
import subprocess
import sys

import pytest

from engram_lm import threads
from engram_lm.threads import NUM_SPINS, allowed_cores, settle_threads


def environment(**chosen: str) -> dict[str, str]:
    """This process's environment without what it says about threads, and with what is chosen."""
    names = ("OMP_", "GOMP_", "KMP_", "MKL_")
    return {name: value for name, value in os.environ.items() if not name.startswith(names)} | chosen


def spins(*arguments: str, **chosen: str) -> list[str]:
    """Run Python, and give what libgomp says, when torch loads it, of how often its threads spin."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment(OMP_DISPLAY_ENV="VERBOSE", **chosen),
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.strip() for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]


@pytest.fixture(scope="module")
def own():
    """What libgomp says in a process that only loads torch."""
    said = spins("-c", "import torch")
    if not said:
        pytest.skip("torch computes here with another OpenMP than GNU's")
    return said


def test_torch_spins_for_a_short_time_under_the_command(own):
    assert spins("-m", "engram_lm", "train", "--help") == [f"GOMP_SPINCOUNT = '{NUM_SPINS}'"] != own


def test_the_users_own_count_reaches_torch_under_the_command(own):
    assert spins("-m", "engram_lm", "train", "--help", GOMP_SPINCOUNT="77") == ["GOMP_SPINCOUNT = '77'"]


def test_importing_the_library_leaves_torch_as_it_is(own):
    assert spins("-c", "from engram_lm import EngramLayer") == own


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY"])
def test_who_has_said_how_threads_wait_is_not_overruled(name):
    given = {name: "whatever"}
    settle_threads(given)
    assert given == {name: "whatever"}


def test_threads_that_come_and_go_with_the_load_are_refused():
    done = subprocess.run(
        [sys.executable, "-m", "engram_lm", "train", "--help"],
        env=environment(OMP_DYNAMIC="TRUE"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("engram-lm train: OMP_DYNAMIC=TRUE lets torch compute wrong numbers")


def limited_to(folder, monkeypatch, version, quota, period=100_000):
    """Let the innermost control group be a folder that allows so much time in every period."""
    if version == 2:
        (folder / "cpu.max").write_text(f"{quota} {period}\n")
    else:
        (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (folder / "cpu.cfs_period_us").write_text(f"{period}\n")
    monkeypatch.setattr(threads, "control_groups", lambda controller: [(folder, version == 2), (folder / "no", True)])
    monkeypatch.setattr(threads, "_visible_cores", lambda: 8)


@pytest.mark.parametrize(
    ("version", "quota", "cores"),
    [
        (2, "300000", 3),
        (2, "150000", 2),
        (2, "1000", 1),
        (2, "max", 8),
        (2, "9900000", 8),
        (1, "250000", 3),
        (1, "-1", 8),
    ],
)
def test_there_are_as_many_threads_as_a_container_allows_cores(version, quota, cores, tmp_path, monkeypatch):
    limited_to(tmp_path, monkeypatch, version, quota)
    assert allowed_cores() == cores
    settled: dict[str, str] = {}
    settle_threads(settled)
    assert settled.get("OMP_NUM_THREADS") == (None if cores == 8 else str(cores))


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_who_has_said_how_many_threads_there_are_is_not_overruled(name, tmp_path, monkeypatch):
    limited_to(tmp_path, monkeypatch, 2, "300000")
    given = {name: "5"}
    settle_threads(given)
    assert given == {name: "5", "GOMP_SPINCOUNT": str(NUM_SPINS)}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no process to cores")
def test_cores_that_a_process_may_not_run_on_are_not_counted():
    one = min(os.sched_getaffinity(0))
    script = f"import os; os.sched_setaffinity(0, [{one}]); from engram_lm.threads import *; print(allowed_cores())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
