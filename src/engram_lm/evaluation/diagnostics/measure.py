"""The bits that models need for groups of tokens: with memory and without, one model beside another."""

# Dimension key: N tokens of the text, B blocks of tokens whose losses belong together.

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from engram_lm.errors import check_whole
from engram_lm.evaluation.diagnostics.divisions import Division, divide, documents_of, spell
from engram_lm.evaluation.diagnostics.reference import ReferenceText
from engram_lm.evaluation.suppressing import find_memories, suppressed
from engram_lm.tokenizing import beginning_tokens
from engram_lm.training.held_out import HeldOutLoss, held_out_loss

MEMORY_ON, MEMORY_OFF = "memory on", "memory off"
"""What a model is called with its memory and with its memory suppressed, unless several models have one."""
_ENOUGH_DOCUMENTS = 10


class Bits(NamedTuple):
    """What a model needs for a group of tokens; None where nothing is known."""

    per_token: float | None
    """Mean bits per token."""
    error: float | None
    """Standard error of `per_token`."""
    per_byte: float | None
    """Bits per byte of the group's text."""
    more: float | None
    """Bits per token above what the first model needs."""
    more_error: float | None
    """Standard error of `more`, from paired differences."""


class Group(NamedTuple):
    """Some tokens of a text."""

    name: str
    """What they have in common."""
    num_tokens: int
    """Tokens that were predicted."""
    num_bytes: int
    """Bytes that they spell."""
    bits: dict[str, Bits]
    """What each model needs for them."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {**self._asdict(), "bits": {name: bits._asdict() for name, bits in self.bits.items()}}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Diagnostics:
    """Where models pay their bits. Made by `diagnose`."""

    losses: dict[str, HeldOutLoss]
    """The loss of each model on the whole text. The first is what the others are compared with."""
    total: Group
    """All tokens."""
    divisions: dict[str, tuple[str, tuple[Group, ...]]]
    """For each division its title and its groups but empty ones; their tokens, bytes and bits add up to `total`."""
    reference: str | None
    """Name of the text in which frequencies were counted; None if it is the evaluated text itself."""
    reference_tokens: int
    """Tokens of that text that were counted."""
    rare_below: int
    """A word is rare that occurs less often than this."""
    blocks: str
    """``documents`` or ``sequences``: what standard errors are taken over."""
    num_blocks: int
    """How many of them there are."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, all but `losses`."""
        names = ("reference", "reference_tokens", "rare_below", "blocks", "num_blocks")
        return {
            "models": list(self.losses),
            "total": self.total.to_dict(),
            "divisions": {
                name: {"title": title, "groups": [group.to_dict() for group in groups]}
                for name, (title, groups) in self.divisions.items()
            },
            **{name: getattr(self, name) for name in names},
        }


def diagnose(
    models: Any,
    tokenizer: Any,
    tokens: np.ndarray,
    *,
    document_ends: np.ndarray,
    length: int,
    batch_size: int = 16,
    max_tokens: int | None = None,
    num_bytes: int | None = None,
    dtype: str = "float32",
    restart_documents: bool = False,
    reference: ReferenceText | None = None,
    rare_below: int = 10,
    on_progress: Callable[[int], None] = lambda num_tokens: None,
) -> Diagnostics:
    """Measure the bits of groups of tokens: by frequency, on rare words that a document repeats, by known N-grams.

    Every model reads the text once, and once more with its memory suppressed if it has one. That is no comparison with
    a model that was trained without memory: the rest of the model still counts on it.

    Standard errors are those of a ratio of sums over blocks that are taken as independent: documents if there are at
    least ten, or else sequences.

    Args:
        models: A model, or models by name, all for ``tokenizer``.
        tokenizer: What made the tokens.
        tokens: Packed tokens, integers ``[N]``.
        document_ends: One past the last token of each document, in order.
        length: Tokens in a sequence.
        batch_size: Sequences at a time.
        max_tokens: Predict at most this many tokens, from the start; all where None.
        num_bytes: Bytes of the text, for the loss in bits per byte. Those of groups are counted by their tokens.
        dtype: Type of matrix products.
        restart_documents: Whether positions restart with documents.
        reference: Where frequencies and N-grams are counted, best the text that the models were trained on. Where None,
            frequencies are counted in the other documents of the text itself.
        rare_below: A word is rare if it occurs less often than this in the reference.
        on_progress: Called with the number of tokens just predicted; `num_passes` times the number of tokens in all.

    Raises:
        ConfigError, DataError, TokenError: As for `held_out_loss`.
    """
    check_whole(rare_below=rare_below)
    tokens = np.asarray(tokens).astype(np.int64)
    beginning = beginning_tokens(tokenizer)
    nats: dict[str, np.ndarray] = {}
    losses: dict[str, HeldOutLoss] = {}
    sequence = np.full(len(tokens), -1)
    conditions = _conditions(models)
    for name, model, off in conditions:
        nats[name] = own = np.full(len(tokens), np.nan)

        def take(places: np.ndarray, found: np.ndarray, own: np.ndarray = own) -> None:
            own[places[places >= 0]] = found[places >= 0]
            first = np.where(places < 0, len(tokens), places).min(-1, keepdims=True)
            sequence[places[places >= 0]] = np.broadcast_to(first, places.shape)[places >= 0]

        with suppressed(model) if off else contextlib.nullcontext():
            losses[name] = held_out_loss(
                model,
                tokens,
                length=length,
                batch_size=batch_size,
                max_tokens=max_tokens,
                num_bytes=num_bytes,
                dtype=dtype,
                document_ends=np.asarray(document_ends) if restart_documents else None,
                beginning=beginning,
                on_token_losses=take,
                on_progress=on_progress,
            )
    stop = int(np.flatnonzero(sequence >= 0)[-1]) + 1
    tokens, sequence = tokens[:stop], sequence[:stop]
    nats = {name: values[:stop] for name, values in nats.items()}
    document = documents_of(stop, document_ends)
    spelled = spell(tokenizer, tokens, document)
    spec = next((own[0][1] for _, model, _ in conditions for own in find_memories(model).values()), None)
    divisions = divide(
        tokens,
        spelled,
        document=document,
        in_sight=np.maximum(sequence - (not beginning), 0),
        tokenizer=tokenizer,
        reference=reference,
        canonical=(lambda part: part) if spec is None else (lambda part: spec.encode(part[None])[0] >> 2),
        vocab_size=len(tokenizer) if spec is None else spec.num_canonical,
        rare_below=rare_below,
    )
    scored = sequence >= 0
    by_document = len(np.unique(document[scored])) >= _ENOUGH_DOCUMENTS
    _, block = np.unique((document if by_document else sequence)[scored], return_inverse=True)
    measured = _Measured(
        nats={name: values[scored] for name, values in nats.items()}, num_bytes=spelled.num_bytes[scored], block=block
    )
    everything = Division(name="all", title="", groups=("all tokens",), of_token=np.zeros(stop, np.int64))
    return Diagnostics(
        losses=losses,
        total=measured.groups(everything, scored)[0],
        divisions={one.name: (one.title, measured.groups(one, scored)) for one in divisions},
        reference=None if reference is None else reference.name,
        reference_tokens=len(tokens) if reference is None else reference.num_counted,
        rare_below=rare_below,
        blocks="documents" if by_document else "sequences",
        num_blocks=int(block.max()) + 1,
    )


def num_passes(models: Any) -> int:
    """Return how many times `diagnose` reads the text."""
    return len(_conditions(models))


def _conditions(models: Any) -> list[tuple[str, Any, bool]]:
    """List names, models, and whether their memory is suppressed."""
    if not isinstance(models, Mapping):
        models = {MEMORY_ON if find_memories(models) else "model": models}
    with_memory = [name for name, model in models.items() if find_memories(model)]
    found = []
    for name, model in models.items():
        found.append((name, model, False))
        if name in with_memory:
            found.append((MEMORY_OFF if len(with_memory) == 1 else f"{name}, {MEMORY_OFF}", model, True))
    return found


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _Measured:
    """The tokens that were predicted."""

    nats: dict[str, np.ndarray]
    """What each model needs for each, ``[n]``."""
    num_bytes: np.ndarray
    """Bytes that each spells."""
    block: np.ndarray
    """The block that each is in, counted from 0."""

    def groups(self, division: Division, scored: np.ndarray) -> tuple[Group, ...]:
        """Add up the groups of a division, without empty ones."""
        of_token = division.of_token[scored]
        found = []
        for index, name in enumerate(division.groups):
            inside = of_token == index
            if inside.any():
                found.append(self._group(name, inside))
        return tuple(found)

    def _group(self, name: str, inside: np.ndarray) -> Group:
        _, block = np.unique(self.block[inside], return_inverse=True)
        count, num_bytes = np.bincount(block), int(self.num_bytes[inside].sum())
        base = next(iter(self.nats.values()))[inside]
        bits = {}
        for index, (model, nats) in enumerate(self.nats.items()):
            own = nats[inside]
            per_token, error = _mean(own / math.log(2), block, count)
            more, more_error = (None, None) if index == 0 else _mean((own - base) / math.log(2), block, count)
            whole = per_token is not None and num_bytes
            per_byte = per_token * len(own) / num_bytes if whole and per_token is not None else None
            bits[model] = Bits(per_token, error, per_byte, more, more_error)
        return Group(name, int(inside.sum()), num_bytes, bits)


def _mean(values: np.ndarray, block: np.ndarray, count: np.ndarray) -> tuple[float | None, float | None]:
    """Average, with the standard error of a ratio of sums over blocks; ``count`` are the values of each block, ``[B]``.

    Source: linearized variance of a ratio, Cochran, “Sampling Techniques”, section 6.3.
    """
    mean = math.fsum(values) / len(values) if np.isfinite(values).all() else math.nan
    if not math.isfinite(mean):
        return None, None
    if len(count) < 2:
        return mean, None
    residuals = np.bincount(block, weights=values) - mean * count
    return mean, float(np.sqrt(len(count) / (len(count) - 1) * np.square(residuals).sum()) / len(values))
