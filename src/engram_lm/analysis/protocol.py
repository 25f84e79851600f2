"""What an analysis is: what it asks for, what it sees of a text, and what it returns."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
from torch import Tensor

from engram_lm.analysis.subject import Subject

__all__ = ["WANTS", "Analysis", "ModelFindings", "NotApplicable", "PlainResult", "Reading", "applicable", "plain"]


class PlainResult:
    """Gives a frozen dataclass a `to_dict` for JSON."""

    also: ClassVar[tuple[str, ...]] = ()
    """Properties and class attributes that belong to the plain values besides the fields."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; NaN becomes None."""
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return {name: plain(getattr(self, name)) for name in (*names, *self.also)}


def plain(value: Any) -> Any:
    """Turn arrays, tuples, mappings and results into lists, dictionaries and numbers, and NaN or infinity into None."""
    if isinstance(value, PlainResult):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Dimension key: B windows at a time, L length, S streams, D hidden, V vocabulary, H heads of all orders, O orders.

Finding = TypeVar("Finding", bound=PlainResult)
WANTS = frozenset({"hidden", "logits", "predict", "gates", "order_scores"})


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Reading:
    """What one model did on some windows of the text. Tensors are on the model's device and carry no gradient.

    It lives only during `Analysis.update`; an analysis that keeps one of its tensors keeps the memory.
    """

    subject: Subject
    """The model."""
    tokens: Tensor
    """Raw token ids, int64 ``[B, L]``; all windows of a reading have the same length, so nothing is padding."""
    start: int
    """Place in the text of ``tokens[0, 0]``. Windows follow each other: ``tokens[b, l]`` is ``start + b * L + l``."""
    hidden: Sequence[Tensor]
    """``num_layers + 1`` tensors ``[B, L, S, D]``: what enters the first layer (before any memory), then the output of
    each layer, before the final norm. Empty unless ``"hidden"`` is wanted."""
    logits: Tensor | None
    """The model's own logits, ``[B, L, V]``; None unless ``"logits"`` or ``"predict"`` is wanted."""
    rows: Mapping[int, Tensor]
    """The rows that each block read, int64 ``[B, L, H]``."""
    gates: Mapping[int, Tensor]
    """The gates of each block, float32 ``[B, L, S]``: 0 at dead positions, 1 where the memory is not gated."""
    order_scores: Mapping[int, Tensor]
    """For each block what every order adds to the score inside the gate, float32 ``[B, L, O, S]``, 0 at dead
    positions. Empty unless ``"order_scores"`` is wanted, and where the memory is not gated."""
    bias_scores: Mapping[int, Tensor]
    """For each block what the bias of the key projection adds, float32 ``[B, L, S]``; present with `order_scores`."""
    active: Tensor
    """Whether a position is alive, bool ``[B, L]``. All positions are without memory."""
    visible: Tensor
    """Tokens that an N-gram sees, including its own and at most the highest order, int64 ``[B, L]``; 0 at dead
    positions and without memory."""
    codes: Tensor | None
    """`HashSpec.encode` of the windows, int64 ``[B, L]``: ``codes >> 2`` are canonical tokens, -1 is dead. None without
    memory."""
    finite: Tensor
    """Whether the gates, and the hidden states and logits asked for, are neither NaN nor infinite, bool ``[B, L]``.
    Statistics leave the other positions out and count them."""


class Analysis(Protocol):
    """What `read_text` feeds. Subclass it for the defaults; any object with these members will do."""

    wants: frozenset[str] = frozenset()
    """What it needs besides tokens, rows and gates: any of ``"hidden"``, ``"logits"``, ``"order_scores"`` and
    ``"predict"``. The last one means logits and hidden states, and that `Subject.predict` of the last hidden state must
    give the model's own logits: this is checked on the first windows, and the analysis does not apply to a model where
    it fails. ``"gates"`` may be named too; they cost nothing."""

    def start(self, subjects: Sequence[Subject]) -> str | None:
        """Get ready.

        Returns:
            None, or why the analysis does not apply to these models; it is then left out and reported.
        """
        return None

    def scratch_bytes_per_token(self, subjects: Sequence[Subject]) -> int:
        """Return how many bytes one `update` needs at its peak for each token of the windows."""
        return 0

    def held_bytes(self, subjects: Sequence[Subject]) -> int:
        """Return the bytes that do not depend on the number of windows: what it keeps, and scratch of fixed size."""
        return 0

    def update(self, readings: Sequence[Reading]) -> None:
        """Take in some windows: one reading for each subject, in the order of `start`, all of the same tokens."""

    def result(self) -> Any:
        """Return what was found: a frozen dataclass of arrays that names their axes, with ``to_dict()``."""


@dataclasses.dataclass(frozen=True)
class NotApplicable:
    """Stands in place of a result."""

    reason: str
    """Why the analysis does not apply."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"not_applicable": self.reason}


@dataclasses.dataclass(frozen=True, eq=False)
class ModelFindings(Generic[Finding]):
    """What an analysis found about each of several models."""

    models: Mapping[str, Finding]
    """The finding about each model, by its name."""
    left_out: Mapping[str, str] | None = None
    """Models to which the analysis does not apply, and why; None if it applies to every model."""
    ngrams: Any = None
    """The N-grams that were counted, for more questions about them; they are not among the plain values."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        left_out = {} if self.left_out is None else {"left_out": dict(self.left_out)}
        return {"models": plain(self.models), **left_out}


def applicable(left_out: Mapping[str, str], subjects: Sequence[Subject]) -> str | None:
    """Say why an analysis applies to none of the models, for `Analysis.start`; None if it applies to some.

    ``left_out`` are the models to which it does not apply, with the reasons.
    """
    if len(left_out) < len(subjects):
        return None
    reasons = set(left_out.values())
    # If one reason holds for all of them, there is no need to say for which.
    return reasons.pop() if len(reasons) == 1 else "; ".join(f"{name}: {why}" for name, why in left_out.items())
