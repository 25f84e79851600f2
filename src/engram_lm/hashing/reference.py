"""The whole hash in plain Python, one position at a time: what the fast paths mean and are tested against."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engram_lm.hashing.spec import HashSpec

__all__ = ["distinct_primes_reference", "encode_reference", "is_prime_reference", "rows_reference", "sight_reference"]


def is_prime_reference(number: int) -> bool:
    """Tell whether a number is prime by trying every divisor."""
    return number >= 2 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def distinct_primes_reference(bases: Sequence[int], count: int, used: set[int]) -> tuple[int, ...]:
    """Take, per base, the next ``count`` primes at or above it that are not in ``used``; add them to it in place."""
    taken = []
    for base in bases:
        candidate = base
        for _ in range(count):
            while candidate in used or not is_prime_reference(candidate):
                candidate += 1
            used.add(candidate)
            taken.append(candidate)
    return tuple(taken)


def encode_reference(
    spec: "HashSpec",
    tokens: Sequence[int],
    attention_mask: Sequence[int] | None = None,
    position_ids: Sequence[int] | None = None,
) -> tuple[list[int | None], list[bool]]:
    """Map one sequence of raw ids to canonical ids and find its segments.

    Returns:
        The canonical id of each position, None where it is dead; and whether a segment starts at it.
    """
    assert spec.token_map is not None
    canonical: list[int | None] = []
    starts = []
    for t, token in enumerate(tokens):
        dead = token in spec.segments.dead_tokens or (attention_mask is not None and attention_mask[t] == 0)
        canonical.append(None if dead else int(spec.token_map.canonical[token]))
        starts_here = t > 0 and tokens[t - 1] in spec.segments.end_tokens
        if spec.segments.positions and position_ids is not None:
            starts_here |= position_ids[t] == 0 if t == 0 else position_ids[t] <= position_ids[t - 1]
        starts.append(starts_here)
    return canonical, starts


def sight_reference(tokens: Sequence[int | None], starts: Sequence[bool], t: int, distance: int, fill: int) -> int:
    """Return what position ``t`` sees ``distance`` tokens back: a canonical id, or the fill where it sees nothing."""
    for s in range(distance + 1):
        if t - s < 0 or tokens[t - s] is None:
            return fill
        if s > 0 and starts[t - s + 1]:
            return fill
    token = tokens[t - distance]
    assert token is not None
    return token


def rows_reference(
    spec: "HashSpec", tokens: Sequence[int | None], starts: Sequence[bool], layer: int
) -> list[list[int]]:
    """Compute the rows of one whole sequence in one layer.

    Args:
        spec: The hash.
        tokens: Canonical ids, None where a position is dead.
        starts: Whether a segment starts at each position.
        layer: The layer's published id.

    Returns:
        Per position, one row per column, offsets included.

    Source: deepseek-ai/Engram ``engram_demo_v1.py`` (XOR hash); meituan-longcat/LongCat-Flash-Lite modeling code and
    arXiv 2601.21204 (polynomial hash).
    """
    assert spec.fill is not None
    index = spec.layers.index(layer)
    sequence = []
    for t in range(len(tokens)):
        rows, offset = [], 0
        for column, prime in enumerate(spec.primes[index]):
            order = spec.orders[column // spec.num_heads]
            seen = [sight_reference(tokens, starts, t, s, spec.fill) for s in range(order)]
            mix = 0
            for s, token in enumerate(seen):
                if spec.variant == "longcat":
                    mix += token * spec.vocab_size**s
                else:
                    mix ^= token * spec.multipliers[index][s]
            rows.append(mix % prime + offset)
            offset += prime
        sequence.append(rows)
    return sequence
