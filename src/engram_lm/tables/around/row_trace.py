"""Recorded traces of row numbers, read from ``.npz`` files that are not believed."""

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from engram_lm.errors import DataError

_ROWS = re.compile(r"rows_(0|[1-9][0-9]{0,8})")


def read_trace(
    path: Path, blocks: list[int] | None, max_reads: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray | None, bool]]:
    """Read a recorded trace, one block at a time and no more than ``max_reads`` of each; all blocks where None.

    Args:
        path: An ``.npz`` with ``rows_<block>``, int64 ``[n]``, and perhaps ``steps_<block>``, int64 ``[s]``.
        blocks: Which blocks; all where None.
        max_reads: Reads of a block at most.

    Yields:
        Block, rows, first read of each step (None where not recorded), and whether reads were left out.

    Raises:
        DataError: No readable .npz, arrays of another type or shape, or steps that are no places in the trace.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            there = {name.removesuffix(".npy"): name for name in archive.namelist()}
            named = sorted(int(found[1]) for found in map(_ROWS.fullmatch, there) if found)
            if not named:
                raise DataError(f"{path} records no rows: expected arrays rows_<block>, found {sorted(there)[:8]}")
            for block in named if blocks is None else blocks:
                if f"rows_{block}" not in there:
                    raise DataError(f"{path} has no rows of block {block}; it records blocks {named}")
                rows, size = _read_array(archive, there[f"rows_{block}"], path, max_reads)
                if len(rows) and rows.min() < 0:
                    raise DataError(f"{path}: rows_{block} holds the row number {rows.min()}; row numbers are from 0")
                starts = None
                if f"steps_{block}" in there:
                    starts, _ = _read_array(archive, there[f"steps_{block}"], path, size + 1)
                    if not len(starts) or starts[0] != 0 or (np.diff(starts) <= 0).any() or starts[-1] >= size:
                        raise DataError(
                            f"{path}: steps_{block} must hold the first read of each step, growing from 0 and below "
                            f"the {size} reads"
                        )
                    starts = starts[starts < len(rows)]
                yield block, rows, starts, size > len(rows)
    except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise DataError(f"{path} is no readable .npz: {error}") from error


def _read_array(archive: zipfile.ZipFile, name: str, path: Path, most: int) -> tuple[np.ndarray, int]:
    """The first ``most`` numbers of an int64 array and its true length; nothing is believed before it is checked."""
    with archive.open(name) as file:
        shape, dtype = _array_header(file, f"{path}: {name}")
        if dtype != np.dtype("<i8") or len(shape) != 1:
            raise DataError(f"{path}: {name} is {dtype} {list(shape)}; expected int64 [n]")
        wanted = min(shape[0], most) * 8
        if archive.getinfo(name).file_size < shape[0] * 8:
            raise DataError(f"{path}: {name} is cut: it promises {shape[0]} numbers and has fewer")
        data = file.read(wanted)
    if len(data) != wanted:
        raise DataError(f"{path}: {name} is cut: expected {wanted} bytes, found {len(data)}")
    return np.frombuffer(data, "<i8").astype(np.int64, copy=False), shape[0]


def _array_header(file: IO[bytes], name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    except ValueError as error:
        raise DataError(f"{name} is no array that numpy wrote: {error}") from error
    return shape, dtype
