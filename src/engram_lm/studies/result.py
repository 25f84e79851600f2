"""The result of a study: what every arm came to with every seed, and what the seeds say together."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from engram_lm.page.number_text import NOTHING, signed_text, spread_text
from engram_lm.studies.budget import price
from engram_lm.studies.page import Finding, Table
from engram_lm.studies.study import Study, TrainedArm
from engram_lm.studies.summary import ENOUGH_SEEDS, paired_difference, seeds_note, spread

__all__ = ["run_record", "study_finding", "study_result"]

_COLUMNS = ("Arm", "Mean", "Difference", "p", "Seeds")


def run_record(trained: TrainedArm, *, curve_points: int) -> dict[str, Any]:
    """What a result says of one run.

    Args:
        trained: The run.
        curve_points: About how many points its curve of training loss gets, each the mean of a stretch.

    Returns:
        ``seed``, ``failed`` (None where training did not diverge), ``loss`` (held-out, in nats per token),
        ``num_evaluated_tokens``, ``num_steps``, ``tokens``, ``seconds`` and ``train_curve``: pairs of tokens and loss.
    """
    held_out = trained.result.get("held_out") or {}
    steps = [line for line in trained.records if line["step"]]
    known = [line for line in steps if line["loss"] is not None]
    size = max(1, len(known) // curve_points)
    stretches = [known[start : start + size] for start in range(0, len(known), size)]
    return {
        "seed": trained.seed,
        "failed": trained.failed,
        "loss": held_out.get("loss"),
        "num_evaluated_tokens": held_out.get("num_tokens"),
        "num_steps": len(steps),
        "tokens": steps[-1]["num_tokens"] if steps else 0,
        "seconds": sum(line["seconds"] for line in steps),
        "train_curve": [
            (part[-1]["num_tokens"], statistics.fmean(line["loss"] for line in part)) for part in stretches
        ],
    }


def study_result(study: Study, seeds: Sequence[Mapping[str, TrainedArm]]) -> dict[str, Any]:
    """Measure everything that was trained, and put it together.

    Args:
        study: What was asked.
        seeds: For each seed, its arms by name.

    Returns:
        A result in the format ``engram.study.1``, without the facts of the run and the settings. The ``summary`` of an
        arm gives, for each measure, ``mean``, ``std`` and, but for the first arm, ``difference``: see
        `paired_difference`.
    """
    arms: dict[str, Any] = {}
    values: dict[str, dict[str, dict[int, float | None]]] = {}
    for arm in study.arms:
        runs = []
        for seed in seeds:
            trained = seed[arm.name]
            measures = {} if trained.failed is not None else {one.name: one.of(trained) for one in study.measures}
            runs.append({**run_record(trained, curve_points=100), "measures": measures})
        values[arm.name] = {
            one.name: {run["seed"]: run["measures"].get(one.name) for run in runs} for one in study.measures
        }
        summary: dict[str, dict[str, Any]] = {
            name: {**spread(found.values())} for name, found in values[arm.name].items()
        }
        if arm is not study.arms[0]:
            for name, first in values[study.arms[0].name].items():
                summary[name]["difference"] = paired_difference(values[arm.name][name], first)
        arms[arm.name] = {
            "title": arm.title,
            "about": arm.about,
            "x": arm.x,
            "is_control": arm.is_control,
            "cost": dataclasses.asdict(price(arm.recipe)),
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


def study_finding(result: Mapping[str, Any]) -> Finding:
    """Say which arm is lowest in the first measure and how sure that is, and list all measures.

    Args:
        result: A result in the format ``engram.study.1``.
    """
    tables = [
        Table(
            title=about["title"].capitalize(),
            columns=_COLUMNS,
            rows=[_row(arm, name) for arm in result["arms"].values()],
            note=f"In {about['unit']}. Difference: to {next(iter(result['arms'].values()))['title']}, seed by seed; p: "
            "two-sided, of a paired t-test.",
        )
        for name, about in result["measures"].items()
    ]
    return Finding(headline=_headline(result), detail=seeds_note(len(result["seeds"])), tables=tables)


def _row(arm: Mapping[str, Any], measure: str) -> list[str]:
    found, failed = arm["summary"][measure], sum(run["failed"] is not None for run in arm["runs"])
    difference = found.get("difference") or {"mean": None, "std": None, "p_value": None}
    return [
        arm["title"],
        spread_text(found["mean"], found["std"]),
        spread_text(difference["mean"], difference["std"], signed=True),
        NOTHING if difference["p_value"] is None else f"{difference['p_value']:.2g}",
        f"{len(arm['runs'])}" + (f", {failed} diverged" if failed else ""),
    ]


def _headline(result: Mapping[str, Any]) -> str:
    measure, about = next(iter(result["measures"].items()))
    summaries = {name: arm["summary"][measure] for name, arm in result["arms"].items()}
    known = {name: found["mean"] for name, found in summaries.items() if found["mean"] is not None}
    if not known:
        return "No arm was trained to its end"
    first, best = next(iter(summaries)), min(known, key=lambda name: known[name])
    words = f"Lowest {about['title']}: {result['arms'][best]['title']}, {known[best]:.3f} {about['unit']}"
    difference = summaries[best].get("difference")
    if difference is None or difference["mean"] is None:
        return words
    sure = f"p = {difference['p_value']:.2g}" if difference["p_value"] is not None else "p unknown"
    if len(difference["per_seed"]) < ENOUGH_SEEDS:
        sure = "too few seeds to tell it from chance"
    return f"{words} ({signed_text(difference['mean'])} to {result['arms'][first]['title']}, {sure})"
