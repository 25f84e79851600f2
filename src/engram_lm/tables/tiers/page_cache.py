"""What the kernel keeps of a file in memory: asking whether rows are there, and asking for those that are not."""

import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Callable

import numpy as np

PAGE_BYTES = mmap.PAGESIZE
"""Bytes of a page."""

_CHUNK_BYTES = 1 << 30

# One row in 64 is looked at before rows are asked for, and at most 32 of them: a look costs about a microsecond, in
# which ten rows can be read that are in memory already. Asking costs as much as waiting for one row in a hundred, so
# what a small sample overlooks is worth little. At least two are looked at, because a look at a missing page has the
# kernel read it, and on a busy machine it may be there already when the look returns.
_SAMPLE_EVERY, _SMALLEST_SAMPLE, _LARGEST_SAMPLE = 64, 2, 32


class Descriptor:
    """An open file by number, closed when nobody holds this object any more."""

    def __init__(self, file: str, flags: int = 0) -> None:
        self.number = -1
        # Windows opens files as text unless told otherwise, and hands none of them on to other programs.
        flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        self.number = os.open(file, os.O_RDONLY | flags)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # Bound here because the module may be gone before this object when the interpreter ends.
        if self.number >= 0:
            close(self.number)


def request_missing(descriptor: int, offsets: np.ndarray, row_bytes: int) -> bool:
    """Ask the kernel to read rows from the disk, all at once, unless a sample of them says that they are in memory.

    Rows that are read one by one wait for the disk one by one; rows that were asked for first arrive together. For rows
    that are in memory, asking would cost more than reading them. ``offsets`` is the first byte of each row in the file,
    int64 ``[n]``. Returns whether anything was asked for.
    """
    if not hasattr(os, "posix_fadvise") or len(offsets) < 2 or _sample_is_resident(descriptor, offsets):
        return False
    request_pages(descriptor, offsets, row_bytes)
    return True


def request_pages(descriptor: int, offsets: np.ndarray, row_bytes: int) -> None:
    """Ask the kernel to read the pages of rows into memory; the arguments of `request_missing`."""
    first, last = offsets // PAGE_BYTES, (offsets + row_bytes - 1) // PAGE_BYTES
    # Short rows lie on one page, or on two that other rows may share; each long row is asked for by itself.
    pages = np.unique(np.concatenate([first, last])) if row_bytes <= PAGE_BYTES else np.unique(first)
    size = PAGE_BYTES if row_bytes <= PAGE_BYTES else row_bytes + PAGE_BYTES
    advise = os.posix_fadvise
    for start in (pages * PAGE_BYTES).tolist():
        advise(descriptor, start, size, os.POSIX_FADV_WILLNEED)


def _sample_is_resident(descriptor: int, offsets: np.ndarray) -> bool:
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    count = min(max(len(offsets) // _SAMPLE_EVERY, _SMALLEST_SAMPLE), _LARGEST_SAMPLE)
    sample, buffer = offsets[:: len(offsets) // count].tolist(), [bytearray(1)]
    try:
        for offset in sample:
            os.preadv(descriptor, buffer, offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError as error:
        # These are file systems that cannot tell; whoever reads the rows next meets every other error again.
        return error.errno not in (errno.EOPNOTSUPP, errno.EINVAL)
    return True


def drop_from_memory(path: str | os.PathLike[str]) -> float | None:
    """Ask the kernel to forget the pages of a file, so that the next reads come from the disk; for measurements.

    Pages that a process has mapped stay, and so do those of file systems in memory. Returns the `resident_share` that
    is left.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some file systems refuse one or the other; the share that is left tells.
        with contextlib.suppress(OSError, AttributeError):
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return resident_share(path)


def resident_share(path: str | os.PathLike[str]) -> float | None:
    """Ask the kernel how much of a file its page cache holds, without reading it.

    Returns the share of its pages, from 0 to 1; None where the system cannot say. Linux calls every page resident that
    belongs to a file which the caller neither owns nor may write, so that is None too.

    Source: mincore(2).
    """
    try:
        if not os.access(path, os.W_OK) and os.stat(path).st_uid != os.geteuid():
            return None
        mincore = ctypes.CDLL(None, use_errno=True).mincore
    except (OSError, AttributeError, TypeError):  # a system without it
        return None
    mincore.argtypes, mincore.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p], ctypes.c_int
    size = os.path.getsize(path)
    if not size:
        return 0.0
    resident = pages = 0
    with open(path, "rb") as file:
        for start in range(0, size, _CHUNK_BYTES):
            length = min(_CHUNK_BYTES, size - start)
            with mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=start) as mapping:
                view = np.frombuffer(mapping, np.uint8)
                found = np.zeros(-(-length // PAGE_BYTES), np.uint8)
                failed = mincore(view.ctypes.data, length, found.ctypes.data)
                del view  # a mapping with a view on it cannot be closed
            if failed:
                return None
            resident += int((found & 1).sum())
            pages += len(found)
    return resident / pages
