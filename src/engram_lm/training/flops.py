"""Operations that a model takes per token, as torch counts them: also of models of others, and of frozen ones."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["forward_flops_per_token", "training_flops_per_token"]


def training_flops_per_token(model: Any, length: int) -> float:
    """Count the operations that training on one token takes, of the model as it stands: with what is frozen in it.

    One sequence goes forward and back while torch counts its matrix products, attention among them; a multiplication
    and an addition are two. So gradients of frozen weights count as none, and neither do those of activations below
    the first trainable weight. Reading rows, norms, gates and the optimizer count as none. In the usual symbols it is
    4N for N weights behind the first trainable one, 2N for those before it, and 2 more for every trainable one.

    Args:
        model: A causal language model; its gradients are cleared.
        length: Tokens in the sequence.
    """
    was_training = model.training
    model.train()
    try:
        flops = _count(model, length, backward=True)
    finally:
        model.train(was_training)
        model.zero_grad(set_to_none=True)
    return flops


@torch.no_grad()
def forward_flops_per_token(model: Any, length: int) -> float:
    """Count the operations of a forward pass on one token, in the same way.

    Args:
        model: A causal language model.
        length: Tokens in the sequence.
    """
    return _count(model, length, backward=False)


def _count(model: Any, length: int, *, backward: bool) -> float:
    tokens = torch.zeros(1, length, dtype=torch.int64, device=model.get_input_embeddings().weight.device)
    # The plain paths: the fast ones of attention and experts are not known to the counter.
    with _plain_experts(model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(input_ids=tokens, use_cache=False).logits
        if backward:
            F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten()).backward()
    return counter.get_total_flops() / length


@contextlib.contextmanager
def _plain_experts(model: Any) -> Iterator[None]:
    config = model.config.get_text_config()
    before = getattr(config, "_experts_implementation", None)
    if before is None:
        yield
        return
    config._experts_implementation = "eager"
    try:
        yield
    finally:
        config._experts_implementation = before
