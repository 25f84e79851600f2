"""Numbers as people read them: counts, losses, differences, spreads over seeds."""

import math
import statistics
from collections.abc import Iterable, Sequence

NOTHING = "–"
"""What stands for a missing number."""


def count_text(value: float | None) -> str:
    """Write a count to three digits, with k, M, G, T or P for the thousands."""
    if value is None or not math.isfinite(value):
        return NOTHING
    for factor, letter in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        # From here on, three digits would round up to the next thousand.
        if abs(value) >= 0.9995 * factor:
            scaled = value / factor
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{letter}"
    return f"{value:.0f}"


def number_text(value: float | None, decimals: int | None = None) -> str:
    """Write a number with a given number of decimals, or to three digits."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if decimals is None:
        decimals = 2 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
    return f"{value:,.{decimals}f}"


def signed_text(value: float) -> str:
    """Write a difference with its sign and three decimals."""
    return f"{value:+.3f}".replace("-", "−")


def spread_text(mean: float | None, spread: float | None, *, signed: bool = False) -> str:
    """Write a mean with its standard deviation, if there is one."""
    if mean is None or not math.isfinite(mean):
        return NOTHING
    text = signed_text(mean) if signed else f"{mean:.3f}"
    return f"{text} ± {spread:.3f}" if spread is not None and math.isfinite(spread) else text


def mean_of(values: Iterable[float | None]) -> float | None:
    """Average the known values; None if there are none."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def spread_of(values: Sequence[float]) -> float | None:
    """Return the standard deviation of a sample; None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None
