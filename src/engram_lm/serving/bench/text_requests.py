"""Requests cut from real text, whose N-grams repeat as they do in use. Random tokens repeat never, or always."""

import numpy as np

from engram_lm.errors import DataError


def cut_requests(tokens: np.ndarray, lengths: np.ndarray, seed: int) -> list[np.ndarray]:
    """Cut pieces out of the tokens of a text, none of which overlap, in a random order.

    Args:
        tokens: The text, int32 ``[n]``.
        lengths: Tokens of each request, in the order in which requests are returned.
        seed: Decides the places.

    Raises:
        DataError: The text is too short.
    """
    spare, random = len(tokens) - int(lengths.sum()), np.random.default_rng(seed)
    if spare < 0:
        raise DataError(
            f"the text has {len(tokens):,} tokens, the requests take {lengths.sum():,}; give more text with --data, or "
            "ask for fewer requests"
        )
    order = random.permutation(len(lengths))
    gaps = np.diff(np.sort(random.integers(0, spare + 1, len(lengths))), prepend=0)
    ends = np.cumsum(gaps + lengths[order])
    cut = {place: tokens[end - lengths[place] : end] for place, end in zip(order.tolist(), ends.tolist(), strict=True)}
    return [cut[place] for place in range(len(lengths))]


def draw_lengths(count: int, shortest: int, longest: int, seed: int) -> np.ndarray:
    """Draw the lengths of requests, all from ``shortest`` to ``longest`` equally likely, int64 ``[count]``."""
    return np.random.default_rng(seed).integers(shortest, longest + 1, count)
