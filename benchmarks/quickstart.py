"""The quickstart itself: the default run for its time, and three seeds with controls for what it shows.

    python benchmarks/quickstart.py --out benchmarks/results/quickstart.json

Takes about half an hour on two cores. ``--from DEFAULT CONTROLS`` collects two finished run folders instead.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from engram_lm.studies.quickstart.run import Quickstart

RUNS: dict[str, dict[str, Any]] = {
    "default": {},
    "controls": {"seeds": 3, "controls": True, "tokens": 600_000, "memory_layers": [1]},
}
COMMANDS = {
    "default": "engram-lm quickstart",
    "controls": "engram-lm quickstart --seeds 3 --controls --tokens 600000 --memory-layers 1",
}


def collect(folder: Path, name: str) -> dict[str, Any]:
    """Read a run's result, without what only that machine's folders mean."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    settings = result["settings"]
    for option, value in {"seeds": 1, "controls": False, "tokens": Quickstart.tokens, **RUNS[name]}.items():
        if settings[option] != value:
            raise SystemExit(f"{folder} was made with {option}={settings[option]}, expected {value}")
    if result["interrupted"] or settings["data"]:
        raise SystemExit(f"{folder} is not a whole run on the default text")
    del settings["out"], result["samples"]
    result["command"] = COMMANDS[name]
    for arm in result["arms"].values():
        for run in arm["runs"]:
            for curve in ("train_curve", "held_out_curve"):
                run[curve] = [[tokens, round(loss, 4)] for tokens, loss in run[curve]]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="file for the results as JSON")
    parser.add_argument("--from", dest="folders", nargs=2, type=Path, help="finished runs: the default, the controls")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = dict(zip(RUNS, arguments.folders or [Path(scratch) / name for name in RUNS]))
        if not arguments.folders:
            for name, options in RUNS.items():
                if Quickstart(out=folders[name], **options).run():
                    raise SystemExit("interrupted")
        results = {name: collect(folder, name) for name, folder in folders.items()}
    for name, result in results.items():
        gain = result["difference"]
        print(f"{name}: {result['seconds'] / 60:.1f} minutes, gain {gain['mean']:.3f} ± {gain['std'] or 0:.3f}")
    if arguments.out:
        text = json.dumps({"benchmark": "quickstart", "results": results}, separators=(",", ":"))
        Path(arguments.out).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
