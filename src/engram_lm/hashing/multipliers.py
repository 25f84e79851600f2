"""Odd multipliers of the XOR hash: one per layer and look-back distance, from either published generator.

Both bound the draw so that ``canonical token * multiplier`` stays below 2**63.
"""

from typing import Any

import numpy as np

GAMMA = 0x9E3779B97F4A7C15
"""The generator's increment: odd, the golden ratio as a fraction of 2**64."""
_LAYER_STRIDE = 10007
_MASK = 2**64 - 1


def multiplier_bound(vocab_size: int) -> int:
    """Return the exclusive bound of the draw ``r`` behind a multiplier ``2 r + 1``."""
    return max(1, (2**63 - 1) // max(vocab_size, 1) // 2)


def pcg64_multipliers(vocab_size: int, count: int, layer: int, seed: int = 0) -> tuple[int, ...]:
    """Draw the multipliers of the layer with this *id* as the demo and DeepSeek-V4.1 do, from NumPy's PCG64 stream.

    There is one for each look-back distance, the current token included; a shorter draw is a prefix of a longer one.

    Source: deepseek-ai/Engram ``engram_demo_v1.py``; deepseek-ai/DeepSeek-V4.1-Flash ``inference/engram.py``.
    """
    draws = np.random.default_rng(seed + _LAYER_STRIDE * layer).integers(
        0, multiplier_bound(vocab_size), size=count, dtype=np.int64
    )
    return tuple(2 * int(draw) + 1 for draw in draws)


def splitmix64(values: Any) -> np.ndarray:
    """Spread every bit of each uint64 over all others: one step of the generator, its increment included.

    Different values give different results. Source: Steele, Lea and Flood, “Fast Splittable Pseudorandom Number
    Generators”, 2014.
    """
    with np.errstate(over="ignore"):  # everything is meant modulo 2**64
        mixed = np.asarray(values, np.uint64) + np.uint64(GAMMA)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(mixed ^ (mixed >> np.uint64(31)))


def splitmix64_multipliers(vocab_size: int, count: int, ordinal: int, seed: int) -> tuple[int, ...]:
    """Draw the multipliers of the layer at this *place* in the list of memory layers, from 0, as Qwen's PLE does.

    Source: transformers ``models/qwen4_exp/modeling_qwen4_exp.py``.
    """
    base, bound = seed + _LAYER_STRIDE * ordinal, multiplier_bound(vocab_size)
    # The increment is added here and again inside splitmix64: that is what the published model does.
    draws = splitmix64(np.array([(base + GAMMA * (index + 1)) & _MASK for index in range(count)], np.uint64))
    return tuple(2 * (int(draw) % bound) + 1 for draw in draws)
