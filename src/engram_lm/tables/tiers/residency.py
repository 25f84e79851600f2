"""Dropping a file from memory, and how much of it is there: what a measurement from cold has to do and to check."""

import contextlib
import ctypes
import mmap
import os
from typing import Any

import numpy as np

from engram_lm.tables.tiers.page_cache import PAGE_BYTES

__all__ = ["drop_from_memory", "resident_share"]

_CHUNK_BYTES = 1 << 30


def drop_from_memory(path: str | os.PathLike[str]) -> float | None:
    """Ask the kernel to forget the pages of a file, so that the next reads come from the disk; for measurements.

    Pages that a process has mapped stay, and so do those of file systems in memory.

    Returns:
        Share of the file that is still in memory, see `resident_share`.

    Raises:
        OSError: The file cannot be opened.
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
    """Ask the kernel how much of a file its page cache holds.

    Args:
        path: The file. Asking reads none of it.

    Returns:
        Share of its pages, from 0 to 1; None where the system cannot say. Linux calls every page resident that
        belongs to a file which the caller neither owns nor may write, so that is None too.

    Raises:
        OSError: The file cannot be opened.

    Source: mincore(2).
    """
    if not os.access(path, os.W_OK) and os.stat(path).st_uid != os.geteuid():
        return None
    mincore = _find_mincore()
    size = os.path.getsize(path)
    if mincore is None:
        return None
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


def _find_mincore() -> Any:
    """The C library's function; None on systems without it."""
    try:
        function = ctypes.CDLL(None, use_errno=True).mincore
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    function.restype = ctypes.c_int
    return function
