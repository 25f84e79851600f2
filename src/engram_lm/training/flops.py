"""Floating-point operations: how many a model needs per token, and how many a device can do per second at best."""

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["forward_flops_per_token", "peak_flops", "training_flops_per_token"]

# Dense matrix products without sparsity, 10^12 operations a second (float32 with TF32, bfloat16); vendors' data sheets.
_ACCELERATORS = {
    "V100": (15.7, 15.7),
    "A100": (156, 312),
    "A10": (62.5, 125),
    "L4": (60, 121),
    "L40": (90.5, 181),
    "4090": (82.6, 165),
    "H20": (74, 148),
    "H100": (494, 989),
    "H800": (494, 989),
    "H200": (494, 989),
    "B200": (1100, 2250),
    "MI300": (653, 1307),
}
_SIZE, _REPEATS = 1024, 5


def training_flops_per_token(model: Any, length: int) -> float:
    """Count the operations that training on one token takes, for the model as it stands, with what is frozen in it.

    One sequence goes forward and back while torch counts the matrix products, including those of attention. A
    multiplication and an addition are two operations. Gradients of frozen weights are not computed and so not counted,
    nor are those of activations below the first trainable weight. Reading rows, norms, gates and the optimizer are left
    out. In the usual symbols the count is 4N for N weights behind the first trainable one, 2N for those before it, and
    2 more for each trainable weight.

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


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Find how many operations per second a device does at best, in matrix products of one type.

    A CPU is measured, which takes a tenth of a second; an accelerator is looked up by its name.

    Returns:
        Operations per second; None for an accelerator that is not in the list.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        # The longest name first: an H200 is not an H20.
        for known in sorted(_ACCELERATORS, key=len, reverse=True):
            if re.search(rf"\b{known}", name) and not re.search(rf"{known}\d", name):
                return _ACCELERATORS[known][dtype == "bfloat16"] * 1e12
        return None
    if device.type != "cpu":
        return None
    matrix = torch.ones(_SIZE, _SIZE, dtype=getattr(torch, dtype))
    best = float("inf")
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - started)
    return 2 * _SIZE**3 / best
