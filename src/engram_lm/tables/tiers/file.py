"""A table read where it lies, by positional reads: a file that is cut gives an error, never SIGBUS."""

import contextlib
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.files import read_at
from engram_lm.tables.layout import RowLayout
from engram_lm.tables.tiers.page_cache import Descriptor, request_missing
from engram_lm.tables.tiers.record_table import RecordTable, cut_error

# Direct reads begin, end and land on multiples of this many bytes: 4 KiB satisfies every common disk.
_BLOCK_BYTES = 4096
# The fewest rows that one task of the pool reads: handing over a task costs as much as reading tens of rows.
_ROWS_PER_TASK = 64


class FileTable(RecordTable):
    """Rows read in place from files by positional reads.

    Use this tier where files may be cut while they are open, or where another machine serves them: a mapped file that
    shrinks ends the process with SIGBUS, this table raises an error. On a local disk `MappedTable` reads cold rows as
    fast and warm rows several times faster, because it makes no system call for each row.

    There are three ways of reading:

    - By default the kernel is asked for the pages of all rows at once, unless a sample of them shows that they are in
      memory. Rows that are in memory are then read by the calling thread, others by a pool of threads.
    - With ``read_ahead=False`` the kernel is not asked, and the pool reads every row.
    - With ``direct=True`` the pool reads past the page cache: every read comes from the disk, and nothing else loses
      its place in memory.

    Args:
        layout: Where the rows lie.
        dtype: Type of the rows that `gather` returns. None: as stored, 8-bit floats as bfloat16, integers as float32.
        num_threads: Threads of the pool, from 1 to 1024.
        direct: Whether to read with ``O_DIRECT``.
        read_ahead: Whether the kernel is asked before rows are read; without effect when ``direct``.

    Raises:
        CheckpointError: A file is missing, or has been cut since its layout was made.
        ConfigError: An impossible ``dtype`` or ``num_threads``, or a file system that refuses direct reads.
    """

    tier = "file"

    def __init__(
        self,
        layout: RowLayout,
        dtype: torch.dtype | None = None,
        *,
        num_threads: int = 16,
        direct: bool = False,
        read_ahead: bool = True,
    ) -> None:
        super().__init__(layout.codec, layout.num_rows, dtype)
        if type(num_threads) is not int or not 1 <= num_threads <= 1024:
            raise ConfigError(f"num_threads is between 1 and 1024, not {num_threads!r}")
        self.layout, self.num_threads, self.direct, self.read_ahead = layout, num_threads, direct, read_ahead
        self._copied_from = layout
        self._remade_from = (layout,), {"num_threads": num_threads, "direct": direct, "read_ahead": read_ahead}
        ends: dict[str, int] = {}
        for extent in (extent for part in layout.parts for extent in part.extents):
            ends[extent.file] = max(ends.get(extent.file, 0), extent.end_bytes)
        pool = self._new_pool()
        self._held: dict[str, _OpenFile] | None = {
            path: _OpenFile(path, end, direct, pool) for path, end in ends.items()
        }

    def _new_pool(self) -> ThreadPoolExecutor:
        # Starts its threads when they are first needed, and ends them when nobody holds it any more.
        return ThreadPoolExecutor(self.num_threads, thread_name_prefix="engram-file")

    def _renew(self) -> None:
        super()._renew()
        pool = self._new_pool()
        for file in (self._held or {}).values():
            file.pool = pool

    def _read_from(self, held: dict[str, "_OpenFile"], numbers: np.ndarray) -> Tensor:
        records = torch.empty(len(numbers), self.codec.record_bytes, dtype=torch.uint8)
        data, column = records.numpy(), 0
        plans = []
        for part in self.layout.parts:
            out = data[:, column : column + part.row_bytes]
            for extent, where, offsets in part.divide(numbers):
                places = np.arange(len(numbers)) if isinstance(where, slice) else where
                plans.append((held[extent.file], offsets, places, out))
            column += part.row_bytes
        # All parts are asked for before the first of them is waited for.
        asks = self.read_ahead and not self.direct
        missing = [
            not asks or request_missing(file.descriptor, offsets, out.shape[1]) for file, offsets, _, out in plans
        ]
        for (file, offsets, places, out), is_missing in zip(plans, missing, strict=True):
            self._read_rows(file, offsets, places, out, self.num_threads if is_missing else 1)
        for file in dict.fromkeys(plan[0] for plan in plans):
            # Rows that are still there are refused too: a file that shrinks is being written to.
            file.refuse_cut()
        return records

    def _read_rows(
        self, file: "_OpenFile", offsets: np.ndarray, places: np.ndarray, out: np.ndarray, most_tasks: int
    ) -> None:
        """Read each row into its place: straight, or from the whole blocks that direct reads take."""
        size = out.shape[1]
        target, stride = _flat(out)

        def read(piece: slice) -> None:
            begins = (places[piece] * stride).tolist()
            # Anonymous memory is aligned to pages, as direct reads require.
            buffer = memoryview(mmap.mmap(-1, ((size - 1) // _BLOCK_BYTES + 2) * _BLOCK_BYTES if self.direct else 1))
            for begin, offset in zip(begins, offsets[piece].tolist(), strict=True):
                if not self.direct:
                    file.read_into(target[begin : begin + size], offset)
                    continue
                skipped = offset % _BLOCK_BYTES
                whole = -(-(skipped + size) // _BLOCK_BYTES) * _BLOCK_BYTES
                file.read_into(buffer[:whole], offset - skipped, skipped + size)
                target[begin : begin + size] = buffer[skipped : skipped + size]

        # Tasks take turns row by row: neighbouring rows in one task would be read one after another.
        num_tasks = min(most_tasks, -(-len(offsets) // _ROWS_PER_TASK))
        file.run(read, [slice(task, None, num_tasks) for task in range(num_tasks)])

    def stats(self) -> dict[str, Any]:
        """See `Table.stats`; adds how the files are read."""
        return {
            **super().stats(),
            "num_files": len(self.layout.files),
            "num_threads": self.num_threads,
            "direct": self.direct,
            "read_ahead": self.read_ahead and not self.direct,
        }


class _OpenFile:
    """One open file of a table, and the threads that read it."""

    def __init__(self, path: str, end_bytes: int, direct: bool, pool: ThreadPoolExecutor) -> None:
        self.path, self.end_bytes, self.pool = path, end_bytes, pool
        try:
            self._file = Descriptor(path)
            self.refuse_cut()
            if direct:
                self._file = _open_direct(path)
            else:
                with contextlib.suppress(AttributeError, OSError):
                    # Rows lie far apart, so what the kernel guesses beyond them would be read for nothing.
                    os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error

    @property
    def descriptor(self) -> int:
        """Its number."""
        return self._file.number

    def run(self, call: Callable[[Any], None], tasks: Sequence[Any]) -> None:
        """Call with every task and wait for all of them; the first error is raised after the last call has ended."""
        if len(tasks) == 1:
            call(tasks[0])
            return
        futures = [self.pool.submit(call, task) for task in tasks]
        wait(futures)
        for future in futures:
            future.result()

    def read_into(self, target: memoryview, offset: int, needed: int | None = None) -> None:
        """Fill ``target`` from byte ``offset``, or at least ``needed`` bytes of it."""
        needed = len(target) if needed is None else needed
        found = 0
        try:
            while found < needed:
                count = read_at(self.descriptor, target[found:], offset + found)
                if count == 0:
                    break
                found += count
        except OSError as error:
            # A direct read that stopped at the new end of a file continues where direct reads may not begin.
            self.refuse_cut()
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error
        if found < needed:
            self.refuse_cut()
            # The file was cut and has grown again since.
            raise cut_error(self.path, self.end_bytes, offset + found)

    def refuse_cut(self) -> None:
        """Check that the file still has all bytes of the table."""
        found = os.fstat(self.descriptor).st_size
        if found < self.end_bytes:
            raise cut_error(self.path, self.end_bytes, found)


def _open_direct(path: str) -> Descriptor:
    try:
        if not hasattr(os, "O_DIRECT"):
            raise OSError("this system has no O_DIRECT")
        file = Descriptor(path, os.O_DIRECT)
        # Some file systems open such files and refuse to read them.
        read_at(file.number, memoryview(mmap.mmap(-1, _BLOCK_BYTES)), 0)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read with direct=True, its file system refuses O_DIRECT or aligned reads of "
            f"{_BLOCK_BYTES} bytes ({error}); open it with direct=False"
        ) from error
    return file


def _flat(out: np.ndarray) -> tuple[memoryview, int]:
    """The bytes from a column slice's first to its last, and how far its rows are apart."""
    rows, size = out.shape
    stride = out.strides[0]
    flat = np.lib.stride_tricks.as_strided(out, ((rows - 1) * stride + size,), (1,))
    return memoryview(flat), stride  # type: ignore[arg-type]  # an array is a buffer
