"""Numbers as integers of 8 or 4 bits with one bfloat16 scale per block of 32: ``number = integer * scale``.

Symmetric: zero stays zero, and -127 to 127 (-7 to 7) are used, so that a number and its negative are equally far off.

The scale is the block's largest magnitude over 127 (7), rounded to the nearest bfloat16. Why bfloat16: its range is
float32's, while float16 loses blocks under 6e-8 and has none over 65504; and its coarser step costs nothing, since
integers are chosen for the scale after rounding, which is off by 0.2 % at most. A power of two (E8M0, one byte less per
block) is up to twice too large. On normally distributed rows of 256 numbers the mean relative error is, with a float32,
float16, bfloat16 and E8M0 scale, 0.533, 0.533, 0.538 and 0.829 % for 8 bits, 9.68, 9.68, 9.68 and 14.37 % for 4 bits: a
power of two costs more than half a bit of every number, and saves a quarter of a bit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from engram_lm.errors import CheckpointError
from engram_lm.tables.block_float8 import BLOCK, num_blocks

INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # missing from torch's annotations
"""4-bit integers. torch has the name only; their bytes are packed and unpacked here."""

LARGEST = {torch.int8: 127, INT4: 7}
"""The largest integer used of each type."""

# Normal numbers only: smaller ones have too few bits in bfloat16 to return unchanged from `dequantize`.
_SMALLEST_SCALE = torch.finfo(torch.bfloat16).tiny


def quantize_integers(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round numbers to integers under one scale per 32 columns.

    Quantizing what `dequantize` returned as float32 gives the same integers. A block of zeros has the scale 1;
    numbers under 2 ** -127 become 0.

    Args:
        values: ``[rows, columns]``, any floating type.
        dtype: ``torch.int8`` or ``torch.int4``: which integers may be used.

    Returns:
        Integers, int8 ``[rows, columns]`` (not packed), and scales, bfloat16 ``[rows, num_blocks(columns)]``.

    Raises:
        CheckpointError: A number is infinite or NaN.
    """
    largest, (rows, columns) = LARGEST[dtype], values.shape
    blocks = F.pad(values.float(), (0, -columns % BLOCK)).view(rows, num_blocks(columns), BLOCK)
    magnitude = blocks.abs().amax(2)
    if not magnitude.isfinite().all():
        raise CheckpointError(f"{dtype} cannot hold these rows: some numbers are infinite or NaN")
    # The largest float32 must stay finite when it is multiplied back: one bfloat16 step under the quotient.
    highest = torch.finfo(torch.float32).max / largest * (1 - 2**-8)
    scales = (magnitude / largest).clamp(_SMALLEST_SCALE, highest).to(torch.bfloat16)
    scales = torch.where(magnitude == 0, 1, scales)
    integers = (blocks / scales.float().unsqueeze(2)).round_().clamp_(-largest, largest)
    return integers.view(rows, -1)[:, :columns].to(torch.int8), scales


def pack_nibbles(integers: Tensor) -> Tensor:
    """Put two 4-bit integers into a byte: even columns into its low half, odd ones into the high half.

    From int8 ``[rows, columns]`` of -8 to 7 to uint8 ``[rows, ceil(columns / 2)]``; a missing last column is 0.
    """
    halves = F.pad(integers, (0, integers.shape[1] % 2)).view(torch.uint8) & 15
    return halves[:, ::2] | (halves[:, 1::2] << 4)


def unpack_nibbles(data: Tensor, columns: int) -> Tensor:
    """Undo `pack_nibbles`: uint8 ``[rows, ceil(columns / 2)]`` → int8 ``[rows, columns]``."""
    # Shifting left and right again repeats the sign bit.
    signed = data.view(torch.int8)
    return torch.stack([(signed << 4) >> 4, signed >> 4], dim=2).view(len(data), -1)[:, :columns]
