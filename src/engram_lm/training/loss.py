"""The loss of a language model, for training and for evaluation."""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engram_lm.model import EngramForCausalLM
from engram_lm.model.experts import sequence_balance_loss
from engram_lm.training.compilation import Head, plain_head

NOT_SCORED = -100
"""Target of a position whose prediction does not count; what torch's losses ignore."""
_LOGITS_AT_ONCE = 1 << 27
"""Numbers of logits that are in memory at a time in an evaluation on an accelerator, 512 MiB."""
_LOGITS_IN_CACHE = 1 << 20
"""The same on a CPU, whose cache holds them: 2,048 tokens of 4,096 logits then take 10 ms on a core in place of 42."""
_FEWEST_TOKENS = 64
"""Tokens at a time at least on a CPU, so that its matrix products stay fast where the vocabulary is large."""


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Run matrix products in ``dtype``."""
    if dtype == "float32":
        return contextlib.nullcontext()
    # A weight is used once in a pass. Cached copies of all weights would outlast the blocks that use them.
    return torch.autocast(device.type, dtype=getattr(torch, dtype), cache_enabled=False)


def language_model_loss(
    model: Any,
    inputs: Tensor,
    targets: Tensor,
    dtype: str = "float32",
    *,
    position_ids: Tensor | None = None,
    head: Head = plain_head,
) -> Tensor:
    """Compute the mean nats per token that counts.

    A model of ours whose configuration weighs the sequence-wise balance loss of its experts has it added, as with
    ``labels``. Without gradients, as in an evaluation, the mean is exact: losses are taken in float32 and added up in
    float64.

    Args:
        model: An `EngramForCausalLM`, whose logits are never all in memory; or any causal language model of
            transformers.
        inputs: Tokens ``[B, L]``.
        targets: The token after each, ``[B, L]``; `NOT_SCORED` where it does not count.
        dtype: Type of matrix products.
        position_ids: ``[B, L]``, starting anew where a document does; one run of positions where None.
        head: Computes the losses of a model of ours from its hidden states, with gradients.
    """
    if not isinstance(model, EngramForCausalLM):
        return _loss_of_logits(model, inputs, targets, dtype, position_ids)
    balance = model.config.sequence_balance if model.training and model.config.has_experts else 0.0
    wanted = dict.fromkeys(("output_router_logits", "output_chosen_experts"), True) if balance else {}
    outputs, hidden, weight = _before_the_head(model, inputs, dtype, position_ids, **wanted)
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    count = (targets != NOT_SCORED).sum()
    if torch.is_grad_enabled():
        # Each token's loss has the type of the products; their mean is taken in float32.
        loss = head(hidden, weight, targets).float().sum() / count
    else:
        loss = _losses_in_parts(hidden, weight, targets).double().sum() / count
    if balance:
        loss = loss + balance * sequence_balance_loss(outputs.router_logits, outputs.chosen_experts, len(inputs))
    return loss


@torch.no_grad()
def token_losses(
    model: Any, inputs: Tensor, targets: Tensor, dtype: str = "float32", *, position_ids: Tensor | None = None
) -> Tensor:
    """Compute the nats of each token, float32 ``[B, L]``; 0 where a target does not count.

    Takes what `language_model_loss` takes. Without gradients, that one returns the mean of these.
    """
    if isinstance(model, EngramForCausalLM):
        _, hidden, weight = _before_the_head(model, inputs, dtype, position_ids)
        return _losses_in_parts(hidden.flatten(0, 1), weight, targets.flatten()).view_as(targets)
    logits = _logits(model, inputs, dtype, position_ids)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)


def _before_the_head(
    model: EngramForCausalLM, inputs: Tensor, dtype: str, position_ids: Tensor | None, **wanted: bool
) -> tuple[Any, Tensor, Tensor]:
    """Run a model of ours up to its head: its outputs, the hidden states and the head's weight, ready to multiply."""
    with autocast(inputs.device, dtype):
        outputs = model.model(input_ids=inputs, position_ids=position_ids, use_cache=False, **wanted)
    hidden, weight = outputs.last_hidden_state, model.lm_head.weight
    if dtype != "float32":
        hidden, weight = hidden.to(getattr(torch, dtype)), weight.to(getattr(torch, dtype))
    return outputs, hidden, weight


def _losses_in_parts(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Losses of hidden states ``[n, D]``, taken in float32; only some have their logits in memory at a time."""
    if hidden.device.type == "cpu":
        at_once = max(_FEWEST_TOKENS, _LOGITS_IN_CACHE // len(weight))
    else:
        at_once = max(1, _LOGITS_AT_ONCE // len(weight))
    parts = zip(hidden.split(at_once), targets.split(at_once), strict=True)
    return torch.cat(
        [F.cross_entropy(F.linear(some, weight).float(), following, reduction="none") for some, following in parts]
    )


def _logits(model: Any, inputs: Tensor, dtype: str, position_ids: Tensor | None) -> Tensor:
    # Not every model accepts positions.
    wanted = {} if position_ids is None else {"position_ids": position_ids}
    with autocast(inputs.device, dtype):
        logits: Tensor = model(input_ids=inputs, use_cache=False, **wanted).logits
    return logits


def _loss_of_logits(model: Any, inputs: Tensor, targets: Tensor, dtype: str, position_ids: Tensor | None) -> Tensor:
    if not torch.is_grad_enabled():
        losses = token_losses(model, inputs, targets, dtype, position_ids=position_ids)
        return losses.double().sum() / (targets != NOT_SCORED).sum()
    return F.cross_entropy(_logits(model, inputs, dtype, position_ids).flatten(0, 1).float(), targets.flatten())
