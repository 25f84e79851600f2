"""Whether a packed file still holds what was written: checksums, and the rows of its source."""

import dataclasses
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_lm.errors import CheckpointError, MismatchError
from engram_lm.tables.files.packed import PAGE_BYTES, SUFFIX, PackedHeader, read_checksums, read_packed_header
from engram_lm.tables.files.row_error import sampled
from engram_lm.tables.layout import RowLayout

__all__ = ["BadChunk", "Verification", "checked_records", "inspect_packed", "verify_packed"]


@dataclasses.dataclass(frozen=True)
class BadChunk:
    """The first part of a file that is not what it should be."""

    index: int
    """Which chunk."""
    first_row: int
    """Its first row."""
    last_row: int
    """Its last row."""
    start_bytes: int
    """Where it begins in the file."""
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
    """Chunks read and compared."""
    rows_checked: int
    """Rows in those chunks."""
    source_compared: bool
    """Whether their rows were compared with the source's too."""
    bad: BadChunk | None
    """The first bad chunk; None where all that was checked is right."""


def verify_packed(
    path: str | os.PathLike[str],
    *,
    sample: int | None = None,
    seed: int = 0,
    source: RowLayout | None = None,
    on_progress: Callable[[int], None] = lambda num_bytes: None,
) -> Verification:
    """Read chunks of a packed file and compare them with their checksums, and with the source where it is given.

    A copy of other rows than the source's has right checksums; only the source tells them apart. Rows of the source are
    encoded again, which gives the same bytes.

    Args:
        path: The packed file.
        sample: Chunks to check, drawn evenly; all where None or more than there are.
        seed: Of the draw.
        source: The table that the file was made of.
        on_progress: Called with the bytes just checked.

    Raises:
        CheckpointError: The header or the table of checksums is damaged, or a file cannot be read.
        MismatchError: The source has another number of rows, or rows of another width.
    """
    header = read_packed_header(path)
    geometry, checksums = header.geometry, read_checksums(header)
    if source is not None and (source.num_rows, source.codec.width) != (geometry.num_rows, geometry.codec.width):
        raise MismatchError(
            f"{path} has {geometry.num_rows} rows of {geometry.codec.width} numbers, the source has {source.num_rows} "
            f"of {source.codec.width}; it was made of another table"
        )
    count = geometry.num_chunks if sample is None else min(max(sample, 1), geometry.num_chunks)
    rows_checked = chunks_checked = 0
    bad = None
    with open(header.path, "rb", buffering=0) as file:
        for index in sampled(geometry.num_chunks, count, seed).tolist():
            first, last = geometry.chunk(index)
            start, stop = geometry.chunk_bytes(index)
            chunks_checked, rows_checked = chunks_checked + 1, rows_checked + last - first
            _, reason = _read_chunk(file, header.data_start + start, stop - start, checksums[index])
            if reason is None and source is not None:
                reason = _source_reason(header, source, first, last)
            if reason is not None:
                bad = BadChunk(index, first, last - 1, header.data_start + start, reason)
                break
            on_progress(stop - start)
    return Verification(str(path), geometry.num_chunks, chunks_checked, rows_checked, source is not None, bad)


def _read_chunk(file: Any, position: int, size: int, expected: int) -> tuple[bytes, str | None]:
    """Read a chunk; also what is wrong with it, None where nothing is."""
    try:
        data = os.pread(file.fileno(), size, position)
    except OSError as error:
        # One unreadable sector of a failing disk is a bad chunk, not the end of the check.
        return b"", f"cannot be read: {error.strerror}"
    if len(data) != size:
        return data, f"the file ends {size - len(data)} bytes before the chunk does"
    found = zlib.crc32(data)
    return data, None if found == expected else f"expected the CRC-32 {expected:08x}, found {found:08x}"


def _source_reason(header: PackedHeader, source: RowLayout, first: int, last: int) -> str | None:
    codec = header.geometry.codec
    expected = source.load_records(first, last)
    if source.codec != codec:
        expected = codec.reencode(expected, source.codec)
    differing = (expected != header.layout.load_records(first, last)).any(dim=1).nonzero()
    return f"row {first + int(differing[0])} is not the source's" if len(differing) else None


def checked_records(layout: RowLayout) -> Callable[[int, int], Tensor]:
    """How to load runs of a table's records for a copy of them: held against checksums, where the file has some.

    A copy gets checksums of its own, which would be right for damaged rows too.

    Args:
        layout: The table.

    Returns:
        Called as `RowLayout.load_records`, in ascending order. Of a packed file it raises `CheckpointError` for the
        first chunk that is not what was written.

    Raises:
        CheckpointError: The header or the table of checksums of a packed file is damaged.
    """
    if layout.tensors or not layout.files[0].endswith(SUFFIX):
        return layout.load_records
    header = read_packed_header(layout.files[0])
    return _CheckedRecords(header) if header.layout.parts == layout.parts else layout.load_records


class _CheckedRecords:
    """Records of a packed file, by whole chunks; the last one is kept for the next call."""

    def __init__(self, header: PackedHeader) -> None:
        self._header, self._checksums = header, read_checksums(header)
        self._index, self._records = -1, np.empty((0, header.geometry.codec.record_bytes), np.uint8)

    def __call__(self, start: int, stop: int) -> Tensor:
        geometry = self._header.geometry
        pieces = []
        for index in range(start // geometry.chunk_rows, -(-stop // geometry.chunk_rows)):
            if index != self._index:
                self._index, self._records = index, self._load(index)
            first, _ = geometry.chunk(index)
            pieces.append(self._records[max(start - first, 0) : stop - first])
        return torch.from_numpy(np.concatenate(pieces))

    def _load(self, index: int) -> np.ndarray:
        header, geometry = self._header, self._header.geometry
        (first, last), (start, stop) = geometry.chunk(index), geometry.chunk_bytes(index)
        with open(header.path, "rb", buffering=0) as file:
            data, reason = _read_chunk(file, header.data_start + start, stop - start, self._checksums[index])
        if reason:
            raise CheckpointError(
                f"{header.path}: chunk {index}, rows {first} to {last - 1}, is not what was written: {reason}; copy "
                "the file again, or convert its source again"
            )
        rows = np.frombuffer(data, np.uint8)
        if geometry.rows_per_page:
            used = geometry.rows_per_page * geometry.codec.record_bytes
            rows = rows.reshape(-1, PAGE_BYTES)[:, :used].reshape(-1)
        return rows.reshape(-1, geometry.codec.record_bytes)[: last - first]


def inspect_packed(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a packed file says of itself, as JSON values: geometry, bytes, padding, digest, provenance.

    Raises:
        CheckpointError: The header is damaged.
    """
    header = read_packed_header(path)
    geometry = header.geometry
    record_bytes = geometry.num_rows * geometry.codec.record_bytes
    return {
        "path": str(Path(path)),
        **geometry.to_dict(),
        "file_bytes": header.file_bytes,
        "padding_share": 1 - record_bytes / geometry.data_bytes,
        "bytes_per_number": geometry.codec.record_bytes / geometry.codec.width,
        "spec_digest": header.spec_digest,
        "hash_spec": header.hash_spec,
        "provenance": header.provenance,
    }
