"""One pass over a text for all analyses and all models, in lockstep, in bounded memory."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from engram_lm.adapt.evaluation_mode import evaluating
from engram_lm.analysis.budget import choose_batch_size
from engram_lm.analysis.recording import Recording, not_finite, recording
from engram_lm.analysis.subject import Subject
from engram_lm.errors import ConfigError, DataError, MismatchError, TokenError

__all__ = [
    "Analysis",
    "NotApplicable",
    "Reading",
    "read_text",
    "text_tokens",
    "visible_tokens",
]

# Dimension key: B windows at a time, L length, S streams, D hidden, V vocabulary, H heads of all orders, O orders.

WANTS = frozenset({"hidden", "logits", "predict", "gates", "order_scores"})


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Reading:
    """What one model did on some windows of the text. Tensors are on the model's device and carry no gradient.

    It is alive during `Analysis.update` only; an analysis that keeps one of its tensors keeps the memory.
    """

    subject: Subject
    """The model."""
    tokens: Tensor
    """Raw token ids, int64 ``[B, L]``; all windows of one reading are of one length, so nothing is padding."""
    start: int
    """Place in the text of ``tokens[0, 0]``. Windows follow each other: ``tokens[b, l]`` is ``start + b * L + l``."""
    hidden: Sequence[Tensor]
    """``num_layers + 1`` of ``[B, L, S, D]``: what enters the first layer (before any memory), then the output of each
    layer; before the final norm. Empty unless ``"hidden"`` is wanted."""
    logits: Tensor | None
    """``[B, L, V]``, the model's own; None unless ``"logits"`` or ``"predict"`` is wanted."""
    rows: Mapping[int, Tensor]
    """Block to the rows it read, int64 ``[B, L, H]``."""
    gates: Mapping[int, Tensor]
    """Block to its gates, float32 ``[B, L, S]``; 0 at dead positions, 1 where the memory is not gated."""
    order_scores: Mapping[int, Tensor]
    """Block to what each order adds to the score inside the gate, float32 ``[B, L, O, S]``, 0 at dead positions; empty
    unless ``"order_scores"`` is wanted, and where the memory is not gated."""
    bias_scores: Mapping[int, Tensor]
    """Block to what the key projection's bias adds, float32 ``[B, L, S]``; with `order_scores`."""
    active: Tensor
    """Bool ``[B, L]``; False at dead positions. All True without memory."""
    visible: Tensor
    """Tokens that an N-gram sees, itself included and at most the highest order, int64 ``[B, L]``; 0 at dead positions
    and without memory."""
    codes: Tensor | None
    """`HashSpec.encode` of the windows, int64 ``[B, L]``: ``codes >> 2`` are canonical tokens, -1 is dead. None without
    memory."""
    finite: Tensor
    """Bool ``[B, L]``; False where a gate, or a hidden state or logit asked for, is NaN or infinite. Statistics
    leave these positions out and count them."""


class Analysis(Protocol):
    """What `read_text` feeds. Subclass it for the defaults; any object with these members will do."""

    wants: frozenset[str] = frozenset()
    """What it needs beside tokens, rows and gates, of ``"hidden"``, ``"logits"``, ``"order_scores"`` and ``"predict"``
    (logits and hidden states, and `Subject.predict` of the last one must be the model's own logits: checked on the
    first windows, and the analysis does not apply where it is not so). ``"gates"`` may be said too; they cost nothing.
    """

    def start(self, subjects: Sequence[Subject]) -> str | None:
        """Get ready.

        Returns:
            None, or why the analysis does not apply to these models; it then is left out and reported.
        """
        return None

    def scratch_bytes_per_token(self, subjects: Sequence[Subject]) -> int:
        """Bytes for each token of the windows that one `update` needs at its peak."""
        return 0

    def held_bytes(self, subjects: Sequence[Subject]) -> int:
        """Bytes that it takes however many windows are read at once: what it keeps, and scratch of a fixed size."""
        return 0

    def update(self, readings: Sequence[Reading]) -> None:
        """Take in some windows: one reading per subject, in the order of `start`, all of the same tokens."""

    def result(self) -> Any:
        """Return what was found: a frozen dataclass of arrays that names their axes, with ``to_dict()``."""


@dataclasses.dataclass(frozen=True)
class NotApplicable:
    """Stands in place of a result."""

    reason: str
    """Why the analysis does not apply."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"not_applicable": self.reason}


@torch.no_grad()
def read_text(
    subjects: Sequence[Subject],
    tokens: Any,
    analyses: Mapping[str, Analysis],
    *,
    length: int,
    budget_bytes: int = 1 << 29,
    max_tokens: int | None = None,
    max_batch_size: int = 16,
    on_progress: Callable[[int], None] = lambda num_tokens: None,
) -> dict[str, Any]:
    """Run a text through models once, and let all analyses look on.

    The text is cut into windows that do not see each other; positions start anew with each. There is one forward pass
    per model and batch of windows, whatever is asked for. Everything kept is a statistic, so the text may be of any
    length.

    Args:
        subjects: Models of one vocabulary; see `engram_lm.analysis.subject.group_by_tokenizer`. Each is put back into
            the mode it was in.
        tokens: Token ids of the text, integers ``[num_tokens]``: an array, also a memory-mapped one, or token shards;
            or a text, which is tokenized without special tokens.
        analyses: By the name under which the result is returned.
        length: Tokens in a window; the last one may be shorter.
        budget_bytes: How much the hidden states, logits and scores that are kept for the analyses, and the analyses'
            own scratch, may take at once, all models together. What a forward pass needs besides is the model's own.
        max_tokens: Read only so many tokens, from the start; all where None.
        max_batch_size: At most so many windows at a time.
        on_progress: Called with the number of tokens just read (by all models).

    Returns:
        Results by name; `NotApplicable` where an analysis does not apply.

    Raises:
        DataError: The text has no tokens.
        ConfigError: ``length`` or another number is not positive, one window alone is larger than the budget or than
            what a model can see, two models have one name, or an analysis wants something unknown.
        MismatchError: The models have different tokenizers; the message has both digests.
        TokenError: A token outside the vocabulary, or tokens that are no integers.
    """
    _check_numbers(length=length, budget_bytes=budget_bytes, max_batch_size=max_batch_size)
    _check_subjects(subjects, length)
    if isinstance(tokens, str):
        tokens = text_tokens(subjects[0].tokenizer, tokens)
    num_tokens = _check_text(tokens, max_tokens)
    results: dict[str, Any] = {}
    running: dict[str, Analysis] = {}
    for name, analysis in analyses.items():
        if unknown := sorted(analysis.wants - WANTS):
            raise ConfigError(f"the analysis {name!r} wants {unknown[0]!r}; known are {', '.join(sorted(WANTS))}")
        reason = analysis.start(subjects)
        if reason is None:
            running[name] = analysis
        else:
            results[name] = NotApplicable(reason)
    batch_size = choose_batch_size(
        subjects, list(running.values()), length=min(length, num_tokens), budget_bytes=budget_bytes
    )
    with contextlib.ExitStack() as stack:
        if running:
            wants = frozenset[str]().union(*(analysis.wants for analysis in running.values()))
            recordings = [_open(stack, subject, wants) for subject in subjects]
            for start, windows in _windows(tokens, num_tokens, length, min(batch_size, max_batch_size)):
                readings = [
                    _read(subject, record, windows, start, wants)
                    for subject, record in zip(subjects, recordings, strict=True)
                ]
                if start == 0:
                    _drop_wrong_predictions(readings, running, results)
                for analysis in running.values():
                    analysis.update(readings)
                del readings
                for record in recordings:
                    record.clear()
                on_progress(windows.size)
    results.update({name: analysis.result() for name, analysis in running.items()})
    return {name: results[name] for name in analyses}


def text_tokens(tokenizer: Any, text: str) -> np.ndarray:
    """Tokenize a text without special tokens, int64 ``[num_tokens]``."""
    return np.asarray(tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int64)


def visible_tokens(codes: Tensor, highest_order: int) -> Tensor:
    """Count the tokens from each position back to the start of its segment; see `engram_lm.hashing.Segments`.

    Args:
        codes: As from `HashSpec.encode`, int64 ``[B, L]``.
        highest_order: Where to stop counting.

    Returns:
        int64 ``[B, L]``, 0 at dead positions.
    """
    places = torch.arange(codes.shape[1], device=codes.device).expand_as(codes)
    blocked = (codes & 1).bool()
    # Behind an end of a segment, and behind a dead position, whose code is -1 and so has all bits.
    blocked[:, 1:] |= (codes[:, :-1] & 2).bool()
    begins = torch.where(blocked, places, 0).cummax(1).values
    return (places - begins + 1).clamp(max=highest_order).masked_fill(codes < 0, 0)


def _open(stack: contextlib.ExitStack, subject: Subject, wants: frozenset[str]) -> Recording:
    stack.enter_context(evaluating(subject.model))
    hidden = bool(wants & {"hidden", "predict"})
    return stack.enter_context(recording(subject, hidden=hidden, order_scores="order_scores" in wants))


def _read(subject: Subject, record: Recording, windows: np.ndarray, start: int, wants: frozenset[str]) -> Reading:
    """Compute one model on some windows."""
    if windows.min() < 0 or windows.max() >= subject.vocab_size:
        raise TokenError(
            f"token ids go from {windows.min()} to {windows.max()}, {subject.name} has {subject.vocab_size}; tokenize "
            "the text with the model's own tokenizer"
        )
    tokens = torch.from_numpy(windows).to(subject.device)
    codes = _codes(subject, tokens)
    options: dict[str, Any] = {"input_ids": tokens, "use_cache": False}
    wanted = bool(wants & {"logits", "predict"})
    if not wanted and subject.keeps_fewer_logits:
        options["logits_to_keep"] = 1
    logits = subject.model(**options).logits
    silent = [block for block in subject.memories if block not in record.gates]
    if silent:
        raise MismatchError(
            f"{subject.name} did not read the memory of block {silent[0]}; it was switched off or detached after the "
            "analysis began"
        )
    nothing = torch.zeros_like(tokens)
    reading = Reading(
        subject=subject,
        tokens=tokens,
        start=start,
        hidden=tuple(record.hidden),
        logits=logits if wanted else None,
        rows=dict(record.rows),
        gates=dict(record.gates),
        order_scores=dict(record.order_scores),
        bias_scores=dict(record.bias_scores),
        active=nothing == 0 if codes is None else codes >= 0,
        visible=nothing if codes is None or subject.spec is None else visible_tokens(codes, subject.spec.orders[-1]),
        codes=codes,
        finite=nothing == 0,
    )
    for tensor in (*reading.hidden, logits if wanted else nothing, *record.gates.values()):
        reading.finite.logical_and_(~not_finite(tensor).to(tokens.device))
    return reading


def _codes(subject: Subject, tokens: Tensor) -> Tensor | None:
    spec = subject.spec
    if spec is None:
        return None
    # Ids that no tokenizer makes are no text to an attached memory.
    known = tokens < spec.num_tokens
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    codes: Tensor = spec.encode(tokens.masked_fill(~known, 0), attention_mask=known, position_ids=positions)
    return codes


def _windows(tokens: Any, num_tokens: int, length: int, batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Whole windows in batches, then the shorter rest alone, so that no padding is needed: start, int64 [B, L]."""
    whole = num_tokens - num_tokens % length
    starts = [*range(0, whole, batch_size * length), *([whole] if whole < num_tokens else [])]
    for start in starts:
        stop = min(start + batch_size * length, whole) if start < whole else num_tokens
        piece = np.asarray(tokens[start:stop])
        if piece.dtype.kind not in "iu" or piece.ndim != 1:
            raise TokenError(f"token ids are integers [num_tokens], got {piece.dtype} {list(piece.shape)}")
        yield start, piece.astype(np.int64).reshape(-1, min(length, stop - start))


def _drop_wrong_predictions(readings: Sequence[Reading], running: dict[str, Analysis], results: dict[str, Any]) -> None:
    """Leave out what relies on `Subject.predict` where it is not what the model's own head does."""
    asking = [name for name, analysis in running.items() if "predict" in analysis.wants]
    reason = next(filter(None, map(_wrong_prediction, readings)), None) if asking else None
    if reason is not None:
        for name in asking:
            del running[name]
            results[name] = NotApplicable(reason)


def _wrong_prediction(reading: Reading) -> str | None:
    subject, logits = reading.subject, reading.logits
    if subject.head is None:
        return f"{subject.name} has no output head"
    assert logits is not None
    own = logits[0].float()
    found = subject.predict(reading.hidden[-1][0]).to(own.device).float()
    keep = reading.finite[0].to(own.device)
    if found.shape != own.shape:
        return f"the head of {subject.name} gives {list(found.shape)}, the model itself {list(own.shape)}"
    if not keep.any():
        return None
    gap = float((found - own)[keep].abs().max())
    # Half precision rounds a logit of 30 to steps of 0.125.
    allowed = (1e-4 if logits.dtype == torch.float32 else 0.03) * max(1.0, float(own[keep].abs().max()))
    if gap <= allowed:
        return None
    return (
        f"the last layer of {subject.name}, its final norm and its head give logits up to {gap:.3g} away from the "
        "model's own, so this model does something else behind its layers, which is not known here"
    )


def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            what = "length is the number of tokens seen at once" if name == "length" else f"{name} is a whole number"
            raise ConfigError(f"{what}, at least 1, not {value!r}")


def _check_subjects(subjects: Sequence[Subject], length: int) -> None:
    if not subjects:
        raise ConfigError("there is no model to read the text; pass at least one")
    names = [subject.name for subject in subjects]
    if len(set(names)) < len(names):
        raise ConfigError(f"models are told apart by their names, which are {', '.join(names)}; pass name='...'")
    first = subjects[0]
    for subject in subjects:
        if subject.max_length is not None and length > subject.max_length:
            raise ConfigError(
                f"{subject.name} has learned {subject.max_length} positions and cannot see {length} tokens at once; "
                "choose a smaller length"
            )
        if subject.tokenizer is first.tokenizer:
            continue
        sizes = (len(first.tokenizer), len(subject.tokenizer))
        if sizes[0] != sizes[1] or first.vocabulary_digest != subject.vocabulary_digest:
            raise MismatchError(
                f"models that read a text together need one vocabulary: {first.name} has {sizes[0]} tokens "
                f"({first.vocabulary_digest}), {subject.name} {sizes[1]} ({subject.vocabulary_digest}); analyze them "
                "one after the other"
            )


def _check_text(tokens: Any, max_tokens: int | None) -> int:
    shape = getattr(tokens, "shape", None)
    if shape is not None and len(shape) != 1:
        raise DataError(f"a text is one row of token ids [num_tokens], got the shape {list(shape)}")
    num_tokens = len(tokens) if max_tokens is None else min(len(tokens), max_tokens)
    if num_tokens < 1:
        raise DataError("the text has no tokens, so there is nothing to analyze; pass a text of at least one token")
    return num_tokens
