"""A table read where it lies, through memory mapping."""

import mmap
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram.errors import CheckpointError
from engram.tables.layout import Part, RowLayout
from engram.tables.record_table import RecordTable

__all__ = ["MappedTable"]


class MappedTable(RecordTable):
    """Rows read in place from files through memory mapping.

    Opening costs nothing however large the files are; reading costs the pages that the rows lie on, which stay in the
    page cache. A file that is cut while it is mapped ends the process with SIGBUS: `FileTable` does not.

    Args:
        layout: Where the rows lie.
        dtype: Type of the rows that `gather` returns; the stored one where None, bfloat16 for 8-bit rows.

    Raises:
        CheckpointError: A file is missing, or has been cut since its layout was made.
        ConfigError: An impossible ``dtype``.
    """

    def __init__(self, layout: RowLayout, dtype: torch.dtype | None = None) -> None:
        super().__init__(layout.codec, layout.num_rows, dtype)
        self.layout = layout
        files = {file: _map(file) for file in layout.files}
        self._parts: list[list[np.ndarray]] | None = [_views(part, files) for part in layout.parts]

    @property
    def _closed(self) -> bool:
        return self._parts is None

    def _read(self, numbers: np.ndarray) -> Tensor:
        mapped = self._parts
        self._refuse_closed(mapped is None)
        assert mapped is not None
        records = torch.empty(len(numbers), self.codec.record_bytes, dtype=torch.uint8)
        data, first = records.numpy(), 0
        for part, views in zip(self.layout.parts, mapped, strict=True):
            last = first + part.row_bytes
            _take(part, views, numbers, data if len(self.layout.parts) == 1 else data[:, first:last])
            first = last
        return records

    def load_records(self, start: int, stop: int) -> Tensor:
        """See `RecordTable.load_records`; reads past the mapping."""
        self._refuse_closed(self._closed)
        return self.layout.load_records(start, stop)

    def stats(self) -> dict[str, Any]:
        """See `Table.stats`; adds how many files the table lies in."""
        return {**super().stats(), "tier": "mmap", "num_files": len(self.layout.files)}

    def close(self) -> None:
        """Give the mapping back. A gather of another thread that has begun still ends well."""
        self._parts = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by opening the files again."""
        return MappedTable, (self.layout, self._dtype)


def _take(part: Part, views: list[np.ndarray], numbers: np.ndarray, out: np.ndarray) -> None:
    """Copy rows of one part into ``out``, ``[n, row_bytes]``."""
    if len(views) == 1:
        if out.flags.c_contiguous:
            # The numbers are checked already, so nothing is clipped; any other mode would copy everything twice.
            np.take(views[0], numbers, axis=0, out=out, mode="clip")
        else:
            out[...] = views[0][numbers]
        return
    owners = np.searchsorted(part.first_rows, numbers, side="right") - 1
    order = np.argsort(owners, kind="stable")
    bounds = np.searchsorted(owners[order], np.arange(len(views) + 1))
    for owner in np.unique(owners).tolist():
        where = order[bounds[owner] : bounds[owner + 1]]
        out[where] = views[owner][numbers[where] - part.first_rows[owner]]


def _map(file: str) -> mmap.mmap:
    try:
        with open(file, "rb") as opened:
            mapping = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot map {file}: {error}") from error
    if hasattr(mmap, "MADV_RANDOM"):
        # Rows lie far apart; reading ahead would fetch tens of pages for one row.
        mapping.madvise(mmap.MADV_RANDOM)
    return mapping


def _views(part: Part, files: dict[str, mmap.mmap]) -> list[np.ndarray]:
    """Matrices of bytes ``[rows, row_bytes]`` on the mappings, read-only."""
    views = []
    for extent in part.extents:
        mapping, end = files[extent.file], extent.end_bytes(part.row_bytes)
        if end > len(mapping):
            raise CheckpointError(
                f"{extent.file} was cut after its header was read: expected at least {end} bytes, found {len(mapping)}"
            )
        data = np.frombuffer(mapping, np.uint8, count=end - extent.start_bytes, offset=extent.start_bytes)
        shape, strides = (extent.num_rows, part.row_bytes), (extent.stride_bytes, 1)
        views.append(np.lib.stride_tricks.as_strided(data, shape, strides, writeable=False))
    return views
