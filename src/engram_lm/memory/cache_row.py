"""What an engine that keeps the state of memory in a cache of its own keeps of each token: one row per memory layer."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

from engram_lm.memory.config import EngramConfig

if TYPE_CHECKING:
    import torch

# Dimension key: D hidden, S streams.

_ALIGNMENT_BYTES = 16


@dataclasses.dataclass(frozen=True)
class MemoryRow:
    """How many bytes one token's row has, and what lies where in it."""

    num_values: int
    """Numbers of the value, D; 0 where the layer has no convolution."""
    num_scales: int
    """Scales, S, float32, see `EngramLayer.convolution_scales`; 0 where the layer has no convolution."""
    holds_code: bool
    """Whether the row holds the token's code too, int32; one memory layer of a model does."""
    dtype: "torch.dtype"
    """Type of the value."""

    @property
    def scales_start(self) -> int:
        """First byte of the scales."""
        return -(-self.num_values * self.dtype.itemsize // 4) * 4

    @property
    def code_start(self) -> int:
        """First byte of the code."""
        return self.scales_start + 4 * self.num_scales

    @property
    def num_bytes(self) -> int:
        """Bytes of the row."""
        used = self.code_start + 4 * self.holds_code
        return max(1, -(-used // _ALIGNMENT_BYTES)) * _ALIGNMENT_BYTES


def memory_rows(memory: EngramConfig, blocks: Iterable[int], dtype: "torch.dtype") -> dict[int, MemoryRow]:
    """Describe what is kept of each token: block, in the order in which they run, to its row, where it has one.

    Args:
        memory: What all layers of the model have in common.
        blocks: The blocks with memory.
        dtype: Type of the hidden states.
    """
    kept = bool(memory.kernel_size)
    rows = {}
    for index, block in enumerate(blocks):
        if kept or index == 0:
            rows[block] = MemoryRow(
                num_values=memory.hidden_size if kept else 0,
                num_scales=memory.num_streams if kept else 0,
                holds_code=index == 0,
                dtype=dtype,
            )
    return rows
