"""What a model predicts next, and how far two predictions are apart."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engram_lm.analysis.protocol import Analysis, Reading
from engram_lm.analysis.reading import read_text
from engram_lm.analysis.subject import Subject

# Dimension key: L length, V vocabulary.

_NUM_TOKENS = 8


class Candidate(NamedTuple):
    """A token that may come next."""

    token: int
    """Its id."""
    text: str
    """What it spells."""
    probability: float
    """Its probability, in [0, 1]."""


class Prediction(NamedTuple):
    """The likeliest next tokens after a position."""

    candidates: tuple[Candidate, ...]
    """The likeliest first; empty where the model's numbers are not finite."""


class FactAnswer(NamedTuple):
    """How the prompt of a fact is answered."""

    before: Prediction
    """What came next before any fact of the visitor."""
    now: Prediction
    """What comes next with all of them."""
    is_as_asked: bool
    """Whether the whole answer of the fact is now the greedy continuation."""


class LogitsKeeper(Analysis):
    """Keeps the logits of a text that is read in one window."""

    wants = frozenset({"logits"})

    def update(self, readings: Sequence[Reading]) -> None:
        """Keep the logits of the one window."""
        logits = readings[0].logits
        assert logits is not None
        self._logits = logits[0].float().cpu()

    def result(self) -> Tensor:
        """Return them, float32 ``[L, V]`` on the CPU."""
        return self._logits


def read_logits(subject: Subject, tokens: np.ndarray) -> Tensor:
    """Compute the logits of a text, float32 ``[L, V]`` on the CPU."""
    keeper: dict[str, Analysis] = {"logits": LogitsKeeper()}
    logits: Tensor = read_text([subject], tokens, keeper, length=len(tokens), budget_bytes=1 << 62)["logits"]
    return logits


def predictions(logits: Tensor, spell: Callable[[int], str]) -> tuple[Prediction, ...]:
    """Name the likeliest next tokens by logits, float32 ``[L, V]``; ``spell`` writes a token."""
    finite = logits.isfinite().all(-1).tolist()
    best = torch.softmax(logits, -1).nan_to_num().topk(min(_NUM_TOKENS, logits.shape[-1]))
    names = {token: spell(token) for token in best.indices.unique().tolist()}
    found = []
    for is_finite, tokens, chances in zip(finite, best.indices.tolist(), best.values.tolist(), strict=True):
        candidates = (Candidate(token, names[token], chance) for token, chance in zip(tokens, chances, strict=True))
        found.append(Prediction(tuple(candidates) if is_finite else ()))
    return tuple(found)


def changes(logits: Tensor, other: Tensor) -> np.ndarray:
    """Compute how far a second prediction is from a first one, in nats.

    Takes logits ``[L, V]`` of both, and returns the Kullback-Leibler divergence of the second from the first, float64
    ``[L]``, NaN where a number is not finite.
    """
    first, second = (torch.log_softmax(one.double(), -1) for one in (logits, other))
    divergence = (first.exp() * (first - second)).sum(-1).clamp(min=0)
    finite = logits.isfinite().all(-1) & other.isfinite().all(-1)
    return divergence.masked_fill(~finite, float("nan")).numpy()
