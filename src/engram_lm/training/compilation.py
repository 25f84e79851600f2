"""Compiles what a training step of a model of ours spends its time on, by ``torch.compile``."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engram_lm.model import EngramForCausalLM
from engram_lm.model.block import EngramBlock

_SHORT_SEQUENCE = 128
"""Tokens of a sequence up to which a CPU attends by plain products, which are compiled: a whole step of the smallest
model, with 128 tokens in a sequence, then takes 0.87 of the time that it takes with fused attention."""

Head = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Called with hidden states ``[n, D]``, the head's weight ``[V, D]`` and targets ``[n]``; returns the nats of each."""


def plain_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute the loss of each token in the type of the products, a part of the logits at a time."""
    losses: Tensor = F.linear_cross_entropy(hidden, weight, targets, reduction="none")
    return losses


def can_compile(device: torch.device) -> bool:
    """Whether this machine has what compiling for a device takes: a C++ compiler for a CPU, Triton for a GPU."""
    if device.type == "cuda":
        return bool(torch.utils._triton.has_triton())
    if device.type != "cpu":
        return False
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except (InvalidCxxCompiler, RuntimeError):
        return False


def compile_training(model: EngramForCausalLM, sequence_length: int) -> Head:
    """Compile the halves of a model's blocks and the work of its memory layers, in place, for passes with gradients.

    Passes without gradients, such as evaluations, stay as they are: their batches come in several sizes, each of which
    would be compiled anew. Results differ by rounding. Hashing, the reading of rows and routed experts are not
    compiled.

    Returns:
        The compiled loss of the head.
    """
    # transformers remembers which of torch's functions it can use; that does not change, so nothing can go wrong.
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    if sequence_length <= _SHORT_SEQUENCE and model.device.type == "cpu":
        model.set_attn_implementation("eager")
    attend, feed_forward = _with_gradients(EngramBlock.attend), _with_gradients(EngramBlock.feed_forward)
    blocks: Any = model.model.layers
    for block in blocks:
        memory = block.memory
        if memory is not None:
            memory.respond = functools.partial(_with_gradients(type(memory).respond), memory)
        if memory is None or block.updates_first:
            block.attend = functools.partial(attend, block)
        block.feed_forward = functools.partial(feed_forward, block)
    return _with_gradients(_whole_head)


def _whole_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute the loss of each token from all logits at once; compiled, they are read and written once."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


def _with_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function, for calls where gradients are computed."""
    # Models of other shapes in this process must not use up the number of times that it is compiled for this one.
    compiled = torch.compile(function, dynamic=False, isolate_recompiles=True)  # type: ignore[call-overload]

    @functools.wraps(function)
    def either(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else function)(*args, **kwargs)

    return either
