"""What every benchmark here shares: interleaved timing, and a result that names its command, machine and commit."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def measure(callables: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Time callables in turn (A B C A B C …), so that a slow minute of a shared machine hits all of them.

    Args:
        callables: Name to what is timed; on an accelerator each must wait for its own result.
        repeats: Rounds that count; one more, before them, warms up.

    Returns:
        Name to seconds, one number per round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in callables}
    for round_ in range(repeats + 1):
        for name, call in callables.items():
            start = time.perf_counter()
            call()
            if round_ > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def machine() -> dict[str, Any]:
    """Describe the processor: its model and the cores this process may use."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu_model": model, "num_cores": cores}


def commit() -> str | None:
    """Return the commit of this working tree, with ``+dirty`` where files differ from it; None without one."""

    def git(*arguments: str) -> str | None:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    if head is None:
        return None
    return head + ("+dirty" if git("status", "--porcelain", "--untracked-files=no") else "")


def versions() -> dict[str, str]:
    """Return the versions of Python, torch and transformers."""
    import torch
    import transformers

    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def write(path: str | os.PathLike[str], name: str, results: list[dict[str, Any]]) -> None:
    """Write one benchmark's results as one JSON object."""
    record = {
        "benchmark": name,
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        **versions(),
        "commit": commit(),
        "results": results,
    }
    Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
