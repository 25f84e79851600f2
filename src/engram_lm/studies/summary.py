"""What several seeds say together: means, spreads, and differences to the first arm, seed by seed."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engram_lm.page.number_text import mean_of, signed_text, spread_of

__all__ = ["ENOUGH_SEEDS", "headline", "paired_difference", "paired_p_value", "seeds_note", "spread", "summarize"]

ENOUGH_SEEDS = 3
"""Seeds below which a difference is not called one."""


def spread(values: Iterable[float | None]) -> dict[str, float | None]:
    """Mean and sample standard deviation of the finite values; None where there are too few of them."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return {"mean": mean_of(known), "std": spread_of(known)}


def paired_p_value(differences: Sequence[float]) -> float | None:
    """Probability of a mean difference at least this far from 0, were there none: a two-sided paired t-test.

    Args:
        differences: One for each pair.

    Returns:
        None for fewer than two pairs, or where all differences are the same.

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4 (Student's distribution as a finite sum).
    """
    mean, deviation = mean_of(differences), spread_of(differences)
    if mean is None or not deviation:
        return None
    freedom = len(differences) - 1
    angle = math.atan(mean / deviation * math.sqrt(len(differences) / freedom))
    cosine = math.cos(angle)
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    for number in range(2 + odd, freedom, 2):
        term *= cosine**2 * (number - 1) / number
        total += term
    inside = math.sin(abs(angle)) * (total if freedom > 1 else 0.0)
    return 1 - (2 / math.pi * (abs(angle) + inside) if odd else inside)


def paired_difference(values: Mapping[int, float], first: Mapping[int, float]) -> dict[str, Any]:
    """Subtract the first arm's values from another's, for each seed that both have.

    Returns:
        ``mean``, ``std``, ``per_seed`` and ``p_value`` (see `paired_p_value`).
    """
    found = [values[seed] - first[seed] for seed in values if seed in first]
    return {**spread(found), "per_seed": found, "p_value": paired_p_value(found)}


def summarize(values: Mapping[str, Mapping[str, Mapping[int, float | None]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Average over seeds.

    Args:
        values: By arm, measure and seed, the arm that the others are compared with first.

    Returns:
        By arm and measure: ``mean``, ``std`` and, but for the first arm, ``difference`` (see `paired_difference`).
    """
    known = {
        arm: {name: {seed: one for seed, one in found.items() if one is not None} for name, found in measures.items()}
        for arm, measures in values.items()
    }
    first = next(iter(known))
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for arm, measures in known.items():
        summary[arm] = {}
        for name, found in measures.items():
            summary[arm][name] = spread(found.values())
            if arm != first:
                summary[arm][name]["difference"] = paired_difference(found, known[first].get(name, {}))
    return summary


def seeds_note(num_seeds: int) -> str:
    """Say what the number of seeds allows to claim."""
    if num_seeds >= ENOUGH_SEEDS:
        return f"Values are means over {num_seeds} seeds, ± the sample standard deviation."
    seeds = "One seed was" if num_seeds == 1 else f"{num_seeds} seeds were"
    return f"{seeds} run, which is too few to tell a difference from chance; run at least {ENOUGH_SEEDS}."


def headline(result: Mapping[str, Any]) -> str:
    """Say in a sentence which arm is lowest in the first measure, and how sure that is.

    Args:
        result: A result in the format ``engram.study.1``.
    """
    measure = next(iter(result["measures"]))
    arms = {name: arm["summary"][measure] for name, arm in result["arms"].items()}
    known = {name: found["mean"] for name, found in arms.items() if found["mean"] is not None}
    if not known:
        return "No arm was measured"
    first, best = next(iter(arms)), min(known, key=lambda name: known[name])
    about = result["measures"][measure]
    words = f"Lowest {about['title']}: {result['arms'][best]['title']}, {known[best]:.3f} {about['unit']}"
    if best != first and (difference := arms[best]["difference"])["mean"] is not None:
        words += f" ({signed_text(difference['mean'])} to {result['arms'][first]['title']}"
        p_value = difference["p_value"]
        enough = len(difference["per_seed"]) >= ENOUGH_SEEDS and p_value is not None
        words += f", p = {p_value:.2g})" if enough else ", too few seeds to tell it from chance)"
    return words
