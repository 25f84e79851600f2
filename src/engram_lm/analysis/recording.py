"""What a model does in one forward pass, recorded by hooks: hidden states, rows, and gates split by order."""

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from engram_lm.analysis.subject import Subject
from engram_lm.errors import MismatchError
from engram_lm.memory.gate_recorder import record_gates
from engram_lm.memory.layer import EngramLayer

# Dimension key: B batch, L length, S streams, D hidden, O orders, H heads of all orders, M memory width.


def score_parts(
    layer: EngramLayer, hidden_states: Tensor, memory: Tensor, active: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Split the score of every gate into what each order, ``[B, L, O, S]``, and the bias, ``[B, L, S]``, add; float32.

    The score is (h * w) . (W e + b) times two scales. Multiplying the query side into W leaves one number for each
    channel of the memory vector; the numbers of one order are summed. The hidden states are ``[B, L, S, D]`` or
    ``[B, L, D]``, as the layer takes them; ``memory`` holds row numbers ``[B, L, H]`` or memory vectors ``[B, L, M]``;
    both parts are 0 where ``active``, bool ``[B, L]``, is False.
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


class Recording:
    """What the last forward pass of a model did. It is made by `recording` and cleared before the next pass."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Drop everything, so that no tensor of this pass is alive during the next one."""
        self.hidden: list[Tensor] = []  # [B, L, S, D]: what enters the first layer, then each layer's output
        self.rows: dict[int, Tensor] = {}  # block -> [B, L, H]
        self.gates: dict[int, Tensor] = {}  # block -> [B, L, S]
        self.order_scores: dict[int, Tensor] = {}  # block -> [B, L, O, S]
        self.bias_scores: dict[int, Tensor] = {}  # block -> [B, L, S]


@contextlib.contextmanager
def recording(subject: Subject, *, hidden: bool, order_scores: bool) -> Iterator[Recording]:
    """Hook a model so that each forward pass records what it did; the hooks are removed afterwards, errors or not.

    Hidden states are copied, because some models change them in place later.
    """
    record = Recording()
    with contextlib.ExitStack() as hooks:
        if hidden:
            first, streams = subject.layers[0], (subject.num_streams, subject.hidden_size)
            # It comes first, because an attached memory adds to the hidden state in a hook of its own.
            entering = first.register_forward_pre_hook(
                functools.partial(_enter, record, streams), with_kwargs=True, prepend=True
            )
            hooks.callback(entering.remove)
            for layer in subject.layers:
                hooks.callback(layer.register_forward_hook(functools.partial(_leave, record, streams)).remove)
        for block, memory in subject.memories.items():
            before = functools.partial(_before_memory, record, block, order_scores and memory.config.gate != "none")
            hooks.callback(memory.register_forward_pre_hook(before, with_kwargs=True).remove)
        hooks.enter_context(record_gates(subject.memories, lambda block, gates: record.gates.update({block: gates})))
        yield record


def _enter(record: Recording, streams: tuple[int, int], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    record.hidden.append(_copied(args[0] if args else kwargs["hidden_states"], streams))


def _leave(record: Recording, streams: tuple[int, int], module: nn.Module, args: Any, output: Any) -> None:
    record.hidden.append(_copied(output if isinstance(output, Tensor) else output[0], streams))


def _copied(hidden: Tensor, streams: tuple[int, int]) -> Tensor:
    hidden = hidden.unsqueeze(-2) if hidden.dim() == 3 else hidden
    if hidden.shape[2:] != streams:
        raise MismatchError(
            f"a decoder layer returns hidden states {list(hidden.shape)}; expected [batch, length, {streams[0]}, "
            f"{streams[1]}] (streams, width) of every layer"
        )
    return hidden.detach().clone()


def _before_memory(
    record: Recording, block: int, split: bool, module: EngramLayer, args: Any, kwargs: dict[str, Any]
) -> Any:
    """Keep the row numbers, and split the scores before the layer computes them."""
    hidden, memory = args[0], args[1]
    if not memory.is_floating_point():
        record.rows[block] = memory.detach()
    if split:
        # Rows are read once for both, because the layer takes memory vectors as well as row numbers.
        memory = memory if memory.is_floating_point() else module.read(memory)
        parts = score_parts(module, hidden, memory.to(hidden.device), kwargs.get("active"))
        record.order_scores[block], record.bias_scores[block] = parts
    return (hidden, memory, *args[2:]), kwargs


def not_finite(tensor: Tensor) -> Tensor:
    """Find the positions of a tensor ``[B, L, ...]`` that hold a NaN or an infinity, bool ``[B, L]``."""
    if not tensor.is_floating_point() or not tensor.numel():
        return torch.zeros(tensor.shape[:2], dtype=torch.bool, device=tensor.device)
    # The largest magnitude is not finite exactly if one of the values is not, and this makes no copy of the tensor.
    return ~torch.linalg.vector_norm(tensor.flatten(2), ord=torch.inf, dim=-1).isfinite()
