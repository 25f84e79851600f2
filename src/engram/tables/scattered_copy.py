"""Copying many rows out of mapped memory in few system calls, where touching the memory might end the process.

A process that reads a mapped page which its file no longer has is killed by SIGBUS. The kernel, copying the same page
on the process's behalf, returns an error.
"""

import ctypes
import errno
import functools
import os
import sys
from collections.abc import Callable

import numpy as np

__all__ = ["copy_scattered"]

# The kernel's limit on the pieces of one call (IOV_MAX).
_MOST_PIECES = 1024


def copy_scattered(sources: np.ndarray, targets: np.ndarray, size: int) -> bool:
    """Copy ``size`` bytes from each source address to the target address beside it.

    Args:
        sources: Addresses in this process, uint64 ``[n]``; they may have lost what they point to.
        targets: Addresses in this process, uint64 ``[n]``, valid and writable.
        size: Bytes of each piece.

    Returns:
        True when all was copied. False when a source could not be read or the system does not let a process do this;
        then any part of the targets may have been written.

    Source: ``process_vm_readv(2)``, which allows a process to name itself.
    """
    call = _process_vm_readv()
    if call is None:
        return False
    process = os.getpid()
    pieces = np.empty((2, len(sources), 2), np.uint64)
    pieces[..., 1] = size
    pieces[0, :, 0], pieces[1, :, 0] = targets, sources
    local, remote = pieces[0].ctypes.data, pieces[1].ctypes.data
    for start in range(0, len(sources), _MOST_PIECES):
        count, skipped = min(_MOST_PIECES, len(sources) - start), 16 * start
        if call(process, local + skipped, count, remote + skipped, count, 0) != count * size:
            return False
    return True


@functools.cache
def _process_vm_readv() -> Callable[..., int] | None:
    """The system call, or None where there is none or a container forbids it."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        call = ctypes.CDLL(None, use_errno=True).process_vm_readv
    except (OSError, AttributeError):
        return None
    call.restype = ctypes.c_ssize_t
    call.argtypes = (
        ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong,
    )  # fmt: skip
    source, target = np.arange(2, dtype=np.uint64), np.zeros(2, np.uint64)
    pieces = np.array([[target.ctypes.data, 16], [source.ctypes.data, 16]], np.uint64)
    done = call(os.getpid(), pieces.ctypes.data, 1, pieces.ctypes.data + 16, 1, 0)
    if done != 16 or ctypes.get_errno() in (errno.ENOSYS, errno.EPERM):
        return None
    return call
