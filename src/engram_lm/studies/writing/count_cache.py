"""A cache that counts what a text says and has no gradients: the control of everything that learns while it runs."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from engram_lm.errors import check_whole

# Dimension key: N predicted tokens.

_SHARES = np.linspace(0.0, 0.99, 100)
"""Weights to choose from."""


class CacheReading(NamedTuple):
    """What a cache says of some tokens."""

    probabilities: np.ndarray
    """The probability of each, float64 ``[N]``."""
    known: np.ndarray
    """How long the longest context is of which the cache has counts: 0 where it has none at all, 1 for counts of single
    tokens, up to the cache's order; int64 ``[N]``."""


class _Followers:
    """What came after one context, and how often."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.total = 0


class CountCache:
    """An interpolated N-gram model of what has been read so far.

    With c(h, w) occurrences of token w after context h, c(h) of them in all and T(h) different ones,

        ``p(w | h) = (c(h, w) + T(h) p(w | h')) / (c(h) + T(h))``

    where h' is h without its oldest token, and every token is as likely as any other where nothing was counted.

    Args:
        vocab_size: Tokens that there are.
        order: Tokens of an N-gram at most, from 1.

    Source: Witten and Bell, “The zero-frequency problem”, IEEE Transactions on Information Theory 37, 1991, method C;
    as a cache beside a model: Kuhn and De Mori, “A cache-based natural language model for speech recognition”, 1990.
    """

    def __init__(self, vocab_size: int, order: int) -> None:
        check_whole(at_least=1, vocab_size=vocab_size, order=order)
        self.vocab_size, self.order = vocab_size, order
        self._followers: dict[tuple[int, ...], _Followers] = {}

    @property
    def num_counts(self) -> int:
        """How many counts it holds: different N-grams of all orders."""
        return sum(len(one.counts) for one in self._followers.values())

    def read(self, tokens: Sequence[int] | np.ndarray, first: int = 1) -> CacheReading:
        """Say how likely each token from the place ``first`` on is after those before it; nothing is counted."""
        words = list(map(int, tokens))
        found = [self._probability(words, place) for place in range(first, len(words))]
        probabilities, known = zip(*found, strict=True) if found else ((), ())
        return CacheReading(np.array(probabilities, dtype=np.float64), np.array(known, dtype=np.int64))

    def add(self, tokens: Sequence[int] | np.ndarray, first: int = 1) -> None:
        """Count the tokens from the place ``first`` on, each after those before it."""
        words = list(map(int, tokens))
        for place in range(first, len(words)):
            for length in range(min(place, self.order - 1) + 1):
                followers = self._followers.setdefault(tuple(words[place - length : place]), _Followers())
                followers.counts[words[place]] = followers.counts.get(words[place], 0) + 1
                followers.total += 1

    def _probability(self, words: list[int], place: int) -> tuple[float, int]:
        probability, known = 1 / self.vocab_size, 0
        for length in range(min(place, self.order - 1) + 1):
            followers = self._followers.get(tuple(words[place - length : place]))
            if followers is None:  # then no longer context was counted either
                break
            different = len(followers.counts)
            count = followers.counts.get(words[place], 0)
            probability = (count + different * probability) / (followers.total + different)
            known = length + 1
        return probability, known


def follow(cache: CountCache, tokens: Sequence[int] | np.ndarray, *, chunk: int) -> CacheReading:
    """Read a stream as a model does that is updated after every chunk: say how likely its tokens are, then count them.

    Args:
        cache: What was counted before; the stream is added to it.
        tokens: The stream; all but the first are predicted.
        chunk: Tokens between two updates. With 1 a token is counted before the next one is read.
    """
    parts = []
    for start in range(1, len(tokens), chunk):
        # Longer contexts than the cache counts are left out, so that a long stream costs no more per token.
        before = max(0, start - cache.order + 1)
        piece = tokens[before : start + chunk]
        parts.append(cache.read(piece, start - before))
        cache.add(piece, start - before)
    return CacheReading(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def mix(nats: np.ndarray, reading: CacheReading, shares: np.ndarray) -> np.ndarray:
    """Return the nats ``[N]`` of a model and a cache together, ``(1 - s) p_model + s p_cache``.

    Args:
        nats: The model's, of the same tokens.
        reading: What the cache says of them.
        shares: The cache's share s for each length of context that it knows, float ``[order + 1]``.
    """
    share = shares[reading.known]
    return -np.log((1 - share) * np.exp(-nats) + share * reading.probabilities)


def fit_shares(nats: np.ndarray, reading: CacheReading, order: int) -> np.ndarray:
    """Choose the shares of `mix` under which a text is likeliest, each among 0, 0.01, ..., 0.99.

    A cache that has counted nothing gets none, and so does a length of context that the text does not have.
    """
    shares = np.zeros(order + 1)
    for length in range(1, order + 1):
        of_length = reading.known == length
        if of_length.any():
            model, cache = np.exp(-nats[of_length]), reading.probabilities[of_length]
            likely = np.log(model + _SHARES[:, None] * (cache - model)).sum(1)
            shares[length] = _SHARES[likely.argmax()]
    return shares
