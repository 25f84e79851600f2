"""Floating-point operations: how many a model needs per token, and how many a device can do per second at best."""

import re
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

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


def flops_per_token(
    model: Any, length: int, *, training: bool, loss: Callable[[Tensor], Tensor] | None = None
) -> float:
    """Count the operations that a token of a sequence of ``length`` takes, for the model as it stands.

    One sequence goes forward, and back for training, while torch counts the matrix products, including those of
    attention. A multiplication and an addition are two operations. Gradients of frozen weights are not computed and so
    not counted, nor are those of activations below the first trainable weight. Reading rows, norms, gates and the
    optimizer are left out. In the usual symbols training takes 4N for N weights behind the first trainable one, 2N for
    those before it, and 2 more for each trainable weight. The model's gradients are cleared.

    Args:
        model: A causal language model.
        length: Tokens in a sequence.
        training: Whether it is trained, and not only computed.
        loss: Computes what is trained from tokens ``[1, length]``; the loss of the tokens themselves where None.
    """
    tokens = torch.zeros(1, length, dtype=torch.int64, device=model.get_input_embeddings().weight.device)

    def own_loss(tokens: Tensor) -> Tensor:
        logits = model(input_ids=tokens, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten()) if training else logits

    config, was_training = model.config.get_text_config(), model.training
    experts = getattr(config, "_experts_implementation", None)
    # The plain paths: the fast ones of attention and experts are not known to the counter.
    if experts is not None:
        config._experts_implementation = "eager"
    if training:
        model.train()
    try:
        with (
            torch.set_grad_enabled(training),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            found = (loss or own_loss)(tokens)
            if training:
                found.backward()
    finally:
        if experts is not None:
            config._experts_implementation = experts
        if training:
            model.train(was_training)
            model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / length


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
