"""What several seeds say together: means, spreads, and differences to the first arm, seed by seed."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engram_lm.page.number_text import mean_of, spread_of

__all__ = ["ENOUGH_SEEDS", "paired_difference", "paired_p_value", "seeds_note", "spread"]

ENOUGH_SEEDS = 3
"""Seeds below which a difference is not told from chance."""


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
    angle = abs(math.atan(mean / deviation * math.sqrt(len(differences) / freedom)))
    odd = freedom % 2
    term = total = math.cos(angle) if odd else 1.0
    for number in range(2 + odd, freedom, 2):
        term *= math.cos(angle) ** 2 * (number - 1) / number
        total += term
    inside = math.sin(angle) * total if freedom > 1 else 0.0
    return 1 - (2 / math.pi * (angle + inside) if odd else inside)


def paired_difference(values: Mapping[int, float | None], first: Mapping[int, float | None]) -> dict[str, Any]:
    """Subtract the first arm's values from another's, for each seed in which both are known.

    Returns:
        ``mean``, ``std``, ``per_seed`` and ``p_value`` (see `paired_p_value`).
    """
    pairs = [(values[seed], first.get(seed)) for seed in values]
    found = [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]
    return {**spread(found), "per_seed": found, "p_value": paired_p_value(found)}


def seeds_note(num_seeds: int) -> str:
    """Say what the number of seeds allows to claim."""
    if num_seeds >= ENOUGH_SEEDS:
        return f"Values are means over {num_seeds} seeds, ± the sample standard deviation."
    seeds = "One seed was" if num_seeds == 1 else f"{num_seeds} seeds were"
    return f"{seeds} run, which is too few to tell a difference from chance; run at least {ENOUGH_SEEDS}."
