"""A recipe's parts made real: tokenizer, token shards, configuration, model."""

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer
from transformers.activations import ACT2FN

from engram_lm.errors import ConfigError, DataError, MismatchError, suggestion
from engram_lm.files import new_folder
from engram_lm.model import EngramForCausalLM, EngramLMConfig
from engram_lm.planning.command import read_config
from engram_lm.tables.tiers.sharded import shard_tables
from engram_lm.training.data.corpus import standard_library_files
from engram_lm.training.data.packing import OneSidedError, PackedCorpus, open_remembered, pack_to_shards
from engram_lm.training.data.shards import TokenShards
from engram_lm.training.data.sources import TextSource
from engram_lm.training.data.tokenizer import train_tokenizer
from engram_lm.training.distribution import Ranks
from engram_lm.training.recipe import Recipe

__all__ = ["TrainingText", "build_model", "cache_folder", "find_tokenizer", "model_config", "open_text", "text_sources"]


def text_sources(recipe: Recipe) -> tuple[TextSource, ...]:
    """Where the recipe's text comes from."""
    if recipe.data.sources:
        return recipe.data.sources
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
    weights = recipe.model.weights
    if weights is not None and not (weights / "config.json").is_file() and (weights / "model").is_dir():
        raise ConfigError(f"{weights} is a run; its model is in {weights / 'model'}: give that as model.weights")
    source = recipe.tokenizer.path or (None if recipe.model.weights is None else str(recipe.model.weights))
    with _locked(folder):
        if not folder.is_dir():
            if source is None:
                tokenizer = train_tokenizer(_beginning(recipe), recipe.tokenizer.vocab_size)
            else:
                tokenizer = _load_tokenizer(source)
            with new_folder(folder) as aside:
                tokenizer.save_pretrained(aside)
    return _load_tokenizer(folder)


def _load_tokenizer(source: str | Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # tokenizers raises a bare Exception where its file is damaged
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"cannot load the tokenizer {source}: {why}; give a folder that save_pretrained wrote, or the name of one "
            "on the Hub"
        ) from error


@dataclasses.dataclass(frozen=True)
class TrainingText:
    """Tokens to train on, and tokens to evaluate on."""

    train: TokenShards
    """What is trained on, and perhaps more behind it."""
    num_tokens: int
    """How many of its tokens are trained on."""
    held_out: np.ndarray | None
    """What is evaluated on, int64; None where nothing is."""
    held_out_ends: np.ndarray | None
    """Where documents end in it."""
    digest: str
    """Of all of it."""
    about: str | None = None
    """What people should know of how it was divided."""


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
    share = 0.0 if data.held_out_sources else data.held_out
    try:
        corpus = pack(text_sources(recipe), share)
        train, held_out, digest, first = corpus.train, corpus.held_out, corpus.digest, 0
        num_tokens = train.num_tokens
        if data.held_out_sources:
            other = pack(data.held_out_sources, 0.0)
            held_out, digest = other.train, f"{digest}, {other.digest}"
    except OneSidedError:
        corpus = pack(text_sources(recipe), 0.0)
        train = held_out = corpus.train
        num_tokens = first = train.num_tokens - max(round(share * train.num_tokens), 2)
        digest = f"{corpus.digest}, the first {num_tokens}"
        about = f"few documents: the last {train.num_tokens - first:,} tokens are held out"
    needed = data.sequence_length + 1
    if num_tokens < needed:
        raise DataError(
            f"the text gives {num_tokens} tokens to train on, one sequence needs {needed}; give more text, or a "
            "smaller data.sequence_length"
        )
    if held_out is None:
        return TrainingText(train, num_tokens, None, None, digest)
    stop = min(held_out.num_tokens, first + recipe.evaluation.max_tokens + 1)
    if stop - first < 2:
        raise DataError("the held-out text gives less than 2 tokens; give more, or data.held_out = 0 for none")
    ends = held_out.document_ends(first, stop) - first
    return TrainingText(train, num_tokens, held_out.slice(first, stop), ends, digest, about)


def model_config(recipe: Recipe, tokenizer: Any = None) -> EngramLMConfig:
    """Configure the recipe's model.

    Args:
        recipe: Which model.
        tokenizer: Decides vocabulary and canonical tokens of a preset; without one they are the preset's own.

    Raises:
        ConfigError: An impossible model.
        MismatchError: A configuration made for another tokenizer.
    """
    model = recipe.model
    if model.weights is not None or model.config is not None:
        config = read_config(str(model.weights or model.config))
        if tokenizer is not None:
            if config.spec is not None:
                config._token_map = config.spec.bind(tokenizer).token_map
            elif config.vocab_size < len(tokenizer):
                raise MismatchError(
                    f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {config.vocab_size}; use the "
                    "tokenizer that the model was made for"
                )
    else:
        config = _preset(recipe, tokenizer)
    if recipe.data.sequence_length > config.max_position_embeddings:
        raise ConfigError(
            f"data.sequence_length {recipe.data.sequence_length} is more than the model's max_position_embeddings "
            f"{config.max_position_embeddings}; shorten it, or set model.backbone.max_position_embeddings"
        )
    return config


def _preset(recipe: Recipe, tokenizer: Any) -> EngramLMConfig:
    model = recipe.model
    # transformers keeps fields that it does not know beside those it does: a misspelled one would change nothing.
    known = [field.name for field in dataclasses.fields(EngramLMConfig) if field.name not in ("memory", "hash_spec")]
    for name in model.backbone:
        if name not in known:
            raise ConfigError(f"model.backbone has an unknown field {name!r}; {suggestion(name, known)}")
    activation = str(model.backbone.get("hidden_act", "silu"))
    if activation not in ACT2FN:  # only building a block would find out, by a KeyError
        raise ConfigError(f"model.backbone.hidden_act is one of {', '.join(ACT2FN)}, not {activation!r}")
    try:
        return EngramLMConfig.preset(model.preset, tokenizer, memory=model.memory or None, **model.backbone)
    except StrictDataclassError as error:
        raise ConfigError(f"model.backbone cannot be: {' '.join(str(error).split())}") from error


def build_model(recipe: Recipe, config: EngramLMConfig, ranks: Ranks) -> Any:
    """Build the model on this process's device, with its share of the tables.

    The first numbers depend on the seed and nothing else: neither the backbone's on the tables, nor a row on how many
    processes there are.
    """
    torch.manual_seed(recipe.train.seed)
    model: Any
    if recipe.model.weights is not None:
        model = EngramForCausalLM.from_pretrained(recipe.model.weights, dtype=torch.float32)
    else:
        # Tables come later: a process may have no room for more than its share of them.
        config._tables_on_meta = config.memory is not None and config.memory["table_gradient"] == "sparse"
        try:
            model = EngramForCausalLM(config)
        finally:
            del config._tables_on_meta
    if recipe.train.gradient_checkpointing:
        # Its new name in transformers; the old one warns there.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if any(table.gradient == "sparse" for table in model.tables.values()):
        seed = None if recipe.model.weights is not None else recipe.train.seed
        shard_tables(model, ranks.group, seed=seed, device=ranks.device, deduplicate=recipe.parallel.deduplicate)
    return model.to(ranks.device)


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
