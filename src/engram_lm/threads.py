"""How many threads computing takes, and how they wait for each other, decided before torch is loaded.

OpenMP, whose threads torch computes with, reads its settings when it is loaded and never again. So the command decides,
by variables of its own environment that its child processes inherit. Importing `engram_lm` decides nothing.
"""

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

from engram_lm.control_groups import control_groups
from engram_lm.errors import ConfigError

NUM_SPINS = 1000
"""How often a thread looks whether it may go on before it sleeps, which takes about as long as to sleep and wake.

Threads that look for longer take the core from the very thread that they wait for, as soon as another program keeps a
core busy; threads that sleep at once have to be woken for every one of the many short parts of a training step
(``benchmarks/busy_machine.py``)."""

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
_COUNT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def settle_threads(environment: MutableMapping[str, str]) -> None:
    """Settle in an environment what its owner has left open; without effect on a process that has loaded torch.

    Threads wait actively for a short time only, where no variable says how they wait. There are as many of them as
    `allowed_cores`, where no variable says how many and a container allows fewer cores than OpenMP sees. The number
    does not follow the load: a long training would keep what a busy minute gave it, and a sum over many numbers is
    rounded otherwise on another number of threads.

    Args:
        environment: Names and values of variables, such as ``os.environ``; changed in place.

    Raises:
        ConfigError: OpenMP is told to give fewer threads than torch asks for. Torch 2.13 then leaves parts of its work
            undone: the first step of a training had another loss, and NaN in its gradient (measured).
    """
    if environment.get("OMP_DYNAMIC", "").strip().lower() == "true":
        raise ConfigError(
            "OMP_DYNAMIC=TRUE lets torch compute wrong numbers on a busy machine; unset it, and set "
            "OMP_NUM_THREADS to the number of threads instead"
        )
    if not any(name in environment for name in _WAITING):
        environment["GOMP_SPINCOUNT"] = str(NUM_SPINS)
    cores = allowed_cores()
    if cores < _visible_cores() and not any(name in environment for name in _COUNT):
        environment["OMP_NUM_THREADS"] = str(cores)


def allowed_cores() -> int:
    """Cores that this process may keep busy: those it may run on, or fewer where a container allows less time."""
    quotas = [quota for folder, is_second in control_groups("cpu") if (quota := _quota(folder, is_second))]
    return max(1, min([_visible_cores(), *map(math.ceil, quotas)]))


def _visible_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quota(folder: Path, is_second: bool) -> float | None:
    """Cores whose time a control group may take; None without a limit."""
    try:
        if is_second:
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text(encoding="ascii") for name in ("quota", "period")
            )
        cores = int(quota) / int(period)
    except (OSError, ValueError):  # no such file, or "max"
        return None
    return cores if cores > 0 else None
