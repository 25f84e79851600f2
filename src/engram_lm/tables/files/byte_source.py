"""Where the bytes of files come from: this machine, or any place that reads a file by position."""

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from engram_lm.errors import CheckpointError


class ByteSource(Protocol):
    """One file, read by position. Reading raises an `OSError`, which is a `RemoteError` for a file elsewhere."""

    @property
    def name(self) -> str:
        """Path or address of the file, as layouts and messages show it."""

    @property
    def size(self) -> int:
        """Size of the file in bytes."""

    def read(self, start: int, stop: int) -> bytes:
        """Read the bytes from ``start`` up to, but not including, ``stop``; fewer where the file ends before that."""


class FileFolder(Protocol):
    """A folder of files, on this machine or elsewhere; opening and reading raise as `ByteSource` says."""

    @property
    def name(self) -> str:
        """Path or address of the folder, as messages show it."""

    def tensor_files(self) -> Sequence[str]:
        """Names of the ``.safetensors`` files, sorted; ``model.safetensors`` where a server cannot list its files."""

    def open(self, file: str) -> ByteSource:
        """Open a file by its name relative to the folder."""

    def read(self, file: str) -> bytes | None:
        """Read a whole small file, such as an index or ``config.json``; None where there is none."""


class LocalFile:
    """A file of this machine as a `ByteSource`; a `CheckpointError` where the path is not that of a regular file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # The type is checked first: opening a pipe would wait until somebody writes to it.
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a file; name a checkpoint folder, or a .safetensors file")
        self.name, self.size = str(path), status.st_size

    def read(self, start: int, stop: int) -> bytes:
        """See `ByteSource.read`."""
        with open(self.name, "rb") as file:
            file.seek(start)
            return file.read(stop - start)


class LocalFolder:
    """A folder of this machine as a `FileFolder`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def name(self) -> str:
        """See `FileFolder.name`."""
        return str(self.path)

    def tensor_files(self) -> list[str]:
        """See `FileFolder.tensor_files`."""
        return sorted(path.name for path in self.path.glob("*.safetensors"))

    def open(self, file: str) -> LocalFile:
        """See `FileFolder.open`."""
        path = self.path / file
        if not os.path.exists(path):  # unlike `Path.exists`, this says no to a name that no file system can hold
            raise FileNotFoundError(f"{path} is missing")
        return LocalFile(path)

    def read(self, file: str) -> bytes | None:
        """See `FileFolder.read`."""
        path = self.path / file
        return path.read_bytes() if path.is_file() else None


def is_address(source: object) -> bool:
    """Whether a source is an address that fsspec may open, such as ``"https://…"`` or ``"s3://…"``, and not a path."""
    if not isinstance(source, str) or source.startswith("mooncake://"):
        return False
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source) is not None
