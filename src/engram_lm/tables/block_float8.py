"""Numbers as E4M3 floats with one power of two per block: how DeepSeek-V4.1 stores its memory.

An E8M0 scale byte ``b`` means ``2 ** (b - 127)``; 255 means NaN. torch's own conversion gives all of these, byte 0
included; shifting the byte into a float's exponent field would give 0 there instead of ``2 ** -127``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from engram_lm.errors import CheckpointError

BLOCK = 32
"""Columns (and, in a matrix with square blocks, rows) that share a scale."""

# 448, the largest E4M3 number, is 0.875 * 2 ** 9.
_LARGEST_FRACTION, _LARGEST_EXPONENT = 0.875, 9


def num_blocks(size: int, block: int = BLOCK) -> int:
    """Count the blocks over a dimension; the last may be cut."""
    return -(-size // block)


def block_size(size: int, count: int) -> int | None:
    """Find how long the blocks of a dimension are, from their number: all of it, one, or a power of two; else None."""
    if count in (1, size):
        return size // count
    powers = (2**exponent for exponent in range(1, size.bit_length()))
    return next((power for power in powers if num_blocks(size, power) == count), None)


def dequantize(
    values: Tensor, scales: Tensor, dtype: torch.dtype, *, block: int = BLOCK, square: bool = False
) -> Tensor:
    """Multiply every number by its block's scale.

    Exact in bfloat16 with float8_e8m0fnu scales, wherever the product is within its range: a product has the few
    significant bits of its value. With other scales the product is computed in float32 (float64 for that ``dtype``),
    and rounded once.

    Args:
        values: Floats or integers of 8 bits, ``[rows, columns]``.
        scales: Floating point, ``[rows, num_blocks(columns)]``, or ``[num_blocks(rows), num_blocks(columns)]``.
        dtype: Type of the result.
        block: Columns of a block.
        square: Whether a block has as many rows as columns, or one.

    Returns:
        ``[rows, columns]``.

    Source: deepseek-ai/DeepSeek-V4.1-Flash ``inference/engram.py``.
    """
    # The product is rounded once, to the result's type; float16 could not even hold the scales.
    holds_it = dtype == torch.float64 or (dtype == torch.bfloat16 and scales.dtype == torch.float8_e8m0fnu)
    exact = dtype if holds_it else torch.float32
    numbers, factors = values.to(exact), scales.to(exact)
    rows, columns = numbers.shape
    if columns % block == 0 and not square:
        # The same products without a scale for every number in memory: half the time.
        return numbers.view(rows, columns // block, block).mul_(factors.unsqueeze(2)).view(rows, columns).to(dtype)
    return numbers.mul_(_widened(factors, numbers.shape, block, square)).to(dtype)


def _widened(scales: Tensor, shape: torch.Size, block: int, square: bool) -> Tensor:
    """A scale for each number of a matrix."""
    wide = scales.repeat_interleave(block, dim=1)[:, : shape[1]]
    return wide.repeat_interleave(block, dim=0)[: shape[0]] if square else wide


def quantize(values: Tensor, *, square: bool = False) -> tuple[Tensor, Tensor]:
    """Round numbers to E4M3 under the smallest power of two per block that lets its largest number fit.

    Quantizing what `dequantize` returned (within its range) gives equal values: a smaller scale than the original one
    only leaves room for more bits.

    Args:
        values: ``[rows, columns]``, any floating type.
        square: Whether a block is 32 x 32, or 32 columns of one row.

    Returns:
        Values, float8_e4m3fn ``[rows, columns]``, and scales, float8_e8m0fnu, shaped as for `dequantize`.

    Raises:
        CheckpointError: A number is infinite or NaN.

    Source: the ``ue8m0`` scales of deepseek-ai/DeepSeek-V4.1-Flash ``config.json``.
    """
    rows, columns = values.shape
    values = values.float()
    height = BLOCK if square else 1
    padded = F.pad(values, (0, -columns % BLOCK, 0, -rows % height))
    largest = padded.abs().unflatten(1, (-1, BLOCK)).unflatten(0, (-1, height)).amax((1, 3))
    if not largest.isfinite().all():
        raise CheckpointError("8-bit floats cannot hold these weights: some are infinite or NaN")
    fraction, exponent = torch.frexp(largest)
    exponent = exponent - _LARGEST_EXPONENT + (fraction > _LARGEST_FRACTION)
    exponent = torch.where(largest == 0, 0, exponent).clamp_min(-127)
    scales = (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
    return (values / _widened(scales.float(), values.shape, BLOCK, square)).to(torch.float8_e4m3fn), scales
