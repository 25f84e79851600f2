"""Whether a packed table still holds what was written: checksums, and the rows of its source."""

import dataclasses
import os
import zlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from engram_lm.errors import CheckpointError, MismatchError
from engram_lm.tables.files.byte_source import LocalFile
from engram_lm.tables.files.packed import PackedHeader, read_checksums, read_packed_header
from engram_lm.tables.files.row_error import sampled
from engram_lm.tables.layout import RowLayout


@dataclasses.dataclass(frozen=True)
class BadChunk:
    """The first chunk of a packed table that is not what was written."""

    index: int
    """Number of the chunk, from 0."""
    first_row: int
    """Its first row."""
    last_row: int
    """Its last row."""
    start_bytes: int
    """Its first byte in the file."""
    reason: str
    """What is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify_packed` found."""

    path: str
    """The file."""
    num_chunks: int
    """Chunks in the file."""
    chunks_checked: int
    """Chunks that were read and compared."""
    rows_checked: int
    """Rows in those chunks."""
    source_compared: bool
    """Whether their rows were compared with the source's too."""
    bad: BadChunk | None
    """The first bad chunk; None where everything that was checked is right."""


def verify_packed(
    path: str | os.PathLike[str],
    *,
    sample: int | None = None,
    seed: int = 0,
    source: RowLayout | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Verification:
    """Read chunks of a packed table and compare them with their checksums, and with the source where it is given.

    A copy of other rows than the source's has right checksums of its own; only the source tells them apart. Rows of the
    source are encoded again, which gives the same bytes.

    Args:
        path: The packed table.
        sample: Chunks to check, drawn evenly; all where None or more than there are.
        seed: Seed of that draw.
        source: The table that the file was made from.
        on_progress: Called with the bytes checked so far.

    Raises:
        CheckpointError: The header or the checksums are damaged, or the source cannot be read.
        MismatchError: The source has another number of rows, or rows of another width.
    """
    header = read_packed_header(path)
    checksums = read_checksums(header)
    if source is not None and (source.num_rows, source.codec.width) != (header.num_rows, header.codec.width):
        raise MismatchError(
            f"{path} has {header.num_rows} rows of {header.codec.width} numbers, the source has {source.num_rows} of "
            f"{source.codec.width}; it was made from another table"
        )
    count = header.num_chunks if sample is None else min(max(sample, 1), header.num_chunks)
    rows_checked = chunks_checked = bytes_checked = 0
    bad = None
    for index in sampled(header.num_chunks, count, seed).tolist():
        (first, last), (start, stop) = header.chunk(index), header.chunk_bytes(index)
        chunks_checked, rows_checked = chunks_checked + 1, rows_checked + last - first
        _, reason = _read_chunk(header, index, checksums[index])
        if reason is None and source is not None:
            expected = header.codec.reencode(source.load_records(first, last), source.codec)
            differing = (expected != header.layout.load_records(first, last)).any(dim=1).nonzero()
            reason = f"row {first + int(differing[0])} is not the source's" if len(differing) else None
        if reason is not None:
            bad = BadChunk(index, first, last - 1, start, reason)
            break
        bytes_checked += stop - start
        on_progress(bytes_checked)
    return Verification(str(path), header.num_chunks, chunks_checked, rows_checked, source is not None, bad)


def _read_chunk(header: PackedHeader, index: int, expected: int) -> tuple[bytes, str | None]:
    """Read a chunk; return its bytes, and what is wrong with it or None."""
    start, stop = header.chunk_bytes(index)
    try:
        data = LocalFile(header.file).read(start, stop)
    except OSError as error:
        # One unreadable sector of a failing disk is a bad chunk, not the end of the check.
        return b"", f"cannot be read: {error.strerror}"
    if len(data) != stop - start:
        return data, f"the file ends {stop - start - len(data)} bytes before the chunk does"
    found = zlib.crc32(data)
    return data, None if found == expected else f"expected the CRC-32 {expected:08x}, found {found:08x}"


def checked_records(layout: RowLayout) -> Callable[[int, int], Tensor]:
    """Return how to load runs of records for a copy, as `RowLayout.load_records` does, but compared with checksums.

    A copy gets checksums of its own, which would be right for damaged rows too. So a chunk of a packed table that is
    not what was written raises a `CheckpointError`. Runs are asked for in ascending order.
    """
    if layout.tensors:
        return layout.load_records
    header = read_packed_header(layout.files[0])
    checksums = read_checksums(header)
    kept: dict[int, np.ndarray] = {}  # the chunk that was read last

    def chunk(index: int) -> np.ndarray:
        if index not in kept:
            data, reason = _read_chunk(header, index, checksums[index])
            if reason:
                first, last = header.chunk(index)
                raise CheckpointError(
                    f"{header.file}: chunk {index}, rows {first} to {last - 1}, is not what was written: {reason}; "
                    "copy the file again, or convert its source again"
                )
            kept.clear()
            kept[index] = np.frombuffer(data, np.uint8).reshape(-1, header.codec.record_bytes)
        return kept[index]

    def load(start: int, stop: int) -> Tensor:
        pieces = []
        for index in range(start // header.chunk_rows, -(-stop // header.chunk_rows)):
            first, _ = header.chunk(index)
            pieces.append(chunk(index)[max(start - first, 0) : stop - first])
        return torch.from_numpy(np.concatenate(pieces))

    return load
