"""The result of a study: what every arm came to with every seed."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from engram_lm.studies.budget import arm_cost
from engram_lm.studies.diagnostics import diagnose_models
from engram_lm.studies.study import Study, TrainedArm
from engram_lm.studies.summary import paired_difference, spread
from engram_lm.training.data.text import TrainingText


def run_record(trained: TrainedArm, *, curve_points: int) -> dict[str, Any]:
    """What a result says of one run; losses are in nats per token, ``loss`` on held-out text.

    The curve of training loss has about ``curve_points`` points of tokens and loss, each the mean of a stretch.
    """
    held_out = trained.result.get("held_out") or {}
    steps = [line for line in trained.records if line["step"]]
    known = [line for line in steps if line["loss"] is not None]
    size = max(1, len(known) // curve_points)
    stretches = [known[start : start + size] for start in range(0, len(known), size)]
    return {
        "seed": trained.seed,
        "failed": trained.failed,
        "dtype": trained.result.get("dtype"),
        "loss": held_out.get("loss"),
        "num_evaluated_tokens": held_out.get("num_tokens"),
        "num_steps": len(steps),
        "tokens": steps[-1]["num_tokens"] if steps else 0,
        "seconds": sum(line["seconds"] for line in steps),
        "train_curve": [
            (part[-1]["num_tokens"], statistics.fmean(line["loss"] for line in part)) for part in stretches
        ],
    }


def runs_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List every run of a study's result: of each arm, or of each seed where a study goes on with what it trained."""
    if "arms" in result:
        return [run for arm in result["arms"].values() for run in arm["runs"]]
    return [run for seed in result["seeds"] for part in ("short", "long") for run in seed[part].values()]


def study_result(study: Study, seeds: Sequence[Mapping[str, TrainedArm]]) -> dict[str, Any]:
    """Measure everything that was trained, given as the arms of each seed by name.

    Returns:
        A result in the format ``engram.study.1``, without the facts of the run and the settings. The ``summary`` of an
        arm gives, for each measure, ``mean``, ``std`` and, but for the first arm of a group, ``difference``: see
        `paired_difference`.
    """
    arms: dict[str, Any] = {}
    firsts: dict[tuple[str, str], dict[int, float | None]] = {}
    for arm in study.arms:
        runs = []
        for seed in seeds:
            trained = seed[arm.name]
            measures = {} if trained.failed is not None else {one.name: one.of(trained) for one in study.measures}
            runs.append({**run_record(trained, curve_points=100), "measures": measures})
        summary: dict[str, dict[str, Any]] = {}
        for one in study.measures:
            values = {run["seed"]: run["measures"].get(one.name) for run in runs}
            summary[one.name] = {**spread(values.values())}
            first = firsts.setdefault((arm.group, one.name), values)
            if first is not values:
                summary[one.name]["difference"] = paired_difference(values, first)
        arms[arm.name] = {
            "title": arm.title,
            "about": arm.about,
            "x": arm.x,
            "group": arm.group,
            "is_control": arm.is_control,
            "cost": dataclasses.asdict(arm_cost(arm)),
            "recipe": arm.recipe.to_dict(),
            "runs": runs,
            "summary": summary,
        }
    return {
        "study": study.name,
        "question": study.question,
        "budget": dataclasses.asdict(study.budget),
        "measures": {one.name: {"title": one.title, "unit": one.unit} for one in study.measures},
        "seeds": list(range(len(seeds))),
        "arms": arms,
    }


def arm_diagnostics(arms: Mapping[str, TrainedArm], text: TrainingText) -> dict[str, Any] | None:
    """Say for which tokens the first arm of a seed pays, and the best of those that share its text; by their titles.

    None where no arm was trained to its end, or nothing is held out.
    """
    losses = {
        name: float(loss)
        for name, arm in arms.items()
        if (loss := (arm.result.get("held_out") or {}).get("loss")) is not None
    }
    trained = list(losses)
    if not trained or text.held_out is None:
        return None
    first, recipe = arms[trained[0]], arms[trained[0]].arm.recipe
    others = [
        name
        for name in trained[1:]
        if (other := arms[name].arm.recipe).data == recipe.data and other.tokenizer == recipe.tokenizer
    ]
    chosen = [first, *(arms[name] for name in sorted(others, key=losses.__getitem__)[:1])]
    loaded = {arm.arm.title: arm.load() for arm in chosen}
    tokenizer = loaded[first.arm.title][1]
    return diagnose_models({title: model for title, (model, _) in loaded.items()}, tokenizer, text, recipe)
