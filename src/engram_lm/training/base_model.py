"""A recipe that starts from a pretrained model: memory or LoRA on a frozen base, or all of its weights."""

import contextlib
import hashlib
import importlib.util
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import engram_lm.model  # noqa: F401 - AutoModelForCausalLM then knows the project's own models
from engram_lm.adapt import MemoryAdapter, attach
from engram_lm.adapt.controls import EmbeddingMeans, one_row, permuted_hash
from engram_lm.adapt.decoder import find_decoder
from engram_lm.adapt.transfer import transfer_rows
from engram_lm.errors import CheckpointError, ConfigError, EngramError, MissingExtraError, RemoteError
from engram_lm.hashing import HashSpec
from engram_lm.memory.step import RowMap
from engram_lm.tables.occupancy import TrainedTable
from engram_lm.tokenizing import beginning_tokens
from engram_lm.training.assembly import locate
from engram_lm.training.build import checkpoint_activations
from engram_lm.training.checkpoints.training_state import SPEC_DIGEST, training_tensors
from engram_lm.training.data.text import TrainingText
from engram_lm.training.dependence import DependenceLoss
from engram_lm.training.distribution import Ranks
from engram_lm.training.flops import flops_per_token
from engram_lm.training.recipe import LoraOptions, Recipe
from engram_lm.training.retention import RetentionLoss
from engram_lm.training.writing import trained_tables

_BASES = (
    "A base is a folder that save_pretrained wrote, or a name on the Hub. `engram-lm train recipes/base-cpu.toml` "
    "trains a small one in runs/base-cpu/model"
)
_FINGERPRINT_NUMBERS = 64
_ROW_MAPS = {"permuted_hash": permuted_hash, "one_row": one_row}


class AdaptedBase:
    """A pretrained model with what the recipe adds to it. What the recipe trains, and only that, requires a gradient.

    Raises:
        ConfigError: The base cannot be loaded, has no recognizable layer list, or the memory is none for it; or there
            are several processes.
        MismatchError: The tokenizer is not the base's.
        MissingExtraError: LoRA is asked for, and peft is not installed.
    """

    def __init__(self, recipe: Recipe, tokenizer: Any, ranks: Ranks) -> None:
        if ranks.world_size > 1:
            raise ConfigError("a recipe with model.base trains in one process; start it without torchrun")
        options = recipe.model
        assert options.base is not None
        self._recipe, self._beginning = recipe, beginning_tokens(tokenizer)
        self.module: Any = load_base(options.base, options.revision, options.base_dtype)
        """The base, in which everything else is put."""
        self._fingerprint = fingerprint(self.module)
        self.module.to(ranks.device).eval()
        is_whole = not (recipe.adapter.layers or recipe.lora.rank)
        self.module.requires_grad_(is_whole)
        torch.manual_seed(recipe.train.seed)
        self.peft_model: Any = _add_lora(self.module, recipe.lora, options.layer_list) if recipe.lora.rank else None
        """peft's view of the base with its low-rank matrices; None without them."""
        self.adapter: MemoryAdapter | None = None
        """The memory; None without it."""
        if recipe.adapter.layers:
            self.adapter = self._attach(tokenizer)
        if recipe.train.gradient_checkpointing:
            checkpoint_activations(self.module)
        self.retention_loss: RetentionLoss | None = None
        """Holds what is trained to the base; None without it."""
        if recipe.retention.weight:
            self.retention_loss = RetentionLoss(self.module, layer_list=options.layer_list)
        self.dependence_loss: DependenceLoss | None = None
        """Makes the model depend on the memory; None without it."""
        if recipe.dependence.weight:
            assert self.adapter is not None
            self.dependence_loss = DependenceLoss(self.adapter, recipe.dependence)
        self._parts = ["memory"] * (self.adapter is not None) + ["lora"] * (self.peft_model is not None)

    needs_checkpoint = False
    """Whether `write` takes the model out of a checkpoint."""

    def _attach(self, tokenizer: Any) -> MemoryAdapter | None:
        recipe, layer_list = self._recipe, self._recipe.model.layer_list
        decoder = find_decoder(self.module, layer_list)
        memory = recipe.adapter.for_base(decoder.hidden_size, len(decoder.layers))
        if recipe.adapter.control == "embeddings":
            EmbeddingMeans.attach(self.module, decoder, memory.layers, memory.orders)
            return None
        table_dtype = getattr(torch, recipe.adapter.table_dtype)
        adapter = attach(self.module, tokenizer, memory, layer_list=layer_list, table_dtype=table_dtype)
        if recipe.model.frozen_tables:
            adapter.memory_tables.requires_grad_(False)
        if (move := _ROW_MAPS.get(recipe.adapter.control)) is not None:
            adapter.row_map = move(adapter.spec)
        return adapter

    def prepare(self, text: TrainingText) -> None:
        """Let rows begin as hidden states of the base, if the recipe says so. Called once, before training."""
        options, recipe = self._recipe.adapter, self._recipe
        if self.adapter is not None and options.initialization == "transfer":
            transfer_rows(
                self.adapter,
                text.train[: min(text.num_tokens, options.transfer_tokens)],
                num_ngrams=options.rows_per_head,
                source=options.transfer_source,
                length=recipe.data.sequence_length,
                seed=recipe.train.seed,
                beginning=self._beginning,
            )

    @property
    def sizes(self) -> dict[str, int]:
        """Parameters: ``total``, those in ``tables``, those that take part in a token (``active``), and ``trained``."""
        parameters = list(self.module.parameters())
        tables = [] if self.adapter is None else list(self.adapter.memory_tables.parameters())
        total, in_tables = (sum(parameter.numel() for parameter in some) for some in (parameters, tables))
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        return {"total": total, "tables": in_tables, "active": total - in_tables, "trained": trained}

    def training_flops_per_token(self) -> float:
        """Operations that training on one token takes, without those of hidden states that rows are made of.

        Those of the retention and dependence losses of a step are divided among the tokens that are trained on.
        """
        length, dependence = self._recipe.data.sequence_length, self.dependence_loss

        def both(tokens: Tensor) -> Tensor:
            assert dependence is not None
            return dependence(self.module, tokens, tokens).sum()

        count = flops_per_token(self.module, length, training=True, loss=None if dependence is None else both)
        if self.retention_loss is not None:
            share = self._recipe.retention.batch_size / self._recipe.train.batch_size
            count += share * flops_per_token(self.module, length, training=True, loss=self.retention_loss)
        return count

    def rows(self) -> tuple[HashSpec, RowMap | None, dict[str, TrainedTable]] | None:
        """How the memory reads rows, and its tables that are trained, by name; None without memory."""
        if self.adapter is None:
            return None
        return self.adapter.spec, self.adapter.row_map, trained_tables(self.adapter.tables)

    def identity(self) -> dict[str, Any]:
        """Say what must be the same in a checkpoint: the base's weights, by a fingerprint, and the memory's hash."""
        return {"base": self._fingerprint, SPEC_DIGEST: None if self.adapter is None else self.adapter.spec.digest}

    def facts(self) -> dict[str, Any]:
        """Say what is written beside the tensors of a checkpoint."""
        return self.identity()

    def tensors(self, optimizer: Any) -> dict[str, Tensor]:
        """Name what training changes, for a checkpoint; what is frozen is not in it."""
        return training_tensors(self.module, optimizer, only_trained=True)

    def write(self, out: Path, checkpoint: Path | None, tokenizer: Any) -> None:
        """Write what was trained into the run folder: ``memory/`` and ``lora/``, or else the whole ``model/``."""
        for name in (*self._parts, *([] if self._parts else ["model"])):
            if (out / name).is_dir():
                shutil.rmtree(out / name)  # of an earlier end of this run
        if self.adapter is not None:
            self.adapter.save_pretrained(out / "memory")
        if self.peft_model is not None:
            self.peft_model.save_pretrained(out / "lora")
        if not self._parts:
            self.module.save_pretrained(out / "model")
            tokenizer.save_pretrained(out / "model")

    def is_written(self, out: Path) -> bool:
        """Whether what `write` writes is there."""
        return all((out / name).is_dir() for name in self._parts or ["model"])


@contextlib.contextmanager
def told_where_bases_come_from() -> Iterator[None]:
    """Add to an error that a base cannot be found where one can be had."""
    try:
        yield
    except (CheckpointError, RemoteError) as error:
        raise type(error)(f"{error}. {_BASES}") from error


def load_base(source: str, revision: str | None, dtype: str) -> Any:
    """Load a pretrained causal language model; a ConfigError repeats what transformers says if that cannot be done.

    Where it cannot be found, the errors are those of `locate`.
    """
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    with told_where_bases_come_from():
        place, options = locate(source, revision)
    try:
        return AutoModelForCausalLM.from_pretrained(place, dtype=kind, **options)
    except EngramError:
        raise
    except Exception as error:  # transformers, huggingface_hub, tokenizers and safetensors each raise their own
        # All of it in one line: what the first line begins is often said in the second.
        why = " ".join(str(error).split())[:400] or type(error).__name__
        raise ConfigError(f"cannot load the base model {source}: {why}. {_BASES}") from error


def lora_targets(model: Any, targets: tuple[str, ...], layer_list: str | None = None) -> list[str]:
    """Find the full names of the decoder layers' matrices that get low-rank ones, by the ends of their names.

    Raises:
        ConfigError: There is none.
    """
    decoder = find_decoder(model, layer_list)
    inside = {
        f"{decoder.name}.{name}": module
        for name, module in decoder.layers.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    found = [name for name in inside if "all-linear" in targets or name.endswith(tuple(f".{end}" for end in targets))]
    if not found:
        ends = sorted({name.rpartition(".")[2] for name in inside})
        raise ConfigError(
            f"no matrix of the decoder layers is called {', '.join(targets)}; there are {', '.join(ends)}"
        )
    return found


def _add_lora(model: Any, lora: LoraOptions, layer_list: str | None) -> Any:
    if importlib.util.find_spec("peft") is None:
        raise MissingExtraError(
            "LoRA is trained with peft, which is not installed; install the extra with `pip install "
            "'engram-lm[lora]'`, or leave LoRA out of the recipe (`engram-lm adapt --controls` adds it)"
        )
    from peft import LoraConfig, get_peft_model

    targets = lora_targets(model, lora.targets, layer_list)
    alpha = 2 * lora.rank if lora.alpha is None else lora.alpha
    options: dict[str, Any] = {"r": lora.rank, "lora_alpha": alpha, "lora_dropout": lora.dropout}
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 by a name that is going out of use there.
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
        # GPT-2's matrices lie the other way around.
        turned = all(isinstance(model.get_submodule(name), Conv1D) for name in targets)
        chosen = LoraConfig(**options, target_modules=targets, fan_in_fan_out=turned, task_type="CAUSAL_LM")
        return get_peft_model(model, chosen)


def fingerprint(model: nn.Module) -> str:
    """Digest the name, the shape and some numbers of every tensor, which tells one model from another."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        numbers = tensor.detach().flatten()
        some = numbers[:: max(1, numbers.numel() // _FINGERPRINT_NUMBERS)]
        digest.update(some.double().cpu().numpy().tobytes())
    return digest.hexdigest()
