"""What several seeds say together: means, spreads, and differences to the first arm, seed by seed."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engram_lm.page.number_text import NOTHING, mean_of, signed_text, spread_of, spread_text
from engram_lm.studies.page import Finding, Table

_COLUMNS = ("Arm", "Mean", "Difference", "p", "Seeds")

ENOUGH_SEEDS = 3
"""Seeds below which a difference is not told from chance."""


def spread(values: Iterable[float | None]) -> dict[str, float | None]:
    """Mean and sample standard deviation of the finite values; None where there are too few of them."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return {"mean": mean_of(known), "std": spread_of(known)}


def paired_p_value(differences: Sequence[float]) -> float | None:
    """Probability of a mean difference at least this far from 0, were there none: a two-sided paired t-test.

    It is None for fewer than two pairs, and where all differences are the same.

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4 (Student's distribution as a finite sum).
    """
    mean, deviation = mean_of(differences), spread_of(differences)
    if mean is None or not deviation:
        return None
    freedom = len(differences) - 1
    angle = abs(math.atan(mean / deviation * math.sqrt(len(differences) / freedom)))
    odd = freedom % 2
    term = total = math.cos(angle) if odd else 1.0
    for number in range(2 + odd, freedom, 2):
        term *= math.cos(angle) ** 2 * (number - 1) / number
        total += term
    inside = math.sin(angle) * total if freedom > 1 else 0.0
    return 1 - (2 / math.pi * (angle + inside) if odd else inside)


def paired_difference(values: Mapping[int, float | None], first: Mapping[int, float | None]) -> dict[str, Any]:
    """Subtract the first arm's values from another's, for each seed in which both are known; see `paired_p_value`."""
    pairs = [(values[seed], first.get(seed)) for seed in values]
    found = [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]
    return {**spread(found), "per_seed": found, "p_value": paired_p_value(found)}


def seeds_note(num_seeds: int) -> str:
    """Say what the number of seeds allows to claim."""
    if num_seeds >= ENOUGH_SEEDS:
        return f"Values are means over {num_seeds} seeds, ± the sample standard deviation."
    seeds = "One seed was" if num_seeds == 1 else f"{num_seeds} seeds were"
    return f"{seeds} run, which is too few to tell a difference from chance; run at least {ENOUGH_SEEDS}."


def study_finding(result: Mapping[str, Any]) -> Finding:
    """Say which arm of an ``engram.study.1`` is lowest in the first measure and how sure that is, and list all."""
    arms = list(result["arms"].values())
    several = len({arm.get("group") for arm in arms}) > 1
    first = "the first arm of the group" if several else arms[0]["title"]
    tables = [
        Table(
            title=about["title"].capitalize(),
            columns=_COLUMNS,
            rows=[_row(arm, name) for arm in arms],
            note=f"In {about['unit']}. Difference: to {first}, seed by seed; p: two-sided, of a paired t-test.",
        )
        for name, about in result["measures"].items()
    ]
    return Finding(headline=_headline(result), detail=seeds_note(len(result["seeds"])), tables=tables)


def difference_cells(difference: Mapping[str, Any] | None) -> tuple[str, str]:
    """Write a `paired_difference` and its p-value; None is that of the first arm, which has none."""
    if difference is None:
        return NOTHING, NOTHING
    p_value = difference["p_value"]
    return (
        spread_text(difference["mean"], difference["std"], signed=True),
        NOTHING if p_value is None else f"{p_value:.2g}",
    )


def _row(arm: Mapping[str, Any], measure: str) -> list[str]:
    found, failed = arm["summary"][measure], sum(run["failed"] is not None for run in arm["runs"])
    return [
        arm["title"],
        spread_text(found["mean"], found["std"]),
        *difference_cells(found.get("difference")),
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
