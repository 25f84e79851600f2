"""A table read where it lies: rows of tensors in safetensors files, without loading them."""

import itertools
import math
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram.errors import CheckpointError, ConfigError
from engram.tables.block_float8 import dequantize, num_blocks
from engram.tables.safetensors_file import StoredTensor
from engram.tables.table import Table

__all__ = ["MappedTable"]

_PLAIN = {"F64", "F32", "F16", "BF16"}
_FLOAT8 = "F8_E4M3"


class MappedTable(Table):
    """Rows read in place from one tensor, or from several laid one after another, through memory mapping.

    Opening costs nothing however large the files are; reading costs the pages that the rows lie on. Rows come back on
    the CPU.

    Args:
        shards: Tensors ``[rows, width]`` of one width and type, in the order of their rows. Each has as many rows as
            it has.
        scales: What 8-bit rows are multiplied by, and required for them: one tensor F8_E8M0
            ``[rows, ceil(width / 32)]`` per shard, or one number for the whole table.
        dtype: Type of the rows that `gather` returns; the stored one where None, bfloat16 for 8-bit rows.

    Raises:
        CheckpointError: Tensors of the wrong rank, type or size, or a file that has been cut since its header was read.
        ConfigError: Scales where there should be none or none where there should be some, or an impossible ``dtype``.
    """

    def __init__(
        self,
        shards: Sequence[StoredTensor],
        *,
        scales: Sequence[StoredTensor] | float | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.shards = tuple(shards)
        """Where the rows lie, in their order."""
        self.scales = scales if scales is None or isinstance(scales, int | float) else tuple(scales)
        """What 8-bit rows are multiplied by: the tensors, one number, or None for plain rows."""
        self.width = _check_shards(self.shards)
        self._check_scales()
        self.num_rows = sum(shard.shape[0] for shard in self.shards)
        quantized = self.shards[0].dtype == _FLOAT8
        if dtype is None:
            dtype = torch.bfloat16 if quantized else self.stored_dtype
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
            raise ConfigError(f"rows are read as torch's floats of 16 bits or more, not as {dtype!r}")
        self._dtype = dtype
        self._starts = np.array([0, *itertools.accumulate(shard.shape[0] for shard in self.shards)][:-1])
        files: dict[Path, mmap.mmap] = {}
        self._rows: list[np.ndarray] | None = [_map(shard, files) for shard in self.shards]
        self._row_scales = [_map(scale, files) for scale in self.scales] if isinstance(self.scales, tuple) else []

    @property
    def dtype(self) -> torch.dtype:
        """Type of the numbers that `gather` returns."""
        return self._dtype

    @property
    def stored_dtype(self) -> torch.dtype:
        """Type of the numbers in the files."""
        return self.shards[0].torch_dtype

    def gather(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Table.gather`."""
        parts, scales = self._rows, self._row_scales
        self._refuse_closed(parts is None)
        assert parts is not None
        self._check_rows(rows)
        numbers = rows.detach().cpu().reshape(-1).numpy()
        values = self._take(parts, numbers).view(self.stored_dtype)
        if isinstance(self.scales, tuple):
            blocks = self._take(scales, numbers).view(torch.float8_e8m0fnu)
            values = dequantize(values, blocks, self._dtype)
        elif self.scales is not None:
            # In float32, so that the product is rounded once.
            values = (values.float() * self.scales).to(self._dtype)
        result = values.to(self._dtype).view(*rows.shape, self.width)
        return result if out is None else out.copy_(result)

    def load_stored(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Read a run of rows as they are stored, past the mapping, so that copying a table leaves no pages behind.

        Args:
            start: First row.
            stop: One past the last row.

        Returns:
            Rows in `stored_dtype`, ``[stop - start, width]``, and their scales, float8_e8m0fnu
            ``[stop - start, ceil(width / 32)]``, or None where there is none per row.

        Raises:
            CheckpointError: A file has been cut since it was opened.
            RowRangeError: The run leaves the table.
            TableClosedError: The table has been closed.
        """
        self._refuse_closed(self._rows is None)
        if start < stop:
            self._check_rows(torch.tensor([start, stop - 1]))
        rows, scales = [], []
        for number, (first, shard) in enumerate(zip(self._starts.tolist(), self.shards, strict=True)):
            low, high = max(start - first, 0), min(stop - first, shard.shape[0])
            if low < high:
                rows.append(shard.load(low, high))
                if isinstance(self.scales, tuple):
                    scales.append(self.scales[number].load(low, high))
        return torch.cat(rows), torch.cat(scales) if scales else None

    def stats(self) -> dict[str, Any]:
        """See `Table.stats`; adds what the table takes in its files."""
        stored = [*self.shards, *(self.scales if isinstance(self.scales, tuple) else ())]
        return {
            **super().stats(),
            "stored_bytes": sum(tensor.num_bytes for tensor in stored),
            "num_shards": len(self.shards),
            "num_files": len({tensor.path for tensor in stored}),
        }

    def close(self) -> None:
        """Give the mapping back. A gather of another thread that has begun still ends well."""
        self._rows, self._row_scales = None, []

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by opening the files again."""
        return _reopen, (self.shards, self.scales, self._dtype)

    def _take(self, parts: list[np.ndarray], numbers: np.ndarray) -> Tensor:
        """Copy rows out of the shards: bytes ``[len(numbers), bytes of a row]``."""
        result = torch.empty(len(numbers), parts[0].shape[1], dtype=torch.uint8)
        data = result.numpy()
        if len(parts) == 1:
            # The numbers are checked already, so nothing is clipped; any other mode would copy everything twice.
            np.take(parts[0], numbers, axis=0, out=data, mode="clip")
            return result
        owners = np.searchsorted(self._starts, numbers, side="right") - 1
        order = np.argsort(owners, kind="stable")
        bounds = np.searchsorted(owners[order], np.arange(len(parts) + 1))
        for owner in np.unique(owners).tolist():
            where = order[bounds[owner] : bounds[owner + 1]]
            data[where] = parts[owner][numbers[where] - self._starts[owner]]
        return result

    def _check_scales(self) -> None:
        quantized = self.shards[0].dtype == _FLOAT8
        if quantized != (self.scales is not None):
            # Without its scales an 8-bit table reads without an error and is wrong by orders of magnitude.
            raise ConfigError(
                f"{self.shards[0]}: rows of {_FLOAT8} need scales, pass 1.0 if they have none"
                if quantized
                else f"{self.shards[0]}: only rows of {_FLOAT8} have scales"
            )
        if isinstance(self.scales, tuple):
            if len(self.scales) != len(self.shards):
                raise CheckpointError(f"{len(self.shards)} shards have {len(self.scales)} tensors of scales")
            for shard, scale in zip(self.shards, self.scales, strict=True):
                expected = (shard.shape[0], num_blocks(self.width))
                if (scale.dtype, scale.shape) != ("F8_E8M0", expected):
                    raise CheckpointError(f"{scale}: expected F8_E8M0 {list(expected)}, for {shard}")
        elif self.scales is not None and not 0 < self.scales < math.inf:
            raise CheckpointError(f"{self.shards[0]}: the table's scale is {self.scales}, expected a number above 0")


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


def _map(tensor: StoredTensor, files: dict[Path, mmap.mmap]) -> np.ndarray:
    """Map a matrix: bytes ``[rows, bytes of a row]``, read-only. A file is mapped once."""
    if tensor.path not in files:
        try:
            with open(tensor.path, "rb") as file:
                files[tensor.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot map {tensor.path}: {error}") from error
        if hasattr(mmap, "MADV_RANDOM"):
            # Rows lie far apart; reading ahead would fetch tens of pages for one row.
            files[tensor.path].madvise(mmap.MADV_RANDOM)
    mapping = files[tensor.path]
    if tensor.start_bytes + tensor.num_bytes > len(mapping):
        raise CheckpointError(
            f"{tensor.path} was cut after its header was read: expected at least "
            f"{tensor.start_bytes + tensor.num_bytes} bytes, found {len(mapping)}"
        )
    data = np.frombuffer(mapping, np.uint8, count=tensor.num_bytes, offset=tensor.start_bytes)
    return data.reshape(tensor.shape[0], -1)


def _reopen(shards: tuple[StoredTensor, ...], scales: Any, dtype: torch.dtype) -> MappedTable:
    return MappedTable(shards, scales=scales, dtype=dtype)
