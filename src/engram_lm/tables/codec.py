"""What the bytes of a row mean: how a row's record becomes numbers, and numbers a record."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor

from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.tables.block_float8 import BLOCK, dequantize, num_blocks, quantize
from engram_lm.tables.block_integers import INT4, LARGEST, pack_nibbles, quantize_integers, unpack_nibbles

CODEC_NAMES: dict[str, tuple[torch.dtype, Literal["none", "blocks"]]] = {
    "float32": (torch.float32, "none"),
    "bfloat16": (torch.bfloat16, "none"),
    "float16": (torch.float16, "none"),
    "float8_e4m3": (torch.float8_e4m3fn, "blocks"),
    "int8": (torch.int8, "blocks"),
    "int4": (INT4, "blocks"),
}
"""What tables are converted to, by the name on the command line: type of the numbers and kind of scale."""

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALE_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
# What a header leaves out where it is so: files of the first version have no word for it.
_UNSAID = ("block", "scale_dtype")

_NUMBERS_AT_ONCE = 2**17

# Halfway between 448, the largest E4M3 number, and what would come next.
_LARGEST_ROUNDED_DOWN = 464


@dataclasses.dataclass(frozen=True)
class RowCodec:
    """How one row is stored: a record of bytes, its numbers first, then their scales where it has some.

    The record is what tiers read, keep, send and cache. It becomes numbers last, so every tier gives the same bits.
    """

    width: int
    """Numbers in a row."""
    stored_dtype: torch.dtype
    """Type of the stored numbers: a float of 16 bits or more, ``torch.float8_e4m3fn``, ``torch.float8_e5m2``,
    ``torch.int8``, or ``torch.int4``, of which a byte holds two."""
    scale: Literal["none", "table", "blocks"] = "none"
    """What numbers of 8 bits and less are multiplied by: one number of the table (8 bits only), or one per ``block``
    numbers, which then stands in the record."""
    table_scale: float = 1.0
    """The number, where ``scale`` is ``"table"``."""
    block: int = BLOCK
    """Numbers that share a scale, where ``scale`` is ``"blocks"``; at least ``width`` for one scale in each row."""
    scale_dtype: torch.dtype | None = None
    """Type of those scales: ``torch.float32``, ``torch.bfloat16``, ``torch.float16`` or ``torch.float8_e8m0fnu``. None
    becomes the type that this library writes: ``float8_e8m0fnu`` for floats, ``bfloat16`` for integers."""

    def __post_init__(self) -> None:
        eight, wide = self.stored_dtype in (*_FLOAT8, torch.int8), _is_wide(self.stored_dtype)
        if self.width < 1 or not (eight or wide or self.stored_dtype == INT4):
            raise ConfigError(f"a row of {self.width} numbers of {self.stored_dtype} cannot be stored")
        if self.scale not in (("none",) if wide else ("table", "blocks") if eight else ("blocks",)):
            raise ConfigError(
                f"rows of {self.stored_dtype} with scale={self.scale!r}: 8-bit rows have one scale or scales by "
                "blocks, 4-bit rows have them by blocks, others have none"
            )
        if not 0 < self.table_scale < math.inf:
            raise ConfigError(f"the table's scale is {self.table_scale}, expected a finite number above 0")
        if self.scale_dtype is None:
            object.__setattr__(self, "scale_dtype", self._own_scale_dtype)
        if self.block < 1 or self.scale_dtype not in _SCALE_TYPES:
            raise ConfigError(f"scales of {self.scale_dtype} for {self.block} numbers each cannot be stored")

    @property
    def _own_scale_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.stored_dtype in LARGEST else torch.float8_e8m0fnu

    @classmethod
    def named(cls, name: str, width: int) -> Self:
        """Return the codec of one of `CODEC_NAMES` for rows of ``width`` numbers; a `ConfigError` for other names."""
        if name not in CODEC_NAMES:
            raise ConfigError(f"rows are stored as {', '.join(CODEC_NAMES)}, not as {name!r}")
        return cls(width, *CODEC_NAMES[name])

    @classmethod
    def from_dict(cls, values: object) -> Self:
        """Read what `to_dict` returned, out of a file or message that may be damaged; a `ConfigError` where it is."""
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, Mapping) or sorted({*values, *_UNSAID}) != sorted(names):
            raise ConfigError(f"a codec is an object of {', '.join(names)}, not {values!r:.200}")
        width, name, scale, factor = (values[name] for name in names[:4])
        block, scale_name = values.get("block", BLOCK), values.get("scale_dtype")
        dtype, scale_dtype = (
            getattr(torch, each, None) if isinstance(each, str) else None for each in (name, scale_name)
        )
        sized = all(type(size) is int and 0 < size < 2**48 for size in (width, block))
        factored = type(factor) in (int, float) and not factor > 1e308
        known = isinstance(dtype, torch.dtype) and (scale_name is None or isinstance(scale_dtype, torch.dtype))
        if not known or not isinstance(scale, str) or not sized or not factored:
            raise ConfigError(
                f"rows of {width!r:.100} numbers of type {name!r:.100} with scale {scale!r:.100} times {factor!r:.100} "
                f"of type {scale_name!r:.100} for {block!r:.100} numbers each cannot be stored"
            )
        return cls(width, dtype, scale, float(factor), block, scale_dtype)  # type: ignore[arg-type]  # the class checks the scale

    def to_dict(self) -> dict[str, Any]:
        """Return the codec as JSON values, for headers and manifests."""
        values = dataclasses.asdict(self)
        usual = {"block": BLOCK, "scale_dtype": self._own_scale_dtype}
        for name in _UNSAID:
            if values[name] == usual[name]:
                del values[name]
        return {
            name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
            for name, value in values.items()
        }

    def __str__(self) -> str:
        """Type of the numbers and kind of scale, for messages."""
        name = str(self.stored_dtype).removeprefix("torch.").removesuffix("fn")
        if self.scale == "none":
            return name
        if self.scale == "table":
            return f"{name} times {self.table_scale:g}"
        kind = "" if self.scale_dtype == self._own_scale_dtype else f"{str(self.scale_dtype).removeprefix('torch.')} "
        is_by_row = self.block >= self.width and self.block != BLOCK
        return f"{name} with " + (
            f"a {kind}scale for each row" if is_by_row else f"{kind}scales by blocks of {self.block}"
        )

    @property
    def value_bytes(self) -> int:
        """Bytes of a row's numbers."""
        return -(-self.width // 2) if self.stored_dtype == INT4 else self.width * self.stored_dtype.itemsize

    @property
    def scale_bytes(self) -> int:
        """Bytes of a row's scales."""
        if self.scale != "blocks":
            return 0
        assert self.scale_dtype is not None
        return num_blocks(self.width, self.block) * self.scale_dtype.itemsize

    @property
    def record_bytes(self) -> int:
        """Bytes of a row as it is stored."""
        return self.value_bytes + self.scale_bytes

    @property
    def natural_dtype(self) -> torch.dtype:
        """Type that loses nothing: the stored one, bfloat16 for 8-bit floats, float32 for integers."""
        if self.stored_dtype in LARGEST:
            return torch.float32
        return torch.bfloat16 if self.stored_dtype.itemsize == 1 else self.stored_dtype

    def checked_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """The type of returned rows; a `ConfigError` where ``dtype`` is not a float type of at least 16 bits."""
        if dtype is None:
            return self.natural_dtype
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
            raise ConfigError(f"rows are read as torch's floats of 16 bits or more, not as {dtype!r}")
        return dtype

    def decode(self, records: Tensor, dtype: torch.dtype) -> Tensor:
        """Turn records, uint8 ``[n, record_bytes]``, contiguous, into rows ``[n, width]``; a view if possible."""
        if self.scale == "blocks":
            assert self.scale_dtype is not None
            values = records[:, : self.value_bytes].contiguous()
            values = unpack_nibbles(values, self.width) if self.stored_dtype == INT4 else values.view(self.stored_dtype)
            # A copy even of a single row: its scales may begin at any byte, which a view of their type may not.
            scales = records[:, self.value_bytes :].clone(memory_format=torch.contiguous_format).view(self.scale_dtype)
            return dequantize(values, scales, dtype, block=self.block)
        values = records.view(self.stored_dtype)
        if self.scale == "table":
            # In float32, so that the product is rounded once.
            return (values.float() * self.table_scale).to(dtype)
        return values.to(dtype)

    def encode(self, rows: Tensor) -> Tensor:
        """Turn rows into records; encoding what `decode` returned gives records of equal values.

        Args:
            rows: ``[n, width]``, any floating type.

        Returns:
            uint8 ``[n, record_bytes]``.

        Raises:
            CheckpointError: A number is infinite or NaN, and the stored type has scales; or it is finite and larger
                than the stored type can hold.
            ConfigError: Rows of this kind are read and copied as they are, never made: theirs is none of `CODEC_NAMES`.
        """
        usual = self.block == BLOCK and self.scale_dtype == self._own_scale_dtype
        if not usual or (self.scale == "table" and self.stored_dtype != torch.float8_e4m3fn):
            raise ConfigError(f"rows cannot be rounded to {self}; choose {', '.join(CODEC_NAMES)}")
        if self.stored_dtype in LARGEST:
            integers, factors = quantize_integers(rows, self.stored_dtype)
            packed = pack_nibbles(integers) if self.stored_dtype == INT4 else integers.view(torch.uint8)
            return torch.cat([packed, factors.view(torch.uint8)], dim=1)
        if self.scale == "blocks":
            values, scales = quantize(rows)
            return torch.cat([values.view(torch.uint8), scales.view(torch.uint8)], dim=1)
        if self.scale == "table":
            rows = rows.float() / self.table_scale
            # torch rounds everything above to 448, infinity included, and says nothing.
            if not (rows.abs() <= _LARGEST_ROUNDED_DOWN).all():
                raise CheckpointError(f"{self} cannot hold these rows: some numbers are too large, infinite or NaN")
        stored = rows.to(self.stored_dtype)
        if self.scale == "none" and stored.dtype != rows.dtype and (stored.isinf() & rows.isfinite()).any():
            raise CheckpointError(f"{self} cannot hold these rows: some numbers are too large and would be infinite")
        return stored.contiguous().view(torch.uint8).view(len(rows), self.record_bytes)

    def reencode(self, records: Tensor, codec: "RowCodec") -> Tensor:
        """Turn records of another codec into records of this one; its own stay as they are. Raises as `encode`."""
        if codec == self:
            return records
        exact = torch.float64 if codec.stored_dtype == torch.float64 else torch.float32
        result = torch.empty(len(records), self.record_bytes, dtype=torch.uint8)
        # A few rows at a time: what lies between both types then stays in the processor's cache.
        at_once = max(1, _NUMBERS_AT_ONCE // self.width)
        for start in range(0, len(records), at_once):
            part = slice(start, start + at_once)
            result[part] = self.encode(codec.decode(records[part], exact))
        return result


def _is_wide(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize >= 2
