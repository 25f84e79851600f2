"""Copying many rows out of mapped memory in few system calls, where touching the memory might end the process.

A process that reads a mapped page which its file no longer has is killed by SIGBUS. The kernel, copying the same page
on the process's behalf, returns an error. Two of its calls take a thousand pieces at a time:

- ``pwritev`` writes them one after another into a file in memory, from which they are copied once more while they are
  in the processor's cache. About half a microsecond for 256 bytes.
- ``process_vm_readv``, which allows a process to name itself, copies them straight to their places, and needs twice as
  long for short pieces: it looks up the page of each. Containers may forbid it.
"""

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import sys
from collections.abc import Callable

import numpy as np

__all__ = ["ScatteredCopy"]

# The kernel's limit on the pieces of one call (IOV_MAX).
_MOST_PIECES = 1024
# Pieces copied by way of the file in memory stay in the processor's second cache; longer ones are not copied twice.
_FILE_BYTES = 512 << 10
_LONGEST_PIECE_BYTES = 16 << 10


class ScatteredCopy:
    """Copies rows from addresses that may have lost what they point to. Safe for several threads and after a fork."""

    def __init__(self) -> None:
        # Files that no thread uses now, each with the process it belongs to: a forked one must not write into it.
        self._idle: list[tuple[int, _MemoryFile]] = []
        self._closed = False

    def copy(self, sources: np.ndarray, out: np.ndarray, places: np.ndarray | None = None) -> bool:
        """Copy a row from each source address into the row of ``out`` beside it.

        Args:
            sources: Addresses in this process, uint64 ``[n]``.
            out: uint8 ``[m, size]``, its rows contiguous, though perhaps not all of it.
            places: The rows of ``out`` that are meant, int64 ``[n]``; all of them in their order where None.

        Returns:
            True when all was copied. False when a source could not be read or the system has neither call; then any
            part of those rows may have been written.
        """
        if out.shape[1] <= _LONGEST_PIECE_BYTES:
            copied = self._by_file(sources, out, places)
            if copied is not None:
                return copied
        return _by_process(sources, out, places)

    def _by_file(self, sources: np.ndarray, out: np.ndarray, places: np.ndarray | None) -> bool | None:
        """By way of a file in memory; None where there can be none."""
        write = _pwritev()
        if write is None:
            return None
        file, process, size = None, os.getpid(), out.shape[1]
        with contextlib.suppress(IndexError):
            owner, idle = self._idle.pop()
            file = idle if owner == process else None
        if file is None:
            try:
                file = _MemoryFile()
            except OSError:
                return None
        pieces = np.empty((len(sources), 2), np.uint64)
        pieces[:, 0], pieces[:, 1] = sources, size
        address, at_once = pieces.ctypes.data, min(_MOST_PIECES, _FILE_BYTES // size)
        try:
            for start in range(0, len(sources), at_once):
                count = min(at_once, len(sources) - start)
                if write(file.descriptor, address + 16 * start, count, 0) != count * size:
                    return False
                found = file.data[: count * size].reshape(count, size)
                out[slice(start, start + count) if places is None else places[start : start + count]] = found
        finally:
            self._idle.append((process, file))
            if self._closed:
                # After it was put back: a close between a look and that would leave the file behind.
                self._idle.clear()
        return True

    def close(self) -> None:
        """Give the files in memory back. A copy that is under way still ends well, and so does a later one."""
        self._closed = True
        self._idle.clear()


class _MemoryFile:
    """A file in memory, mapped; gone when nobody holds it any more."""

    def __init__(self) -> None:
        self.descriptor = -1
        self.descriptor = os.memfd_create("engram-rows", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, _FILE_BYTES)
        self.data = np.frombuffer(mmap.mmap(self.descriptor, _FILE_BYTES), np.uint8)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # Held here: when the interpreter ends, the module may be gone before this is.
        if self.descriptor >= 0:
            close(self.descriptor)


def _by_process(sources: np.ndarray, out: np.ndarray, places: np.ndarray | None) -> bool:
    """With ``process_vm_readv``; the result of `ScatteredCopy.copy`."""
    call = _process_vm_readv()
    if call is None:
        return False
    process, size = os.getpid(), out.shape[1]
    rows = np.arange(len(sources)) if places is None else places
    pieces = np.empty((2, len(sources), 2), np.uint64)
    pieces[..., 1] = size
    pieces[0, :, 0] = (rows * out.strides[0]).astype(np.uint64) + np.uint64(out.ctypes.data)
    pieces[1, :, 0] = sources
    local, remote = pieces[0].ctypes.data, pieces[1].ctypes.data
    for start in range(0, len(sources), _MOST_PIECES):
        count, skipped = min(_MOST_PIECES, len(sources) - start), 16 * start
        if call(process, local + skipped, count, remote + skipped, count, 0) != count * size:
            return False
    return True


@functools.cache
def _pwritev() -> Callable[..., int] | None:
    """The system call, or None where there are no files in memory."""
    if not hasattr(os, "memfd_create"):
        return None
    try:
        call = ctypes.CDLL(None).pwritev64
    except (OSError, AttributeError):
        return None
    call.restype = ctypes.c_ssize_t
    call.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
    return call


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
