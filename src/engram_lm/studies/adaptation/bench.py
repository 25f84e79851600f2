"""What an adaptation finds out before it trains: the base's own losses, and what each arm costs."""

import dataclasses
import time
from collections.abc import Container, Mapping
from typing import Any, Literal

import numpy as np
import torch

from engram_lm.adapt.attachment import adapter_spec
from engram_lm.adapt.decoder import find_decoder
from engram_lm.errors import ConfigError
from engram_lm.evaluation import check_tasks
from engram_lm.memory import EngramConfig
from engram_lm.studies.adaptation.arms import arm_kind, arm_recipe
from engram_lm.studies.adaptation.diagnostics import loss_values, measure_tasks, retained_losses
from engram_lm.studies.adaptation.recipe import AdaptationRecipe, ArmName
from engram_lm.tables.byte_size import byte_size
from engram_lm.tokenizing import beginning_tokens
from engram_lm.training.assembly import bytes_to_download, load_tokenizer, open_text
from engram_lm.training.base_model import (
    AdaptedBase,
    fingerprint,
    load_base,
    lora_targets,
    told_where_bases_come_from,
)
from engram_lm.training.data.text import TrainingText
from engram_lm.training.distribution import Ranks
from engram_lm.training.flops import flops_per_token
from engram_lm.training.held_out import held_out_loss
from engram_lm.training.job import sequences_at_once
from engram_lm.training.loop import best_dtype, find_device
from engram_lm.training.progress import RunProgress
from engram_lm.training.recipe import Recipe
from engram_lm.training.recipe_trainer import seconds_per_step, trainer_of


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
    seconds_per_step: float | None
    """How long a step took on this machine before training, in seconds; None where nothing is left to train."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuringSeconds:
    """How long it takes to measure a model once, in seconds."""

    texts: float = 0.0
    """Losses of the domain's held-out text and of the retained ones."""
    per_token: float = 0.0
    """The same, for a token."""
    tasks: float = 0.0
    """Benchmarks."""


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
        if recipe.tasks.names:
            check_tasks(recipe.tasks.names, recipe.tasks.data)  # before the model and the text, which take minutes
        base = recipe.base
        device = recipe.train.device
        if device == "auto":
            device = str(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
        self.ranks = Ranks(device=find_device(device))
        with told_where_bases_come_from():
            missing = bytes_to_download(base.model, base.revision)
        progress.note(f"loading {base.model}" + (f", of which {byte_size(missing)} are downloaded" if missing else ""))
        self._progress = progress
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
        self.seconds = MeasuringSeconds()
        """How long that takes."""
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

    def plan(self, timed: Container[ArmName] | None = None) -> Mapping[ArmName, tuple[ArmCost, int]]:
        """Say what each arm costs, and how many steps it gets.

        Of each arm in ``timed``, of all where None, a step is taken to see how long it takes.
        """
        timed = self.recipe.arms.names if timed is None else timed
        self._progress.note("taking a step of each arm to see how long it takes")
        train = self.recipe.train
        per_step = train.batch_size * self.recipe.data.sequence_length
        steps = train.num_steps
        if steps is None:
            assert train.epochs is not None
            steps = max(1, round(train.epochs * self.text.num_tokens / per_step))
        names = dict.fromkeys(("memory", *self.recipe.arms.names))
        costs = {name: self._cost(name, is_timed=name in timed) for name in names}
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

    def _cost(self, name: ArmName, *, is_timed: bool) -> ArmCost:
        recipe = self.arm_recipe(name)
        trained = AdaptedBase(recipe, self.tokenizer, self.ranks)
        sizes = trained.sizes
        in_tables = 0 if recipe.model.frozen_tables else sizes["tables"]
        transferred = 0
        if recipe.adapter.layers and recipe.adapter.initialization == "transfer":
            transferred = min(recipe.adapter.transfer_tokens, self.text.num_tokens)
        flops = trained.training_flops_per_token()
        forward_flops = flops_per_token(trained.module, recipe.data.sequence_length, training=False)
        seconds = None
        if is_timed:
            # Last, because it trains the model.
            options: dict[str, Any] = {"dtype": self.dtype, "ranks": self.ranks}
            seconds = seconds_per_step(trainer_of(recipe, trained, self.text, self.tokenizer, **options))
        return ArmCost(
            num_trainable=sizes["trained"],
            num_trainable_outside_tables=sizes["trained"] - in_tables,
            flops_per_token=flops,
            preparation_flops=transferred * forward_flops,
            lora_rank=self.lora_rank if arm_kind(name).lora else None,
            seconds_per_step=seconds,
        )

    def seconds_of_run(self, name: ArmName, cost: ArmCost, num_steps: int) -> float:
        """Estimate how long a run of an arm takes: steps as long as the one taken, and measuring as long as the base's.

        What it does before its first step (transferred rows, counting rows) is not in it.
        """
        kind, train, texts = arm_kind(name), self.recipe.train, self.text.texts
        assert cost.seconds_per_step is not None
        curve = (train.curve_points + 2) * min(train.curve_tokens, self.recipe.data.held_out_tokens)
        tokens = curve + (len(texts["validation"].tokens) if "validation" in texts else 0)
        times = 3 if kind.has_memory and train.look_inside else 1
        measuring = times * self.seconds.texts + tokens * self.seconds.per_token + self.seconds.tasks
        return num_steps * cost.seconds_per_step + measuring

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

        started = time.perf_counter()
        domain = loss(text.held_out, text.held_out_bytes)
        texts = {name: loss(one.tokens, one.num_bytes) for name, one in text.texts.items() if name != "validation"}
        measured = time.perf_counter()
        tasks = measure_tasks(model, self.tokenizer, self.recipe.tasks)
        num_tokens = domain["num_tokens"] + sum(one["num_tokens"] for one in texts.values())
        self.seconds = MeasuringSeconds(
            texts=measured - started,
            per_token=(measured - started) / num_tokens,
            tasks=time.perf_counter() - measured,
        )
        return {"domain": loss_values(domain), **retained_losses(texts), "tasks": tasks}


def matched_rank(model: Any, targets: list[str], memory: EngramConfig) -> int:
    """Choose the LoRA rank, at least 1, whose matrices on ``targets`` hold as many weights as the memory's.

    They then cost as many operations. Tables are read and not multiplied, so they count as none.
    """
    per_rank = sum(sum(model.get_submodule(name).weight.shape) for name in targets)
    wanted = len(memory.layers) * memory.memory_dim * (memory.num_streams + 1) * memory.hidden_size
    return max(1, round(wanted / per_rank))
