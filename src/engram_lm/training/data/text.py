"""Sources → tokens to train on and tokens held out: what every run and every study trains and evaluates on."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engram_lm.errors import ConfigError, DataError
from engram_lm.files import user_path
from engram_lm.training.data.documents import is_balanced
from engram_lm.training.data.packing import OneSidedError, PackedCorpus, open_remembered, pack_to_shards
from engram_lm.training.data.shards import TokenShards
from engram_lm.training.data.text_source import Sources, TextSource, name_sources


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationText:
    """A text that the trained model is also evaluated on."""

    name: str
    """Its key in the result. ``validation`` is taken by ``data.validation``."""
    sources: tuple[TextSource, ...] = ()
    """Where it comes from; the Python standard library's own sources where empty."""
    held_out: float = 0.0
    """Share of its documents that is used, from 0 and below 1. With ``data.held_out`` of an earlier run over the same
    sources, these are the documents that were not trained on there. 0 uses all of the text."""
    max_tokens: int = 65_536
    """Tokens used at most, at least 2."""

    def __post_init__(self) -> None:
        if not self.name or self.name == "validation":
            raise ConfigError(f"a text to evaluate on needs a name of its own, not {self.name!r}")
        if not 0 <= self.held_out < 1 or self.max_tokens < 2:
            raise ConfigError(
                f"held_out is a share from 0 and below 1 and max_tokens at least 2, not {self.held_out} and "
                f"{self.max_tokens}"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOutText:
    """Tokens that are evaluated on and never trained on."""

    tokens: np.ndarray
    """int64 ``[num_tokens]``."""
    num_bytes: int
    """Bytes of the text that they came from."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TrainingText:
    """Tokens to train on, and tokens to evaluate on."""

    train: TokenShards
    """What is trained on, and perhaps more behind it."""
    num_tokens: int
    """How many of its tokens are trained on."""
    held_out: np.ndarray | None
    """What is evaluated on, int64 ``[num_held_out]``; None where nothing is."""
    held_out_bytes: int | None
    """Bytes of the text that ``held_out`` came from."""
    held_out_ends: np.ndarray | None
    """One past the last token of each document that ends in ``held_out``, in order, int64."""
    digest: str
    """Digest of sources, tokenizer and division."""
    texts: Mapping[str, HeldOutText]
    """Other texts to evaluate on, by name: ``validation``, and those that were named."""
    general: TokenShards | None
    """General text, such as the model knew before; None where none is named."""
    about: str | None
    """What people should know of how the text was divided; None where whole documents are held out."""
    facts: dict[str, Any]
    """For results: ``source`` (for people), ``documents``, ``bytes`` of text as UTF-8, ``train_tokens``,
    ``held_out_tokens`` and ``skipped`` (files passed over, by reason)."""


def cache_folder(chosen: Path | None) -> Path:
    """Find the folder where token shards are kept for later runs: the chosen one, or one in the user's cache."""
    if chosen is not None:
        return user_path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "engram-lm" / "shards"


def prepare_text(
    sources: Sources,
    tokenizer: Any,
    cache: Path,
    *,
    sequence_length: int,
    held_out: float = 0.01,
    validation: float = 0.0,
    held_out_sources: Sources = (),
    max_held_out_tokens: int = 65_536,
    max_bytes: int | None = None,
    texts: Iterable[EvaluationText] = (),
    general: Sources = (),
    general_held_out: float = 0.0,
    on_progress: Callable[[str, int, int | None], None] = lambda task, num_bytes, total_bytes: None,
) -> TrainingText:
    """Tokenize text into shards, or open those that an earlier run made of it, and divide it.

    Documents are held out by their contents: neither their order nor their names matter, and copies of a document are
    on the same side. Where that holds out less than half or more than twice the share asked for (a few large
    documents), that share of the text is held out instead, from the end.

    Args:
        sources: Where text comes from; the Python standard library's own sources where empty.
        tokenizer: A fast tokenizer.
        cache: Where token shards are kept.
        sequence_length: Tokens in a sequence; there must be text for at least one.
        held_out: Share of the documents to hold out, in [0, 1).
        validation: Share to hold out beside it, as the text ``validation``.
        held_out_sources: Where text to evaluate on comes from, in place of such shares.
        max_held_out_tokens: Evaluate on this many tokens at most, from the start, and on half as many for validation.
        max_bytes: Of more files than this, read some; see `open_sources`.
        texts: Other texts to evaluate on.
        general: General text, such as the model knew before; there is none where empty.
        general_held_out: Share of its documents that is left out, in [0, 1).
        on_progress: See `pack_to_shards`, whose errors are raised too.
    """
    sources, held_out_sources, general = list(sources), list(held_out_sources), list(general)

    def pack(sources: Sources, held_out: float, max_bytes: int | None = None) -> PackedCorpus:
        return pack_to_shards(
            sources, tokenizer, cache, held_out=held_out, max_bytes=max_bytes, on_progress=on_progress
        )

    share = 0.0 if held_out_sources else held_out + validation
    corpus = _packed(lambda share: pack(sources, share, max_bytes), share)
    apart, digest, about, first, num_tokens = corpus.held_out, corpus.digest, None, 0, corpus.train.num_tokens
    if held_out_sources:
        other = pack(held_out_sources, 0.0)
        apart, digest = other.train, f"{digest}, {other.digest}"
    elif apart is None and share:
        apart = corpus.train
        num_tokens = first = _beginning_of_end(apart, share, tokenizer)
        digest = f"{digest}, the first {num_tokens}"
        about = f"few documents: the last {apart.num_tokens - first:,} tokens are held out"
    if num_tokens < sequence_length + 1:
        raise DataError(
            f"the text gives {num_tokens} tokens to train on, one sequence needs {sequence_length + 1}; give more "
            "text, or shorter sequences (--sequence-length; in a recipe data.sequence_length)"
        )
    measured: dict[str, HeldOutText] = {}
    tokens = ends = None
    if apart is not None:
        middle = first + (round((apart.num_tokens - first) * validation / share) if validation else 0)
        if validation:
            measured["validation"] = _held_out_text(
                "data.validation", apart, first, middle, max_held_out_tokens // 2, tokenizer
            )
        stop = min(apart.num_tokens, middle + max_held_out_tokens + 1)
        if stop - middle < 2:
            raise DataError("the held-out text gives less than 2 tokens; give more, or data.held_out = 0 for none")
        tokens, ends = apart[middle:stop], apart.document_ends(middle, stop) - middle

    def pack_other(where: str, sources: Sources, held_out: float) -> PackedCorpus:
        try:
            return pack(sources, held_out)
        except OneSidedError as error:
            raise DataError(
                f"held_out = {held_out} of {where} selects no document or all of them; set it to 0 to use all of the "
                "text"
            ) from error

    for text in texts:
        where = f"the text {text.name}"
        packed = pack_other(where, text.sources, text.held_out)
        shards = packed.held_out or packed.train
        measured[text.name] = _held_out_text(where, shards, 0, shards.num_tokens, text.max_tokens, tokenizer)
        digest = f"{digest}, {text.name}: {packed.digest}"
    known = None
    if general:
        packed = pack_other("the general text", general, general_held_out)
        known, digest = packed.train, f"{digest}, general: {packed.digest}"
        if known.num_tokens < sequence_length + 1:
            raise DataError(
                f"the general text gives {known.num_tokens} tokens, one sequence needs {sequence_length + 1}; name "
                "more text in data.general"
            )
    sides = [side for side in (corpus.train, corpus.held_out) if side is not None]
    return TrainingText(
        train=corpus.train,
        num_tokens=num_tokens,
        held_out=tokens,
        held_out_bytes=None if tokens is None else _num_bytes(tokens, tokenizer),
        held_out_ends=ends,
        digest=digest,
        texts=measured,
        general=known,
        about=about,
        facts={
            "source": name_sources(sources),
            "documents": sum(side.num_documents for side in sides),
            "bytes": sum(side.num_text_bytes for side in sides),
            "train_tokens": num_tokens,
            "held_out_tokens": 0 if tokens is None else len(tokens),
            "skipped": corpus.skipped,
        },
    )


def _packed(pack: Callable[[float], PackedCorpus], share: float) -> PackedCorpus:
    """Pack text and set a share of its documents apart; none, where documents are too few and too large for that."""
    if share:
        try:
            corpus = pack(share)
        except OneSidedError:
            return pack(0.0)
        assert corpus.held_out is not None
        apart = corpus.held_out.num_text_bytes
        if is_balanced(apart, corpus.train.num_text_bytes + apart, share):
            return corpus
    return pack(0.0)


def _beginning_of_end(shards: TokenShards, share: float, tokenizer: Any) -> int:
    """Find where the end of the text begins that has a share of the tokens, and no larger share of the bytes.

    `split_documents` leaves that share of the bytes to it, so that a study's tokenizer never sees held-out text.
    """
    first, left = shards.num_tokens, round(share * shards.num_text_bytes)
    count = round(share * first)
    lowest, piece = first - count, max(1, count // 64)
    while first > lowest:
        start = max(lowest, first - piece)
        left -= _num_bytes(shards[start:first], tokenizer)
        if left < 0:
            break
        first = start
    return min(first, shards.num_tokens - 2)


def _held_out_text(where: str, shards: TokenShards, start: int, stop: int, most: int, tokenizer: Any) -> HeldOutText:
    tokens = shards[start : min(stop, start + most + 1)]
    if len(tokens) < 2:
        raise DataError(f"{where} gives {len(tokens)} tokens, 2 are needed; give more text, or a larger share of it")
    return HeldOutText(tokens, _num_bytes(tokens, tokenizer))


def _num_bytes(tokens: np.ndarray, tokenizer: Any) -> int:
    """Count the bytes of the text that tokens came from."""
    text = tokenizer.decode(tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(text.encode("utf-8", "replace"))


def beginning(sources: Sources, cache: Path, num_characters: int, *, max_bytes: int | None = None) -> Iterator[str]:
    """Read the first characters of the text, to train a tokenizer on: documents, long ones in pieces."""
    left = num_characters
    for piece in open_remembered(sources, cache, max_bytes=max_bytes).pieces():
        if left <= 0:
            return
        yield piece.text[:left]
        left -= len(piece.text)
