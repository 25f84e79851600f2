"""A loss that makes memory matter: with it a sequence should be predicted better than without it, by a margin.

Source: Whittle (a retrofit of a table into a larger model), whose loss is ``relu(margin - (CE_off - CE_on))``.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram_lm.adapt.adapter import MemoryAdapter
from engram_lm.adapt.evaluation_mode import evaluating
from engram_lm.errors import ConfigError
from engram_lm.training.loss import NOT_SCORED, autocast

# Dimension key: B batch, L length, V vocabulary.


@dataclasses.dataclass(frozen=True, kw_only=True)
class DependenceOptions:
    """How strongly a model is made to depend on its memory."""

    weight: float = 0.0
    """What the dependence loss is multiplied by before it is added, at least 0; with 0 there is none. It is the mean
    over sequences of relu(margin - (CE_off - CE_on)), with the cross entropies without and with memory."""
    margin: float = 0.3
    """Nats per token by which memory should lower the cross entropy of a sequence, at least 0."""

    def __post_init__(self) -> None:
        if not (0 <= self.weight < math.inf and 0 <= self.margin < math.inf):
            raise ConfigError(f"weight and margin are finite numbers from 0, not {self.weight} and {self.margin}")


class DependenceLoss:
    """The loss of a text, and how far memory fails to lower it by the margin.

    The cross entropy without memory takes one more forward pass, in evaluation mode. It is taken as given: its gradient
    would lower the loss by making the model worse without memory.

    Args:
        adapter: The memory.
        options: Margin and weight.
    """

    def __init__(self, adapter: MemoryAdapter, options: DependenceOptions) -> None:
        self._adapter, self._margin = adapter, options.margin
        self.weight = options.weight
        """What the second of its losses is multiplied by before it is added to the first."""

    def __call__(
        self, model: Any, inputs: Tensor, targets: Tensor, dtype: str = "float32", *, position_ids: Tensor | None = None
    ) -> Tensor:
        """Compute the loss of the text, in nats per token, and the dependence loss: float32 ``[2]``.

        Arguments are those of `engram_lm.training.loss.language_model_loss`.
        """
        with torch.no_grad(), memory_off(model, [self._adapter]):
            off = mean_of_sequences(_logits(model, inputs, dtype, position_ids), targets)
        on = mean_of_sequences(_logits(model, inputs, dtype, position_ids), targets)
        counted = (targets != NOT_SCORED).sum(1)
        mean = (on * counted).sum() / counted.sum().clamp(min=1)
        return torch.stack([mean, missing_gain(off, on, self._margin)])


@contextlib.contextmanager
def memory_off(model: nn.Module, adapters: Iterable[MemoryAdapter]) -> Iterator[None]:
    """Let a model compute in evaluation mode and without these memories inside a ``with`` block."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for adapter in adapters:
            stack.enter_context(adapter.disabled())
        yield


def missing_gain(off: Tensor, on: Tensor, margin: float) -> Tensor:
    """What memory lacks to lowering the losses of sequences ``[B]`` by a margin, without and with it, on average."""
    return F.relu(margin - (off - on)).mean()


def mean_of_sequences(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean nats per token of each sequence, over the tokens that count, float32 ``[B]``.

    Args:
        logits: ``[B, L, V]``.
        targets: The token that each position predicts, ``[B, L]``; `NOT_SCORED` where it does not count.
    """
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)
    return losses.sum(1) / (targets != NOT_SCORED).sum(1).clamp(min=1)


def _logits(model: Any, inputs: Tensor, dtype: str, position_ids: Tensor | None) -> Tensor:
    wanted = {} if position_ids is None else {"position_ids": position_ids}  # not every model accepts positions
    with autocast(inputs.device, dtype):
        logits: Tensor = model(input_ids=inputs, use_cache=False, **wanted).logits
    return logits
