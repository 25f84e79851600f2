"""What a step of an arm costs, so that arms can be compared at equal operations of training."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from engram_lm.adapt.decoder import find_decoder
from engram_lm.errors import ConfigError
from engram_lm.memory import EngramConfig

__all__ = ["forward_flops_per_token", "lora_targets", "matched_rank", "training_flops_per_token"]


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


def lora_targets(model: Any, targets: tuple[str, ...], layer_list: str | None = None) -> list[str]:
    """Find the matrices of the decoder layers that get low-rank ones beside them.

    Args:
        model: The base model, without memory.
        targets: Ends of their names, or ``all-linear``.
        layer_list: Path of the decoder layers, where structure does not tell.

    Returns:
        Their full names.

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


def matched_rank(model: Any, targets: list[str], memory: EngramConfig) -> int:
    """Choose the LoRA rank whose matrices hold as many weights, and so cost as many operations, as the memory's.

    Args:
        model: The base model.
        targets: Names of the matrices that get low-rank ones, from `lora_targets`.
        memory: Geometry of the memory; its tables are read and not multiplied, so they count as none.

    Returns:
        The nearest whole rank, at least 1.
    """
    per_rank = sum(sum(model.get_submodule(name).weight.shape) for name in targets)
    wanted = len(memory.layers) * memory.memory_dim * (memory.num_streams + 1) * memory.hidden_size
    return max(1, round(wanted / per_rank))


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
