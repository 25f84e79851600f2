"""Builds the model of a recipe: its configuration, its first weights, and its tables divided over the processes."""

import dataclasses
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers.activations import ACT2FN

from engram_lm.errors import ConfigError, MismatchError, suggestion
from engram_lm.hashing import HashSpec
from engram_lm.hashing.token_map import read_vocabulary
from engram_lm.memory.interface import MemoryLayer
from engram_lm.memory.step import RowMap
from engram_lm.model import EngramForCausalLM, EngramLMConfig
from engram_lm.planning.command import read_config
from engram_lm.planning.sizes import model_sizes
from engram_lm.tables.occupancy import TrainedTable
from engram_lm.training.checkpoints.training_state import SPEC_DIGEST, export_model, model_facts, training_tensors
from engram_lm.training.data.text import TrainingText
from engram_lm.training.distribution import Ranks
from engram_lm.training.recipe import ArchitectureOptions, ModelOptions, Recipe
from engram_lm.training.shard_tables import shard_tables
from engram_lm.training.writing import trained_tables


class OwnModel:
    """The recipe's `EngramForCausalLM`, with this process's share of its tables.

    `engram_lm.training.base_model.AdaptedBase` has the same methods, for a recipe that starts from a model of others.

    Raises:
        ConfigError: An impossible model.
        MismatchError: A configuration made for another tokenizer.
    """

    def __init__(self, recipe: Recipe, tokenizer: Any, ranks: Ranks) -> None:
        config = model_config(recipe, tokenizer)
        self.module: Any = build_model(recipe, config, tokenizer, ranks)
        """The model."""
        self._costs = model_sizes(config, context=recipe.data.sequence_length)

    needs_checkpoint = True
    """Whether `write` takes the model out of a checkpoint."""

    def prepare(self, text: TrainingText) -> None:
        """Let memory layers take from the text what they have to know before training."""
        for block in self.module.model.layers:
            # Most layers take nothing, and a long text is read as a whole.
            if block.memory is not None and type(block.memory).prepare is not MemoryLayer.prepare:
                block.memory.prepare(self.module.hash_spec, text.train[: text.num_tokens])

    retention_loss = dependence_loss = None
    """Losses that compare a model with its frozen base, which this one has not."""

    def rows(self) -> tuple[HashSpec, RowMap | None, dict[str, TrainedTable]] | None:
        """How the memory reads rows, and its tables that are trained, by name; None without hashed rows."""
        memory = self.module.config.memory_config
        if memory is None or memory.entry.reads != "rows":
            return None
        return self.module.hash_spec, None, trained_tables(self.module.tables)

    @property
    def sizes(self) -> dict[str, int]:
        """Parameters: ``total``, those in ``tables``, and those that take part in a token (``active``)."""
        return {"total": self._costs.total, "tables": self._costs.memory_tables, "active": self._costs.active}

    def training_flops_per_token(self) -> float:
        """Operations that training on one token takes."""
        return 3 * self._costs.flops_per_token

    def identity(self) -> dict[str, Any]:
        """Say what must be the same in a checkpoint: the hash of the memory."""
        return {SPEC_DIGEST: self.facts()[SPEC_DIGEST]}

    def facts(self) -> dict[str, Any]:
        """Say what is written beside the tensors of a checkpoint."""
        return model_facts(self.module)

    def tensors(self, optimizer: Any) -> dict[str, Tensor]:
        """Name what training changes, for a checkpoint."""
        return training_tensors(self.module, optimizer)

    def write(self, out: Path, checkpoint: Path | None, tokenizer: Any) -> None:
        """Write ``model/`` into the run folder, of a checkpoint: a process alone may have no room for all tables."""
        assert checkpoint is not None
        if (out / "model").is_dir():
            shutil.rmtree(out / "model")  # of an earlier end of this run, which its checkpoint has as well
        export_model(checkpoint, out / "model", tokenizer=tokenizer)

    def is_written(self, out: Path) -> bool:
        """Whether what `write` writes is there."""
        return (out / "model" / "config.json").is_file()


def model_config(recipe: Recipe, tokenizer: Any = None) -> EngramLMConfig:
    """Configure the recipe's model; without a tokenizer, vocabulary and canonical tokens are the preset's own.

    Raises:
        ConfigError: An impossible model.
        MismatchError: A configuration made for another tokenizer.
    """
    config = _architecture(recipe.model, tokenizer)
    recipe.stage.apply(config, sequence_length=recipe.data.sequence_length)
    if recipe.data.sequence_length > config.max_position_embeddings:
        way = "set model.backbone.max_position_embeddings" if recipe.model.weights is None else "set stage.factor"
        raise ConfigError(
            f"data.sequence_length {recipe.data.sequence_length} is more than the model's max_position_embeddings "
            f"{config.max_position_embeddings}; shorten it, or {way}"
        )
    return config


def _architecture(model: ArchitectureOptions, tokenizer: Any) -> EngramLMConfig:
    """Read a model's configuration, or make that of a preset."""
    source = (model.weights if isinstance(model, ModelOptions) else None) or model.config
    if source is None:
        return _preset(model, tokenizer)
    config = read_config(str(source))
    if tokenizer is not None:
        config.bind_tokenizer(tokenizer)
        # A text that holds such a token only late would end the run there.
        if config.vocab_size < (size := len(read_vocabulary(tokenizer))):
            raise MismatchError(
                f"the tokenizer has {size} tokens, the model's vocabulary {config.vocab_size}; use the tokenizer that "
                "the model was made for, or resize_token_embeddings of the model first"
            )
    return config


def _preset(model: ArchitectureOptions, tokenizer: Any) -> EngramLMConfig:
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


def build_model(recipe: Recipe, config: EngramLMConfig, tokenizer: Any, ranks: Ranks) -> Any:
    """Build the model on this process's device, with its share of the tables.

    The first numbers depend on the seed and nothing else: neither the backbone's on the tables, nor a row on how many
    processes there are. The tokenizer is for the models in ``model.like``.

    Raises:
        ConfigError: A model in ``model.like`` is impossible, or its memory has another number of layers.
    """
    torch.manual_seed(recipe.train.seed)
    model: Any
    if recipe.model.weights is not None:
        model = EngramForCausalLM.from_pretrained(recipe.model.weights, config=config, dtype=torch.float32)
    else:
        model = _new_model(config)
        for like in recipe.model.like:
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(recipe.train.seed)
                _take_weights(_new_model(_architecture(like, tokenizer)), model, like.part)
    if recipe.train.gradient_checkpointing:
        checkpoint_activations(model)
    if any(table.gradient == "sparse" for table in model.tables.values()):
        seed = None if recipe.model.weights is not None else recipe.train.seed
        shard_tables(model, ranks.group, seed=seed, device=ranks.device, deduplicate=recipe.parallel.deduplicate)
    for table in model.tables.values():
        table.weight.requires_grad_(not recipe.model.frozen_tables)
    return model.to(ranks.device)


def checkpoint_activations(model: Any) -> None:
    """Let the blocks of a model be computed twice in training, to keep less of them in memory."""
    # The new name in transformers; the old one warns there.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    # transformers lets the embeddings' outputs have a gradient, which the other kind of checkpointing needs. The
    # backward pass would then go through every block of a frozen base, also through those below the first memory.
    model.disable_input_require_grads()


def _new_model(config: EngramLMConfig) -> Any:
    """Build a model whose sparse tables have no numbers yet: a process may have no room for more than its share."""
    sparse = config.memory is not None and config.memory["table_gradient"] == "sparse"
    return EngramForCausalLM(config, table_device="meta" if sparse else None)


@torch.no_grad()
def _take_weights(source: Any, target: Any, part: str) -> None:
    """Let weights begin as another model's: of a larger matrix, the part that the smaller one has.

    Rows of sparse tables are left out: they depend on the seed and their place among the tables alone.
    """
    if part == "all":
        pairs: Iterable[tuple[nn.Module, nn.Module]] = [(source, target)]
    else:
        ours, theirs = (
            [layer.memory for layer in model.base_model.layers if layer.memory is not None]
            for model in (target, source)
        )
        if len(ours) != len(theirs):
            raise ConfigError(
                f"model.like has {len(theirs)} memory layers and the model {len(ours)}; their weights cannot be paired"
            )
        pairs = zip(theirs, ours, strict=True)
    for one, other in pairs:
        known = dict(one.named_parameters())
        for name, parameter in other.named_parameters():
            given = known.get(name)
            if given is None or given.is_meta or parameter.is_meta:
                continue
            if given.dim() == parameter.dim():  # otherwise they have a name in common and nothing else
                common = tuple(slice(0, min(a, b)) for a, b in zip(given.shape, parameter.shape, strict=True))
                parameter[common] = given[common]
