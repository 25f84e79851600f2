"""Table sizes: distinct primes at or above a requested number of rows (LongCat: odd numbers)."""

import math
from collections.abc import Sequence

from engram_lm.errors import ConfigError

_LIMIT = 2**63
_SMALL = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97)
_PRIMORIAL = math.prod(_SMALL)
# The first twelve primes decide primality for every number below 3.3e24, so for every one below 2**63.
# Source: Sorenson and Webster, "Strong pseudoprimes to twelve prime bases", 2015.
_WITNESSES = _SMALL[:12]
# The first four are enough below this bound, which holds every published table size.
# Source: Jaeschke, "On strong pseudoprimes to several bases", 1993.
_FEW_WITNESSES_BELOW = 3_215_031_751


def is_prime(number: int) -> bool:
    """Tell whether a number below 2**63 is prime, without chance (deterministic Miller-Rabin).

    Raises:
        ConfigError: The number is 2**63 or more.
    """
    if number >= _LIMIT:
        raise ConfigError(f"primes are searched below 2**63, got {number}; ask for fewer rows")
    if number <= _SMALL[-1]:
        return number in _SMALL
    # One gcd rejects nine candidates in ten before the first power is taken.
    if math.gcd(number, _PRIMORIAL) != 1:
        return False
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for witness in _WITNESSES[:4] if number < _FEW_WITNESSES_BELOW else _WITNESSES:
        power = pow(witness, odd, number)
        if power in (1, number - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % number
            if power == number - 1:
                break
        else:
            return False
    return True


def is_prime_reference(number: int) -> bool:
    """Tell whether a number is prime by trying every divisor."""
    return number >= 2 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def distinct_primes(bases: Sequence[int], count: int, used: set[int]) -> tuple[int, ...]:
    """Take, for each base in turn, the next ``count`` primes at or above it that nobody has taken yet.

    The search restarts at every base and skips what is in ``used``, so equal bases continue where the last one ended.
    The primes that are taken are added to ``used`` in place.

    Raises:
        ConfigError: A prime would be 2**63 or more.

    Source: deepseek-ai/Engram ``engram_demo_v1.py``; deepseek-ai/DeepSeek-V4.1-Flash ``inference/engram.py``.
    """
    taken = []
    for base in bases:
        prime = base - 1
        for _ in range(count):
            prime = _next_unused(prime, used)
            used.add(prime)
            taken.append(prime)
    return tuple(taken)


def distinct_primes_reference(bases: Sequence[int], count: int, used: set[int]) -> tuple[int, ...]:
    """Do what `distinct_primes` does by testing every number by trial division."""
    taken = []
    for base in bases:
        candidate = base
        for _ in range(count):
            while candidate in used or not is_prime_reference(candidate):
                candidate += 1
            used.add(candidate)
            taken.append(candidate)
    return tuple(taken)


def prime_tables(
    bases: Sequence[int], heads: int, num_layers: int, *, shared: bool = False
) -> tuple[tuple[int, ...], ...]:
    """Return the primes of each layer, distinct over all layers, or equal in all where they share one table."""
    if shared:
        return (distinct_primes(bases, heads, set()),) * num_layers
    used: set[int] = set()
    return tuple(distinct_primes(bases, heads, used) for _ in range(num_layers))


def longcat_moduli(base: int, columns: int) -> tuple[int, ...]:
    """Return LongCat's odd moduli. Source: meituan-longcat/LongCat-Flash-Lite modeling code; arXiv 2601.21204."""
    return tuple(base + 2 * column + 1 for column in range(columns))


def _next_unused(number: int, used: set[int]) -> int:
    candidate = 2 if number < 2 else number + 1 + number % 2
    # What is in `used` is known to be prime: asking the set first saves the test.
    while candidate in used or not is_prime(candidate):
        candidate += 1 if candidate == 2 else 2
    return candidate
