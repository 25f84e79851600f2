"""A loss that makes memory matter: with it a sequence should be predicted better than without it, by a margin.

Source: Whittle (a retrofit of a table into a larger model), whose loss is ``relu(margin - (CE_off - CE_on))``.
"""

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engram_lm.adapt.adapter import MemoryAdapter
from engram_lm.adapt.evaluation_mode import evaluating
from engram_lm.errors import ConfigError
from engram_lm.training.loss import NOT_SCORED, autocast

# Dimension key: B batch, L length.


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
        with torch.no_grad(), evaluating(model), self._adapter.disabled():
            off = sequence_losses(model, inputs, targets, dtype, position_ids=position_ids)
        on = sequence_losses(model, inputs, targets, dtype, position_ids=position_ids)
        counted = (targets != NOT_SCORED).sum(1)
        missing = F.relu(self._margin - (off - on)).mean()
        return torch.stack([(on * counted).sum() / counted.sum().clamp(min=1), missing])


def sequence_losses(
    model: Any, inputs: Tensor, targets: Tensor, dtype: str, *, position_ids: Tensor | None = None
) -> Tensor:
    """Compute the mean nats per token of each sequence, over the tokens that count, float32 ``[B]``."""
    wanted = {} if position_ids is None else {"position_ids": position_ids}  # not every model accepts positions
    with autocast(inputs.device, dtype):
        logits = model(input_ids=inputs, use_cache=False, **wanted).logits
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)
    return losses.sum(1) / (targets != NOT_SCORED).sum(1).clamp(min=1)
