"""The splitmix64 generator's scrambling of 64-bit integers."""

from typing import Any

import numpy as np

__all__ = ["GAMMA", "splitmix64"]

GAMMA = 0x9E3779B97F4A7C15
"""The generator's increment: odd, the golden ratio as a fraction of 2**64."""


def splitmix64(values: Any) -> np.ndarray:
    """Spread every bit of each value over all others: one step of the generator, its increment included.

    Args:
        values: uint64 of any shape, or one integer below 2**64.

    Returns:
        uint64 of the same shape; different values give different results.

    Source: Steele, Lea and Flood, “Fast Splittable Pseudorandom Number Generators”, 2014.
    """
    with np.errstate(over="ignore"):  # everything is meant modulo 2**64
        mixed = np.asarray(values, np.uint64) + np.uint64(GAMMA)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(mixed ^ (mixed >> np.uint64(31)))
