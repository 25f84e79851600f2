"""Where the rows of a table lie: which bytes of which files make up row r."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from engram_lm.errors import CheckpointError, ConfigError, RowRangeError
from engram_lm.tables.block_float8 import num_blocks
from engram_lm.tables.codec import RowCodec
from engram_lm.tables.stored_tensor import StoredTensor, read_into

VERSION_MARK = "#engram-version="
"""Stands behind the address of a file in a layout, before the version that the file must have."""

_PLAIN = {"F64", "F32", "F16", "BF16"}
_FLOAT8 = "F8_E4M3"


@dataclasses.dataclass(frozen=True)
class Extent:
    """A run of rows in one file: row i of the run begins at ``start_bytes + i * row_bytes``."""

    file: str
    """Path or address of the file."""
    start_bytes: int
    """First byte of the run."""
    num_rows: int
    """Rows in the run."""
    row_bytes: int
    """Bytes of each row."""

    def offsets(self, inside: np.ndarray) -> np.ndarray:
        """First byte, in the file, of rows counted from the beginning of the run: int64 ``[n]`` → int64 ``[n]``."""
        return inside * self.row_bytes + self.start_bytes

    @property
    def end_bytes(self) -> int:
        """One past the last byte of the run."""
        return self.start_bytes + self.num_rows * self.row_bytes


@dataclasses.dataclass(frozen=True)
class Part:
    """The bytes of every row that lie side by side: its numbers, its scales, or both."""

    row_bytes: int
    """Bytes of each row."""
    extents: tuple[Extent, ...]
    """Where they are, in the order of the rows."""

    @cached_property
    def first_rows(self) -> np.ndarray:
        """First row of each extent, int64."""
        return np.array([0, *itertools.accumulate(extent.num_rows for extent in self.extents)][:-1], dtype=np.int64)

    def divide(self, numbers: np.ndarray) -> Iterator[tuple[Extent, np.ndarray | slice, np.ndarray]]:
        """Find the bytes of checked rows: an extent, which ``numbers`` lie in it, where they begin in its file."""
        for index, where, inside in self.split(numbers):
            yield self.extents[index], where, self.extents[index].offsets(inside)

    def split(self, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray | slice, np.ndarray]]:
        """Find the extents of checked rows: a place in `extents`, which ``numbers`` lie there, their rows in it."""
        if len(self.extents) == 1:
            yield 0, slice(None), numbers
            return
        owners = np.searchsorted(self.first_rows, numbers, side="right") - 1
        order = np.argsort(owners, kind="stable")
        bounds = np.searchsorted(owners[order], np.arange(len(self.extents) + 1))
        for owner in np.unique(owners).tolist():
            where = order[bounds[owner] : bounds[owner + 1]]
            yield owner, where, numbers[where] - self.first_rows[owner]


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """A table in files that is not opened: what its rows mean and where their bytes are.

    All tiers that read files are made from a layout, so they read the same bytes.
    """

    codec: RowCodec
    """What a record means."""
    parts: tuple[Part, ...]
    """Where the bytes of records lie; the parts of a row, one after another, are its record."""
    tensors: tuple[StoredTensor, ...] = ()
    """The tensors of numbers, where the rows lie in safetensors files."""
    spec_digest: str | None = None
    """Digest of the HashSpec that addresses the rows, where the source says it."""

    def __post_init__(self) -> None:
        if sum(part.row_bytes for part in self.parts) != self.codec.record_bytes:
            raise ConfigError(
                f"a row has {self.codec.record_bytes} bytes, its parts {[part.row_bytes for part in self.parts]}"
            )
        counts = {sum(extent.num_rows for extent in part.extents) for part in self.parts}
        if len(counts) != 1 or min(counts) < 1:
            raise ConfigError(f"the parts of a table have equal numbers of rows, at least one, not {counts}")

    @property
    def num_rows(self) -> int:
        """Rows in the table."""
        return sum(extent.num_rows for extent in self.parts[0].extents)

    @property
    def files(self) -> tuple[str, ...]:
        """Every file, once, in the order of first use."""
        return tuple(dict.fromkeys(extent.file for part in self.parts for extent in part.extents))

    @property
    def stored_bytes(self) -> int:
        """Bytes of all records."""
        return self.num_rows * self.codec.record_bytes

    def load_records(self, start: int, stop: int) -> torch.Tensor:
        """Read a run of rows, uint8 ``[stop - start, codec.record_bytes]``, with ordinary reads.

        Copying a table so leaves no mapped pages behind.

        Raises:
            CheckpointError: A file is missing, or has been cut since the layout was made.
            RowRangeError: The run leaves the table.
        """
        if not 0 <= start <= stop <= self.num_rows:
            raise RowRangeError(
                f"the table has rows 0 to {self.num_rows - 1}, rows {start} to {stop - 1} were asked for"
            )
        records = torch.empty(stop - start, self.codec.record_bytes, dtype=torch.uint8)
        data, column = records.numpy(), 0
        for part in self.parts:
            for first, extent in zip(part.first_rows.tolist(), part.extents, strict=True):
                low, high = max(start - first, 0), min(stop - first, extent.num_rows)
                if low < high:
                    out = data[first + low - start : first + high - start, column : column + part.row_bytes]
                    # Straight into the result where its rows follow each other: a second copy would cost as much as
                    # the read.
                    straight = out.flags.c_contiguous
                    buffer = out if straight else np.empty(out.shape, np.uint8)
                    read_into(buffer.data.cast("B"), extent.file, extent.start_bytes + low * extent.row_bytes, "rows")
                    if not straight:
                        out[...] = buffer
            column += part.row_bytes
        return records

    @cached_property
    def identity(self) -> str:
        """SHA-256, in hexadecimal, of where and what the table is: geometry, places, sizes and times of its files.

        Two processes that open the same unchanged files find the same value; it names caches and shared copies.
        """
        files = []
        for file in self.files:
            path = Path(file)
            if path.exists():
                status = path.stat()
                files.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
            else:
                files.append([file, None, None])
        parts = [dataclasses.asdict(part) for part in self.parts]
        values = [self.codec.to_dict(), parts, files, self.spec_digest]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def tensor_layout(shards: Sequence[StoredTensor], *, scales: Sequence[StoredTensor] | float | None = None) -> RowLayout:
    """Describe a table that lies in one tensor of a safetensors file, or in several that follow each other.

    Args:
        shards: Tensors ``[rows, width]`` of one width and type, in the order of their rows. Each has as many rows as
            it has.
        scales: What 8-bit rows are multiplied by, and required for them: one tensor F8_E8M0
            ``[rows, ceil(width / 32)]`` per shard, or one number for the whole table.

    Raises:
        CheckpointError: Tensors of the wrong rank, type or size.
        ConfigError: Scales where there should be none, or none where there should be some.
    """
    shards = tuple(shards)
    width = _check_shards(shards)
    quantized = shards[0].dtype == _FLOAT8
    scale_tensors: tuple[StoredTensor, ...] = ()
    if quantized != (scales is not None):
        # Without its scales an 8-bit table reads without an error and is wrong by orders of magnitude.
        raise ConfigError(
            f"{shards[0]}: rows of {_FLOAT8} need scales, pass 1.0 if they have none"
            if quantized
            else f"{shards[0]}: only rows of {_FLOAT8} have scales"
        )
    if scales is None:
        codec = RowCodec(width, shards[0].torch_dtype)
    elif isinstance(scales, int | float):
        if not 0 < scales < float("inf"):
            raise CheckpointError(f"{shards[0]}: the table's scale is {scales}, expected a finite number above 0")
        codec = RowCodec(width, torch.float8_e4m3fn, "table", float(scales))
    else:
        codec, scale_tensors = RowCodec(width, torch.float8_e4m3fn, "blocks"), tuple(scales)
        if len(scale_tensors) != len(shards):
            raise CheckpointError(f"{len(shards)} shards have {len(scale_tensors)} tensors of scales")
        for shard, scale in zip(shards, scale_tensors, strict=True):
            expected = (shard.shape[0], num_blocks(width))
            if (scale.dtype, scale.shape) != ("F8_E8M0", expected):
                raise CheckpointError(f"{scale}: expected F8_E8M0 {list(expected)}, for {shard}")
    parts = [_part(shards, codec.value_bytes)]
    if scale_tensors:
        parts.append(_part(scale_tensors, codec.scale_bytes))
    return RowLayout(codec, tuple(parts), shards)


def _part(tensors: tuple[StoredTensor, ...], row_bytes: int) -> Part:
    extents = (Extent(tensor.file, tensor.start_bytes, tensor.shape[0], row_bytes) for tensor in tensors)
    return Part(row_bytes, tuple(extents))


def _check_shards(shards: tuple[StoredTensor, ...]) -> int:
    """Check the shards against each other and return their width."""
    if not shards:
        raise ConfigError("a table has at least one shard")
    for shard in shards:
        if shard.dtype not in _PLAIN | {_FLOAT8}:
            raise CheckpointError(f"{shard}: rows are {', '.join(sorted(_PLAIN))} or {_FLOAT8}")
        if len(shard.shape) != 2 or 0 in shard.shape:
            raise CheckpointError(f"{shard}: a table is [rows, width], with at least one of each")
        if (shard.shape[1], shard.dtype) != (shards[0].shape[1], shards[0].dtype):
            raise CheckpointError(f"{shard} differs in width or type from the shard before it, {shards[0]}")
    return shards[0].shape[1]
