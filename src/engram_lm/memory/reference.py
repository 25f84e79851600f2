"""The plain twin of the Engram layer: the paper's equations one by one, one stream and one position at a time.

Slow on purpose. `EngramLayer` is tested against it for every option, forward and gradient.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from engram_lm.memory.layer import EngramLayer


def layer_reference(
    layer: EngramLayer, hidden_states: Tensor, rows: Tensor, active: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute what ``layer(hidden_states, rows, active=active)`` computes, from the same weights.

    Returns the update ``[B, L, S, D]`` and the gates ``[B, L, S]``. Source: paper, Eq. 1-6.
    """
    config = layer.config
    assert layer.table is not None
    batch, length, streams, hidden = hidden_states.shape
    if active is None:
        active = torch.ones(batch, length, dtype=torch.bool)
    active = active.clone()
    updates = torch.zeros(batch, length, streams, hidden, dtype=hidden_states.dtype)
    gates = torch.zeros(batch, length, streams, dtype=hidden_states.dtype)
    for b in range(batch):
        for m in range(streams):
            gated: list[Tensor] = []
            normed: list[Tensor] = []
            for t in range(length):
                is_written = _written(layer, rows[b, t])
                memory = _memory_vector(layer, rows[b, t], is_written)
                bias = layer.key_value.bias
                weight_key = layer.key_value.weight[m * hidden : (m + 1) * hidden]
                weight_value = layer.key_value.weight[streams * hidden :]
                key, value = weight_key @ memory, weight_value @ memory
                if bias is not None:
                    key = key + bias[m * hidden : (m + 1) * hidden]
                    value = value + bias[streams * hidden :]
                alpha = _gate(layer, hidden_states[b, t, m], key, m)
                if not any(is_written):
                    active[b, t] = False
                if not active[b, t]:
                    alpha = alpha * 0
                gates[b, t, m] = alpha
                gated.append(alpha * value)  # Eq. 4
                if config.kernel_size:
                    normed.append(_rms_norm(gated[t], layer.conv_norm[m], layer))
            for t in range(length):
                if not active[b, t]:
                    continue
                updates[b, t, m] = gated[t]
                if config.kernel_size:  # Eq. 5
                    taps = layer.conv_weight[m * hidden : (m + 1) * hidden]
                    mixed = torch.zeros(hidden, dtype=hidden_states.dtype)
                    for distance in range(config.kernel_size):
                        source = t - distance * config.conv_dilation
                        if source >= 0:
                            mixed = mixed + taps[:, config.kernel_size - 1 - distance] * normed[source]
                    updates[b, t, m] = gated[t] + F.silu(mixed)
    return updates, gates


def _written(layer: EngramLayer, rows: Tensor) -> list[bool]:
    """Whether what each head of a token reads counts as written; everything does without occupancy."""
    config = layer.config
    if config.occupancy == "none":
        return [True] * len(rows)
    assert layer.table is not None
    result = [bool((layer.table.gather(row) != 0).any()) for row in rows]
    if config.occupancy == "ngrams":
        for first in range(0, len(rows), config.num_heads):
            heads = slice(first, first + config.num_heads)
            result[heads] = [all(result[heads])] * config.num_heads
    return result


def _memory_vector(layer: EngramLayer, rows: Tensor, is_written: list[bool]) -> Tensor:
    """Eq. 2: the rows of all heads, one after the other; zeros for those that do not count as written."""
    config = layer.config
    assert layer.table is not None
    parts: list[Tensor] = []
    for order in range(len(config.orders)):
        for head in range(config.num_heads):
            row = layer.table.gather(rows[order * config.num_heads + head])
            if config.signs == "hashed":
                neighbour = rows[order * config.num_heads + (head + 1) % config.num_heads]
                row = row if int(neighbour) % 2 == 0 else -row
            # A row of zeros is zeros already, and keeps its gradient.
            parts.append(row if is_written[len(parts)] or config.occupancy == "rows" else torch.zeros_like(row))
    return torch.cat(parts)


def _gate(layer: EngramLayer, hidden: Tensor, key: Tensor, stream: int) -> Tensor:
    """Eq. 4 and 6 for one position and one stream."""
    config = layer.config
    if config.gate == "none":
        return torch.ones((), dtype=hidden.dtype)
    query = _rms_norm(hidden, layer.query_norm[stream], layer)
    score = query @ _rms_norm(key, layer.key_norm[stream], layer) / math.sqrt(len(hidden))
    if config.gate == "signed_sqrt":
        score = torch.sign(score) * torch.sqrt(torch.clamp(torch.abs(score), min=1e-6))
    return torch.sigmoid(score)


def _rms_norm(x: Tensor, weight: Tensor, layer: EngramLayer) -> Tensor:
    gain = 1 + weight if layer.config.norm_weight == "zero_centered" else weight
    return x / torch.sqrt((x * x).mean() + layer.config.norm_eps) * gain
