"""A table read where it lies, with positional reads: slower files, truncated files and dropped caches do it no harm."""

import contextlib
import itertools
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.tables.layout import RowLayout
from engram_lm.tables.tiers.async_reads import AsyncReads
from engram_lm.tables.tiers.page_cache import request_missing
from engram_lm.tables.tiers.record_table import RecordTable
from engram_lm.tables.tiers.scattered_copy import ScatteredCopy

__all__ = ["FileTable"]

# Direct reads begin, end and land on multiples of this: 4 KiB satisfies every common disk.
_BLOCK_BYTES = 4096
# What one direct read may take, and what all buffers of one gather may take together.
_LARGEST_READ_BYTES, _LARGEST_BUFFER_BYTES = 1 << 20, 32 << 20
# Rows that one task of the pool reads at least; handing over a task costs as much as reading tens of rows.
_ROWS_PER_TASK = 64


class FileTable(RecordTable):
    """Rows read in place from files, by the kernel's asynchronous read-ahead or by a pool of threads.

    A file that is cut while it is open gives an error, never SIGBUS.

    Three ways of reading, chosen by what was measured:

    - The usual one asks the kernel for the pages of all rows at once, unless a sample of them says that they are in
      memory, and then lets the kernel copy the rows: a thousand per system call, and without touching the mapping.
    - ``read_ahead=False``, and systems that do not allow that call, read each row by itself, many at a time.
    - ``direct=True`` goes past the page cache: every read comes from the disk, nothing else loses its place in memory.
      The kernel reads hundreds of blocks at a time (`AsyncReads`); threads do where it does not.

    Args:
        layout: Where the rows lie.
        dtype: Type of the rows that `gather` returns; the stored one where None, bfloat16 for 8-bit rows.
        num_threads: Reads under way at the same time, where threads read. At least 1.
        direct: Whether to read with ``O_DIRECT``.
        read_ahead: Whether the kernel is asked before rows are read; without effect when ``direct``.

    Raises:
        CheckpointError: A file is missing, or has been cut since its layout was made.
        ConfigError: An impossible ``dtype`` or ``num_threads``, or direct reads where the file system has none.
    """

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
        self._opened: _OpenFiles | None = _OpenFiles(layout, direct)
        self._pool, self._copy = _Pool(num_threads), ScatteredCopy()
        self._async = AsyncReads() if direct else None

    @property
    def _closed(self) -> bool:
        return self._opened is None

    def _renew(self) -> None:
        super()._renew()
        self._pool = _Pool(self.num_threads)

    def _read(self, numbers: np.ndarray) -> Tensor:
        # Held for as long as this read takes, so that closing the table in another thread closes no file under it.
        opened = self._opened
        self._refuse_closed(opened is None)
        assert opened is not None
        records = torch.empty(len(numbers), self.codec.record_bytes, dtype=torch.uint8)
        data, column = records.numpy(), 0
        plans = []
        for part in self.layout.parts:
            out = data[:, column : column + part.row_bytes]
            for extent, where, offsets in part.divide(numbers):
                plans.append((opened.files[extent.file], offsets, None if isinstance(where, slice) else where, out))
            column += part.row_bytes
        if self.read_ahead and not self.direct:
            # For all parts before the first of them is waited for.
            for file, offsets, _, out in plans:
                request_missing(file.descriptor, offsets, out.shape[1])
        for file, offsets, places, out in plans:
            if self.direct:
                self._read_direct(file, offsets, places, out)
            elif not (self.read_ahead and self._copy_rows(file, offsets, places, out)):
                self._read_each(file, offsets, places, out)
        for file in dict.fromkeys(plan[0] for plan in plans):
            # Bytes past the end of a file that lie on its last page read as zeros.
            file.refuse_cut()
        return records

    def _copy_rows(self, file: "_OpenFile", offsets: np.ndarray, places: np.ndarray | None, out: np.ndarray) -> bool:
        """Let the kernel copy rows of the mapping into rows ``places`` of ``out``; False where it cannot."""
        if not file.address:
            return False
        return self._copy.copy(offsets.view(np.uint64) + np.uint64(file.address), out, places)

    def _read_each(self, file: "_OpenFile", offsets: np.ndarray, places: np.ndarray | None, out: np.ndarray) -> None:
        """Read rows one by one, several at a time, each straight into its place."""
        size = out.shape[1]
        places = np.arange(len(offsets)) if places is None else places
        target, stride = _flat(out)

        def read(piece: slice) -> None:
            begins = (places[piece] * stride).tolist()
            for begin, offset in zip(begins, offsets[piece].tolist(), strict=True):
                file.read_into(target[begin : begin + size], offset)

        # Every task takes every so-many-th row: neighbours in one task would be read one after another.
        num_tasks = min(self.num_threads, -(-len(offsets) // _ROWS_PER_TASK))
        self._pool.run(read, [slice(task, None, num_tasks) for task in range(num_tasks)])

    def _read_direct(self, file: "_OpenFile", offsets: np.ndarray, places: np.ndarray | None, out: np.ndarray) -> None:
        """Read the blocks that rows lie on, each once, and pick the rows out of them."""
        size = out.shape[1]
        per_row = (size - 1) // _BLOCK_BYTES + 2
        at_once = max(1, _LARGEST_BUFFER_BYTES // (per_row * _BLOCK_BYTES))
        order = np.argsort(offsets, kind="stable")
        for start in range(0, len(order), at_once):
            chosen = order[start : start + at_once]
            begins = offsets[chosen]
            spans = np.unique(begins // _BLOCK_BYTES)[:, None] + np.arange(per_row)
            last = (begins + size - 1) // _BLOCK_BYTES
            blocks = np.unique(spans)
            # A block is wanted where some row reaches into it; only rows that begin before it can.
            reach = last[np.searchsorted(begins, (blocks + 1) * _BLOCK_BYTES) - 1]
            blocks = blocks[blocks <= reach]
            # Anonymous memory is aligned to pages, as direct reads ask for.
            buffer = np.frombuffer(mmap.mmap(-1, len(blocks) * _BLOCK_BYTES), np.uint8)
            self._read_blocks(file, blocks, buffer)
            inside = np.searchsorted(blocks, begins // _BLOCK_BYTES) * _BLOCK_BYTES + begins % _BLOCK_BYTES
            windows = np.lib.stride_tricks.as_strided(buffer, (len(buffer) - size + 1, size), (1, 1), writeable=False)
            out[chosen if places is None else places[chosen]] = windows[inside]

    def _read_blocks(self, file: "_OpenFile", blocks: np.ndarray, buffer: np.ndarray) -> None:
        """Read sorted blocks into a buffer that has their size, neighbours together."""
        target, runs = memoryview(buffer), np.array(list(_runs(blocks)))  # type: ignore[arg-type]  # is a buffer
        begins, lows = blocks[runs[:, 0]] * _BLOCK_BYTES, runs[:, 0] * _BLOCK_BYTES
        sizes = (runs[:, 1] - runs[:, 0]) * _BLOCK_BYTES
        # The last block of a file may be shorter than a block.
        needed = np.minimum(sizes, file.end_bytes - begins)

        def read(run: int) -> None:
            low, size = int(lows[run]), int(sizes[run])
            file.read_into(target[low : low + size], int(begins[run]), int(needed[run]))

        assert self._async is not None
        addresses = (lows + buffer.ctypes.data).astype(np.uint64)
        found = self._async.read(file.descriptor, begins, sizes, addresses)
        # What came short is read again, and gives its error then.
        again = range(len(runs)) if found is None else np.flatnonzero(found < needed).tolist()
        if len(again):
            self._pool.run(read, again)

    def load_records(self, start: int, stop: int) -> Tensor:
        """See `RecordTable.load_records`; one long read for each file."""
        self._refuse_closed(self._closed)
        return self.layout.load_records(start, stop)

    def stats(self) -> dict[str, Any]:
        """See `Table.stats`; adds how the files are read."""
        return {
            **super().stats(),
            "tier": "file",
            "num_files": len(self.layout.files),
            "num_threads": self.num_threads,
            "direct": self.direct,
            "read_ahead": self.read_ahead and not self.direct,
        }

    def close(self) -> None:
        """Close the files. A gather of another thread that has begun still ends well."""
        self._opened = None
        self._pool.stop()
        self._copy.close()
        if self._async is not None:
            self._async.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by opening the files again."""
        return _open_again, (self.layout, self._dtype, self.num_threads, self.direct, self.read_ahead)


def _open_again(layout: RowLayout, dtype: torch.dtype, num_threads: int, direct: bool, read_ahead: bool) -> FileTable:
    return FileTable(layout, dtype, num_threads=num_threads, direct=direct, read_ahead=read_ahead)


class _OpenFile:
    """One open file, with what the table needs of it."""

    def __init__(self, path: str, end_bytes: int, direct: bool) -> None:
        self.path, self.end_bytes = path, end_bytes
        self.descriptor = -1
        self._mapping: mmap.mmap | None = None
        self.address = 0
        """Of the mapping, of which nothing here ever touches the memory; 0 where there is none."""
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.refuse_cut()
            if direct:
                os.close(self.descriptor)
                self.descriptor = -1
                self.descriptor = _open_direct(path)
            else:
                self._map()
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error

    def _map(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            # Rows lie far apart; what the kernel guesses beyond them would be read for nothing.
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        with contextlib.suppress(ValueError, OSError):
            # Without a mapping every row is read by itself.
            mapping = mmap.mmap(self.descriptor, self.end_bytes, access=mmap.ACCESS_READ)
            if hasattr(mmap, "MADV_RANDOM"):
                mapping.madvise(mmap.MADV_RANDOM)
            self._mapping = mapping
            self.address = np.frombuffer(mapping, np.uint8, count=1).ctypes.data

    def read_into(self, target: memoryview, offset: int, needed: int | None = None) -> None:
        """Fill ``target`` from byte ``offset``, or at least ``needed`` bytes of it."""
        needed = len(target) if needed is None else needed
        found = 0
        try:
            while found < needed:
                count = os.preadv(self.descriptor, [target[found:]], offset + found)
                if count == 0:
                    break
                found += count
        except OSError as error:
            # A direct read that ended at the new end of a file goes on where direct reads may not begin.
            self.refuse_cut()
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error
        if found < needed:
            self.refuse_cut()
            self._raise_cut(offset + found)  # it was, and has grown again

    def refuse_cut(self) -> None:
        """Check that the file still has all bytes of the table."""
        found = os.fstat(self.descriptor).st_size
        if found < self.end_bytes:
            self._raise_cut(found)

    def _raise_cut(self, found: int) -> None:
        raise CheckpointError(
            f"{self.path} was cut after its header was read: expected at least {self.end_bytes} bytes, found {found}; "
            "put the whole file back and open the table again"
        )

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # Held here: when the interpreter ends, the module may be gone before this is.
        if self.descriptor >= 0:
            close(self.descriptor)


class _OpenFiles:
    """The open files of a table; closed when the last reader lets go of them."""

    def __init__(self, layout: RowLayout, direct: bool) -> None:
        ends: dict[str, int] = {}
        for part in layout.parts:
            for extent in part.extents:
                ends[extent.file] = max(ends.get(extent.file, 0), extent.end_bytes(part.row_bytes))
        self.files = {path: _OpenFile(path, end, direct) for path, end in ends.items()}


class _Pool:
    """Threads that read, started when they are first needed."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads, self._lock = num_threads, threading.Lock()
        self._executor: ThreadPoolExecutor | None = None

    def run(self, call: Callable[[Any], None], tasks: Sequence[Any]) -> None:
        """Call with every task and wait for all of them; the first error is raised after the last has ended."""
        if len(tasks) == 1:
            call(tasks[0])
            return
        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(self._num_threads, thread_name_prefix="engram-file")
            futures = [self._executor.submit(call, task) for task in tasks]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]

    def stop(self) -> None:
        """Let the threads end when they have done what they were given."""
        with self._lock:
            if self._executor is not None:
                self._executor.shutdown(wait=False)
            self._executor = None


def _open_direct(path: str) -> int:
    flag = getattr(os, "O_DIRECT", None)
    try:
        if flag is None:
            raise OSError("this system has no O_DIRECT")
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flag)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read with direct=True, its file system refuses O_DIRECT ({error}); open it with "
            "direct=False"
        ) from error
    try:
        # Some file systems open such files and refuse to read them.
        os.preadv(descriptor, [mmap.mmap(-1, _BLOCK_BYTES)], 0)
    except OSError as error:
        os.close(descriptor)
        raise ConfigError(
            f"{path} cannot be read with direct=True, its file system refuses aligned reads of {_BLOCK_BYTES} bytes "
            f"({error}); open it with direct=False"
        ) from error
    return descriptor


def _flat(out: np.ndarray) -> tuple[memoryview, int]:
    """The bytes from a column slice's first to its last, and how far its rows are apart."""
    rows, size = out.shape
    stride = out.strides[0]
    flat = np.lib.stride_tricks.as_strided(out, ((rows - 1) * stride + size,), (1,))
    return memoryview(flat), stride  # type: ignore[arg-type]  # an array is a buffer


def _runs(blocks: np.ndarray) -> Iterator[tuple[int, int]]:
    """Cut sorted blocks into runs of neighbours, none longer than one read may be."""
    longest = _LARGEST_READ_BYTES // _BLOCK_BYTES
    bounds = [0, *(np.flatnonzero(np.diff(blocks) > 1) + 1).tolist(), len(blocks)]
    for low, high in itertools.pairwise(bounds):
        for start in range(low, high, longest):
            yield start, min(start + longest, high)
