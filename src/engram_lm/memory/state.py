"""What the convolution must remember between two steps of decoding."""

import torch

from engram_lm.hashing.window import RollingWindow
from engram_lm.memory.config import EngramConfig

__all__ = ["ConvolutionState"]


class ConvolutionState(RollingWindow):
    """The last positions that a layer's convolution reads: normalized gated values, ``[B, context, S * D]``.

    Same operations as `engram_lm.hashing.TokenHistory`: advance (done by the layer), rollback, reorder, fork, snapshot.
    Positions before the start of a sequence, and masked ones, are zeros.

    Args:
        config: Gives the width, the reach of the convolution and the number of streams.
        batch_size: Sequences.
        device: Where the layer runs.
        dtype: Type of the layer's values.
        max_rollback: Positions that can be taken back; None keeps everything since the start.
    """

    def __init__(
        self,
        config: EngramConfig,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_rollback: int | None = 0,
    ) -> None:
        super().__init__(
            batch_size,
            config.conv_context,
            item_shape=(config.num_streams * config.hidden_size,),
            fill=0,
            dtype=dtype,
            device=device,
            max_rollback=max_rollback,
        )
