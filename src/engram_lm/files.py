"""Files and folders that are written whole or not at all, and how text files and paths that people write are read."""

import collections
import contextlib
import ctypes
import errno
import json
import math
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from engram_lm.errors import CheckpointError, EngramError

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    import msvcrt

_FOLDERS_ARE_FILES = hasattr(os, "O_DIRECTORY")
"""Whether folders can be opened, flushed and replaced by a rename, as files can: everywhere but on Windows."""
_POSITION = threading.Lock()
"""Held while a file's position is moved and used, where a system has no reads and writes at a position."""
_LOCKED_BYTE = 1 << 43
"""The byte that a lock covers on Windows, far behind all data, because other programs could not read a locked one."""


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary file beside ``path`` and put it in ``path``'s place when the block ends well.

    The contents reach the disk before the rename, so a crash leaves the old file or the new one. When the block raises,
    the temporary file is removed and ``path`` stays as it was. Missing parent folders are created.
    """
    path = user_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(descriptor)
    aside = Path(name)
    try:
        # mkstemp makes files only their owner can read; a replaced file keeps its mode, a new one gets the usual 0644.
        aside.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o644)
        yield aside
        put_in_place(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def put_in_place(aside: Path, path: Path) -> None:
    """Bring a file that was written beside ``path`` to the disk, and give it that name."""
    flush(aside)
    os.replace(aside, path)
    with contextlib.suppress(OSError):
        # Some file systems cannot flush a folder; the rename is still atomic there, only less durable.
        flush(path.parent)


def check_new_folder(path: str | os.PathLike[str]) -> None:
    """Raise a `FileExistsError` where something lies at ``path`` already that is not an empty folder."""
    path = user_path(path).absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty, so it is left alone; name another folder")


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path`` and give it that name when the block ends well.

    What was written reaches the disk before the rename, so a crash leaves no folder of that name or a whole one. When
    the block raises, the temporary folder is removed. Missing parent folders are created. A ``path`` that exists
    already must be an empty folder, else this is a `FileExistsError`.
    """
    path = user_path(path).absolute()
    check_new_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        aside.chmod(0o755)
        yield aside
        for inside in [*aside.rglob("*"), aside]:
            flush(inside)
        if path.is_dir() and not _FOLDERS_ARE_FILES:
            path.rmdir()
        os.replace(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    with contextlib.suppress(OSError):
        flush(path.parent)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike[str], check: Callable[[Path], None]) -> Iterator[Path]:
    """Yield an empty temporary folder and put it in the place of the one at ``path`` when the block ends well.

    The two change places in one step where the file system can do that (local ones on Linux can), so a crash at any
    point leaves the old folder or the new one. Elsewhere the old folder has another name beside it for a moment.
    Programs that have files of the old folder open can still read them. Missing parent folders are created. ``check``
    is called with an existing folder that holds something, and raises where that must not be replaced.
    """
    path = user_path(path).resolve()  # a link stays one
    if not (path.is_dir() and any(path.iterdir())):
        with new_folder(path) as aside:
            yield aside
        return
    check(path)
    written = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    with new_folder(written) as aside:
        yield aside
    try:
        written.chmod(path.stat().st_mode & 0o777)
        _exchange(written, path)
        with contextlib.suppress(OSError):
            flush(path.parent)
    finally:
        shutil.rmtree(written, ignore_errors=True)


def write_atomically(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write a whole file, atomically, as `replacing` does; text is encoded as UTF-8."""
    with replacing(path) as aside:
        aside.write_bytes(data.encode() if isinstance(data, str) else data)


def user_path(path: str | os.PathLike[str]) -> Path:
    """Take a path that a person wrote: a leading ``~`` is their home folder; one that is relative stays so."""
    return Path(os.path.expanduser(path))


def read_text(path: str | os.PathLike[str], *, errors: str = "strict") -> str:
    r"""Read a file of text that any editor may have saved: UTF-8, a byte order mark dropped, each line's end ``\n``.

    Raises:
        OSError: It cannot be read.
        UnicodeDecodeError: It is not UTF-8; not with ``errors="replace"``.
    """
    return user_path(path).read_text(encoding="utf-8-sig", errors=errors)


def read_json(
    path: str | os.PathLike[str], *, error: type[EngramError] = CheckpointError, advice: str = ""
) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    If it cannot be read, is not JSON, names something twice or holds something else, this raises the ``error``, whose
    message ends in the ``advice``.
    """
    try:
        text = user_path(path).read_bytes()
    except OSError as cause:
        raise error(f"{path} cannot be read ({cause.strerror}){advice and '; ' + advice}") from cause
    return parse_json(text, str(path), error=error, advice=advice)


def parse_json(
    text: bytes | str, where: str, *, error: type[EngramError] = CheckpointError, advice: str = ""
) -> dict[str, Any]:
    """Parse a JSON object that came from somewhere else, as `read_json` does; ``where`` names it in messages."""
    end = f"; {advice}" if advice else ""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            twice, _ = collections.Counter(name for name, _ in pairs).most_common(1)[0]
            raise error(f"{where} names {twice!r:.200} twice{end}")
        return values

    try:
        values = json.loads(text, object_pairs_hook=unique)
    except EngramError:
        raise
    except (ValueError, RecursionError) as cause:
        raise error(f"{where} is not readable JSON ({cause!s:.200}){end}") from cause
    if not isinstance(values, dict):
        raise error(f"{where} holds a JSON {type(values).__name__}, not an object{end}")
    return values


def only_finite(value: Any) -> Any:
    """Replace numbers that JSON lacks, NaN and infinity, by None; also inside of mappings, lists and tuples."""
    if isinstance(value, Mapping):
        return {key: only_finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [only_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk. Some file systems cannot flush folders: an `OSError`."""
    if not _FOLDERS_ARE_FILES and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if _FOLDERS_ARE_FILES else os.O_RDWR)  # Windows flushes what it may write
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_file(file: IO[Any], *, wait: bool = True) -> None:
    """Hold an open file until it is closed, however its process ends. Others that lock it wait or are refused.

    Args:
        file: An open file; its position stays.
        wait: Whether to wait for a process that holds it.

    Raises:
        BlockingIOError: Another process holds it, and this one does not wait.
    """
    descriptor = file.fileno()
    if "fcntl" in globals():
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return
    with _POSITION:
        position = os.lseek(descriptor, 0, os.SEEK_CUR)
        try:
            while True:
                os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
                try:
                    msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
                    return
                except OSError as error:
                    if not wait:
                        raise BlockingIOError(errno.EWOULDBLOCK, "another process holds the file") from error
                    time.sleep(0.1)
        finally:
            os.lseek(descriptor, position, os.SEEK_SET)


def read_at(descriptor: int, target: memoryview, offset: int) -> int:
    """Read bytes from a position of an open file into ``target``; any number of threads may do so at a time.

    Returns how many bytes were read: fewer than asked for at the end of the file, and none behind it.
    """
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [target], offset)
    if hasattr(os, "pread"):
        data = os.pread(descriptor, len(target), offset)
    else:
        with _POSITION:
            os.lseek(descriptor, offset, os.SEEK_SET)
            data = os.read(descriptor, len(target))
    target[: len(data)] = data
    return len(data)


def write_at(descriptor: int, data: Any, offset: int) -> None:
    """Write all bytes of a buffer to a position of an open file."""
    view = memoryview(data).cast("B")
    while len(view):
        if hasattr(os, "pwrite"):
            count = os.pwrite(descriptor, view, offset)
        else:
            with _POSITION:
                os.lseek(descriptor, offset, os.SEEK_SET)
                count = os.write(descriptor, view)
        view, offset = view[count:], offset + count


def _exchange(one: Path, other: Path) -> None:
    """Let two folders of one file system change places."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, TypeError):  # another C library than glibc's; Windows
        _exchange_in_steps(one, other)
        return
    current_folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2(current_folder, os.fsencode(one), current_folder, os.fsencode(other), exchange) == 0:
        return
    code = ctypes.get_errno()
    if code not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        raise OSError(code, os.strerror(code), str(other))
    _exchange_in_steps(one, other)  # network file systems


def _exchange_in_steps(one: Path, other: Path) -> None:
    aside = other.with_name(f".{other.name}.{uuid.uuid4().hex}.old")
    os.replace(other, aside)
    try:
        os.replace(one, other)
    except BaseException:
        os.replace(aside, other)
        raise
    os.replace(aside, one)
