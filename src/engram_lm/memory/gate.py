"""How much of the memory a hidden state lets in: one number per token and stream."""

import math
from typing import Literal

import torch
from torch import Tensor

# Dimension key: B batch, L length, S streams, D hidden.


def signed_sqrt(score: Tensor, smallest: float = 1e-6) -> Tensor:
    """Compress a score: sign(s) * sqrt(max(|s|, smallest)), which is exactly 0 at 0.

    Keeps the sigmoid behind it from saturating. Below ``smallest`` the gradient is zero.

    Source: the paper's demo (``engram_demo_v1.py``); absent from the paper's Eq. 4.
    """
    return score.abs().clamp_min(smallest).sqrt() * score.sign()


def gate_values(
    hidden: Tensor, key: Tensor, weight: Tensor, *, eps: float, squash: Literal["signed_sqrt", "plain"]
) -> Tensor:
    """Compute the gates of all streams, in float32 whatever the inputs are: the sigmoid of their `gate_scores`.

    Returns:
        Gates in (0, 1), float32, ``[B, L, S]``.

    Source: paper, Eq. 4 and 6.
    """
    return torch.sigmoid(gate_scores(hidden, key, weight, eps=eps, squash=squash))


def gate_scores(
    hidden: Tensor, key: Tensor, weight: Tensor, *, eps: float, squash: Literal["signed_sqrt", "plain"]
) -> Tensor:
    """Compare hidden states with keys, in float32 whatever the inputs are.

    The two normalizations are taken as one scaling of the dot product, and their weights as one product, so that no
    normalized copy of the hidden state or the key is made.

    Args:
        hidden: Hidden states, ``[B, L, S, D]``.
        key: Projected memory, ``[B, L, S, D]``. Both may have further dimensions before S that broadcast.
        weight: Product of the query's and the key's norm weights, ``[S, D]``.
        eps: Added to both mean squares.
        squash: What is applied to the score.

    Returns:
        Scores, float32, ``[B, L, S]``.

    Source: the fused form as in deepseek-ai/TileKernels ``tile_kernels/torch/engram.py``.
    """
    hidden, key = hidden.float(), key.float()
    dot = torch.linalg.vecdot(hidden * weight.float(), key)
    hidden_scale = torch.rsqrt(hidden.square().mean(-1) + eps)
    key_scale = torch.rsqrt(key.square().mean(-1) + eps)
    score = dot * hidden_scale * key_scale * (1 / math.sqrt(hidden.shape[-1]))
    return signed_sqrt(score) if squash == "signed_sqrt" else score
