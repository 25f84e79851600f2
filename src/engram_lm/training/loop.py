"""The training loop: steps of one model, on one process or on many."""

import contextlib
import dataclasses
import functools
import itertools
import math
import time
from typing import Any, Literal

import torch
from torch import Tensor

from engram_lm.errors import ConfigError, DataError, DivergedError, check_whole
from engram_lm.model.experts import Router, balance_experts
from engram_lm.training.compilation import compile_training, plain_head
from engram_lm.training.data.batches import Batch, Batches
from engram_lm.training.dependence import DependenceLoss
from engram_lm.training.diagnostics import TableUse, gradient_norms, update_norms
from engram_lm.training.distribution import (
    LossModule,
    Ranks,
    agree,
    loss_weight,
    sharded_weights,
    share,
    without_sync,
    wrap_backbone,
)
from engram_lm.training.loss import language_model_loss
from engram_lm.training.optimizers import OptimizerOptions, build_optimizer, clip_gradients
from engram_lm.training.optimizers.muon import product_dtype
from engram_lm.training.retention import Retention
from engram_lm.training.schedules import ScheduleOptions, learning_rate_factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How steps are taken."""

    num_steps: int
    """Optimizer steps; the schedule ends with them."""
    micro_batch_size: int | None = None
    """Sequences that a process computes at a time; gradients of a larger share are added up. All where None."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down."""
    max_skipped_steps: int = 0
    """Steps in a row that may be skipped because their gradient is not finite, before training ends with an error."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of matrix products; weights stay in float32."""
    compile: bool = False
    """Whether the passes of a model of ours are compiled: see `engram_lm.training.compilation`."""

    def __post_init__(self) -> None:
        # Written so that NaN is refused too.
        if not (self.num_steps >= 1 and self.max_grad_norm > 0 and self.max_skipped_steps >= 0):
            raise ConfigError(
                f"training needs num_steps >= 1, max_grad_norm > 0 and max_skipped_steps >= 0, not {self.num_steps}, "
                f"{self.max_grad_norm} and {self.max_skipped_steps}"
            )
        check_whole(micro_batch_size=self.micro_batch_size)


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """What one step did."""

    step: int
    """Counted from 1."""
    loss: float
    """Mean nats per token of the batch, over all processes, before the update."""
    grad_norm: float
    """Global norm before clipping."""
    lr: float
    """Learning rate of the backbone."""
    num_tokens: int
    """Tokens trained on so far."""
    seconds: float
    """How long this step took, in seconds."""
    skipped: bool = False
    """Whether the gradient was not finite, so that nothing was changed."""
    other_losses: dict[str, float] | None = None
    """``retention_loss`` and ``dependence_loss`` before they are weighed, where the step has them, over all processes;
    ``loss`` is without them."""
    details: dict[str, Any] | None = None
    """Norms by group, use of the tables and expert load, if they were asked for: see `Trainer.step`."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as one dictionary, with the entries of ``other_losses`` and ``details`` beside the others."""
        values = vars(self) | (self.other_losses or {}) | (self.details or {})
        del values["details"], values["other_losses"]
        return values


def best_dtype(device: torch.device) -> Literal["float32", "bfloat16"]:
    """Choose bfloat16 if the device multiplies it in hardware, which makes such CPUs several times faster."""
    return "bfloat16" if product_dtype(device) == torch.bfloat16 else "float32"


def find_device(name: str) -> torch.device:
    """Find the device of this name.

    Raises:
        ConfigError: This machine has no such device.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name} cannot be used ({str(error).splitlines()[0]}); use cpu or cuda") from error
    return device


class Trainer:
    """Trains one model in place, a step at a time, so that several can be trained side by side.

    With several processes, each of them holds a trainer and all call the same methods in the same order. The losses are
    those of one process, up to rounding: see `engram_lm.training.distribution`.

    Args:
        model: An `EngramForCausalLM`, or any causal language model of transformers, with memory attached or without;
            parameters that do not require a gradient stay as they are. With several processes its tables have been
            given to `engram_lm.training.shard_tables.shard_tables`.
        batches: Gives the sequences of each step.
        options: How steps are taken.
        optimizer: How gradients become updates.
        schedule: How the learning rate changes.
        ranks: The processes; None means this one alone.
        backbone: With several processes, whether each holds the whole backbone (``"ddp"``) or a part (``"fsdp2"``).
        retention: Keeps the model near its base on general text, in each step; for one process.
        dependence: Computes the loss of the text that is trained on together with the dependence loss; for one process.

    Raises:
        ConfigError: A batch has fewer sequences than there are processes.
    """

    def __init__(
        self,
        model: Any,
        batches: Batches,
        options: TrainOptions,
        optimizer: OptimizerOptions | None = None,
        schedule: ScheduleOptions | None = None,
        *,
        ranks: Ranks | None = None,
        backbone: Literal["ddp", "fsdp2"] = "ddp",
        retention: Retention | None = None,
        dependence: DependenceLoss | None = None,
    ) -> None:
        self.model, self.batches, self.options = model, batches, options
        self.retention, self.dependence = retention, dependence
        self.optimizer_options = optimizer or OptimizerOptions()
        self.schedule = schedule or ScheduleOptions()
        self.ranks = ranks or Ranks()
        self.num_steps_done = self.num_skipped = self._skipped_in_a_row = 0
        head = compile_training(model, batches.length) if options.compile else plain_head
        self._parts = _divide(batches.batch_size, options.micro_batch_size, self.ranks)
        self.loss_module = wrap_backbone(
            LossModule(model, functools.partial(language_model_loss, dtype=options.dtype, head=head)),
            backbone if self.ranks.world_size > 1 else "none",
            self.ranks,
        )
        """What computes the loss, wrapped for several processes."""
        self.optimizer = build_optimizer(model, self.optimizer_options, group=self.ranks.group)
        self.table_use = TableUse(model, self.ranks)
        self._own_rows = {id(weight) for weight in sharded_weights(model)}
        routers = [module for module in model.modules() if isinstance(module, Router)]
        # Selection biases have no gradient, so those of a frozen model must be left alone explicitly.
        self._routers_learn = any(weight.requires_grad for router in routers for weight in router.parameters())

    def step(self, *, details: bool = False) -> StepRecord:
        """Take the next step. A step whose gradient is not finite changes nothing, on any process, and is counted.

        Args:
            details: Whether to measure norms of gradients and updates by group, use of the tables and expert load.

        Raises:
            DivergedError: More than ``max_skipped_steps`` in a row have been skipped; the model is as it was before
                them.
        """
        started = time.perf_counter()
        rate = self.optimizer_options.lr * learning_rate_factor(
            self.num_steps_done, self.options.num_steps, self.schedule
        )
        self.optimizer.set_lr(rate)
        device = next(self.model.parameters()).device
        self.model.train()
        loss, others = self._backward(device)
        found = gradient_norms(self.model, self.optimizer, self.ranks) if details else {}
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = clip_gradients(
            parameters,
            self.options.max_grad_norm,
            is_sharded=lambda parameter: id(parameter) in self._own_rows,
            group=self.ranks.group,
        )
        skipped = not all(map(math.isfinite, (norm, loss, *others.values())))
        if not skipped:
            self.table_use.note()
            with update_norms(self.model, self.optimizer, self.ranks, enabled=details) as norms:
                self.optimizer.step()
            found |= norms
        self.optimizer.zero_grad(set_to_none=True)
        load = balance_experts(self.model, None if self._routers_learn and not skipped else 0.0)  # over all processes
        if details:
            found |= {"tables": self.table_use.summary(), "expert_load": _load_summary(load)}
        self.num_steps_done += 1
        self.num_skipped += skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row > self.options.max_skipped_steps:
            raise DivergedError(
                f"the loss became {loss} and the gradient {norm} at step {self.num_steps_done}"
                + (f", after {self._skipped_in_a_row} such steps in a row" if self._skipped_in_a_row > 1 else "")
                + "; lower the learning rate"
            )
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # or this step's work would be counted in the next one
        return StepRecord(
            step=self.num_steps_done,
            loss=loss,
            grad_norm=norm,
            lr=rate,
            num_tokens=self.num_steps_done * self.batches.batch_size * self.batches.length,
            seconds=time.perf_counter() - started,
            skipped=skipped,
            other_losses=others or None,
            details=found if details else None,
        )

    def _backward(self, device: torch.device) -> tuple[float, dict[str, float]]:
        """Compute the gradients of the whole batch's mean loss, and that loss; and the other losses of the step."""
        total = torch.zeros((), device=device)
        others: dict[str, Tensor] = {}
        # A process that cannot read its text must not leave the others waiting in an exchange.
        with agree(self.ranks, f"reading the text of step {self.num_steps_done + 1}"):
            batches = [self.batches.part(self.num_steps_done, start, stop) for start, stop in self._parts]
            self._check_tokens(batches)
        for index, (start, stop) in enumerate(self._parts):
            batch = batches[index].to(device)
            last = index == len(self._parts) - 1
            with contextlib.nullcontext() if last else without_sync(self.loss_module):
                weight = loss_weight(stop - start, self.batches.batch_size, self.ranks)
                if self.dependence is None:
                    loss = self.loss_module(batch.inputs, batch.targets, position_ids=batch.position_ids) * weight
                    loss.backward()
                else:
                    both = self.dependence(
                        self.model, batch.inputs, batch.targets, self.options.dtype, position_ids=batch.position_ids
                    )
                    loss, missing = both * weight
                    (loss + self.dependence.weight * missing).backward()
                    others["dependence_loss"] = missing.detach() + others.get(
                        "dependence_loss", torch.zeros_like(missing)
                    )
            total += loss.detach()
        if self.retention is not None:
            others["retention_loss"] = self._retain(self.retention, device)
        return self.ranks.mean(total), {name: self.ranks.mean(value) for name, value in others.items()}

    def _retain(self, retention: Retention, device: torch.device) -> Tensor:
        """Add the gradients of this step's retention loss, weighed, to those that are there; return the loss itself."""
        total, batches = torch.zeros((), device=device), retention.batches
        for start, stop in _divide(batches.batch_size, self.options.micro_batch_size, self.ranks):
            batch = batches.part(self.num_steps_done, start, stop).to(device)
            loss = retention.loss(batch.inputs, self.options.dtype, position_ids=batch.position_ids)
            loss = loss * loss_weight(stop - start, batches.batch_size, self.ranks)
            (loss * retention.weight).backward()
            total += loss.detach()
        return total

    def _check_tokens(self, batches: list[Batch]) -> None:
        """Refuse tokens that the model would refuse on this process alone, while the others wait in an exchange."""
        size = self.model.config.get_text_config().vocab_size
        for batch in batches:
            # Targets hold all inputs but the first of each sequence.
            ends = torch.stack([*batch.targets.aminmax(), *batch.inputs[:, 0].aminmax()])
            smallest, largest = int(ends.min()), int(ends.max())
            if smallest < 0 or largest >= size:
                raise DataError(
                    f"the text holds the token {smallest if smallest < 0 else largest}, the model's vocabulary has "
                    f"{size}; pack the text again with the model's tokenizer"
                )


def _divide(batch_size: int, micro_batch_size: int | None, ranks: Ranks) -> list[tuple[int, int]]:
    """Divide the samples of a batch that this process computes into parts, equally many on every process."""
    wanted = 1 if micro_batch_size is None else math.ceil(batch_size / (micro_batch_size * ranks.world_size))
    # Every process takes part in every exchange of rows, so each part must have a sequence for each of them.
    num_parts = max(1, min(wanted, batch_size // ranks.world_size))
    bounds = [batch_size * part // num_parts for part in range(num_parts + 1)]
    parts = []
    for low, high in itertools.pairwise(bounds):
        start, stop = share(high - low, ranks)
        parts.append((low + start, low + stop))
    return parts


def _load_summary(load: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Give the largest and the smallest share of an expert in each router; 1 means an equal share."""
    return {
        name: {"largest": float(share.max() * len(share)), "smallest": float(share.min() * len(share))}
        for name, share in load.items()
    }
