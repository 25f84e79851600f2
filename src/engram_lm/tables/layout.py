"""Where the rows of a table lie: which bytes of which files make up row r."""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from engram_lm.errors import CheckpointError, ConfigError, RowRangeError
from engram_lm.tables.block_float8 import BLOCK, block_size, num_blocks
from engram_lm.tables.codec import RowCodec
from engram_lm.tables.stored_tensor import StoredTensor, read_into

VERSION_MARK = "#engram-version="
"""Stands behind the address of a file in a layout, before the version that the file must have."""

_PLAIN = {"F64", "F32", "F16", "BF16"}
_EIGHT_BITS = {"F8_E4M3", "F8_E5M2", "I8"}
_SCALES = {"F32", "BF16", "F16", "F8_E8M0"}


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
    shared_by: int = 1
    """A run of rows that all have the same bytes, which are stored once: one scale for several rows."""

    def offsets(self, inside: np.ndarray) -> np.ndarray:
        """First byte, in the file, of rows counted from the beginning of the run: int64 ``[n]`` → int64 ``[n]``."""
        return inside // self.shared_by * self.row_bytes + self.start_bytes

    @property
    def end_bytes(self) -> int:
        """One past the last byte of the run."""
        return self.start_bytes + -(-self.num_rows // self.shared_by) * self.row_bytes


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
                    straight = out.flags.c_contiguous and extent.shared_by == 1
                    begin, end = low // extent.shared_by, (high - 1) // extent.shared_by + 1
                    buffer = out if straight else np.empty((end - begin, part.row_bytes), np.uint8)
                    read_into(buffer.data.cast("B"), extent.file, extent.start_bytes + begin * extent.row_bytes, "rows")
                    if not straight:
                        out[...] = buffer[np.arange(low, high) // extent.shared_by - begin]
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
        scales: What 8-bit rows (F8_E4M3, F8_E5M2, I8) are multiplied by, and required for them: one number for the
            whole table; or tensors of F32, BF16, F16 or F8_E8M0, one for each shard or one for all of them. A tensor
            of scales has one number, ``[rows]``, or ``[blocks of rows, blocks of columns]``, whose sizes are those
            that `block_size` finds.

    Raises:
        CheckpointError: Tensors of the wrong rank, type or size.
        ConfigError: Scales where there should be none, or none where there should be some.
    """
    shards = tuple(shards)
    width = _check_shards(shards)
    quantized = shards[0].dtype in _EIGHT_BITS
    if quantized != (scales is not None):
        # Without its scales an 8-bit table reads without an error and is wrong by orders of magnitude.
        raise ConfigError(
            f"{shards[0]}: rows of {shards[0].dtype} need scales, pass 1.0 if they have none"
            if quantized
            else f"{shards[0]}: only rows of {', '.join(sorted(_EIGHT_BITS))} have scales"
        )
    dtype = shards[0].torch_dtype
    if scales is None:
        codec = RowCodec(width, dtype)
    elif isinstance(scales, int | float):
        if not 0 < scales < float("inf"):
            raise CheckpointError(f"{shards[0]}: the table's scale is {scales}, expected a finite number above 0")
        codec = RowCodec(width, dtype, "table", float(scales))
    else:
        return _with_scales(shards, tuple(scales), width)
    return RowLayout(codec, (_part(shards, codec.value_bytes),), shards)


def _with_scales(shards: tuple[StoredTensor, ...], scales: tuple[StoredTensor, ...], width: int) -> RowLayout:
    """Describe a table whose scales lie in tensors of their own."""
    counts = [shard.shape[0] for shard in shards]
    if len(scales) == 1:
        counts = [sum(counts)]
    if len(scales) != len(counts):
        raise CheckpointError(f"{len(shards)} shards have {len(scales)} tensors of scales")
    shapes = [_scale_shape(scale, rows) for scale, rows in zip(scales, counts, strict=True)]
    for scale, (_, columns) in zip(scales, shapes, strict=True):
        if (scale.dtype, columns) != (scales[0].dtype, shapes[0][1]):
            raise CheckpointError(f"{scale} differs in type or blocks from the scales before it, {scales[0]}")
    # Of the sizes that would do, ours comes first: a row of up to 32 numbers is one block of it.
    columns = shapes[0][1]
    block = BLOCK if num_blocks(width, BLOCK) == columns else block_size(width, columns)
    shared = [block_size(rows, blocks) for rows, (blocks, _) in zip(counts, shapes, strict=True)]
    for scale, shard, shared_by in zip(scales, shards, shared, strict=False):
        if scale.dtype not in _SCALES or block is None or shared_by is None:
            raise CheckpointError(
                f"{scale}: engram-lm does not read scales of this type and shape for {shard}; it reads "
                f"{', '.join(sorted(_SCALES))}, one for all, for each row, or for each block of a power of two"
            )
    assert block is not None
    codec = RowCodec(width, shards[0].torch_dtype, "blocks", block=block, scale_dtype=scales[0].torch_dtype)
    extents = (
        Extent(scale.file, scale.start_bytes, rows, codec.scale_bytes, shared_by or 1)
        for scale, rows, shared_by in zip(scales, counts, shared, strict=True)
    )
    return RowLayout(codec, (_part(shards, codec.value_bytes), Part(codec.scale_bytes, tuple(extents))), shards)


def _scale_shape(scale: StoredTensor, rows: int) -> tuple[int, int]:
    """Blocks of rows and of columns that a tensor of scales is for; (0, 0), which fits nothing, where unclear."""
    if math.prod(scale.shape) == 1:
        return 1, 1
    if scale.shape == (rows,):
        return rows, 1
    return scale.shape if len(scale.shape) == 2 else (0, 0)


def _part(tensors: tuple[StoredTensor, ...], row_bytes: int) -> Part:
    extents = (Extent(tensor.file, tensor.start_bytes, tensor.shape[0], row_bytes) for tensor in tensors)
    return Part(row_bytes, tuple(extents))


def _check_shards(shards: tuple[StoredTensor, ...]) -> int:
    """Check the shards against each other and return their width."""
    if not shards:
        raise ConfigError("a table has at least one shard")
    for shard in shards:
        if shard.dtype not in _PLAIN | _EIGHT_BITS:
            known = ", ".join(sorted(_PLAIN | _EIGHT_BITS))
            raise CheckpointError(f"{shard}: engram-lm reads rows of {known}, and not of this type")
        if len(shard.shape) != 2 or 0 in shard.shape:
            raise CheckpointError(f"{shard}: a table is [rows, width], with at least one of each")
        if (shard.shape[1], shard.dtype) != (shards[0].shape[1], shards[0].dtype):
            raise CheckpointError(f"{shard} differs in width or type from the shard before it, {shards[0]}")
    return shards[0].shape[1]
