"""Folders of runs and studies: held by one process at a time, or put in place only when they are complete."""

import contextlib
import datetime
import itertools
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from engram_lm.errors import RunFolderError
from engram_lm.files import lock_file, user_path

_MARK = "result.json"
_LOCK = ".lock"


@contextlib.contextmanager
def hold_folder(path: Path, mark: str, *, kind: str, work: str) -> Iterator[bool]:
    """Hold a folder alone inside a ``with`` block; it is made where there is none.

    The kernel gives the lock back however a process ends.

    Args:
        path: The folder.
        mark: The file by which such a folder is known; the caller writes it.
        kind: What the folder is, for messages, such as ``a training run``.
        work: What is done in it, for messages, such as ``training``.

    Yields:
        Whether the mark was there already.

    Raises:
        RunFolderError: It holds something else, cannot be written, or another process works in it.
    """
    # What is left by a process that was killed before it wrote the mark is nobody's work.
    left = (_LOCK, f".{mark}.")
    known = (path / mark).is_file()
    if path.is_file() or (
        not known and path.is_dir() and any(not file.name.startswith(left) for file in path.iterdir())
    ):
        raise RunFolderError(
            f"{path} holds something that is not {kind} (no {mark}), so it is left alone; name another folder with "
            "--out"
        )
    with contextlib.ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((path / _LOCK).open("a"))
            lock_file(lock, wait=False)
        except BlockingIOError:
            raise RunFolderError(
                f"another process is {work} in {path}; wait until it ends, or name another folder with --out"
            ) from None
        except OSError as error:
            raise RunFolderError(
                f"cannot write to {path}: {error.strerror}; name a folder you can write to with --out"
            ) from error
        yield known


class RunFolder:
    """A folder that appears under its name only when it is complete.

    Args:
        path: Where to put the results. An earlier run there is kept beside it, under a numbered name.
        mark: File in a run by which it is known as one.

    Raises:
        RunFolderError: The path is a file, holds something that is not a run, or cannot be written.
    """

    def __init__(self, path: Path, *, mark: str = _MARK) -> None:
        try:
            path = user_path(path).resolve()
        except (OSError, RuntimeError) as error:
            raise RunFolderError(f"cannot use {path}: {error}; name another folder with --out") from error
        self.path = path
        if path == Path.cwd():
            raise RunFolderError("the folder you stand in cannot become a run; name a folder in it with --out")
        if path.is_file():
            raise RunFolderError(f"{path} is a file; name another folder with --out")
        if path.is_dir() and any(path.iterdir()) and not (path / mark).is_file():
            raise RunFolderError(
                f"{path} exists and holds something that is not a run (no {mark}), so it is left alone; "
                "name another folder with --out"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        except OSError as error:
            raise RunFolderError(
                f"cannot write to {path.parent}: {error.strerror}; name a folder you can write to with --out"
            ) from error

    def publish(self) -> Path | None:
        """Put the folder in its place, and return where an earlier run was moved to, if there was one."""
        moved = None
        _open_to_readers(self.aside)
        if self.path.is_dir():
            if any(self.path.iterdir()):
                numbered = (self.path.with_name(f"{self.path.name}-{number}") for number in itertools.count(1))
                moved = next(path for path in numbered if not path.exists())
                self.path.rename(moved)
            else:
                self.path.rmdir()
        self.aside.rename(self.path)
        return moved

    def discard(self) -> None:
        """Remove what was written aside."""
        shutil.rmtree(self.aside, ignore_errors=True)


def _open_to_readers(folder: Path) -> None:
    """Give files the permissions that new files have here; some libraries write them for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in [folder, *folder.rglob("*")]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def run_facts(started: float, commit: str | None) -> dict[str, Any]:
    """Collect what every result says about how it was made.

    ``started`` is in seconds since 1970, and ``commit`` what `commit` gave then: the tree may change during a long run.
    """
    return {
        "command": command_line(),
        "started": datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat(timespec="seconds"),
        "seconds": time.time() - started,
        "machine": machine(),
        "versions": versions(),
        "commit": commit,
    }


def command_line() -> str:
    """Give the command that started this process, as one would type it."""
    name = Path(sys.argv[0]).name
    words = ["engram-lm" if name == "__main__.py" else name, *sys.argv[1:]]
    return shlex.join(words).encode("utf-8", "replace").decode()


def machine() -> dict[str, Any]:
    """Describe this machine, without its names or paths."""
    import torch

    facts: dict[str, Any] = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    with contextlib.suppress(OSError):  # only Linux has the file
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                facts["processor"] = line.split(":", 1)[1].strip()
                break
    with contextlib.suppress(OSError, ValueError, AttributeError):  # not on Windows
        facts["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    facts["threads"] = torch.get_num_threads()
    facts["system"] = f"{platform.system()} {platform.machine()}"
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
    return facts


def versions() -> dict[str, str]:
    """List the versions of the software that decides results."""
    found = {"python": platform.python_version()}
    for name in ("engram-lm", "torch", "transformers", "tokenizers", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def commit() -> str | None:
    """Find the commit of the source tree that this package runs from, marked if files differ; None if installed."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def to_json(value: Any) -> str:
    """Write indented JSON. File names that are not UTF-8 lose the characters that are not."""
    return json.dumps(value, indent=2, ensure_ascii=False).encode("utf-8", "replace").decode() + "\n"
