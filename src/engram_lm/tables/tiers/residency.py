"""How much of a file is in memory: what a measurement that calls itself cold has to check."""

import ctypes
import mmap
import os
from typing import Any

import numpy as np

from engram_lm.tables.tiers.page_cache import PAGE_BYTES

__all__ = ["resident_share"]

_CHUNK_BYTES = 1 << 30


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
