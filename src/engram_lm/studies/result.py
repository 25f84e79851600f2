"""The result of a study: what every arm came to with every seed, and what the seeds say together."""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engram_lm.page.number_text import NOTHING, signed_text, spread_text
from engram_lm.studies.budget import Cost
from engram_lm.studies.study import Study, TrainedArm
from engram_lm.studies.summary import headline, seeds_note, summarize

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["ARM_COLUMNS", "arm_rows", "mean_curve", "result_table", "study_result"]

_CURVE_POINTS = 100
ARM_COLUMNS = ("Arm", "Mean", "Difference", "p", "Seeds")
"""What a table says of every arm's measure, in order; see `arm_rows`."""


def mean_curve(records: Sequence[Mapping[str, Any]], points: int = _CURVE_POINTS) -> list[tuple[int, float]]:
    """Average the training loss over equal stretches of a run.

    Args:
        records: Lines of its ``metrics.jsonl``.
        points: About how many stretches to make.

    Returns:
        Pairs of the tokens trained on at the end of a stretch, and the mean loss in it, in nats per token.
    """
    known = [line for line in records if line.get("loss") is not None]
    size = max(1, len(known) // points)
    stretches = [known[start : start + size] for start in range(0, len(known), size)]
    return [(stretch[-1]["num_tokens"], statistics.fmean(line["loss"] for line in stretch)) for stretch in stretches]


def study_result(study: Study, costs: Mapping[str, Cost], seeds: Sequence[Mapping[str, TrainedArm]]) -> dict[str, Any]:
    """Measure everything that was trained, and put it together.

    Returns:
        A result in the format ``engram.study.1``, without the facts of the run.
    """
    measured = {arm.name: [_run(study, seed[arm.name]) for seed in seeds] for arm in study.arms}
    values = {
        name: {
            measure.name: {run["seed"]: run["measures"].get(measure.name) for run in runs} for measure in study.measures
        }
        for name, runs in measured.items()
    }
    summary = summarize(values)
    return {
        "study": study.name,
        "question": study.question,
        "budget": dataclasses.asdict(study.budget),
        "measures": {one.name: {"title": one.title, "unit": one.unit} for one in study.measures},
        "seeds": list(range(len(seeds))),
        "arms": {
            arm.name: {
                "title": arm.title,
                "about": arm.about,
                "x": arm.x,
                "is_control": arm.is_control,
                "cost": dataclasses.asdict(costs[arm.name]),
                "recipe": arm.recipe.to_dict(),
                "runs": measured[arm.name],
                "summary": summary[arm.name],
            }
            for arm in study.arms
        },
    }


def _run(study: Study, trained: TrainedArm) -> dict[str, Any]:
    measures = {} if trained.failed is not None else {one.name: one.of(trained) for one in study.measures}
    result = trained.result
    return {
        "seed": trained.seed,
        "failed": trained.failed,
        "measures": measures,
        "num_steps": result.get("num_steps"),
        "tokens": result.get("num_tokens"),
        "seconds": sum(line["seconds"] for line in trained.records),
        "train_curve": mean_curve(trained.records),
    }


def arm_rows(result: Mapping[str, Any], measure: str) -> list[list[str]]:
    """Describe a measure of every arm: a cell for each of `ARM_COLUMNS`.

    Args:
        result: A result in the format ``engram.study.1``.
        measure: Name of the measure.
    """
    rows = []
    for arm in result["arms"].values():
        found, failed = arm["summary"][measure], sum(run["failed"] is not None for run in arm["runs"])
        difference, p_value = found.get("difference") or {}, (found.get("difference") or {}).get("p_value")
        rows.append(
            [
                arm["title"],
                spread_text(found["mean"], found["std"]),
                NOTHING if difference.get("mean") is None else signed_text(difference["mean"]),
                NOTHING if p_value is None else f"{p_value:.2g}",
                f"{len(arm['runs'])}" + (f", {failed} diverged" if failed else ""),
            ]
        )
    return rows


def result_table(result: Mapping[str, Any]) -> Iterable["Table"]:
    """Lay out a result for a terminal, a table for each measure.

    Args:
        result: A result in the format ``engram.study.1``.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    for number, (name, about) in enumerate(result["measures"].items()):
        title = headline(result) if number == 0 else about["title"].capitalize()
        table = Table(
            box=box.SIMPLE_HEAD,
            title=Text(title, style="bold"),
            title_justify="left",
            caption=f"{about['title'].capitalize()}, {about['unit']}. {seeds_note(len(result['seeds']))}",
            caption_justify="left",
        )
        for index, column in enumerate(ARM_COLUMNS):
            table.add_column(column, justify="right" if index else "left")
        for row in arm_rows(result, name):
            table.add_row(*map(Text, row))
        yield table
