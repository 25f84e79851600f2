"""What an adaptation finds out before it trains: the base's own losses, and what each arm costs."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch

from engram_lm.adapt.attachment import adapter_spec
from engram_lm.adapt.decoder import find_decoder
from engram_lm.errors import ConfigError
from engram_lm.memory import EngramConfig
from engram_lm.studies.adaptation.arms import arm_kind, arm_recipe
from engram_lm.studies.adaptation.diagnostics import loss_values, measure_tasks, retained_losses
from engram_lm.studies.adaptation.recipe import AdaptationRecipe, ArmName
from engram_lm.tokenizing import beginning_tokens
from engram_lm.training.assembly import load_tokenizer, open_text
from engram_lm.training.base_model import AdaptedBase, fingerprint, load_base, lora_targets
from engram_lm.training.data.text import TrainingText
from engram_lm.training.distribution import Ranks
from engram_lm.training.flops import flops_per_token
from engram_lm.training.held_out import held_out_loss
from engram_lm.training.job import sequences_at_once
from engram_lm.training.loop import best_dtype, find_device
from engram_lm.training.progress import RunProgress
from engram_lm.training.recipe import Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmCost:
    """What an arm holds and takes."""

    num_trainable: int
    """Numbers that are trained."""
    num_trainable_outside_tables: int
    """Those of them that are multiplied by, and not looked up."""
    flops_per_token: float
    """Operations of training on one token."""
    preparation_flops: float
    """Operations before training: those of taking hidden states."""
    lora_rank: int | None
    """Rank of its low-rank matrices; None without them."""


class Bench:
    """The base and the text as they are before training, and the arms' costs.

    Raises:
        ConfigError: No domain is named, the base cannot be loaded or has no recognizable layer list, or the memory is
            none for it.
        DataError: There is too little text.
        MismatchError: The base's tokenizer is not the model's.
    """

    def __init__(self, recipe: AdaptationRecipe, progress: RunProgress) -> None:
        if not recipe.data.domain:
            raise ConfigError(
                "data.domain is not given: name the text that the model should learn, files or folders, such as "
                "--data.domain '[\"my-text/\"]'"
            )
        base = recipe.base
        device = recipe.train.device
        if device == "auto":
            device = str(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
        self.ranks = Ranks(device=find_device(device))
        progress.note(f"loading {base.model}")
        model = load_base(base.model, base.revision, base.dtype)
        self.tokenizer = load_tokenizer(base.model, base.revision)
        self.fingerprint = fingerprint(model)
        """Digest of the base's weights."""
        model.to(self.ranks.device).eval()
        decoder = find_decoder(model, base.layer_list)
        self.memory: EngramConfig = recipe.memory.for_base(decoder.hidden_size, len(decoder.layers))
        """Geometry of the memory."""
        # The recipes of the runs name layers by their numbers, whatever words this one has.
        self.recipe = dataclasses.replace(recipe, memory=dataclasses.replace(recipe.memory, layers=self.memory.layers))
        targets = lora_targets(model, recipe.lora.targets, base.layer_list)
        rank = recipe.lora.rank
        self.lora_rank: int = matched_rank(model, targets, self.memory) if rank == "auto" else rank
        """Rank of LoRA."""
        self.dtype: Literal["float32", "bfloat16"] = (
            best_dtype(self.ranks.device) if recipe.train.dtype == "auto" else recipe.train.dtype
        )
        """Type of matrix products."""
        self.spec = adapter_spec(decoder, self.tokenizer, self.memory)  # refuses a tokenizer that is not the model's
        """The hash that the memory will have."""
        # Last, because it may be many gigabytes.
        self.text: TrainingText = open_text(self.arm_recipe("memory"), self.tokenizer, progress)
        """What is trained and measured on."""
        progress.note("measuring the base")
        self.before: dict[str, dict[str, Any] | None] = self._measure(model)
        """Losses and scores of the base, as those of a run."""
        self.base = {
            "name": base.model,
            "model_type": str(model.config.model_type),
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "hidden_size": decoder.hidden_size,
            "num_layers": len(decoder.layers),
        }
        """What the base is, for the result."""

    def arm_recipe(self, name: ArmName, **options: Any) -> Recipe:
        """A run of an arm as a recipe: see `arm_recipe`."""
        return arm_recipe(self.recipe, name, lora_rank=self.lora_rank, dtype=self.dtype, **options)

    def plan(self) -> Mapping[ArmName, tuple[ArmCost, int]]:
        """Say what each arm costs, and how many steps it gets."""
        train = self.recipe.train
        per_step = train.batch_size * self.recipe.data.sequence_length
        steps = train.num_steps
        if steps is None:
            assert train.epochs is not None
            steps = max(1, round(train.epochs * self.text.num_tokens / per_step))
        costs = {name: self._cost(name) for name in dict.fromkeys(("memory", *self.recipe.arms.names))}
        budget = steps * per_step * costs["memory"].flops_per_token + costs["memory"].preparation_flops
        plan = {}
        for name in self.recipe.arms.names:
            cost, own_steps = costs[name], steps
            if train.equal == "compute" and name != "memory":
                own_steps = round((budget - cost.preparation_flops) / (per_step * cost.flops_per_token))
            if own_steps < 1:
                raise ConfigError(f"the arm {name} cannot take a step of what memory takes {steps} steps of; take more")
            plan[name] = cost, own_steps
        return plan

    def _cost(self, name: ArmName) -> ArmCost:
        recipe = self.arm_recipe(name)
        trained = AdaptedBase(recipe, self.tokenizer, self.ranks)
        sizes = trained.sizes
        in_tables = 0 if recipe.model.frozen_tables else sizes["tables"]
        transferred = 0
        if recipe.adapter.layers and recipe.adapter.initialization == "transfer":
            transferred = min(recipe.adapter.transfer_tokens, self.text.num_tokens)
        return ArmCost(
            num_trainable=sizes["trained"],
            num_trainable_outside_tables=sizes["trained"] - in_tables,
            flops_per_token=trained.training_flops_per_token(),
            preparation_flops=transferred
            * flops_per_token(trained.module, recipe.data.sequence_length, training=False),
            lora_rank=self.lora_rank if arm_kind(name).lora else None,
        )

    def _measure(self, model: Any) -> dict[str, dict[str, Any] | None]:
        recipe, text = self.arm_recipe("memory"), self.text
        assert text.held_out is not None

        def loss(tokens: np.ndarray, num_bytes: int | None) -> dict[str, Any]:
            return held_out_loss(
                model,
                tokens,
                length=recipe.data.sequence_length,
                batch_size=sequences_at_once(recipe, self.ranks),
                num_bytes=num_bytes,
                dtype=self.dtype,
                beginning=beginning_tokens(self.tokenizer),
            ).to_dict()

        texts = {name: loss(one.tokens, one.num_bytes) for name, one in text.texts.items() if name != "validation"}
        return {
            "domain": loss_values(loss(text.held_out, text.held_out_bytes)),
            **retained_losses(texts),
            "tasks": measure_tasks(model, self.tokenizer, self.recipe.tasks),
        }


def matched_rank(model: Any, targets: list[str], memory: EngramConfig) -> int:
    """Choose the LoRA rank, at least 1, whose matrices on ``targets`` hold as many weights as the memory's.

    They then cost as many operations. Tables are read and not multiplied, so they count as none.
    """
    per_rank = sum(sum(model.get_submodule(name).weight.shape) for name in targets)
    wanted = len(memory.layers) * memory.memory_dim * (memory.num_streams + 1) * memory.hidden_size
    return max(1, round(wanted / per_rank))
