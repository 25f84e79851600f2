"""Short passages of a long text with all their gates, kept while the text is read for other things."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engram_lm.analysis.gates.trace import GateTrace, token_texts
from engram_lm.analysis.reading import Analysis, Reading
from engram_lm.analysis.subject import Subject
from engram_lm.errors import ConfigError

__all__ = ["PassageTraces", "Passages"]

# Dimension key: L length of a passage, S streams, O orders.


@dataclasses.dataclass(frozen=True, eq=False)
class PassageTraces:
    """Passages seen through the gates of several models."""

    starts: tuple[int, ...]
    """Where each begins in the text, in tokens."""
    traces: Mapping[str, tuple[GateTrace, ...]]
    """By model, one for each passage."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: where the passages are and what they spell; their gates are on the page."""
        texts = next(iter(self.traces.values()), ())
        return {"starts": list(self.starts), "texts": ["".join(trace.texts) for trace in texts]}


class Passages(Analysis):
    """Keeps the gates at the beginning of some windows, spread evenly over the text. Feed it with `read_text`.

    A window's beginning is taken because there the passage holds every token that its N-grams see.

    Args:
        num_tokens: Tokens of the text.
        length: Tokens in a window, as `read_text` is told.
        num_passages: How many to keep.
        passage_tokens: Tokens of each, at most.

    Raises:
        ConfigError: A number is below 1.
    """

    wants = frozenset({"gates", "order_scores"})

    def __init__(self, num_tokens: int, *, length: int, num_passages: int = 6, passage_tokens: int = 160) -> None:
        if min(num_tokens, length, num_passages, passage_tokens) < 1:
            raise ConfigError("the text, its windows and its passages have at least one token, and there is a passage")
        self.passage_tokens = min(passage_tokens, length)
        # The last window may be a stub of a few tokens; it is taken where it is all there is.
        num_windows = max(1, num_tokens // length)
        places = np.linspace(0, num_windows - 1, min(num_passages, num_windows)).round().astype(int)
        self.starts = tuple(int(place) * length for place in places)
        self._subjects: dict[str, Subject] = {}
        self._kept: dict[str, list[tuple[np.ndarray, ...]]] = {}

    def start(self, subjects: Sequence[Subject]) -> str | None:
        """Apply to the models with gated memory."""
        self._subjects = {subject.name: subject for subject in subjects if subject.gated}
        self._kept = {name: [] for name in self._subjects}
        return None if self._subjects else "no model has a gated memory"

    def update(self, readings: Sequence[Reading]) -> None:
        """Keep what belongs to a passage."""
        num_windows, length = readings[0].tokens.shape
        first = readings[0].start
        for start in self.starts:
            if not first <= start < first + num_windows * length:
                continue
            place = np.s_[(start - first) // length, : self.passage_tokens]
            for reading in readings:
                if reading.subject.name in self._kept:
                    parts = (reading.gates, reading.order_scores, reading.bias_scores)
                    self._kept[reading.subject.name].append(
                        (
                            reading.tokens[place].cpu().numpy(),
                            reading.visible[place].cpu().numpy(),
                            *(np.stack([part[block][place].float().cpu().numpy() for block in part]) for part in parts),
                        )
                    )

    def result(self) -> PassageTraces:
        """Return the passages, one `GateTrace` for each model and passage."""
        traces = {
            name: tuple(_trace(self._subjects[name], *parts) for parts in kept) for name, kept in self._kept.items()
        }
        return PassageTraces(self.starts, traces)


def _trace(
    subject: Subject,
    tokens: np.ndarray,
    visible: np.ndarray,
    gates: np.ndarray,
    order_scores: np.ndarray,
    bias_scores: np.ndarray,
) -> GateTrace:
    assert subject.spec is not None
    return GateTrace(
        tokens=tokens,
        texts=tuple(token_texts(subject.tokenizer, tokens.tolist())),
        blocks=tuple(subject.memories),
        orders=subject.spec.orders,
        gates=gates,
        order_scores=order_scores,
        bias_scores=bias_scores,
        visible=visible,
    )
