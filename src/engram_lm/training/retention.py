"""A loss that keeps a model where it was: on general text its predictions should stay those of its base.

The base is the same model with what was added to it switched off, so there is no second model in memory: one more
forward pass, in evaluation mode and without gradients, gives its predictions.
"""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram_lm.adapt.adapter import attached_adapters
from engram_lm.adapt.decoder import find_decoder
from engram_lm.adapt.evaluation_mode import evaluating
from engram_lm.errors import ConfigError, check_whole
from engram_lm.tables.occupancy import written_only
from engram_lm.training.data.batches import Batches
from engram_lm.training.loss import autocast

_LOGITS_AT_ONCE = 1 << 24
"""Numbers of logits that are in memory at a time, 64 MiB in float32; a few such tensors are alive at once."""
_CHECKED_TOKENS = 4

# Dimension key: B batch, L length, N = B * L positions, D hidden, V vocabulary.


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetentionOptions:
    """How strongly a model is held to its base's predictions on general text."""

    weight: float = 0.0
    """What the retention loss is multiplied by before it is added to the loss of the text that is trained on, at least
    0; with 0 there is none. It is the mean of KL(base || model) over positions, in nats, of ``data.general``."""
    batch_size: int = 4
    """Sequences of general text in a step, as long as those that are trained on."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ConfigError(f"weight is a finite number from 0, not {self.weight}")
        check_whole(batch_size=self.batch_size)


@contextlib.contextmanager
def as_base(model: nn.Module) -> Iterator[None]:
    """Let a model compute as its base does inside a ``with`` block: attached memories and peft's adapters are off.

    Every part is in evaluation mode meanwhile. Use it around a whole forward pass without gradients.
    """
    layers = _peft_layers(model)
    flags = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    off = [layer for layer in layers if not layer.disable_adapters]
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for adapter in attached_adapters(model).values():
            stack.enter_context(adapter.disabled())
        try:
            for layer in off:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in off:
                layer.enable_adapters(True)
            # peft sets them by rules of its own, whatever was frozen before.
            for parameter, requires_grad in flags:
                parameter.requires_grad_(requires_grad)


def _peft_layers(model: nn.Module) -> list[Any]:
    """The parts of a model that peft has put in the place of others, which can be switched off."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [part for part in model.modules() if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def refuse_moving_base(model: nn.Module) -> None:
    """Refuse a model whose base is trained, or to which nothing was added, so that it has no base to stay with.

    Raises:
        ConfigError: Some parameter is trained that belongs neither to attached memory nor to peft's adapters.
    """
    layers = _peft_layers(model)
    added = {id(p) for adapter in attached_adapters(model).values() for p in adapter.parameters()}
    for layer in layers:
        within = layer.base_layer if hasattr(layer, "base_layer") else layer.original_module
        base = {id(parameter) for parameter in within.parameters()}
        added |= {id(parameter) for parameter in layer.parameters()} - base
    moving = [name for name, value in model.named_parameters() if value.requires_grad and id(value) not in added]
    if not added or moving:
        what = f"{len(moving)} of its own weights are trained, such as {moving[0]}" if moving else "nothing was added"
        raise ConfigError(
            f"the retention loss compares a model with its frozen base, and {what}; train memory or LoRA beside "
            "frozen weights, or leave the retention loss out"
        )


class RetentionLoss:
    """The mean over positions of KL(base || model): what the base would say of general text, against what is said now.

    The logits of all positions are never in memory at a time: hidden states of both passes are kept, and logits are
    made of some positions after the other, with their gradients. Models whose logits are not simply those of their
    output embedding (because they are scaled or capped) are found out by a comparison; theirs are made at once.

    Args:
        model: A causal language model of transformers with attached memory, LoRA of peft, or both. What does not
            belong to these must be frozen.
        layer_list: Path of its decoder layers, where structure does not tell.

    Raises:
        ConfigError: The model has neither memory nor adapters of peft, or its base is trained, so that its predictions
            would move.
    """

    def __init__(self, model: Any, *, layer_list: str | None = None) -> None:
        refuse_moving_base(model)
        self._model = model
        self._text_model = find_decoder(model, layer_list).text_model
        self._head: Callable[[Tensor], Tensor] = self._find_head()

    @torch.no_grad()
    def _find_head(self) -> Callable[[Tensor], Tensor]:
        """What turns hidden states into logits, if that is all there is to it; otherwise what takes logits as such."""
        head = self._model.get_output_embeddings()
        device = self._model.get_input_embeddings().weight.device
        tokens = torch.arange(1, _CHECKED_TOKENS + 1, device=device)[None]
        with as_base(self._model):
            wanted = self._model(input_ids=tokens, use_cache=False).logits
            states = self._text_model(input_ids=tokens, use_cache=False)[0]
            plain = isinstance(head, nn.Module) and bool((head(states) == wanted).all())
        # A head that is trained is not that of the base.
        plain = plain and not _peft_layers(head) and not any(one.requires_grad for one in head.parameters())
        return head if plain else _identity

    def _states(self, tokens: Tensor, position_ids: Tensor | None) -> Tensor:
        """Compute what `_head` takes, ``[N, D]`` or, where it takes logits, ``[N, V]``."""
        wanted = {} if position_ids is None else {"position_ids": position_ids}  # not every model accepts positions
        if self._head is _identity:
            logits: Tensor = self._model(input_ids=tokens, use_cache=False, **wanted).logits
            return logits.flatten(0, 1)
        states: Tensor = self._text_model(input_ids=tokens, use_cache=False, **wanted)[0]
        return states.flatten(0, 1)

    def __call__(self, tokens: Tensor, dtype: str = "float32", *, position_ids: Tensor | None = None) -> Tensor:
        """Compute the loss of tokens ``[B, L]``, in nats per position, with its gradient where gradients are on.

        Args:
            tokens: General text, int64 ``[B, L]``.
            dtype: Type of matrix products.
            position_ids: ``[B, L]``, starting anew where a document does; one run of positions where None.
        """
        with autocast(tokens.device, dtype):
            with torch.no_grad(), as_base(self._model):
                base = self._states(tokens, position_ids)
            # General text must not write rows of its own, and says nothing through those that were never written.
            with written_only(self._model):
                own = self._states(tokens, position_ids)
            size = self._model.config.get_text_config().vocab_size
            return mean_divergence(base, own, self._head, at_once=max(1, _LOGITS_AT_ONCE // size))


def mean_divergence(base: Tensor, own: Tensor, head: Callable[[Tensor], Tensor], *, at_once: int) -> Tensor:
    """Compute the mean over positions of KL(base || own), in nats, ``at_once`` positions after the other.

    Gradients are computed with the value, so that the logits of some positions are gone when those of the next come.
    They flow into ``own`` alone: the head is taken as frozen.

    Args:
        base: States of the base, ``[N, D]``, without gradients.
        own: States of the model, ``[N, D]``.
        head: Turns states ``[n, D]`` into logits ``[n, V]``.
        at_once: Positions whose logits are in memory at a time.

    Returns:
        A number, float32.
    """
    needs_gradient = torch.is_grad_enabled() and own.requires_grad
    total = torch.zeros((), dtype=torch.float32, device=own.device)
    gradients = []
    for theirs, ours in zip(base.split(at_once), own.detach().split(at_once), strict=True):
        with torch.no_grad():
            wanted = head(theirs).float().log_softmax(-1)
        with torch.set_grad_enabled(needs_gradient):
            ours = ours.requires_grad_(needs_gradient)
            found = head(ours).float().log_softmax(-1)
            part = F.kl_div(found, wanted, reduction="sum", log_target=True) / len(own)
        if needs_gradient:
            part.backward()
            assert ours.grad is not None
            gradients.append(ours.grad)
        total += part.detach()
    return _WithGradient.apply(own, total, torch.cat(gradients)) if needs_gradient else total


@dataclasses.dataclass(frozen=True, eq=False)
class Retention:
    """A retention loss with its text and its weight, as a training loop takes them."""

    loss: RetentionLoss
    """Computes it."""
    batches: Batches
    """The general text of each step."""
    weight: float
    """What it is multiplied by before it is added to the loss of the text that is trained on."""


class _WithGradient(torch.autograd.Function):
    """A value whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * scale.to(gradient.dtype), None, None


def _identity(states: Tensor) -> Tensor:
    return states
