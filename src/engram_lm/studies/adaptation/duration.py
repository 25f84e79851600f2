"""How long an adaptation takes, from a step of each arm that was taken on this machine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engram_lm.studies.adaptation.arms import arm_kind
from engram_lm.studies.adaptation.bench import ArmCost, Bench
from engram_lm.studies.adaptation.recipe import AdaptationRecipe, ArmName


def run_label(name: ArmName, seed: int, rate: float | None) -> str:
    """What a run is called in the folder; with its rate where several are tried."""
    return f"{name}-{seed}" + ("" if rate is None else f"-{rate:g}")


def runs_left(recipe: AdaptationRecipe, out: Path) -> dict[ArmName, int]:
    """Count the runs of each arm that are not finished in the folder of an adaptation."""
    left = {}
    for name in recipe.arms.names:
        kind = arm_kind(name)
        # What is the same as memory but for one thing has the rate that was chosen for memory.
        follows = "memory" in recipe.arms.names and (kind.is_control or kind.transfer)
        rates = () if follows else recipe.rates.of(name)
        first: list[float | None] = list(rates) if len(rates) > 1 else [None]
        labels = [run_label(name, 0, rate) for rate in first]
        labels += [run_label(name, seed, None) for seed in range(1, recipe.train.seeds)]
        left[name] = sum(not (out / "runs" / f"{label}.json").is_file() for label in labels)
    return left


def estimate(
    bench: Bench, plan: Mapping[ArmName, tuple[ArmCost, int]], left: Mapping[ArmName, int]
) -> dict[ArmName, dict[str, Any]]:
    """Say how long each arm takes: ``num_runs`` that are left, ``seconds_per_run`` and ``seconds`` of all of them."""
    found = {}
    for name, (cost, num_steps) in plan.items():
        if left[name]:
            seconds = bench.seconds_of_run(name, cost, num_steps)
            found[name] = {"num_runs": left[name], "seconds_per_run": seconds, "seconds": left[name] * seconds}
    return found


def estimate_lines(
    plan: Mapping[ArmName, tuple[ArmCost, int]], estimates: Mapping[ArmName, Mapping[str, Any]]
) -> list[str]:
    """Write an estimate for people, a line for each arm and one for all of it."""
    lines = []
    for name, found in estimates.items():
        cost, num_steps = plan[name]
        runs = f"{found['num_runs']} runs" if found["num_runs"] > 1 else "1 run"
        lines.append(
            f"{arm_kind(name).title}: {runs} of {num_steps:,} steps of {cost.seconds_per_step:.3g} s and of measuring, "
            f"about {duration_text(found['seconds'])}"
        )
    total = duration_text(sum(found["seconds"] for found in estimates.values()))
    return [*lines, f"all of it takes about {total} on this machine" if lines else "nothing is left to train"]


def duration_text(seconds: float) -> str:
    """Write a duration in two units at most: ``"40 s"``, ``"12 min"``, ``"3 h 20 min"``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
