"""What memory adds to a small pretrained model on a domain that it has not seen, and what the model forgets.

    python benchmarks/adaptation.py --domain FOLDER      # writes benchmarks/results/adaptation.json

Trains the base by recipes/base-cpu.toml unless it is there (about ten minutes on two cores), then runs `engram-lm
adapt` with recipes/adapt-cpu.toml, every arm and three seeds. ``--resume`` goes on with a run that was stopped. The
result is the same for the same text; the committed one is of the ``test`` and ``valid`` files of WikiText-2.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from engram_lm.cli import main as engram_lm

ROOT = Path(__file__).resolve().parents[1]
BASE = Path("runs/base-cpu")
ARMS = ["memory", "lora", "memory_lora", "full", "random_table", "permuted_hash", "transfer"]
OPTIONS = {
    "--train.seeds": "3",
    "--rates.memory": "[1e-2, 2.5e-2, 6e-2]",
    "--rates.lora": "[4e-3, 1e-2, 2.5e-2]",
    "--rates.memory_lora": "[4e-3, 1e-2, 2.5e-2]",
    "--rates.full": "[1e-3, 2e-3, 4e-3]",
    "--train.num_steps": "120",
    "--memory.occupancy": "none",
    "--data.held_out_tokens": "32768",
    "--data.retained_tokens": "32768",
    "--arms.names": json.dumps(ARMS),
}


def command(domain: str) -> list[str]:
    """The arguments of `engram-lm` that make the result."""
    options = {"--data.domain": json.dumps([domain]), **OPTIONS}
    return ["adapt", "recipes/adapt-cpu.toml", *(part for pair in options.items() for part in pair)]


def collect(folder: Path) -> dict[str, Any]:
    """Read a run's result, without what only that machine's folders mean."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if result["interrupted"] or list(result["arms"]) != ARMS:
        raise SystemExit(f"{folder} is not a whole run of all arms; go on with it with --resume")
    result["recipe"]["data"]["domain"] = result["data"]["domain"]
    for section, key in (("data", "cache"), ("base", "model")):
        result["recipe"][section].pop(key, None)
    result["base"]["name"] = "recipes/base-cpu.toml"
    result["command"] = "python benchmarks/adaptation.py --domain wikitext-2"
    for arm in result["arms"].values():
        for run in arm["runs"]:
            run["curve"] = [[tokens, round(loss, 4)] for tokens, loss in run["curve"]]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", help="a text file or a folder of them")
    parser.add_argument("--base", type=Path, default=BASE / "model", help="the base model, trained if it is missing")
    parser.add_argument("--folder", type=Path, default=Path("runs/adaptation"), help="run folder")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    parser.add_argument("--from", dest="finished", type=Path, help="collect a finished run folder instead")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "adaptation.json")
    arguments = parser.parse_args()
    if arguments.finished is None:
        if arguments.domain is None:
            parser.error("name the domain's text with --domain, or a finished run with --from")
        if not arguments.base.is_dir():
            resume = ["--resume"] if (BASE / "checkpoints").is_dir() else []
            if engram_lm(["train", str(ROOT / "recipes" / "base-cpu.toml"), "--out", str(BASE), *resume]):
                raise SystemExit("the base was not trained")
        verb, recipe, *options = command(arguments.domain)
        options += ["--base.model", str(arguments.base), "--out", str(arguments.folder)]
        if engram_lm([verb, str(ROOT / recipe), *options, *(["--resume"] if arguments.resume else [])]):
            raise SystemExit("interrupted; go on with --resume")
    result = collect(arguments.finished or arguments.folder)
    text = json.dumps({"benchmark": "adaptation", "results": result}, separators=(",", ":"))
    arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
