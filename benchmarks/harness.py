"""What every benchmark here shares: interleaved timing, and a result that names its command, machine and commit."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engram_lm.training.run_folder import commit, machine, versions


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


def write(path: str | os.PathLike[str], name: str, results: list[dict[str, Any]]) -> None:
    """Write one benchmark's results as one JSON object."""
    record = {
        "benchmark": name,
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "results": results,
    }
    Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
