"""Controls that read as much as the paper's layer, at the same cost, from rows that cannot belong to N-grams."""

import torch
from torch import Tensor

from engram_lm.memory.layer import EngramLayer

_STRIDE = 1_000_003
"""How far a position moves a row: prime, and larger than most tables of these studies."""


class OneRowLayer(EngramLayer):
    """The paper's layer, for which every N-gram reads the same row of each head."""

    def read(self, rows: Tensor) -> Tensor:
        """Read row h for head h, whatever the numbers ``[B, L, H]`` are."""
        return super().read(torch.arange(rows.shape[-1], device=rows.device).expand_as(rows))


class PermutedLayer(EngramLayer):
    """The paper's layer, for which an N-gram reads other rows at every position of a sequence.

    Positions are counted from the start of a forward pass, so it is for training and evaluation on whole sequences, not
    for decoding. Source: the control `engram_lm.adapt.controls.permuted_hash`, for memory that is attached.
    """

    def read(self, rows: Tensor) -> Tensor:
        """Read rows that were moved along the table by their positions."""
        assert self.table is not None
        moved = rows + _STRIDE * torch.arange(rows.shape[1], device=rows.device)[:, None]
        return super().read(moved % self.table.num_rows)
