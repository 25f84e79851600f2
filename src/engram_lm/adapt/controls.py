"""Controls for a gain: as many rows are read at the same cost, but they cannot mean the same thing."""

import torch
from torch import Tensor

from engram_lm.hashing import HashSpec
from engram_lm.memory.step import RowMap

# Dimension key: B batch, L length, H heads of all orders.

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


def _segments(spec: HashSpec) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Rows of every head and where they begin, int64 ``[H]``, by block."""
    sizes, offsets = {}, {}
    for index, (block, layer) in enumerate(zip(spec.blocks, spec.layers, strict=True)):
        sizes[block] = torch.tensor(spec.primes[index])
        offsets[block] = torch.tensor(spec.offsets(layer))
    return sizes, offsets
