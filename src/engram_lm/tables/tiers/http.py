"""A table on a static file server: rows by HTTP range requests, nothing downloaded before it is read."""

import dataclasses
import threading
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_lm.errors import ConfigError, RemoteError
from engram_lm.tables.layout import RowLayout
from engram_lm.tables.tiers.http_ranges import HttpOptions, RangeClient, RemoteFile, split_address
from engram_lm.tables.tiers.record_table import RecordTable

__all__ = ["HttpTable", "RemoteFolder"]

_LONGEST_SMALL_FILE_BYTES = 100_000_000
# Behind the address of a file, in a layout: which version of it the layout was made from.
_VERSION_MARK = "#engram-version="


class HttpTable(RecordTable):
    """Rows read from a static file server that answers range requests.

    Rows that lie near each other come in one request, several requests are under way at once over kept connections,
    and every wait ends. A file that changes on the server while it is open gives an error.

    Args:
        layout: Where the rows lie; the files of its extents are addresses, see `table_layouts`.
        dtype: Type of the rows that `gather` returns; the stored one where None, bfloat16 for 8-bit rows.
        options: Fields of `HttpOptions`.

    Raises:
        RemoteError: Nobody answers, a file is missing, changed or shorter than the layout says, or the server does not
            answer ranges.
        ConfigError: An impossible option or ``dtype``.
    """

    def __init__(self, layout: RowLayout, dtype: torch.dtype | None = None, **options: Any) -> None:
        super().__init__(layout.codec, layout.num_rows, dtype)
        self.layout, self.options = layout, _options(options)
        client = RangeClient(self.options)
        self._executor = ThreadPoolExecutor(self.options.num_connections, thread_name_prefix="engram-http")
        self._lock = threading.Lock()
        self._client: RangeClient | None = client
        self._num_requests = self._num_bytes = 0
        try:
            self._files = dict(zip(layout.files, self._executor.map(client.look, map(_address, layout.files))))  # noqa: B905
            for part in layout.parts:
                for extent in part.extents:
                    _check(self._files[extent.file], extent.file, extent.end_bytes(part.row_bytes))
        except BaseException:
            self.close()
            raise

    @property
    def _closed(self) -> bool:
        return self._client is None

    def _renew(self) -> None:
        super()._renew()
        client, self._client = self._client, None
        self._lock = threading.Lock()
        if client is not None:
            # The other process talks over these connections.
            client.forget()
            self._client = RangeClient(self.options)
            self._executor = ThreadPoolExecutor(self.options.num_connections, thread_name_prefix="engram-http")

    def _read(self, numbers: np.ndarray) -> Tensor:
        client = self._client
        self._refuse_closed(client is None)
        assert client is not None
        # Each row once, however often it is asked for.
        unique, inverse = np.unique(numbers, return_inverse=True)
        data, column = np.empty((len(unique), self.codec.record_bytes), np.uint8), 0
        waiting: list[Future[None]] = []
        try:
            for part in self.layout.parts:
                out = data[:, column : column + part.row_bytes]
                for extent, where, offsets in part.divide(unique):
                    places = np.arange(len(unique)) if isinstance(where, slice) else where
                    file = self._files[extent.file]
                    waiting += [
                        self._submit(client, file, offsets[run], places[run], out)
                        for run in self._runs(offsets, part.row_bytes)
                    ]
                column += part.row_bytes
            for future in waiting:
                future.result()
        except BaseException:
            for future in waiting:
                future.cancel()
            raise
        return torch.from_numpy(data if len(unique) == len(numbers) and _ordered(inverse) else data[inverse])

    def _submit(
        self, client: RangeClient, file: RemoteFile, offsets: np.ndarray, places: np.ndarray, out: np.ndarray
    ) -> "Future[None]":
        def read() -> None:
            size = out.shape[1]
            start, stop = int(offsets[0]), int(offsets[-1]) + size
            body = np.frombuffer(client.read(file, start, stop), np.uint8)
            windows = np.lib.stride_tricks.as_strided(body, (len(body) - size + 1, size), (1, 1), writeable=False)
            out[places] = windows[offsets - start]
            with self._lock:
                self._num_requests += 1
                self._num_bytes += stop - start

        with self._lock:
            self._refuse_closed(self._client is None)
            return self._executor.submit(read)

    def _runs(self, offsets: np.ndarray, row_bytes: int) -> Iterator[slice]:
        """Cut rows, sorted by their place, into the ones that are asked for together."""
        first = 0
        gaps = np.flatnonzero(np.diff(offsets) > row_bytes + self.options.gap_bytes) + 1
        for last in [*gaps.tolist(), len(offsets)]:
            while first < last:
                limit = offsets[first] + max(self.options.longest_range_bytes, row_bytes) - row_bytes
                end = first + int(np.searchsorted(offsets[first:last], limit, side="right"))
                yield slice(first, end)
                first = end

    def stats(self) -> dict[str, Any]:
        """See `Table.stats`; adds what was asked of the server, what the opening asked left out."""
        return {
            **super().stats(),
            "tier": "http",
            "num_files": len(self.layout.files),
            "num_requests": self._num_requests,
            "received_bytes": self._num_bytes,
        }

    def close(self) -> None:
        """Close the connections."""
        with self._lock:
            client, self._client = self._client, None
            self._executor.shutdown(wait=False)
        if client is not None:
            client.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by opening the addresses again."""
        return _open_again, (self.layout, self._dtype, dataclasses.asdict(self.options))


def _open_again(layout: RowLayout, dtype: torch.dtype, options: dict[str, Any]) -> HttpTable:
    return HttpTable(layout, dtype, **options)


def _options(options: dict[str, Any]) -> HttpOptions:
    known = {field.name for field in dataclasses.fields(HttpOptions)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ConfigError(f"unknown options {', '.join(unknown)}; an http table has {', '.join(sorted(known))}")
    return HttpOptions(**options)


def _ordered(inverse: np.ndarray) -> bool:
    return bool((np.diff(inverse) == 1).all())


def _address(file: str) -> str:
    return file.partition(_VERSION_MARK)[0]


def _check(found: RemoteFile, file: str, end: int) -> None:
    """Hold a file against what its layout says of it."""
    _, marked, version = file.partition(_VERSION_MARK)
    if marked and urllib.parse.unquote(version) != (found.version or ""):
        raise RemoteError(
            f"{found.url} has changed since its header was read: expected version {urllib.parse.unquote(version)}, "
            f"found {found.version}; make the layout again"
        )
    if found.num_bytes < end:
        raise RemoteError(f"{found.url} is too short: expected at least {end} bytes, found {found.num_bytes}")


class _RemoteSource:
    """A file on a server as a `ByteSource`."""

    def __init__(self, client: RangeClient, file: RemoteFile) -> None:
        self._client, self._file = client, file
        self.name, self.size = file.url, file.num_bytes

    def read(self, start: int, stop: int) -> bytes:
        """See `ByteSource.read`."""
        return self._client.read(self._file, start, stop)


class RemoteFolder:
    """A folder on a server as a `FileFolder`.

    Args:
        address: Of a folder, which holds an index or one ``model.safetensors``; or of one file in a folder.
        options: Fields of `HttpOptions`.

    Raises:
        RemoteError: The address is malformed.
    """

    def __init__(self, address: str, **options: Any) -> None:
        self._client = RangeClient(_options(options))
        self._files: dict[str, RemoteFile] = {}
        split_address(address)
        query = urllib.parse.urlsplit(address).query
        self._query = f"?{query}" if query else ""
        base = address.partition("#")[0].partition("?")[0].rstrip("/")
        self.file: str | None = None
        """The one file that the address names; None where it names a folder."""
        if base.endswith(".safetensors"):
            base, _, name = base.rpartition("/")
            self.file = urllib.parse.unquote(name)
        self.name = base

    def tensor_files(self) -> list[str]:
        """See `FileFolder.tensor_files`."""
        return ["model.safetensors"]

    def open(self, file: str) -> _RemoteSource:
        """See `FileFolder.open`."""
        found = self._client.look(self._url(file))
        self._files[found.url] = found
        return _RemoteSource(self._client, found)

    def read(self, file: str) -> bytes | None:
        """See `FileFolder.read`."""
        return self._client.fetch(self._url(file), _LONGEST_SMALL_FILE_BYTES)

    def place(self, layout: RowLayout) -> RowLayout:
        """Add to a layout of files that were opened here which version of each file it was made from.

        So a table is never opened on another file than its header.
        """

        def marked(url: str) -> str:
            version = self._files[url].version
            return url + (f"{_VERSION_MARK}{urllib.parse.quote(version, safe='')}" if version else "")

        parts = tuple(
            dataclasses.replace(
                part, extents=tuple(dataclasses.replace(extent, file=marked(extent.file)) for extent in part.extents)
            )
            for part in layout.parts
        )
        return dataclasses.replace(layout, parts=parts, tensors=(), scale_tensors=())

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _url(self, file: str) -> str:
        return f"{self.name}/{urllib.parse.quote(file)}{self._query}"
