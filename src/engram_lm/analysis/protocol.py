"""What an analysis is: what it asks for, what it sees of a text, and what it returns."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
from torch import Tensor

from engram_lm.analysis.subject import Subject
from engram_lm.files import only_finite


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
    return only_finite(value)


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
    """Tokens read before ``tokens[0, 0]``. Windows follow each other: ``start + b * L + l`` before ``tokens[b, l]``."""
    places: np.ndarray
    """Place of each token in the text, int64 ``[B, L]``; -1 for tokens that begin a window and are not in the text."""
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


class ModelAnalysis(Analysis):
    """An analysis that looks at each model by itself, and adds up its windows in an object of its own."""

    sums: dict[str, Any]
    """What adds up the windows of each model, by its name."""
    left_out: dict[str, str]
    """The models to which the analysis does not apply, and why."""

    def why_not(self, subject: Subject) -> str | None:
        """Say why the analysis does not apply to a model; None if it does."""
        return None

    @abc.abstractmethod
    def sums_for(self, subject: Subject, applied: Sequence[Subject]) -> Any:
        """Return an object whose ``add(reading)`` takes in windows of a model, one of those that are looked at."""

    def start(self, subjects: Sequence[Subject]) -> str | None:
        """Apply to the models for which `why_not` has no reason."""
        self.left_out = {subject.name: why for subject in subjects if (why := self.why_not(subject))}
        applied = [subject for subject in subjects if subject.name not in self.left_out]
        self.sums = {subject.name: self.sums_for(subject, applied) for subject in applied}
        if applied:
            return None
        reasons = set(self.left_out.values())
        # If one reason holds for all of them, there is no need to say for which.
        return (
            reasons.pop() if len(reasons) == 1 else "; ".join(f"{name}: {why}" for name, why in self.left_out.items())
        )

    def update(self, readings: Sequence[Reading]) -> None:
        """Add the windows of each model."""
        for reading in readings:
            if reading.subject.name in self.sums:
                self.sums[reading.subject.name].add(reading)
