"""Many reads past the page cache at once, by the kernel's asynchronous interface: no thread waits for each of them.

Source: ``io_setup(2)``, ``io_submit(2)``, ``io_getevents(2)``; the C library has no functions for them, so they are
called by number. Reads of files that were not opened with ``O_DIRECT`` would work too, one after another.
"""

import contextlib
import ctypes
import errno
import functools
import os
import platform
import sys
import weakref
from collections.abc import Iterator

import numpy as np

__all__ = ["AsyncReads"]

# Reads under way at the same time. A disk has a queue of some hundreds; more would wait in another place.
_DEPTH = 256
# Numbers of io_setup, io_destroy, io_getevents and io_submit. The first column is the kernel's own of every machine
# that came after x86.
_NUMBERS = {"aarch64": (0, 1, 4, 2), "riscv64": (0, 1, 4, 2), "x86_64": (206, 207, 208, 209)}
# struct iocb of a little-endian machine with 64 bits.
_REQUEST = np.dtype(
    [
        ("data", "<u8"), ("key", "<u4"), ("flags", "<i4"), ("operation", "<u2"), ("priority", "<i2"),
        ("descriptor", "<u4"), ("buffer", "<u8"), ("size", "<u8"), ("offset", "<i8"), ("rest", "<u8", 2),
    ]
)  # fmt: skip
_EVENT = np.dtype([("data", "<u8"), ("request", "<u8"), ("result", "<i8"), ("result2", "<i8")])


class AsyncReads:
    """Queues of reads. Safe for several threads, each of which has a queue of its own, and after a fork."""

    def __init__(self) -> None:
        # Queues that no thread uses now, each with the process it belongs to: a forked one does not have it.
        self._idle: list[tuple[int, int]] = []
        self._closed = False
        weakref.finalize(self, _end, self._idle).atexit = False

    def read(self, descriptor: int, offsets: np.ndarray, sizes: np.ndarray, addresses: np.ndarray) -> np.ndarray | None:
        """Read pieces of one file and wait for all of them.

        Args:
            descriptor: The file, opened with ``O_DIRECT``.
            offsets: First byte of each piece, int64 ``[n]``.
            sizes: Bytes of each, int64 ``[n]``.
            addresses: Where each goes, uint64 ``[n]``, valid and writable. Where this is interrupted, it waits
                until nothing is written there any more.

        Returns:
            Bytes read of each piece, int64 ``[n]``, or a negative error number. None where the system does not let
            a process do this, or only so many that none is left; then nothing was read.
        """
        calls = _calls()
        if calls is None:
            return None
        with self._queue() as queue:
            if queue is None:
                return None
            requests = np.zeros(len(offsets), _REQUEST)
            requests["data"] = np.arange(len(offsets))
            requests["descriptor"], requests["buffer"] = descriptor, addresses
            requests["size"], requests["offset"] = sizes, offsets
            pointers = requests.ctypes.data + _REQUEST.itemsize * np.arange(len(offsets), dtype=np.uint64)
            events, results = np.empty(_DEPTH, _EVENT), np.empty(len(offsets), np.int64)
            begun = done = 0
            while done < len(offsets):
                free = min(_DEPTH - (begun - done), len(offsets) - begun)
                if free:
                    count = calls.submit(queue, free, pointers.ctypes.data + 8 * begun)
                    if count >= 0:
                        begun += count
                    elif begun == done and count != -errno.EINTR:
                        # Nothing is under way that might have taken its place: this one is refused for itself.
                        results[begun] = count
                        begun, done = begun + 1, done + 1
                if begun > done:
                    # A quarter at a time, so that the disk has something to do while more is submitted.
                    count = calls.wait(queue, min(begun - done, _DEPTH // 4), _DEPTH, events.ctypes.data)
                    if count < 0 and count != -errno.EINTR:
                        raise OSError(-count, os.strerror(-count))
                    arrived = events[: max(count, 0)]
                    results[arrived["data"]] = arrived["result"]
                    done += len(arrived)
        return results

    @contextlib.contextmanager
    def _queue(self) -> Iterator[int | None]:
        """A queue that no other thread uses; ended with its reads where anything goes wrong."""
        calls = _calls()
        assert calls is not None
        queue, process = None, os.getpid()
        while queue is None and self._idle:
            with contextlib.suppress(IndexError):  # another thread was faster
                owner, idle = self._idle.pop()
                queue = idle if owner == process else None
        if queue is None:
            queue = calls.setup(_DEPTH)
        whole = False
        try:
            yield queue
            whole = True
        finally:
            if queue is not None:
                if whole:
                    self._idle.append((process, queue))
                else:
                    calls.destroy(queue)
                if self._closed:
                    _end(self._idle)

    def close(self) -> None:
        """Give the queues back to the system, which takes it some hundredths of a second."""
        self._closed = True
        _end(self._idle)


def _end(idle: list[tuple[int, int]]) -> None:
    """Give back queues that are this process's own."""
    calls, process = _calls(), os.getpid()
    while idle:
        with contextlib.suppress(IndexError):
            owner, queue = idle.pop()
            if owner == process and calls is not None:
                calls.destroy(queue)


class _Calls:
    """The system calls: results as the kernel gives them, negative error numbers included."""

    def __init__(self, numbers: tuple[int, int, int, int]) -> None:
        self._setup, self._destroy, self._wait, self._submit = numbers
        self._library = ctypes.CDLL(None, use_errno=True)
        self._library.syscall.restype = ctypes.c_long

    def setup(self, depth: int) -> int | None:
        """A new queue; None where the system refuses one."""
        queue = ctypes.c_ulong(0)
        return None if self._call(self._setup, depth, ctypes.addressof(queue)) < 0 else queue.value

    def submit(self, queue: int, count: int, pointers: int) -> int:
        return self._call(self._submit, queue, count, pointers)

    def wait(self, queue: int, least: int, most: int, events: int) -> int:
        return self._call(self._wait, queue, least, most, events, 0)

    def destroy(self, queue: int) -> None:
        self._call(self._destroy, queue)

    def _call(self, number: int, *arguments: int) -> int:
        # All of them are as long as a pointer, counts too: the kernel takes registers.
        done = self._library.syscall(ctypes.c_long(number), *map(ctypes.c_ulong, arguments))
        return done if done >= 0 else -ctypes.get_errno()


@functools.cache
def _calls() -> _Calls | None:
    """The system calls, or None where their numbers are not known."""
    numbers = _NUMBERS.get(platform.machine())
    if not sys.platform.startswith("linux") or sys.byteorder != "little" or sys.maxsize < 2**32 or numbers is None:
        return None
    try:
        return _Calls(numbers)
    except (OSError, AttributeError):
        return None
