"""The score inside a gate, split into what each order's N-gram adds to it."""

import math

import torch
from torch import Tensor

from engram_lm.memory.layer import EngramLayer

__all__ = ["score_bytes_per_token", "score_parts"]

# Dimension key: B batch, L length, S streams, D hidden, O orders, H heads of all orders, M memory width.


def score_parts(
    layer: EngramLayer, hidden_states: Tensor, memory: Tensor, active: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Split the score of every gate into what each order and the bias add.

    The score is (h * w) . (W e + b) times two scales. Multiplying the query side into W leaves one number for each
    channel of the memory vector; the numbers of one order are summed.

    Args:
        layer: A layer with a gate.
        hidden_states: As the layer takes them, ``[B, L, S, D]`` or ``[B, L, D]``.
        memory: Row numbers ``[B, L, H]`` or memory vectors ``[B, L, M]``.
        active: Bool ``[B, L]``; both parts are 0 where it is False.

    Returns:
        Float32 ``[B, L, O, S]`` and ``[B, L, S]``.
    """
    config = layer.config
    streams = (config.num_streams, config.hidden_size)
    wide = config.num_streams * config.hidden_size
    weight, bias = layer.key_value.weight, layer.key_value.bias
    hidden_BLSD = layer.split_streams(hidden_states).float()
    memory_BLM = (memory if memory.is_floating_point() else layer.read(memory)).to(hidden_BLSD)
    weight_SDM = weight[:wide].float().unflatten(0, streams)
    bias_SD = weight.new_zeros(streams).float() if bias is None else bias[:wide].float().unflatten(0, streams)
    with torch.autocast(hidden_BLSD.device.type, enabled=False):
        key_BLSD = torch.einsum("blm,sdm->blsd", memory_BLM, weight_SDM) + bias_SD
        scale_BLS = torch.rsqrt(hidden_BLSD.square().mean(-1) + config.norm_eps)
        scale_BLS = scale_BLS * torch.rsqrt(key_BLSD.square().mean(-1) + config.norm_eps)
        scale_BLS = scale_BLS / math.sqrt(config.hidden_size)
        if active is not None:
            scale_BLS = scale_BLS * active.unsqueeze(-1)
        query_BLSD = hidden_BLSD * layer.gate_gain()
        parts_BLSM = torch.einsum("blsd,sdm->blsm", query_BLSD, weight_SDM) * memory_BLM.unsqueeze(2)
        parts_BLSO = parts_BLSM.unflatten(-1, (len(config.orders), -1)).sum(-1) * scale_BLS.unsqueeze(-1)
        return parts_BLSO.transpose(-1, -2), (query_BLSD * bias_SD).sum(-1) * scale_BLS


def score_bytes_per_token(layer: EngramLayer) -> int:
    """Return the bytes that `score_parts` needs for each token: float32 of the widest arrays it holds."""
    config = layer.config
    wide = config.num_streams * config.hidden_size
    return 4 * (3 * wide + 2 * config.num_streams * config.memory_dim + config.memory_dim)
