"""A folder of a checkpoint at an address that fsspec opens, for the readers of headers."""

import dataclasses
import urllib.parse
from typing import Any

from engram_lm.errors import RemoteError
from engram_lm.tables.layout import RowLayout
from engram_lm.tables.tiers.remote_files import RemoteFile, RemoteFiles, RemoteOptions

__all__ = ["RemoteFolder"]


class RemoteFolder:
    """A folder on a server as a `FileFolder`, by its address or that of one ``.safetensors`` file in it.

    The options are fields of `RemoteOptions`. An http address that names no host raises a `RemoteError`.
    """

    def __init__(self, address: str, **options: Any) -> None:
        self._files = RemoteFiles(RemoteOptions.named(options))
        self._found: dict[str, RemoteFile] = {}
        self._query, self._is_quoted = "", address.lower().startswith(("http://", "https://"))
        base = address.rstrip("/")
        if self._is_quoted:
            try:
                parts = urllib.parse.urlsplit(address)
                _ = parts.port  # raises where it is no number
            except ValueError as error:
                raise RemoteError(f"{address!r} is not an address: {error}") from error
            if not parts.hostname:
                raise RemoteError(f"{address!r} is not an http or https address: it names no host")
            self._query = f"?{parts.query}" if parts.query else ""
            base = address.partition("#")[0].partition("?")[0].rstrip("/")
        self.file: str | None = None
        """The one file that the address names; None where it names a folder."""
        if base.endswith(".safetensors"):
            base, _, name = base.rpartition("/")
            self.file = urllib.parse.unquote(name) if self._is_quoted else name
        self.name = base

    def tensor_files(self) -> list[str]:
        """See `FileFolder.tensor_files`."""
        return ["model.safetensors"]

    def open(self, file: str) -> "_RemoteSource":
        """See `FileFolder.open`."""
        found = self._files.look(self._url(file))
        self._found[found.url] = found
        return _RemoteSource(self._files, found)

    def read(self, file: str) -> bytes | None:
        """See `FileFolder.read`."""
        return self._files.read_small(self._url(file))

    def place(self, layout: RowLayout) -> RowLayout:
        """Mark the addresses in a layout with the versions of the files whose headers were read here."""
        parts = tuple(
            dataclasses.replace(
                part,
                extents=tuple(
                    dataclasses.replace(extent, file=self._found[extent.file].marked) for extent in part.extents
                ),
            )
            for part in layout.parts
        )
        return dataclasses.replace(layout, parts=parts, tensors=())

    def _url(self, file: str) -> str:
        return f"{self.name}/{urllib.parse.quote(file) if self._is_quoted else file}{self._query}"


class _RemoteSource:
    """A file on a server as a `ByteSource`."""

    def __init__(self, files: RemoteFiles, file: RemoteFile) -> None:
        self._files, self._file = files, file
        self.name, self.size = file.url, file.num_bytes

    def read(self, start: int, stop: int) -> bytes:
        """See `ByteSource.read`."""
        stop = min(stop, self.size)
        return self._files.read([(self._file, start, stop)])[0] if start < stop else b""
