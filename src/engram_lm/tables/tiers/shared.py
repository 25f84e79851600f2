"""One copy of a table's records for all processes of a machine.

The copy is a file in a folder that lies in memory. Nothing counts its users: each holds a shared lock on it, which the
kernel gives back however a process ends. Whoever finds that nobody holds one removes the file.

Three files of one name share the work: ``….gate``, locked by whoever opens, loads or removes the copy, and holding the
process and progress of who loads; ``….part``, what is being written; ``….records``, the whole copy, put there by a
rename.
"""

import contextlib
import fcntl
import functools
import json
import mmap
import os
import stat
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_lm.errors import MismatchError, SharedCopyError
from engram_lm.tables.layout import RowLayout
from engram_lm.tables.tiers.record_table import RecordTable

__all__ = ["SharedTable"]

_HEADER_BYTES = 4096
"""A page of JSON in front of the records, so that these begin on a page."""
_LOADED_AT_ONCE_BYTES = 8 << 20
_NOTE_BYTES = 128
_CLOSING_SECONDS = 5.0
"""How long `close` waits for others who are opening; what it then leaves, the next opener removes."""


class SharedTable(RecordTable):
    """Rows in a copy in memory that all processes of this machine share.

    The first process that opens a layout copies its records, the others wait for it and map the same pages. The copy
    disappears with its last user; if that one was killed, with the next table that is opened in the folder. A loader
    that was killed leaves nothing that is mistaken for a copy: the next process loads again.

    Args:
        layout: Where the rows lie; its identity names the copy, so changed files are never served from an old one.
        dtype: Type of the rows that `gather` returns; the stored one where None, bfloat16 for 8-bit rows.
        folder: Where the copy lies; it should be in memory. Processes share a copy when they name the same folder.
        wait_seconds: Longest wait for another process that loads the copy and makes no progress.
        progress: Called by the process that loads with the bytes copied so far and in all.

    Raises:
        SharedCopyError: The folder cannot be written or has too little room, or the process that loads has stopped.
        MismatchError: A copy of that name has another geometry.
        CheckpointError: A file of the layout is missing, or has been cut since its layout was made.
        ConfigError: An impossible ``dtype``.
    """

    def __init__(
        self,
        layout: RowLayout,
        dtype: torch.dtype | None = None,
        *,
        folder: str | os.PathLike[str] = "/dev/shm",
        wait_seconds: float = 60.0,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__(layout.codec, layout.num_rows, dtype)
        self.layout, self.folder, self.wait_seconds = layout, Path(folder), wait_seconds
        # The user is part of the name: a folder that all may write to is no reason to trust another user's bytes.
        self.path = self.folder / f"engram-{os.geteuid()}-{layout.identity[:40]}.records"
        _sweep(self.folder, self.path)
        self.loaded_here = False
        with _gate(self.path, wait_seconds) as gate:
            user = _open_copy(self.path)
            if user is None:
                _load(layout, self.path, gate, progress)
                self.loaded_here = True
                user = _open_copy(self.path)
                assert user is not None
            try:
                fcntl.flock(user, fcntl.LOCK_SH)
                self._records: np.ndarray | None = _map(user, self.path, layout)
            except BaseException:
                os.close(user)
                raise
        self._leave = weakref.finalize(self, _leave, self.path, user, os.getpid())

    @property
    def _closed(self) -> bool:
        return self._records is None

    def _read(self, numbers: np.ndarray) -> Tensor:
        mapped = self._records
        self._refuse_closed(mapped is None)
        assert mapped is not None
        records = torch.empty(len(numbers), self.codec.record_bytes, dtype=torch.uint8)
        # The numbers are checked already, so nothing is clipped; any other mode would copy everything twice.
        np.take(mapped, numbers, axis=0, out=records.numpy(), mode="clip")
        return records

    def stats(self) -> dict[str, Any]:
        """See `Table.stats`; adds where the copy lies and whether this process loaded it."""
        return {**super().stats(), "tier": "shared", "path": str(self.path), "loaded_here": self.loaded_here}

    def close(self) -> None:
        """Leave the copy, and remove it if nobody else uses it. A gather of another thread still ends well."""
        self._records = None
        self._leave()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by opening the same copy again."""
        opening = functools.partial(SharedTable, folder=self.folder, wait_seconds=self.wait_seconds)
        return opening, (self.layout, self._dtype)


@contextlib.contextmanager
def _gate(path: Path, wait_seconds: float) -> Iterator[int]:
    """Hold the lock under which a copy is opened, loaded and removed; yields the locked file.

    Raises:
        SharedCopyError: The folder cannot be written; or the lock is held by a process that loads and has made no
            progress for so long.
    """
    name = path.with_suffix(".gate")
    while True:
        gate = _open_own(name, os.O_RDWR | os.O_CREAT)
        assert gate is not None
        try:
            _lock(gate, name, wait_seconds)
            # Who removes a copy removes its gate too. Then this one is nobody's, and the next to come has another.
            if _is_at(gate, name):
                try:
                    yield gate
                    return
                finally:
                    # Not left to closing the file: a forked child that has it open would keep the lock.
                    fcntl.flock(gate, fcntl.LOCK_UN)
        finally:
            os.close(gate)


def _lock(gate: int, name: Path, wait_seconds: float) -> None:
    note, deadline, pause = b"", time.monotonic() + wait_seconds, 0.001
    while True:
        try:
            fcntl.flock(gate, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pass
        found = os.pread(gate, _NOTE_BYTES, 0)
        if found != note and wait_seconds > 0:
            note, deadline = found, time.monotonic() + wait_seconds
        elif time.monotonic() >= deadline:
            raise SharedCopyError(
                f"waited {wait_seconds:g} seconds for {_read_note(found)}, which holds {name} and makes no progress; "
                "end that process and open the table again"
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def _write_note(gate: int, done_bytes: int, num_bytes: int) -> None:
    note = json.dumps({"pid": os.getpid(), "done_bytes": done_bytes, "num_bytes": num_bytes})
    os.pwrite(gate, note.encode().ljust(_NOTE_BYTES), 0)


def _read_note(note: bytes) -> str:
    try:
        values = json.loads(note)
        return f"process {int(values['pid'])} ({int(values['done_bytes'])} of {int(values['num_bytes'])} bytes loaded)"
    except (ValueError, TypeError, KeyError):
        return "a process that has written no number"


def _load(layout: RowLayout, path: Path, gate: int, progress: Callable[[int, int], None] | None) -> None:
    """Copy all records to a file of their own and give it its name when it is whole."""
    aside = path.with_suffix(".part")
    # Whoever wrote this is dead, or the gate would be locked.
    aside.unlink(missing_ok=True)
    num_bytes = _HEADER_BYTES + layout.stored_bytes
    _write_note(gate, 0, num_bytes)
    space = os.statvfs(path.parent)
    free_bytes = space.f_bavail * space.f_frsize
    if free_bytes < num_bytes:
        raise SharedCopyError(_too_small(path.parent, num_bytes, f"{free_bytes} are free"))
    step = max(1, _LOADED_AT_ONCE_BYTES // layout.codec.record_bytes)
    try:
        with open(aside, "xb", buffering=0, opener=_private) as file:
            _write_all(file.fileno(), _header(layout))
            for start in range(0, layout.num_rows, step):
                stop = min(start + step, layout.num_rows)
                _write_all(file.fileno(), layout.load_records(start, stop).numpy().data.cast("B"))
                done_bytes = _HEADER_BYTES + stop * layout.codec.record_bytes
                _write_note(gate, done_bytes, num_bytes)
                if progress is not None:
                    progress(done_bytes, num_bytes)
        os.rename(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        # Errors of the library are the layout's own; an OSError is the folder's.
        if type(error) is OSError:
            raise SharedCopyError(_too_small(path.parent, num_bytes, str(error.strerror))) from error
        raise


def _too_small(folder: Path, num_bytes: int, found: str) -> str:
    gib = -(-num_bytes // 2**30)
    return (
        f"{folder} has no room for a shared copy: expected {num_bytes} bytes, but {found}. Make it larger (in a "
        f"container with --shm-size={gib}g), name another folder, or read the table where it lies with tier='mmap'"
    )


def _write_all(file: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while len(view):
        view = view[os.write(file, view) :]


def _private(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _open_own(name: Path, flags: int) -> int | None:
    """Open a file that this user owns; None where there is none and none is to be made."""
    try:
        opened = _private(str(name), flags)
    except FileNotFoundError:
        if not flags & os.O_CREAT:
            return None
        raise SharedCopyError(f"{name.parent} is no folder to make files in; name another one") from None
    except OSError as error:
        raise SharedCopyError(f"cannot open {name}: {error.strerror}; name a folder that can be written") from error
    status = os.fstat(opened)
    if status.st_uid != os.geteuid() or not stat.S_ISREG(status.st_mode):
        os.close(opened)
        raise SharedCopyError(f"{name} is not a file of this user (user {os.geteuid()}); remove it")
    return opened


def _open_copy(path: Path) -> int | None:
    return _open_own(path, os.O_RDONLY)


def _is_at(opened: int, name: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(opened), os.stat(name))
    except FileNotFoundError:
        return False


def _header(layout: RowLayout) -> bytes:
    return json.dumps(_geometry(layout)).encode().ljust(_HEADER_BYTES)


def _geometry(layout: RowLayout) -> dict[str, Any]:
    codec = layout.codec
    stored = [codec.width, str(codec.stored_dtype), codec.scale, codec.table_scale]
    return {"identity": layout.identity, "num_rows": layout.num_rows, "codec": stored, "bytes": codec.record_bytes}


def _map(opened: int, path: Path, layout: RowLayout) -> np.ndarray:
    """Bytes ``[num_rows, record_bytes]`` on the copy, read-only, after its header and size were checked."""
    expected, num_bytes = _geometry(layout), os.fstat(opened).st_size
    try:
        found = json.loads(os.pread(opened, _HEADER_BYTES, 0))
    except ValueError:
        found = None
    if found != expected or num_bytes != _HEADER_BYTES + layout.stored_bytes:
        raise MismatchError(
            f"{path} is a copy of another table: expected {expected} in {_HEADER_BYTES + layout.stored_bytes} bytes, "
            f"found {found!r:.300} in {num_bytes} bytes; remove it"
        )
    # Opened once more: a mapping keeps its descriptor, and with it the lock, for as long as anybody has a view of it.
    again = _open_copy(path)
    assert again is not None
    try:
        mapping = mmap.mmap(again, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(again)
    data = np.frombuffer(mapping, np.uint8, offset=_HEADER_BYTES)
    return data.reshape(layout.num_rows, layout.codec.record_bytes)


def _leave(path: Path, user: int, pid: int) -> None:
    """Give back one user's lock, and remove the copy if it was the last."""
    # Closed, not unlocked: unlocking would take the lock from forked children too, which go on reading.
    os.close(user)
    if os.getpid() != pid:
        return
    with contextlib.suppress(SharedCopyError, OSError), _gate(path, _CLOSING_SECONDS):
        _remove_unused(path)


def _remove_unused(path: Path) -> bool:
    """Remove a copy that nobody holds, and its gate, which the caller has locked. Returns whether it is gone."""
    copy = _open_copy(path)
    if copy is not None:
        try:
            fcntl.flock(copy, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        else:
            path.unlink(missing_ok=True)
        finally:
            os.close(copy)
    path.with_suffix(".part").unlink(missing_ok=True)
    path.with_suffix(".gate").unlink(missing_ok=True)
    return True


def _sweep(folder: Path, spared: Path) -> None:
    """Remove what killed processes of this user left of other tables; never waits, and what fails is left."""
    with contextlib.suppress(OSError):
        for name in {file.with_suffix(".records") for file in folder.glob(f"engram-{os.geteuid()}-*.gate")}:
            if name == spared:
                continue
            with contextlib.suppress(OSError, SharedCopyError), _gate(name, 0.0):
                _remove_unused(name)
