"""Each tier of tables, tried: a small table is written, and its rows are read from every tier."""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ROWS, _WIDTH = 512, 64
_MOONCAKE_SECONDS = 10.0


def try_tiers() -> dict[str, Any]:
    """Say of each tier whether it works here: ``"works"``, or why it does not."""
    import torch

    from engram_lm.tables import open_table
    from engram_lm.tables.codec import RowCodec
    from engram_lm.tables.files.convert import build_random

    rows = torch.arange(0, _ROWS, 7)[None]
    with tempfile.TemporaryDirectory(prefix="engram-doctor-") as folder:
        path = Path(folder) / "table.safetensors"
        build_random(path, _ROWS, RowCodec(_WIDTH, torch.float32), seed=0)
        with contextlib.closing(open_table(path, tier="host")) as table:
            expected = table.gather(rows)

        def read(source: Any, tier: Any, **options: Any) -> str:
            with contextlib.closing(open_table(source, tier=tier, **options)) as table:
                return "works" if torch.equal(table.gather(rows).cpu(), expected) else "reads other rows"

        def remote() -> str:
            import fsspec

            place = f"/{Path(folder).name}/table.safetensors"
            files = fsspec.filesystem("memory")
            files.pipe(place, path.read_bytes())
            try:
                said = read(f"memory:/{place}", "remote")
            finally:
                files.rm(place)
            try:
                import aiohttp  # noqa: F401
            except ImportError as error:
                return f"works, but not over https: {error}"
            return said

        device = "cuda" if torch.cuda.is_available() else "cpu"
        trials: dict[str, Callable[[], str]] = {
            "device": lambda: read(path, "device", device=device) + ("" if device == "cuda" else ", on the CPU"),
            "host": lambda: read(path, "host"),
            "mmap": lambda: read(path, "mmap"),
            "file": lambda: read(path, "file"),
            "file, past the page cache": lambda: read(path, "file", direct=True),
            "remote": remote,
            "mooncake": _mooncake,
        }
        return {name: answer(trial) for name, trial in trials.items()}


def _mooncake() -> str:
    """Import Mooncake in a process of its own, because its libraries may end the process that loads them."""
    done = subprocess.run(
        [sys.executable, "-c", "import mooncake.store"],
        capture_output=True, text=True, errors="replace", check=False, timeout=_MOONCAKE_SECONDS,
    )  # fmt: skip
    if done.returncode == 0:
        return "its client loads; tables need a running store"
    said = (done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"])[-1]
    if "No module named" in said:
        return "not installed: pip install 'engram-lm[mooncake]'"
    return f"does not load: {said}; it needs apt-get install libibverbs1 libnuma1 libcurl4"


def answer(trial: Callable[[], Any]) -> Any:
    """Return what a trial finds, or its error as a line: nothing that goes wrong here may end the command."""
    try:
        return trial()
    except Exception as error:
        lines = str(error).strip().splitlines()
        return f"no: {type(error).__name__}{': ' + lines[0] if lines else ''}"
