"""A table read where it lies, through memory mapping."""

import ctypes
import mmap
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.tables.layout import Part, RowLayout
from engram_lm.tables.tiers.page_cache import Descriptor, request_missing
from engram_lm.tables.tiers.record_table import RecordTable, cut_error


class MappedTable(RecordTable):
    """Rows read in place from files through memory mapping.

    Opening costs nothing however large the files are; reading costs the pages that the rows lie on, which stay in the
    page cache, one copy for all processes of the machine. A file that was cut is noticed before rows are read; one that
    is cut at the moment of a read ends the process with SIGBUS: use `FileTable` where that may happen.

    Args:
        layout: Where the rows lie.
        dtype: Type of the rows that `gather` returns. None: as stored, 8-bit floats as bfloat16, integers as float32.
        populate: Whether opening brings all rows into the page cache, so that no later read waits for the disk while
            memory lasts.
        lock: Whether the rows are also locked there, so that the kernel never gives their pages up (``mlock``).

    Raises:
        CheckpointError: A file is missing, or has been cut since its layout was made.
        ConfigError: An impossible ``dtype``, or the system does not let this process lock that much memory.
    """

    tier = "mmap"

    def __init__(
        self, layout: RowLayout, dtype: torch.dtype | None = None, *, populate: bool = False, lock: bool = False
    ) -> None:
        super().__init__(layout.codec, layout.num_rows, dtype)
        self.layout, self.populate, self.lock = layout, populate, lock
        self._copied_from = layout
        self._remade_from = (layout,), {"populate": populate, "lock": lock}
        files = {file: _map(file) for file in layout.files}
        self._held: list[list[np.ndarray]] | None = [_views(part, files) for part in layout.parts]
        if populate or lock:
            for part in layout.parts:
                for extent in part.extents:
                    _keep_in_memory(files[extent.file], extent.start_bytes, extent.end_bytes, lock)
        # The usual case, which one call reads: whole records follow each other in one file.
        self._is_simple = [len(part.extents) for part in layout.parts] == [1]
        self._descriptors = {file: Descriptor(file) for file in layout.files}
        extents = [extent for part in layout.parts for extent in part.extents]
        self._ends = {file: max(extent.end_bytes for extent in extents if extent.file == file) for file in layout.files}

    def _read_from(self, held: list[list[np.ndarray]], numbers: np.ndarray) -> Tensor:
        self._refuse_cut(numbers)
        self._request(numbers)
        records = torch.empty(len(numbers), self.codec.record_bytes, dtype=torch.uint8)
        if self._is_simple:
            # The numbers are checked already, so nothing is clipped; any other mode would copy everything twice.
            held[0][0].take(numbers, axis=0, out=records.numpy(), mode="clip")
            return records
        data, first = records.numpy(), 0
        for part, views in zip(self.layout.parts, held, strict=True):
            for index, where, inside in part.split(numbers):
                data[where, first : first + part.row_bytes] = views[index][inside // part.extents[index].shared_by]
            first += part.row_bytes
        return records

    def _refuse_cut(self, numbers: np.ndarray) -> None:
        """Check that the files still have these rows: touching one behind the end of its file would end the process."""
        for file, descriptor in self._descriptors.items():
            size = os.fstat(descriptor.number).st_size
            if size >= self._ends[file]:
                continue
            for part in self.layout.parts:
                for extent, _, offsets in part.divide(numbers):
                    if extent.file == file and len(offsets) and offsets.max() + part.row_bytes > size:
                        raise cut_error(file, self._ends[file], size)

    def _request(self, numbers: np.ndarray) -> None:
        """Have the kernel read missing pages all at once; touching them would wait for one after another."""
        if len(numbers) < 2:
            return
        descriptors = self._descriptors
        for part in self.layout.parts:
            for extent, _, offsets in part.divide(numbers):
                if extent.file in descriptors:
                    request_missing(descriptors[extent.file].number, offsets, part.row_bytes)

    def stats(self) -> dict[str, Any]:
        """See `Table.stats`; adds how many files the table lies in and whether its rows are locked in memory."""
        return {**super().stats(), "num_files": len(self.layout.files), "locked": self.lock}

    def close(self) -> None:
        """See `RecordTable.close`."""
        super().close()
        self._descriptors = {}


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


def _keep_in_memory(mapping: mmap.mmap, start: int, stop: int, lock: bool) -> None:
    """Read bytes ``start`` to ``stop`` of a mapping into the page cache, and lock them there if asked."""
    start -= start % mmap.PAGESIZE
    if hasattr(mmap, "MADV_WILLNEED"):
        mapping.madvise(mmap.MADV_WILLNEED, start, stop - start)
    pages = np.frombuffer(mapping, np.uint8, count=stop - start, offset=start)
    if not lock:
        pages[:: mmap.PAGESIZE].max()  # waits until each page is there
        return
    try:
        library = ctypes.CDLL(None, use_errno=True)
        failed = library.mlock(ctypes.c_void_p(pages.ctypes.data), ctypes.c_size_t(len(pages)))
        reason = os.strerror(ctypes.get_errno())
    except (OSError, AttributeError, TypeError) as error:  # a system without mlock
        failed, reason = -1, str(error)
    if failed:
        raise ConfigError(
            f"{len(pages)} bytes of a mapped table cannot be locked in memory ({reason}): raise the limit with "
            "`ulimit -l unlimited`, or use populate=True, which does not lock"
        )


def _views(part: Part, files: dict[str, mmap.mmap]) -> list[np.ndarray]:
    """Matrices of bytes ``[rows, row_bytes]`` on the mappings, read-only."""
    views = []
    for extent in part.extents:
        mapping, size = files[extent.file], extent.end_bytes - extent.start_bytes
        if extent.end_bytes > len(mapping):
            raise cut_error(extent.file, extent.end_bytes, len(mapping))
        data = np.frombuffer(mapping, np.uint8, count=size, offset=extent.start_bytes)
        views.append(data.reshape(-1, extent.row_bytes))
    return views
