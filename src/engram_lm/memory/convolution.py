"""The short convolution over gated values: depthwise, causal, dilated."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Dimension key: B batch, L length, C channels, K taps.


def causal_convolution(values: Tensor, context: Tensor | None, weight: Tensor, dilation: int) -> Tensor:
    """Convolve each channel with its own taps, looking back only.

    One shifted multiply-add per tap, in the layout the values already have: no transposition, and the same order of
    additions whether a sequence comes at once or token by token.

    Args:
        values: ``[B, L, C]``.
        context: The ``(K - 1) * dilation`` positions before them, ``[B, context, C]``; zeros where None.
        weight: ``[C, K]``; the last tap meets the current position.
        dilation: Distance between taps in positions.

    Returns:
        ``[B, L, C]``.

    Source: paper, Eq. 5.
    """
    length, num_taps = values.shape[1], weight.shape[-1]
    reach = (num_taps - 1) * dilation
    padded = (
        F.pad(values, (0, 0, reach, 0)) if context is None else torch.cat([context.to(values.dtype), values], dim=1)
    )
    result = values * weight[:, -1]
    for tap in range(num_taps - 1):
        start = tap * dilation
        result = result.addcmul(padded[:, start : start + length], weight[:, tap])
    return result
