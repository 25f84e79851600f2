"""The training loop: one process, one device."""

import contextlib
import dataclasses
import math
import time
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engram.errors import ConfigError, DataError
from engram.model.experts import balance_experts, sequence_balance_loss
from engram.training.batches import Batches
from engram.training.optimizers import RowAdam, clip_gradients, parameter_groups

__all__ = [
    "StepRecord",
    "TrainOptions",
    "Trainer",
    "autocast",
    "best_dtype",
    "find_device",
    "language_model_loss",
    "learning_rate",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How a model is trained."""

    num_steps: int
    """Optimizer steps."""
    lr: float = 3e-3
    """Peak learning rate of the backbone."""
    table_lr_multiplier: float = 5.0
    """Learning rate of tables relative to the backbone's (paper, Table 5)."""
    weight_decay: float = 0.1
    """For matrices of the backbone; tables have none (paper, Table 5)."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises."""
    final_lr: float = 0.1
    """Share of the peak that the cosine ends at."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of Adam's moments, backbone and tables."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of matrix products; weights stay in float32."""

    def __post_init__(self) -> None:
        # Written so that NaN is refused too.
        if not (self.num_steps >= 1 and self.lr > 0 and self.table_lr_multiplier >= 0):
            raise ConfigError(
                f"training needs num_steps >= 1, lr > 0 and table_lr_multiplier >= 0, not {self.num_steps}, {self.lr} "
                f"and {self.table_lr_multiplier}"
            )


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """What one step did."""

    step: int
    """Counted from 1."""
    loss: float
    """Mean nats per token of the batch, before the update."""
    grad_norm: float
    """Global norm before clipping."""
    lr: float
    """Learning rate of the backbone."""
    num_tokens: int
    """Tokens trained on so far."""
    seconds: float
    """Time of this step alone."""


def best_dtype(device: torch.device) -> Literal["float32", "bfloat16"]:
    """Choose bfloat16 where the device multiplies it in hardware, which on such CPUs is several times faster."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    capability = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bfloat16" if capability.get("avx512_bf16") or capability.get("amx_bf16") else "float32"


def find_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        ConfigError: There is none.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name} is not there ({str(error).splitlines()[0]}); use cpu or cuda") from error
    return device


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Run matrix products in ``dtype``."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))


def language_model_loss(model: Any, inputs: Tensor, targets: Tensor, dtype: str = "float32") -> Tensor:
    """Compute the mean nats per token without keeping the logits of the whole batch.

    A model whose configuration weighs the sequence-wise balance loss of its experts has it added, as with ``labels``.

    Args:
        model: An `EngramForCausalLM`.
        inputs: Tokens ``[B, L]``.
        targets: The token after each, ``[B, L]``.
        dtype: Type of matrix products.
    """
    balance = model.config.sequence_balance if model.training and model.config.has_experts else 0.0
    with autocast(inputs.device, dtype):
        wanted = dict.fromkeys(("output_router_logits", "output_chosen_experts"), True) if balance else {}
        outputs = model.model(input_ids=inputs, use_cache=False, **wanted)
    hidden = outputs.last_hidden_state
    weight = model.lm_head.weight
    if dtype != "float32":
        hidden, weight = hidden.to(getattr(torch, dtype)), weight.to(getattr(torch, dtype))
    loss = F.linear_cross_entropy(hidden.flatten(0, 1), weight, targets.flatten()).float()
    if balance:
        loss = loss + balance * sequence_balance_loss(outputs.router_logits, outputs.chosen_experts, len(inputs))
    return loss


def learning_rate(step: int, options: TrainOptions) -> float:
    """Learning rate of a step counted from 0: linear warm-up, then a cosine."""
    warmup_steps = max(1, round(options.warmup * options.num_steps))
    if step < warmup_steps:
        return options.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, options.num_steps - warmup_steps)
    return options.lr * (options.final_lr + (1 - options.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


class Trainer:
    """Trains one model in place, a step at a time, so that several can be trained side by side.

    Args:
        model: An `EngramForCausalLM`; parameters that do not require a gradient stay as they are.
        batches: Where batch ``step`` comes from.
        options: How to train.
    """

    def __init__(self, model: Any, batches: Batches, options: TrainOptions) -> None:
        self.model, self.batches, self.options = model, batches, options
        self.num_steps_done = 0
        groups, tables = parameter_groups(model, weight_decay=options.weight_decay)
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, fused=True)
        ]
        self._multipliers = [1.0]
        if tables:
            rate = options.lr * options.table_lr_multiplier
            self.optimizers.append(RowAdam(tables, lr=rate, betas=options.betas))
            self._multipliers.append(options.table_lr_multiplier)

    def step(self) -> StepRecord:
        """Take the next step.

        Raises:
            DataError: The loss or the gradient is no longer a finite number; the model is as it was before the step.
        """
        started = time.perf_counter()
        rate = learning_rate(self.num_steps_done, self.options)
        for optimizer, multiplier in zip(self.optimizers, self._multipliers, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * multiplier
        device = next(self.model.parameters()).device
        inputs, targets = (tokens.to(device) for tokens in self.batches[self.num_steps_done])
        self.model.train()
        loss = language_model_loss(self.model, inputs, targets, self.options.dtype)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise DataError(f"the loss became {value} at step {self.num_steps_done + 1}; lower the learning rate")
        loss.backward()
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        norm = clip_gradients(
            (parameter for group in groups for parameter in group["params"]), self.options.max_grad_norm
        )
        if not math.isfinite(norm):
            raise DataError(f"the gradient became {norm} at step {self.num_steps_done + 1}; lower the learning rate")
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        balance_experts(self.model)
        self.num_steps_done += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # or this step's work is counted in whoever's comes next
        seconds = time.perf_counter() - started
        return StepRecord(self.num_steps_done, value, norm, rate, self.num_steps_done * inputs.numel(), seconds)
