"""Keep what a study found: its result for benchmarks/results, and its pictures for docs/pictures.

    engram-lm study allocation --data corpus --out runs/allocation
    python benchmarks/study.py runs/allocation runs/scaling

``corpus`` is what ``benchmarks/text_corpus.py`` makes. The documents' tables are then made by ``benchmarks/tables.py``.
A study of candidates may have been made at several sizes, with several numbers of tokens or with other candidates, by
one command each: a result replaces an earlier one of the same setting only, and the verdict on layers is over all that
have seeds enough.
"""

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from engram_lm.page.figure import save_pictures
from engram_lm.studies.layers.verdict import verdict
from engram_lm.studies.registry import STUDIES, command_class
from engram_lm.studies.result import runs_of
from engram_lm.studies.summary import ENOUGH_SEEDS
from engram_lm.training.run_folder import to_json

ROOT = Path(__file__).resolve().parents[1]
CURVE_POINTS = 20
CORPUS = "corpus"
NO_SETTING = {"seeds", "beside", "data", "other_data", "max_bytes"}
"""Flags that two results of a study of candidates may differ in and still be results of one setting, of which the later
one is kept."""


def collect(folder: Path) -> dict[str, Any]:
    """Read a study's result, without what only that machine's folders mean; a training's curve has a few points."""
    result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    result["command"] = portable(result["command"], has_data=bool(result["settings"].get("data")))
    if result["settings"].get("data"):
        result["settings"]["data"] = [CORPUS]
    for name in ("domains", "beside"):
        if name in result["settings"]:
            result["settings"][name] = [Path(path).name for path in result["settings"][name]]
    if "other_data" in result["settings"]:
        result["settings"]["other_data"] = [_last_name(one) for one in result["settings"]["other_data"]]
    arms = list(result.get("arms", {}).values())
    for number, arm in enumerate(arms):
        first, recipe = arms[0]["recipe"], arm["recipe"]
        folders = {name: [CORPUS] for name in ("sources", "held_out_sources") if recipe["data"].get(name)}
        recipe["data"] |= {**folders, "cache": None}
        for text in recipe["evaluation"].get("texts", ()):
            text["sources"] = [text["name"]]
        if number:
            # Apart from the model, what is the first arm's is not said again.
            arm["recipe"] = {name: value for name, value in recipe.items() if name == "model" or value != first[name]}
    for run in runs_of(result):
        curve = run["train_curve"]
        run["train_curve"] = [[n, round(loss, 4)] for n, loss in curve[:: max(1, len(curve) // CURVE_POINTS)]]
    for look in result.get("looks", ()):
        for found in look.get("cka", {}).values():
            if isinstance(found, dict):
                found.pop("within_rows", None)  # of the model without memory: the same in every map
    return result


def portable(command: str, *, has_data: bool) -> str:
    """A command without the folders of the machine that it ran on."""
    words, kept = shlex.split(command), list[str]()
    skipped = False
    for word in words:
        if word.startswith("--"):
            skipped = word.partition("=")[0] in ("--out", "--resume", "--data", "--mode")
        if not skipped:
            kept.append(_last_name(word))
    return shlex.join([*kept, *(["--data", CORPUS] if has_data else [])])


def _last_name(word: str) -> str:
    """A path, or NAME=PATH, without the folders."""
    name, is_pair, path = word.rpartition("=")
    return f"{name}{is_pair}{Path(path).name}" if path.startswith("/") else word


def kept_beside(earlier: list[dict[str, Any]], result: dict[str, Any]) -> list[dict[str, Any]]:
    """The results that are kept with a new one: it takes the place of one of its setting, or is the last."""
    if "arms" not in result["settings"]:
        return [result]
    places = [number for number, one in enumerate(earlier) if _setting(one) == _setting(result)]
    return [*earlier[: places[0]], result, *earlier[places[0] + 1 :]] if places else [*earlier, result]


def _setting(result: dict[str, Any]) -> dict[str, Any]:
    """The flags of a result that set it apart; a flag that is newer than a result was as it is unless given."""
    known = {**command_class(STUDIES[result["study"]][0])().settings(), **result["settings"]}
    return {name: value for name, value in json.loads(to_json(known)).items() if name not in NO_SETTING}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="finished studies")
    for folder in parser.parse_args().folders:
        result = collect(folder)
        name = result["study"]
        if result["settings"].get("tune"):
            raise SystemExit(f"{folder} holds a choice of rates (--tune) and no comparison")
        out = ROOT / "benchmarks" / "results" / f"study_{name}.json"
        results = kept_beside(json.loads(out.read_text(encoding="utf-8"))["results"] if out.is_file() else [], result)
        if "verdict" in result:
            results[0]["verdict"] = verdict([one for one in results if len(one["seeds"]) >= ENOUGH_SEEDS])
        found = {"benchmark": f"study_{name}", "results": results}
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(out.relative_to(ROOT))
        figures = command_class(STUDIES[name][0])().study().figures
        pictures = ROOT / "docs" / "pictures"
        pictures.mkdir(exist_ok=True)
        for path in save_pictures(figures(results[0]), pictures):
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
