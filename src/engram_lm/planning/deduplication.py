"""How many distinct rows a batch reads: curves measured on text."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class DistinctCurve:
    """How many distinct N-grams of each order a number of tokens of a shuffled batch holds.

    Heaps' law with an exponent that falls as text grows: ``ln D = a + b ln T + c (ln T)^2``. Within the tokens that
    were measured it is a fit. Beyond them the last exponent is held, which is an upper bound because exponents fall;
    the lower bound is the last measured count.
    """

    coefficients: dict[int, dict[int, tuple[float, float, float]]]
    """Tokens in a sequence, to order, to (a, b, c). Short sequences repeat less: they are of more documents. Between
    the lengths measured ``ln D`` is interpolated over the logarithm of the length; outside, the nearest counts."""
    tokens_to: int
    """Most tokens that were measured. The fewest were one sequence; fewer tokens are counted in proportion to it."""
    source: str
    """Text and tokenizer."""

    def ngrams(self, order: int, num_tokens: float, sequence_length: int = 2048) -> float:
        """Expected distinct N-grams of an order in ``num_tokens`` tokens, at most ``num_tokens``.

        An order that was not measured counts as all distinct.
        """
        lengths = sorted(length for length, orders in self.coefficients.items() if order in orders)
        if not lengths or num_tokens <= 0:
            return max(0.0, float(num_tokens))
        logs = [math.log(self._of_length(length, order, num_tokens)) for length in lengths]
        place = float(np.interp(math.log(sequence_length), [math.log(length) for length in lengths], logs))
        return min(math.exp(place), float(num_tokens))

    def _of_length(self, length: int, order: int, num_tokens: float) -> float:
        a, b, c = self.coefficients[length][order]
        x = math.log(min(max(num_tokens, length), self.tokens_to))
        found = math.exp(a + b * x + c * x * x)
        if num_tokens < length:
            found *= num_tokens / length
        elif num_tokens > self.tokens_to:
            found *= (num_tokens / self.tokens_to) ** min(1.0, max(0.0, b + 2 * c * x))
        return found


CURVES = {
    "deepseek-v3": DistinctCurve(
        coefficients={
            256: {2: (-1.54083, 1.32514, -0.02461), 3: (-0.98635, 1.20814, -0.01485), 4: (-0.74019, 1.15785, -0.0107)},
            2048: {2: (-2.47037, 1.43321, -0.02783), 3: (-1.4847, 1.25475, -0.01585), 4: (-1.00432, 1.17376, -0.01067)},
        },
        tokens_to=3_149_824,
        source="Python 3.11's standard library, the paper's tokenizer, canonical tokens, shuffled sequences",
    ),
    "bpe-8192": DistinctCurve(
        coefficients={
            256: {2: (-1.50128, 1.32835, -0.02488), 3: (-0.92296, 1.19357, -0.01371), 4: (-0.64549, 1.13463, -0.00918)},
            2048: {
                2: (-2.85737, 1.52532, -0.03225),
                3: (-1.77362, 1.31196, -0.01804),
                4: (-1.23926, 1.21494, -0.01207),
            },
        },
        tokens_to=3_276_800,
        source="Python 3.11's standard library, a byte-level BPE of 8,192 tokens trained on it, shuffled sequences",
    ),
}
"""Measured curves by tokenizer, within 10 % of every point measured and 3.5 % of those of sequences of 2,048 tokens.
Other text repeats itself more or less: ``distinct_share`` of `TrainingShape` takes what was measured on it.

Source: ``benchmarks/scaling.py``, ``benchmarks/results/scaling.json``."""


def distinct_rows(num_ngrams: float, num_rows: int) -> float:
    """Expected distinct rows of one hash head that distinct N-grams fall on: ``R (1 - (1 - 1/R)^n)``."""
    if num_rows < 2:
        return min(float(num_rows), num_ngrams)
    return -num_rows * math.expm1(num_ngrams * math.log1p(-1.0 / num_rows))
