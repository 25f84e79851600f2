"""Controls for a gain: rows that cannot mean the same thing, read at the same cost, and memory without any rows."""

import threading
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram_lm.adapt.decoder import Decoder
from engram_lm.hashing import HashSpec
from engram_lm.memory.step import RowMap

# Dimension key: B batch, L length, D hidden, H heads of all orders.

_STRIDE = 1_000_003
"""How far a position moves a row; larger than few tables and prime, so that neighboring positions are far apart."""


def permuted_hash(spec: HashSpec) -> RowMap:
    """Make a ``row_map`` for an adapter by which an N-gram reads other rows at every position of a sequence.

    As many rows of the same tables are read at the same cost, but what a row has learned at one position says nothing
    about the N-gram at another. A gain that remains does not come from knowing N-grams. Positions are counted from the
    start of the forward pass, so the map is for training and evaluation on whole sequences, not for decoding.
    """
    sizes, offsets = _segments(spec)

    def move(block: int, rows: Tensor) -> Tensor:
        size, offset = sizes[block].to(rows.device), offsets[block].to(rows.device)
        # In a head whose number of rows is the stride itself, that stride would move nothing.
        strides = torch.where(size % _STRIDE == 0, 1, _STRIDE)
        places = torch.arange(rows.shape[1], device=rows.device)[:, None] * strides
        return (rows - offset + places) % size + offset

    return move


def shuffled_rows(spec: HashSpec, seed: int = 0) -> RowMap:
    """Make a ``row_map`` that exchanges the rows of each head by a fixed permutation, which ``seed`` decides.

    What the memory has learned is then addressed wrongly.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes, offsets = _segments(spec)
    places = {
        block: torch.cat(
            [
                torch.randperm(size, generator=generator) + offset
                for size, offset in zip(sizes[block].tolist(), offsets[block].tolist(), strict=True)
            ]
        )
        for block in spec.blocks
    }
    starts = {block: torch.cumsum(sizes[block], 0) - sizes[block] for block in spec.blocks}

    def move(block: int, rows: Tensor) -> Tensor:
        local = rows - offsets[block].to(rows.device) + starts[block].to(rows.device)
        return places[block].to(rows.device)[local]

    return move


def one_row(spec: HashSpec) -> RowMap:
    """Make a ``row_map`` by which every N-gram reads the first row of each head.

    As many rows are read at the same cost, and they are the same ones everywhere. A gain that remains comes from the
    gate and the projections, which see the hidden state, and not from a table.
    """
    _, offsets = _segments(spec)

    def move(block: int, rows: Tensor) -> Tensor:
        return offsets[block].to(rows.device).expand_as(rows)

    return move


class EmbeddingMeans(nn.Module):
    """Memory without a table: the mean of the model's own embeddings of the last tokens, gated by a cosine.

    For each order n, ``ReLU(cos(hidden, mean)) * mean`` of the last n tokens is added to the hidden state, times a
    learned factor for each channel, which starts at 0. It needs no rows, so a gain that it reaches needs none either.
    For training and evaluation on whole sequences, not for decoding.

    Source: the update is that of NGM (arXiv 2605.16893), as summarized; the learned factors are ours.
    """

    def __init__(self, hidden_size: int, orders: tuple[int, ...]) -> None:
        super().__init__()
        self.orders = orders
        self.scale = nn.Parameter(torch.zeros(len(orders), hidden_size))
        # What belongs to one call is seen by the thread that makes it alone.
        self._calls = threading.local()

    @classmethod
    def attach(cls, model: Any, decoder: Decoder, layers: tuple[int, ...], orders: tuple[int, ...]) -> Self:
        """Put it before the decoder ``layers`` of a model, as its module ``embedding_means``, and return it."""
        means = cls(decoder.hidden_size, orders)

        def remember(module: nn.Module, args: Any, output: Tensor) -> None:
            means._calls.embedded = output

        def add(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            hidden = hidden + means(hidden, means._calls.embedded)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        model.get_input_embeddings().register_forward_hook(remember)
        for block in layers:
            decoder.layers[block].register_forward_pre_hook(add, with_kwargs=True)
        model.add_module("embedding_means", means)
        return means

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """Compute the update of hidden states ``[B, L, D]`` from the embeddings ``[B, L, D]`` of their tokens."""
        update = torch.zeros_like(hidden)
        summed = F.pad(embedded.float().cumsum(1), (0, 0, 1, 0))
        ends = torch.arange(1, embedded.shape[1] + 1, device=embedded.device)
        for scale, order in zip(self.scale, self.orders, strict=True):
            starts = (ends - order).clamp_min(0)
            mean = (summed[:, ends] - summed[:, starts]) / (ends - starts)[:, None]
            gate = F.cosine_similarity(hidden.float(), mean, dim=-1).relu()
            update = update + (scale * gate[..., None] * mean).to(hidden.dtype)
        return update


def _segments(spec: HashSpec) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Rows of every head and where they begin, int64 ``[H]``, by block."""
    sizes, offsets = {}, {}
    for index, (block, layer) in enumerate(zip(spec.blocks, spec.layers, strict=True)):
        sizes[block] = torch.tensor(spec.primes[index])
        offsets[block] = torch.tensor(spec.offsets(layer))
    return sizes, offsets
