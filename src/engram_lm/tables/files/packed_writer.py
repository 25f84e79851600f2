"""Writing packed files: chunk by chunk, aside, and again from where it was when it was killed."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from engram_lm.errors import CheckpointError
from engram_lm.files import replacing
from engram_lm.tables.codec import RowCodec
from engram_lm.tables.files.packed import (
    PAGE_BYTES,
    PackedGeometry,
    PackedHeader,
    encode_checksums,
    encode_header,
    read_packed_header,
)

__all__ = ["write_packed"]

# Chunks read and written at once. One write of 16 MiB reaches the page cache several times as fast as the same bytes in
# writes of 1 MiB (measured on ext4); memory stays at a few times this.
_CHUNKS_AT_ONCE = 4
# Rows asked for at a time within those. Larger arrays come from fresh pages every time, whose first touch costs more
# than the copy.
_PIECE_BYTES = 1 << 20


def write_packed(
    path: str | os.PathLike[str],
    records: Callable[[int, int], Tensor],
    codec: RowCodec,
    num_rows: int,
    *,
    spec_digest: str | None = None,
    hash_spec: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    resume_key: str | None = None,
    on_progress: Callable[[int], None] = lambda num_bytes: None,
) -> PackedHeader:
    """Write a table as a packed file, which appears under its name when it is whole and on the disk.

    Memory stays at some tens of megabytes, whatever the size of the table: rows are asked for about a megabyte at a
    time, by another thread while the chunks before are written.

    Args:
        path: The file to create or replace. Missing parent folders are created.
        records: Called with a first row and one past a last row, in ascending order, for uint8
            ``[rows, codec.record_bytes]``; see `RowLayout.load_records` and `RowCodec.encode`.
        codec: What a record means.
        num_rows: Rows in the table.
        spec_digest: Digest of the HashSpec that addresses the rows.
        hash_spec: The HashSpec as JSON values.
        provenance: Where the rows come from, as JSON values.
        resume_key: What the rows depend on. Where given, an interrupted call leaves its work in two hidden files beside
            ``path``, and the next call with the same key and header goes on from there; where None it leaves nothing.
        on_progress: Called with the bytes just written, or found written by an earlier call.

    Returns:
        The header of the file.

    Raises:
        CheckpointError: ``records`` returned something else than promised, or another process is writing this file.
        ConfigError: The header would be too long.
        OSError: The folder cannot be written or the disk is full; what stood under ``path`` is still there.
    """
    path, geometry = Path(path), PackedGeometry(codec, num_rows)
    about: dict[str, Any] = {"spec_digest": spec_digest, "hash_spec": hash_spec, "provenance": provenance or {}}
    header = encode_header(geometry, 0, **about)
    path.parent.mkdir(parents=True, exist_ok=True)
    file: IO[bytes]
    with contextlib.ExitStack() as stack:
        if resume_key is None:
            aside = stack.enter_context(replacing(path))
            file, journal = stack.enter_context(open(aside, "r+b")), None
            done: dict[int, int] = {}
        else:
            key = hashlib.sha256(json.dumps([resume_key, hashlib.sha256(header).hexdigest()]).encode()).hexdigest()
            aside = path.with_name(f".{path.name}.part")
            file = stack.enter_context(_open_alone(aside))
            journal = stack.enter_context(_Journal(path.with_name(f".{path.name}.journal"), key))
            done = _still_there(journal.found, file, geometry, len(header))
        _check_space(aside, geometry.data_bytes + len(header) - os.fstat(file.fileno()).st_blocks * 512)
        checksums = _write_chunks(file, records, geometry, len(header), done, journal, on_progress)
        table = encode_checksums(checksums)
        _write_at(file, table, len(header) + geometry.data_bytes)
        # Last: until here the file begins with a hole, and nobody can take it for a table.
        _write_at(file, encode_header(geometry, zlib.crc32(table), **about), 0)
        file.truncate(len(header) + geometry.data_bytes + len(table))
        if journal is not None:
            _publish(file, aside, path, journal)
    return read_packed_header(path)


def _write_chunks(
    file: IO[bytes],
    records: Callable[[int, int], Tensor],
    geometry: PackedGeometry,
    data_start: int,
    done: dict[int, int],
    journal: "_Journal | None",
    on_progress: Callable[[int], None],
) -> list[int]:
    """Write the chunks that are not done; return the checksums of all."""
    checksums = [done.get(index, 0) for index in range(geometry.num_chunks)]
    for index in done:
        start, stop = geometry.chunk_bytes(index)
        on_progress(stop - start)
    runs = _runs([index for index in range(geometry.num_chunks) if index not in done])

    record_bytes, per_page = geometry.codec.record_bytes, max(1, geometry.rows_per_page)
    piece = max(1, _PIECE_BYTES // record_bytes // per_page) * per_page
    # Two, taken in turn: one is filled while the other is written.
    buffers = [np.empty(0, np.uint8), np.empty(0, np.uint8)]

    def fetch(run: range) -> np.ndarray:
        (start, _), (_, end) = geometry.chunk_bytes(run[0]), geometry.chunk_bytes(run[-1])
        buffers.reverse()
        if len(buffers[0]) < end - start:
            buffers[0] = np.empty(end - start, np.uint8)
        data, filled = buffers[0][: end - start], 0
        first, last = geometry.chunk(run[0])[0], geometry.chunk(run[-1])[1]
        for low in range(first, last, piece):
            high = min(low + piece, last)
            found = records(low, high)
            if found.shape != (high - low, record_bytes) or found.element_size() != 1:
                raise CheckpointError(
                    f"rows {low} to {high - 1} came as {tuple(found.shape)} of {found.dtype}, expected bytes "
                    f"{(high - low, record_bytes)}"
                )
            paged = _in_pages(found.contiguous().numpy(), geometry)
            data[filled : filled + len(paged)] = paged
            filled += len(paged)
        return data[:filled]

    with ThreadPoolExecutor(1, thread_name_prefix="engram-convert") as reader:
        run = next(runs, None)
        coming = None if run is None else reader.submit(fetch, run)
        while run is not None and coming is not None:
            data, current = coming.result(), run
            run = next(runs, None)
            coming = None if run is None else reader.submit(fetch, run)
            origin = geometry.chunk_bytes(current[0])[0]
            _write_at(file, data.data, data_start + origin)
            for index in current:
                start, stop = geometry.chunk_bytes(index)
                checksums[index] = zlib.crc32(data[start - origin : stop - origin].data)
                if journal is not None:
                    journal.add(index, checksums[index])
            on_progress(len(data))
    return checksums


def _runs(indices: list[int]) -> Iterator[range]:
    """Cut ascending numbers into runs without gaps, of a few chunks each."""
    start = 0
    for end in range(1, len(indices) + 1):
        if end == len(indices) or indices[end] != indices[end - 1] + 1 or end - start == _CHUNKS_AT_ONCE:
            yield range(indices[start], indices[end - 1] + 1)
            start = end


def _in_pages(records: np.ndarray, geometry: PackedGeometry) -> np.ndarray:
    """Lay records ``[n, record_bytes]``, which begin a page, into pages: bytes, flat."""
    per_page, (num_rows, record_bytes) = geometry.rows_per_page, records.shape
    if per_page * record_bytes in (0, PAGE_BYTES) and (not per_page or num_rows % per_page == 0):
        return records.reshape(-1)
    num_pages = -(-num_rows // per_page)
    whole = num_rows // per_page
    pages = np.empty((num_pages, PAGE_BYTES), np.uint8)
    pages[:, per_page * record_bytes :] = 0
    inside = np.lib.stride_tricks.as_strided(pages, (num_pages, per_page, record_bytes), (PAGE_BYTES, record_bytes, 1))
    inside[:whole] = records[: whole * per_page].reshape(whole, per_page, record_bytes)
    if whole < num_pages:
        pages[whole] = 0
        inside[whole, : num_rows - whole * per_page] = records[whole * per_page :]
    return pages.reshape(-1)


def _write_at(file: IO[bytes], data: Any, position: int) -> None:
    """Write all of it, or raise."""
    view = memoryview(data)
    while len(view):
        count = os.pwrite(file.fileno(), view, position)
        view, position = view[count:], position + count


def _check_space(aside: Path, needed: int) -> None:
    """Say that a disk is too small before work begins, not hours later."""
    free = shutil.disk_usage(aside.parent).free
    if needed > free:
        raise OSError(
            errno.ENOSPC, f"writing needs {needed:,} bytes, {free:,} are free in {aside.parent}; make room or choose "
            "another folder"
        )  # fmt: skip


@contextlib.contextmanager
def _open_alone(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading and writing, created where missing, while no other process has it.

    Raises:
        CheckpointError: Another process has it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    with open(descriptor, "r+b") as file:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"{path} is being written by another process; wait for it, or end it") from error
        yield file


class _Journal:
    """Which chunks are written, with their checksums: one line each behind a line with the key of the work."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.found = path, dict[int, int]()
        head = f"engram-journal {key}\n"
        text = path.read_text(errors="replace") if path.exists() else ""
        if text.startswith(head):
            # The last line may be cut where the process was killed; it lacks its end then.
            for line in text[len(head) :].splitlines(keepends=True):
                index, _, crc = line.partition(" ")
                if line.endswith("\n") and index.isdecimal() and len(crc) == 9:
                    with contextlib.suppress(ValueError):
                        self.found[int(index)] = int(crc, 16)
        self._head = head

    def __enter__(self) -> "_Journal":
        # Written anew, so that no cut line stays in the middle.
        self._file = open(self.path, "w")
        self._file.write(self._head)
        self._file.writelines(f"{index} {crc:08x}\n" for index, crc in self.found.items())
        self._file.flush()
        return self

    def add(self, index: int, crc: int) -> None:
        """Note a chunk that has been written."""
        self._file.write(f"{index} {crc:08x}\n")
        self._file.flush()

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _still_there(found: dict[int, int], file: IO[bytes], geometry: PackedGeometry, data_start: int) -> dict[int, int]:
    """Of the chunks a journal names, those that are in the file. After a power cut it may name more."""
    done = {}
    for index, crc in sorted(found.items()):
        if index < geometry.num_chunks:
            start, stop = geometry.chunk_bytes(index)
            data = os.pread(file.fileno(), stop - start, data_start + start)
            if len(data) == stop - start and zlib.crc32(data) == crc:
                done[index] = crc
    return done


def _publish(file: IO[bytes], aside: Path, path: Path, journal: _Journal) -> None:
    os.fsync(file.fileno())
    os.replace(aside, path)
    journal.path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        # Some file systems cannot flush a folder; the rename is still atomic there, only less durable.
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
