"""At which block memory helps most, and how many layers it saves: the study over some seeds.

    python benchmarks/depth.py --seeds 3 --out benchmarks/results/depth.json

Takes some minutes per seed on two cores. ``--from FOLDER`` collects a finished study instead.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from engram_lm.studies.depth.study import DepthStudy

_LEFT_OUT = ("out", "data", "resume", "dry_run", "mode", "json", "split")


def collect(folder: Path) -> dict[str, Any]:
    """Read a study's result, without what only that machine's folders mean."""
    result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    settings = result["settings"]
    if settings.pop("data"):
        raise SystemExit(f"{folder} is not a study of the default text")
    changed = [
        f"--{field.name.replace('_', '-')} {settings[field.name]}"
        for field in dataclasses.fields(DepthStudy)
        if field.name not in (*_LEFT_OUT, "parts") and settings[field.name] != field.default
    ]
    result["command"] = " ".join(["engram-lm study depth", *changed])
    for seed in result["seeds"]:
        for arm in seed["arms"].values():
            arm["train_curve"] = [[tokens, round(loss, 4)] for tokens, loss in arm["train_curve"]]
        for found in seed.get("cka", {}).values():
            found.pop("within_rows", None)  # of the model without memory: the same in every map
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="file for the results as JSON")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--from", dest="folder", type=Path, help="a finished study")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch) / "study"
        if not arguments.folder and DepthStudy(out=folder, seeds=arguments.seeds).run():
            raise SystemExit("interrupted")
        result = collect(folder)
    for arm in result["summary"]["arms"].values():
        gain = arm["gain"]
        print(f"{arm['title']}: {arm['loss']['mean']:.4f}" + (f", gain {gain['mean']:+.4f}" if gain else ""))
    if arguments.out:
        text = json.dumps({"benchmark": "depth", "results": [result]}, indent=1)
        Path(arguments.out).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
