"""What macOS and Windows lack, taken away from Python on Linux, in a process of its own, before engram_lm is loaded.

This stands in for machines that are not here. It shows that nothing is used which is missing there, not that what is
there works as on Linux.
"""

import builtins
import ctypes
import errno
import fcntl
import io
import mmap
import os
import pathlib
import shutil
import sys
import types

_LINUX_CALLS = (
    "O_DIRECT", "RWF_NOWAIT", "copy_file_range", "memfd_create", "posix_fadvise", "preadv", "pwritev",
    "sched_getaffinity", "splice",
)  # fmt: skip
_UNIX_CALLS = (
    "O_CLOEXEC", "O_DIRECTORY", "chown", "fchmod", "fork", "getegid", "geteuid", "getgid", "getloadavg", "getuid",
    "killpg", "mkfifo", "nice", "pread", "pwrite", "register_at_fork", "setsid", "sysconf",
)  # fmt: skip
UNIX_ONLY = ("fcntl", "grp", "pwd", "resource", "termios", "tty")
"""Modules that Windows lacks."""


def become(system: str) -> None:
    """Take away what ``"macos"`` or ``"windows"`` lacks."""
    # Whatever others need of Linux is loaded before it is gone.
    import torch
    from transformers import AutoTokenizer, DynamicCache, GenerationMixin  # noqa: F401

    is_windows = system == "windows"
    for name in (*_LINUX_CALLS, *(_UNIX_CALLS if is_windows else ())):
        if hasattr(os, name):
            delattr(os, name)
    for name in [name for name in dir(mmap) if name.startswith(("MADV_POPULATE", "MAP_POPULATE", "MAP_STACK"))]:
        delattr(mmap, name)
    _hide_proc()
    library = ctypes.CDLL

    def load(name, *arguments, **options):
        if name is None and is_windows:
            raise TypeError("LoadLibrary() argument 1 must be str, not None")
        if name is None:
            found = library(None, *arguments, **options)
            return types.SimpleNamespace(**{one: getattr(found, one) for one in ("mlock", "mincore")})
        return library(name, *arguments, **options)

    ctypes.CDLL = load
    if is_windows:
        for name in [name for name in dir(mmap) if name.startswith("MADV_")]:
            delattr(mmap, name)
        _deny_what_windows_denies()
        sys.modules["msvcrt"] = _msvcrt()
        _hide_modules()
    assert "engram_lm.files" not in sys.modules and torch is not None


def _hide_modules() -> None:
    imported = builtins.__import__

    def find(name, importer=None, *arguments, **options):
        if name in UNIX_ONLY and (importer or {}).get("__name__", "").startswith("engram_lm"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return imported(name, importer, *arguments, **options)

    builtins.__import__ = find


def _hide_proc() -> None:
    opened, exists = io.open, os.path.exists

    def open_elsewhere(file, *arguments, **options):
        if isinstance(file, str | os.PathLike) and os.fspath(file).startswith(("/proc", "/dev/shm", "/sys")):
            raise FileNotFoundError(errno.ENOENT, "this system has no such folder", os.fspath(file))
        return opened(file, *arguments, **options)

    builtins.open = io.open = open_elsewhere
    is_dir = os.path.isdir
    os.path.isdir = lambda path: not str(path).startswith(("/proc", "/dev/shm", "/sys")) and is_dir(path)
    os.path.exists = lambda path: not str(path).startswith(("/proc", "/dev/shm", "/sys")) and exists(path)


def _deny_what_windows_denies() -> None:
    """Open no folder, replace no folder by a rename, move no open file, and flush only what is writable."""
    opened, replaced, flushed = os.open, os.replace, os.fsync
    listing = "/proc/self/fd"

    def open_file(path, flags, *arguments, **options):
        if isinstance(path, str | os.PathLike) and pathlib.Path(path).is_dir():
            raise PermissionError(errno.EACCES, "a folder cannot be opened", os.fspath(path))
        return opened(path, flags, *arguments, **options)

    def replace(source, target, **options):
        if pathlib.Path(target).is_dir():
            raise PermissionError(errno.EACCES, "a folder is there", os.fspath(target))
        held = {
            os.readlink(f"{listing}/{number}")
            for number in os.listdir(listing)
            if os.path.islink(f"{listing}/{number}")
        }
        if {os.path.realpath(source), os.path.realpath(target)} & held:
            raise PermissionError(errno.EACCES, "the file is open", os.fspath(source))
        return replaced(source, target, **options)

    def fsync(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & 3 == os.O_RDONLY:
            raise OSError(errno.EBADF, "the file cannot be written")
        return flushed(descriptor)

    os.open, os.replace, os.fsync = open_file, replace, fsync
    shutil._use_fd_functions = False  # as on Windows, folders are removed by their names


def _msvcrt() -> types.ModuleType:
    """Locks on a byte at the file's position, as Windows has them, by those of Linux."""
    module = types.ModuleType("msvcrt")
    module.LK_NBLCK, module.LK_UNLCK = 2, 0

    def locking(descriptor, mode, count):
        position = os.lseek(descriptor, 0, os.SEEK_CUR)
        assert position > 1 << 40 and count == 1  # a byte of the data would keep others from reading it
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if mode else fcntl.LOCK_UN)
        except BlockingIOError as error:
            raise OSError(errno.EACCES, "Permission denied") from error

    module.locking = locking
    return module
