"""What the bytes of a row mean: how a row's record becomes numbers, and numbers a record."""

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from engram.errors import ConfigError
from engram.tables.block_float8 import dequantize, num_blocks, quantize

__all__ = ["RowCodec"]


@dataclasses.dataclass(frozen=True)
class RowCodec:
    """How one row is stored: a record of bytes, its numbers first, then their scales where it has some.

    The record is what tiers read, keep, send and cache. It becomes numbers last, so every tier gives the same bits.
    """

    width: int
    """Numbers in a row."""
    stored_dtype: torch.dtype
    """Type of the stored numbers: a float of 16 bits or more, or ``torch.float8_e4m3fn``."""
    scale: Literal["none", "table", "blocks"] = "none"
    """What 8-bit numbers are multiplied by: nothing, one number of the table, or an E8M0 byte per 32 numbers, which
    then stands in the record."""
    table_scale: float = 1.0
    """The number, where ``scale`` is ``"table"``."""

    def __post_init__(self) -> None:
        eight = self.stored_dtype == torch.float8_e4m3fn
        if self.width < 1 or not self.stored_dtype.is_floating_point or (self.stored_dtype.itemsize < 2 and not eight):
            raise ConfigError(f"a row of {self.width} numbers of {self.stored_dtype} cannot be stored")
        if eight == (self.scale == "none"):
            raise ConfigError(
                f"rows of {self.stored_dtype} with scale={self.scale!r}: 8-bit rows have scales, others none"
            )
        if not 0 < self.table_scale < math.inf:
            raise ConfigError(f"the table's scale is {self.table_scale}, expected a finite number above 0")

    @property
    def value_bytes(self) -> int:
        """Bytes of a row's numbers."""
        return self.width * self.stored_dtype.itemsize

    @property
    def scale_bytes(self) -> int:
        """Bytes of a row's scales."""
        return num_blocks(self.width) if self.scale == "blocks" else 0

    @property
    def record_bytes(self) -> int:
        """Bytes of a row as it is stored."""
        return self.value_bytes + self.scale_bytes

    @property
    def natural_dtype(self) -> torch.dtype:
        """Type that loses nothing: the stored one, and bfloat16 for 8-bit rows."""
        return torch.bfloat16 if self.stored_dtype.itemsize == 1 else self.stored_dtype

    def checked_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """The type that rows are returned in, where ``dtype`` was asked for.

        Raises:
            ConfigError: It is not a float of 16 bits or more.
        """
        if dtype is None:
            return self.natural_dtype
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
            raise ConfigError(f"rows are read as torch's floats of 16 bits or more, not as {dtype!r}")
        return dtype

    def decode(self, records: Tensor, dtype: torch.dtype) -> Tensor:
        """Turn records into rows.

        Args:
            records: uint8 ``[n, record_bytes]``, contiguous.
            dtype: Type of the result.

        Returns:
            ``[n, width]``. A view of the records where they are the rows already.
        """
        if self.scale == "blocks":
            values = records[:, : self.value_bytes].contiguous().view(self.stored_dtype)
            scales = records[:, self.value_bytes :].contiguous().view(torch.float8_e8m0fnu)
            return dequantize(values, scales, dtype)
        values = records.view(self.stored_dtype)
        if self.scale == "table":
            # In float32, so that the product is rounded once.
            return (values.float() * self.table_scale).to(dtype)
        return values.to(dtype)

    def encode(self, rows: Tensor) -> Tensor:
        """Turn rows into records; what `decode` gave comes back with equal values.

        Args:
            rows: ``[n, width]``, any floating type.

        Returns:
            uint8 ``[n, record_bytes]``.

        Raises:
            CheckpointError: 8-bit rows are asked for and a number is infinite or NaN.
        """
        if self.scale == "blocks":
            values, scales = quantize(rows)
            return torch.cat([values.view(torch.uint8), scales.view(torch.uint8)], dim=1)
        if self.scale == "table":
            rows = rows.float() / self.table_scale
        return rows.to(self.stored_dtype).contiguous().view(torch.uint8).view(len(rows), self.record_bytes)
