"""A recipe's text made real: tokenizer, and token shards to train and to evaluate on."""

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from engram_lm.errors import ConfigError, DataError
from engram_lm.files import new_folder
from engram_lm.training.data.corpus import standard_library_files
from engram_lm.training.data.packing import OneSidedError, PackedCorpus, open_remembered, pack_to_shards
from engram_lm.training.data.shards import TokenShards
from engram_lm.training.data.sources import TextSource
from engram_lm.training.data.tokenizer import train_tokenizer
from engram_lm.training.recipe import Recipe

__all__ = [
    "HeldOutText",
    "TrainingText",
    "cache_folder",
    "find_tokenizer",
    "open_text",
    "standard_library",
    "text_sources",
]


def text_sources(recipe: Recipe) -> tuple[TextSource, ...]:
    """Where the recipe's text comes from."""
    return recipe.data.sources or standard_library()


def standard_library() -> tuple[TextSource, ...]:
    """The Python standard library's own sources on this machine, which are the text where none is named."""
    return tuple(TextSource(path=str(path), kind="text") for path in standard_library_files())


def cache_folder(chosen: Path | None) -> Path:
    """Where token shards and tokenizers are kept for later runs: where a recipe says, or in the user's cache."""
    if chosen is not None:
        return chosen.expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "engram-lm" / "shards"


def find_tokenizer(recipe: Recipe, folder: Path) -> Any:
    """Load the recipe's tokenizer, or train it once and keep it in ``folder``.

    Several processes may call this at a time; one of them trains.

    Args:
        recipe: What to train on.
        folder: Where the tokenizer is kept; one that is there already is used.

    Raises:
        ConfigError: The tokenizer cannot be loaded.
        DataError: There is no text to train one on.
    """
    model = recipe.model
    for key, given in (("weights", model.weights), ("base", model.base and Path(model.base))):
        if given and not (given / "config.json").is_file() and (given / "model").is_dir():
            raise ConfigError(f"{given} is a run; its model is in {given / 'model'}: give that as model.{key}")
    source = recipe.tokenizer.path or model.base or (None if model.weights is None else str(model.weights))
    with _locked(folder):
        if not folder.is_dir():
            if source is None:
                tokenizer = train_tokenizer(_beginning(recipe), recipe.tokenizer.vocab_size)
            else:
                tokenizer = _load_tokenizer(source, None if recipe.tokenizer.path else model.revision)
            with new_folder(folder) as aside:
                tokenizer.save_pretrained(aside)
    return _load_tokenizer(folder)


def _load_tokenizer(source: str | Path, revision: str | None = None) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision)
    except Exception as error:  # tokenizers raises a bare Exception where its file is damaged
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"cannot load the tokenizer {source}: {why}; give a folder that save_pretrained wrote, or the name of one "
            "on the Hub"
        ) from error


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOutText:
    """Tokens that are evaluated on and never trained on."""

    tokens: np.ndarray
    """int64 ``[num_tokens]``."""
    num_bytes: int
    """Bytes of the text that they came from."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingText:
    """Tokens to train on, and tokens to evaluate on."""

    train: TokenShards
    """What is trained on, and perhaps more behind it."""
    num_tokens: int
    """How many of its tokens are trained on."""
    held_out: np.ndarray | None
    """What is evaluated on, int64 ``[num_held_out]``; None where nothing is."""
    held_out_ends: np.ndarray | None
    """Where documents end in it."""
    digest: str
    """Of all of it."""
    texts: Mapping[str, HeldOutText] = dataclasses.field(default_factory=dict)
    """Other texts to evaluate on, by name: ``validation``, and those of ``evaluation.texts``."""
    about: str | None = None
    """What people should know of how the text was divided."""


def open_text(
    recipe: Recipe,
    tokenizer: Any,
    on_progress: Callable[[str, int, int | None], None] = lambda task, num_bytes, total_bytes: None,
) -> TrainingText:
    """Tokenize the recipe's text into shards, or open those that an earlier run made of it.

    Args:
        recipe: Which text, and how long a sequence is.
        tokenizer: What makes tokens of it.
        on_progress: See `pack_to_shards`.

    Raises:
        DataError: There is no text, too little of it, or it cannot be read.
    """

    def pack(sources: Sequence[TextSource], held_out: float) -> PackedCorpus:
        return pack_to_shards(
            sources, tokenizer, cache_folder(recipe.data.cache), held_out=held_out, on_progress=on_progress
        )

    data, about = recipe.data, None
    share = 0.0 if data.held_out_sources else data.held_out + data.validation
    corpus = _packed(pack, text_sources(recipe), share)
    train, apart, digest, first = corpus.train, corpus.held_out, corpus.digest, 0
    num_tokens = train.num_tokens
    if data.held_out_sources:
        other = pack(data.held_out_sources, 0.0)
        apart, digest = other.train, f"{digest}, {other.digest}"
    elif apart is None and share:
        apart = train
        num_tokens = first = train.num_tokens - max(round(share * train.num_tokens), 2)
        digest = f"{corpus.digest}, the first {num_tokens}"
        about = f"few documents: the last {train.num_tokens - first:,} tokens are held out"
    needed = data.sequence_length + 1
    if num_tokens < needed:
        raise DataError(
            f"the text gives {num_tokens} tokens to train on, one sequence needs {needed}; give more text, or a "
            "smaller data.sequence_length"
        )
    texts, max_tokens = {}, recipe.evaluation.max_tokens
    held_out = ends = None
    if apart is not None:
        middle = first + (round((apart.num_tokens - first) * data.validation / share) if data.validation else 0)
        if data.validation:
            texts["validation"] = _held_out_text("data.validation", apart, first, middle, max_tokens // 2, tokenizer)
        stop = min(apart.num_tokens, middle + max_tokens + 1)
        if stop - middle < 2:
            raise DataError("the held-out text gives less than 2 tokens; give more, or data.held_out = 0 for none")
        held_out, ends = apart.slice(middle, stop), apart.document_ends(middle, stop) - middle
    for named in recipe.evaluation.texts:
        try:
            packed = pack(named.sources or standard_library(), named.held_out)
        except OneSidedError as error:
            raise DataError(
                f"held_out = {named.held_out} of the text {named.name} is no document or all of them; set it to 0 to "
                "use all of the text"
            ) from error
        shards = packed.train if packed.held_out is None else packed.held_out
        where = f"the text {named.name}"
        texts[named.name] = _held_out_text(where, shards, 0, shards.num_tokens, named.max_tokens, tokenizer)
        digest = f"{digest}, {named.name}: {packed.digest}"
    return TrainingText(train, num_tokens, held_out, ends, digest, texts, about)


def _packed(pack: Callable[[Sequence[TextSource], float], PackedCorpus], sources: Any, share: float) -> PackedCorpus:
    """Pack text and set a share of its documents apart; none, where documents are too few and too large for that."""
    if not share:
        return pack(sources, 0.0)
    try:
        corpus = pack(sources, share)
    except OneSidedError:
        return pack(sources, 0.0)
    assert corpus.held_out is not None
    apart = corpus.held_out.num_tokens
    # Of a few large documents, those set aside may be half of all the text.
    as_asked = 0.5 < apart / max(1.0, share * (corpus.train.num_tokens + apart)) < 2
    return corpus if as_asked else pack(sources, 0.0)


def _held_out_text(where: str, shards: TokenShards, start: int, stop: int, most: int, tokenizer: Any) -> HeldOutText:
    tokens = shards.slice(start, min(stop, start + most + 1))
    if len(tokens) < 2:
        raise DataError(f"{where} gives {len(tokens)} tokens, 2 are needed; give more text, or a larger share of it")
    text = tokenizer.decode(tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return HeldOutText(tokens, len(text.encode("utf-8", "replace")))


def _beginning(recipe: Recipe) -> Iterator[str]:
    """The texts that a tokenizer is trained on."""
    left = recipe.tokenizer.train_bytes
    for piece in open_remembered(text_sources(recipe), cache_folder(recipe.data.cache)).pieces():
        if left <= 0:
            return
        yield piece.text[:left]
        left -= len(piece.text)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
