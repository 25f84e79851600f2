"""Twin, published values and limits of the prime search."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_lm.errors import ConfigError
from engram_lm.hashing.primes import (
    distinct_primes,
    distinct_primes_reference,
    is_prime,
    is_prime_reference,
    longcat_moduli,
    prime_tables,
)


def test_small_numbers_are_prime_exactly_when_no_divisor_divides_them():
    assert [n for n in range(-3, 20_000) if is_prime(n)] == [n for n in range(-3, 20_000) if is_prime_reference(n)]


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.integers(2**20, 2**36))
def test_large_numbers_agree_with_trial_division(number):
    assert is_prime(number) == is_prime_reference(number)


# Strong pseudoprimes to the bases 2; 2, 3; 2, 3, 5; 2, 3, 5, 7 and 2..37 up to the last below 2**63.
@pytest.mark.parametrize("composite", [2047, 1373653, 25326001, 3215031751, 3825123056546413051, (2**31 - 1) ** 2])
def test_strong_pseudoprimes_are_composite(composite):
    assert not is_prime(composite)


@pytest.mark.parametrize("prime", [2**31 - 1, 2**61 - 1, 9223372036854775783, 3215031767])
def test_known_large_primes_are_prime(prime):
    assert is_prime(prime)


def test_primes_beyond_int64_are_refused():
    with pytest.raises(ConfigError, match="below 2\\*\\*63"):
        distinct_primes((9223372036854775783,), 2, set())


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=4), st.integers(1, 9), st.sets(st.sampled_from([2, 3, 5, 401]))
)
def test_distinct_primes_equal_their_plain_twin(bases, count, used):
    taken, taken_plain = set(used), set(used)
    for _ in range(2):
        assert distinct_primes(bases, count, taken) == distinct_primes_reference(bases, count, taken_plain)
    assert taken == taken_plain


# The demo, DeepSeek-V4.1, Qwen's PLE, and the paper's Engram-27B and Engram-40B (docs/paper.md).
@pytest.mark.parametrize(
    ("bases", "heads", "firsts", "lasts", "sums"),
    [
        ((646400,) * 2, 8, (646403, 646631), (646619, 646879), (10344164, 10348242)),
        ((16000000,) * 3, 8, (16000057, 16000477), (16000463, 16000889), (384006168, 384016682)),
        ((20000000,) * 2, 8, (20000003,), (20000171,), (320001446,)),
        ((2262400,) * 2, 8, (2262409, 2262629), (2262619, 2262859), (36199972, 36204260)),
        ((7239680,) * 2, 8, (7239691, 7239979), (7239961, 7240183), (115837464, 115841428)),
    ],
)
def test_published_primes_are_found(bases, heads, firsts, lasts, sums):
    tables = prime_tables(bases, heads, len(sums))
    assert tuple(row[0] for row in tables) == firsts
    assert tuple(row[-1] for row in tables) == lasts
    assert tuple(map(sum, tables)) == sums


def test_the_deepseek_v41_tables_are_found_in_a_tenth_of_a_second():
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        prime_tables((16_000_000,) * 3, 8, 2)
        best = min(best, time.perf_counter() - start)
    assert best < 0.1


def test_longcat_moduli_are_the_published_odd_numbers():
    moduli = longcat_moduli(78 * 131072, 12)
    assert (moduli[0], moduli[1], moduli[-1], sum(moduli)) == (10223617, 10223619, 10223639, 122683536)
