"""Writing packed tables: aside, chunk by chunk, and continuing where a killed call stopped."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from engram_lm.errors import CheckpointError
from engram_lm.files import lock_file, put_in_place, read_at, replacing, user_path, write_at
from engram_lm.tables.codec import RowCodec
from engram_lm.tables.files.packed import PackedHeader, read_packed_header


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
            ``path``, and the next call with the same key and header continues from there; where None it leaves nothing.
        on_progress: Called with the bytes of records written so far, those of an earlier call included.

    Returns:
        The header of the file.

    Raises:
        CheckpointError: ``records`` returned something else than promised, or another process is writing this file.
        OSError: The folder cannot be written or the disk is full; what stood under ``path`` is still there.
    """
    path = user_path(path)
    header = PackedHeader(
        file=str(path),
        codec=codec,
        num_rows=num_rows,
        spec_digest=spec_digest,
        hash_spec=hash_spec,
        provenance=provenance or {},
    ).placed()
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    with contextlib.ExitStack() as stack:
        if resume_key is None:
            aside = stack.enter_context(replacing(path))
            file: IO[bytes] = stack.enter_context(open(aside, "r+b"))
            writer = _Chunks(file, header, None)
        else:
            aside, noted = (path.with_name(f".{path.name}.{kind}") for kind in ("part", "journal"))
            file = stack.enter_context(_open_alone(aside))
            work = json.dumps([resume_key, hashlib.sha256(header.encode()).hexdigest()])
            head = f"engram-journal {hashlib.sha256(work.encode()).hexdigest()}\n"
            done = _still_there(_read_journal(noted, head), file, header)
            # Written anew, so that no cut line stays in the middle.
            journal = stack.enter_context(open(noted, "w", encoding="utf-8", newline="\n"))
            journal.write(head)
            writer = _Chunks(file, header, journal)
            for index, crc in done.items():
                writer.note(index, crc)
        there = os.fstat(file.fileno())
        needed = header.file_bytes - getattr(there, "st_blocks", there.st_size // 512) * 512  # Windows counts no blocks
        if needed > free:  # said before work begins, not hours later
            raise OSError(
                errno.ENOSPC,
                f"writing needs {needed:,} bytes, {free:,} are free in {path.parent}; make room or choose "
                "another folder",
            )
        writer.write_missing(records, on_progress)
        checksums = np.array([writer.checksums[index] for index in range(header.num_chunks)], "<u4").tobytes()
        write_at(file.fileno(), checksums, header.checksums_start)
        # Last: until here the file begins with a hole, and nobody can take it for a table.
        write_at(file.fileno(), dataclasses.replace(header, checksums_crc=zlib.crc32(checksums)).encode(), 0)
        file.truncate(header.file_bytes)
        if resume_key is not None:
            if not hasattr(os, "O_DIRECTORY"):  # Windows renames no file that is open
                stack.close()
            put_in_place(aside, path)
            noted.unlink(missing_ok=True)
    return read_packed_header(path)


class _Chunks:
    """The chunks of a file that is being written, noted in a journal where there is one."""

    def __init__(self, file: IO[bytes], header: PackedHeader, journal: IO[str] | None) -> None:
        self._file, self._header, self._journal = file, header, journal
        self.checksums: dict[int, int] = {}
        """Number of each chunk that is written → its CRC-32."""

    def note(self, index: int, crc: int) -> None:
        """Note a chunk that has been written."""
        self.checksums[index] = crc
        if self._journal is not None:
            self._journal.write(f"{index} {crc:08x}\n")
            self._journal.flush()

    def write_missing(self, records: Callable[[int, int], Tensor], on_progress: Callable[[int], None]) -> None:
        """Write the chunks that are not there; the rows of the next are loaded meanwhile."""
        header = self._header
        missing = [index for index in range(header.num_chunks) if index not in self.checksums]
        written = sum(stop - start for start, stop in map(header.chunk_bytes, self.checksums))
        on_progress(written)

        def load(index: int) -> np.ndarray:
            first, last = header.chunk(index)
            found, expected = records(first, last), (last - first, header.codec.record_bytes)
            if found.shape != expected or found.element_size() != 1:
                raise CheckpointError(
                    f"rows {first} to {last - 1} came as {tuple(found.shape)} of {found.dtype}, expected bytes "
                    f"{expected}"
                )
            return found.contiguous().numpy()

        with ThreadPoolExecutor(1, thread_name_prefix="engram-pack") as reader:
            coming = [reader.submit(load, index) for index in missing[:1]]
            for place, index in enumerate(missing):
                data = coming.pop().result()
                coming += [reader.submit(load, following) for following in missing[place + 1 : place + 2]]
                write_at(self._file.fileno(), data.data, header.chunk_bytes(index)[0])
                self.note(index, zlib.crc32(data.data))
                written += data.nbytes
                on_progress(written)


@contextlib.contextmanager
def _open_alone(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading and writing, created where missing, while no other process has it."""
    with open(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644), "r+b") as file:
        try:
            lock_file(file, wait=False)
        except BlockingIOError as error:
            raise CheckpointError(f"{path} is being written by another process; wait for it, or end it") from error
        yield file


def _read_journal(path: Path, head: str) -> dict[int, int]:
    """Which chunks an earlier call of the same work has written, with their checksums."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
    if lines[:1] != [head]:
        return {}
    # The last line lacks its end where the process was killed in the middle of it.
    matches = (re.fullmatch(r"([0-9]+) ([0-9a-f]{8})\n", line) for line in lines[1:])
    return {int(match[1]): int(match[2], 16) for match in matches if match}


def _still_there(found: Mapping[int, int], file: IO[bytes], header: PackedHeader) -> dict[int, int]:
    """Return those chunks of a journal that are in the file. After a power cut the journal may name more."""
    done = {}
    for index, crc in sorted(found.items()):
        if index < header.num_chunks:
            start, stop = header.chunk_bytes(index)
            data = bytearray(stop - start)
            if read_at(file.fileno(), memoryview(data), start) == len(data) and zlib.crc32(data) == crc:
                done[index] = crc
    return done
