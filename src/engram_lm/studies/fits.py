"""Quantities of curves fitted to a sweep, such as a slope or an optimum, with intervals from the errors of its runs."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from engram_lm.page.number_text import NOTHING

_DRAWS = 4000
_LEVEL = 0.95
"""Probability that an interval holds the true value."""

Quantity = Callable[[np.ndarray], np.ndarray]
"""Computes a number from the mean losses of all arms, float ``[draws, arms]`` to ``[draws]``."""


@dataclasses.dataclass(frozen=True, eq=False)
class Estimate:
    """A quantity of a fitted curve."""

    value: float
    """The quantity of the means over seeds."""
    draws: np.ndarray
    """What it may as well have been, float ``[draws]``; empty where there are too few runs to know."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """The middle 95 % of the draws."""
        if not self.draws.size:
            return None
        low, high = np.quantile(self.draws, ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2))
        return float(low), float(high)

    def minus(self, other: "Estimate") -> "Estimate":
        """Subtract the same quantity of another sweep, whose errors are its own."""
        both = self.draws.size and other.draws.size
        return Estimate(self.value - other.value, self.draws - other.draws if both else np.empty(0))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: ``value`` and ``interval``, the latter None where it is not known."""
        interval = self.interval
        return {"value": self.value, "interval": None if interval is None else list(interval)}


def estimate(losses: np.ndarray, quantity: Quantity, *, seed: int = 0) -> Estimate:
    """Compute a quantity of the mean losses, and what it is when the runs' own errors are drawn again.

    The error of a run is what is left of its loss after the means of its seed and of its arm: what all arms of a
    seed share says nothing about differences between arms. Errors are drawn with replacement from all runs, because the
    few of one arm say little about their size, and scaled by the degrees of freedom as Student's t is.

    Args:
        losses: Float ``[seeds, arms]``, finite.
        quantity: What to compute.
        seed: Decides the draws. Two independent sweeps whose estimates are subtracted need different ones.
    """
    num_seeds, num_arms = losses.shape
    means = losses.mean(0)
    value = float(quantity(means[None])[0])
    freedom = (num_seeds - 1) * (num_arms - 1)
    if not freedom:
        return Estimate(value, np.empty(0))
    errors = losses - losses.mean(1, keepdims=True) - means + losses.mean()
    errors *= math.sqrt(losses.size / freedom)
    chance = np.random.default_rng(seed)
    drawn = chance.choice(errors.ravel(), size=(_DRAWS, num_seeds, num_arms)).mean(1)
    widened = np.sqrt(freedom / chance.chisquare(freedom, size=(_DRAWS, 1)))
    return Estimate(value, quantity(means + drawn * widened))


def slope(x: Sequence[float] | np.ndarray) -> Quantity:
    """The slope of a straight line through points at ``x``."""
    places = np.asarray(x, dtype=float)

    def of(means: np.ndarray) -> np.ndarray:
        return np.polyfit(places, means.T, 1)[0]

    return of


def bend(x: Sequence[float] | np.ndarray) -> Quantity:
    """The second derivative of a parabola through points at ``x``, above 0 where a fall becomes flatter."""
    places = np.asarray(x, dtype=float)

    def of(means: np.ndarray) -> np.ndarray:
        return 2 * np.polyfit(places, means.T, 2)[0]

    return of


def difference(first: int, second: int) -> Quantity:
    """The loss of one arm minus that of another, given by their places."""
    return lambda means: means[:, second] - means[:, first]


def lowest_of_parabola(x: Sequence[float] | np.ndarray) -> Quantity:
    """Where a parabola through points at ``x`` is lowest, not outside of them."""
    places = np.asarray(x, dtype=float)

    def of(means: np.ndarray) -> np.ndarray:
        square, line, _ = np.polyfit(places, means.T, 2)
        low, high = places.min(), places.max()
        ends = np.where(square * (low + high) + line > 0, low, high)  # of a parabola that opens downwards
        with np.errstate(divide="ignore", invalid="ignore"):
            inside = np.clip(-line / (2 * square), low, high)
        return np.where(square > 0, inside, ends)

    return of


def best_share(shares: Sequence[float], *, num_chosen: float, num_experts: float) -> Quantity:
    """The experts' share of the sparse budget at which the sum of two logarithms is lowest.

    Loss is taken to be ``c - a log(experts) - b log(table)``: each kind of parameter alone helps by a constant amount
    whenever it is doubled, which is how both scale. Then the best division gives experts ``a / (a + b)`` of all of it.

    Args:
        shares: The experts' share of each arm, above 0 (or 0) and below 1.
        num_chosen: Experts that a token visits, which the model has at a share of 0.
        num_experts: Experts at a share of 1.
    """
    freed = num_experts - num_chosen
    share = np.asarray(shares, dtype=float)
    experts, table = num_chosen + freed * share, freed * (1 - share)
    columns = np.stack([np.ones_like(share), -np.log(experts), -np.log(table)], axis=1)

    def of(means: np.ndarray) -> np.ndarray:
        _, of_experts, of_table = np.linalg.lstsq(columns, means.T, rcond=None)[0]
        of_experts, of_table = np.maximum(of_experts, 0), np.maximum(of_table, 0)
        with np.errstate(invalid="ignore"):
            part = np.where(of_experts + of_table > 0, of_experts / (of_experts + of_table), 1.0)
        return np.clip((part * num_experts - num_chosen) / freed, 0, 1)

    return of


def is_whole(arm: Mapping[str, Any]) -> bool:
    """Whether an arm of a result has a held-out loss in every seed."""
    return all(run["measures"].get("loss") is not None for run in arm["runs"])


def arm_losses(result: Mapping[str, Any], names: Sequence[str]) -> np.ndarray | None:
    """Take the held-out losses of some arms out of a result, ``[seeds, arms]``, of the seeds in which all have one.

    None where there is no such seed.
    """
    runs = [{run["seed"]: run["measures"].get("loss") for run in result["arms"][name]["runs"]} for name in names]
    rows = [[run.get(seed) for run in runs] for seed in result["seeds"]]
    whole = [row for row in rows if all(loss is not None and math.isfinite(loss) for loss in row)]
    return np.array(whole) if whole else None


def estimate_text(found: Mapping[str, Any] | None, form: str = ".2f") -> str:
    """Write what `Estimate.to_dict` gave, with its interval."""
    if found is None:
        return NOTHING
    interval = found["interval"]
    return f"{found['value']:{form}}" + (f" ({interval[0]:{form}} to {interval[1]:{form}})" if interval else "")
