"""What the kernel keeps of a file in memory: asking whether rows are there, and asking for those that are not."""

import errno
import os

import numpy as np

__all__ = ["PAGE_BYTES", "request_missing", "request_pages"]

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
"""Bytes of a page."""

# One row in so many is looked at before rows are asked for, and never more than the second number: a look costs about
# a microsecond, in which ten rows can be read that are there already. Asking costs as much as waiting for one row in a
# hundred, so that what a small sample overlooks is worth little.
# Never fewer than two: a look at a missing page has the kernel read it, and on a busy machine it may be there already
# when the look returns.
_SAMPLE_EVERY, _SMALLEST_SAMPLE, _LARGEST_SAMPLE = 64, 2, 32


def request_missing(descriptor: int, offsets: np.ndarray, row_bytes: int) -> bool:
    """Ask the kernel to read rows from the disk, all at once, unless a sample of them says that they are in memory.

    Rows that are read one after another wait for the disk one after another; rows that were asked for first arrive
    together. For rows that are there, asking would cost more than reading them.

    Args:
        descriptor: An open file.
        offsets: First byte of each row in the file, int64 ``[n]``.
        row_bytes: Bytes of a row.

    Returns:
        Whether anything was asked for.
    """
    if not hasattr(os, "posix_fadvise") or len(offsets) < 2 or _sample_is_resident(descriptor, offsets):
        return False
    request_pages(descriptor, offsets, row_bytes)
    return True


def request_pages(descriptor: int, offsets: np.ndarray, row_bytes: int) -> None:
    """Ask the kernel to read the pages of rows into memory; the arguments of `request_missing`."""
    first, last = offsets // PAGE_BYTES, (offsets + row_bytes - 1) // PAGE_BYTES
    # Short rows lie on one page, or on two that other rows may lie on as well; long ones are asked for each by itself.
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
        # File systems that cannot tell; whoever reads the rows next meets every other error again.
        return error.errno not in (errno.EOPNOTSUPP, errno.EINVAL)
    return True
