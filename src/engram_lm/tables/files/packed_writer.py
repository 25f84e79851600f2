"""Writing packed tables: aside, chunk by chunk, and on from where a killed call stopped."""

import contextlib
import dataclasses
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
from engram_lm.files import put_in_place, replacing
from engram_lm.tables.codec import RowCodec
from engram_lm.tables.files.packed import PackedHeader, read_packed_header

__all__ = ["write_packed"]


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
    on_progress: Callable[[int], None] = lambda done: None,
) -> PackedHeader:
    """Write a table as a packed file, which appears under its name when it is whole and on the disk.

    Memory stays at some tens of megabytes, whatever the size of the table: one chunk is written while another thread
    asks for the rows of the next.

    Args:
        path: The file to create or replace. Missing parent folders are created.
        records: Called with the first row of a chunk and one past its last, chunk after chunk, for uint8
            ``[rows, codec.record_bytes]``; see `RowLayout.load_records` and `RowCodec.encode`.
        codec: What a record means.
        num_rows: Rows in the table.
        spec_digest: Digest of the HashSpec that addresses the rows.
        hash_spec: The HashSpec as JSON values.
        provenance: Where the rows come from, as JSON values.
        resume_key: What the rows depend on. Where given, an interrupted call leaves its work in two hidden files beside
            ``path``, and the next call with the same key and header goes on from there; where None it leaves nothing.
        on_progress: Called with the bytes of records written so far, those of an earlier call included.

    Returns:
        The header of the file.

    Raises:
        CheckpointError: ``records`` returned something else than promised, or another process is writing this file.
        OSError: The folder cannot be written or the disk is full; what stood under ``path`` is still there.
    """
    path = Path(path)
    header = PackedHeader(
        file=str(path),
        codec=codec,
        num_rows=num_rows,
        spec_digest=spec_digest,
        hash_spec=hash_spec,
        provenance=provenance or {},
    ).placed()
    path.parent.mkdir(parents=True, exist_ok=True)
    file: IO[bytes]
    with contextlib.ExitStack() as stack:
        if resume_key is None:
            aside = stack.enter_context(replacing(path))
            file, journal = stack.enter_context(open(aside, "r+b")), None
            done: dict[int, int] = {}
        else:
            work = json.dumps([resume_key, hashlib.sha256(header.encode()).hexdigest()])
            aside = path.with_name(f".{path.name}.part")
            file = stack.enter_context(_open_alone(aside))
            journal = stack.enter_context(
                _Journal(path.with_name(f".{path.name}.journal"), hashlib.sha256(work.encode()).hexdigest())
            )
            done = _still_there(journal.found, file, header)
        _check_space(aside, header.file_bytes - os.fstat(file.fileno()).st_blocks * 512)
        checksums = np.array(_write_chunks(file, records, header, done, journal, on_progress), "<u4").tobytes()
        _write_at(file, checksums, header.checksums_start)
        # Last: until here the file begins with a hole, and nobody can take it for a table.
        _write_at(file, dataclasses.replace(header, checksums_crc=zlib.crc32(checksums)).encode(), 0)
        file.truncate(header.file_bytes)
        if journal is not None:
            put_in_place(aside, path)
            journal.path.unlink(missing_ok=True)
    return read_packed_header(path)


def _write_chunks(
    file: IO[bytes],
    records: Callable[[int, int], Tensor],
    header: PackedHeader,
    done: Mapping[int, int],
    journal: "_Journal | None",
    on_progress: Callable[[int], None],
) -> list[int]:
    """Write the chunks that are not done; return the checksums of all."""

    def load(index: int) -> np.ndarray:
        first, last = header.chunk(index)
        found, expected = records(first, last), (last - first, header.codec.record_bytes)
        if found.shape != expected or found.element_size() != 1:
            raise CheckpointError(
                f"rows {first} to {last - 1} came as {tuple(found.shape)} of {found.dtype}, expected bytes {expected}"
            )
        return found.contiguous().numpy()

    checksums = [done.get(index, 0) for index in range(header.num_chunks)]
    written = sum(stop - start for start, stop in map(header.chunk_bytes, done))
    on_progress(written)
    missing = [index for index in range(header.num_chunks) if index not in done]
    with ThreadPoolExecutor(1, thread_name_prefix="engram-pack") as reader:
        coming = reader.submit(load, missing[0]) if missing else None
        for place, index in enumerate(missing):
            assert coming is not None
            data = coming.result()
            if place + 1 < len(missing):
                coming = reader.submit(load, missing[place + 1])
            _write_at(file, data.data, header.chunk_bytes(index)[0])
            checksums[index] = zlib.crc32(data.data)
            if journal is not None:
                journal.add(index, checksums[index])
            written += data.nbytes
            on_progress(written)
    return checksums


def _write_at(file: IO[bytes], data: Any, position: int) -> None:
    """Write all of it, or raise."""
    view = memoryview(data).cast("B")
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
    """Open a file for reading and writing, created where missing, while no other process has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    with open(descriptor, "r+b") as file:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"{path} is being written by another process; wait for it, or end it") from error
        yield file


class _Journal:
    """Which chunks are written, with their checksums: one line each, behind a line with the key of the work."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.found = path, dict[int, int]()
        head = f"engram-journal {key}\n"
        text = path.read_text(errors="replace") if path.exists() else ""
        if text.startswith(head):
            # The last line may be cut where the process was killed; then it lacks its end.
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


def _still_there(found: Mapping[int, int], file: IO[bytes], header: PackedHeader) -> dict[int, int]:
    """Return those chunks of a journal that are in the file. After a power cut the journal may name more."""
    done = {}
    for index, crc in sorted(found.items()):
        if index < header.num_chunks:
            start, stop = header.chunk_bytes(index)
            data = os.pread(file.fileno(), stop - start, start)
            if len(data) == stop - start and zlib.crc32(data) == crc:
                done[index] = crc
    return done
