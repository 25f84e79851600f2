"""What a small model still knows, and still reads, with its memory suppressed: the study over some seeds.

    python benchmarks/suppression.py --seeds 3 --out benchmarks/results/suppression.json

Takes some minutes per seed on one core. ``--from FOLDER`` collects a finished study instead.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from engram_lm.studies.suppression.study import SuppressionStudy


def collect(folder: Path) -> dict[str, Any]:
    """Read a study's result, without what only that machine's folders mean."""
    result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    twin = " --twin" if result["settings"]["twin"] else ""
    result["command"] = f"engram-lm study suppression --seeds {len(result['seeds'])}{twin}"
    questions = result["settings"]["families"]["num_questions"]
    if questions != SuppressionStudy.questions:
        result["command"] += f" --questions {questions}"
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="file for the results as JSON")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--twin", action="store_true", help="also train each model without memory")
    parser.add_argument("--from", dest="folder", type=Path, help="a finished study")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch) / "study"
        if not arguments.folder and SuppressionStudy(out=folder, seeds=arguments.seeds, twin=arguments.twin).run():
            raise SystemExit("interrupted")
        result = collect(folder)
    for name, difference in result["summary"]["reading_minus_recall"].items():
        print(f"{name}: reading retains {difference['mean']:+.2f} more than recall")
    if arguments.out:
        text = json.dumps({"benchmark": "suppression", "results": [result]}, indent=1)
        Path(arguments.out).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
