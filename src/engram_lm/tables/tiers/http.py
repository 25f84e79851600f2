"""A table on a static file server: rows by HTTP range requests, nothing downloaded before it is read."""

import dataclasses
import threading
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_lm.errors import CheckpointError, ConfigError, RemoteError
from engram_lm.tables.files.packed import PREFIX_BYTES, SUFFIX, PackedHeader, parse_packed_header, parse_packed_prefix
from engram_lm.tables.files.safetensors_file import (
    INDEX_NAME,
    LONGEST_HEADER_BYTES,
    StoredTensor,
    TensorFolder,
    parse_header,
    parse_index,
)
from engram_lm.tables.layout import RowLayout
from engram_lm.tables.tiers.http_ranges import HttpOptions, RangeClient, RemoteFile, split_address
from engram_lm.tables.tiers.record_table import RecordTable

__all__ = ["HttpTable", "RemoteFolder", "http_layout", "is_address"]

_LONGEST_SMALL_FILE_BYTES = 100_000_000
# Behind the address of a file, in a layout: which version of it the layout was made from.
_VERSION_MARK = "#engram-version="


def is_address(source: object) -> bool:
    """Whether a source is an http or https address."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


class HttpTable(RecordTable):
    """Rows read from a static file server that answers range requests.

    Rows that lie near each other come in one request, several requests are under way at once over kept connections,
    and every wait ends. A file that changes on the server while it is open gives an error.

    Args:
        layout: Where the rows lie; the files of its extents are addresses, see `http_layout`.
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


class RemoteFolder(TensorFolder):
    """The tensors of a checkpoint on a server, found by its headers alone.

    Args:
        address: Of a folder, which holds an index or one ``model.safetensors``; of one ``.safetensors`` file; or of a
            packed file (``.engram``), which has no tensors: see `read_packed`.
        options: Fields of `HttpOptions`.

    Raises:
        CheckpointError: A malformed index or header, or neither index nor ``model.safetensors``.
        RemoteError: Nobody answers, or the server does not answer ranges.
    """

    def __init__(self, address: str, **options: Any) -> None:
        self._client = RangeClient(_options(options))
        self._headers, self._paths = {}, {}
        self._files: dict[Path, RemoteFile] = {}
        split_address(address)
        parts = urllib.parse.urlsplit(address)
        self._query = f"?{parts.query}" if parts.query else ""
        base = address.partition("#")[0].partition("?")[0].rstrip("/")
        name = "model.safetensors"
        if base.endswith((".safetensors", SUFFIX)):
            base, _, name = base.rpartition("/")
        self.address = base
        # What messages call the folder, and what the paths of its files begin with; `url` turns them into addresses.
        self.folder = Path()
        self.packed = Path(urllib.parse.unquote(name)) if name.endswith(SUFFIX) else None
        """The packed file that the address names, in the folder; None where it names none."""
        if self.packed is not None:
            return
        if not parts.path.endswith(".safetensors"):
            index = self._client.fetch(self.url(Path(INDEX_NAME)), _LONGEST_SMALL_FILE_BYTES)
            if index is not None:
                self._paths = parse_index(index, Path(INDEX_NAME))
                return
        path = Path(urllib.parse.unquote(name))
        self._paths = dict.fromkeys(self._header(path), path)

    def url(self, path: Path) -> str:
        """The address of a file inside the folder."""
        return f"{self.address}/{urllib.parse.quote(path.as_posix())}{self._query}"

    def read_small(self, name: str) -> bytes | None:
        """Read a small file beside the tensors, such as ``config.json``; None where there is none.

        Raises:
            RemoteError: Nobody answers, or it is not small.
        """
        return self._client.fetch(self.url(Path(name)), _LONGEST_SMALL_FILE_BYTES)

    def find(self, name: str) -> StoredTensor:
        """Return where a tensor lies, in a file relative to the folder.

        Raises:
            CheckpointError: There is no such tensor, or the file that should hold it lacks it or is malformed.
            RemoteError: The file is missing, or nobody answers.
        """
        if name not in self._paths:
            raise CheckpointError(f"the tensor {name} is missing from {self.address}")
        path = self._paths[name]
        header = self._header(path)
        if name not in header:
            raise CheckpointError(f"{self.url(path)} does not hold {name}, although {INDEX_NAME} says so")
        return header[name]

    def _header(self, path: Path) -> dict[str, StoredTensor]:
        if path not in self._headers:
            url = self.url(path)
            file = self._client.look(url)
            if file.num_bytes < 8:
                raise CheckpointError(f"{url} is not a safetensors file: it has {file.num_bytes} bytes")
            length = int.from_bytes(self._client.read(file, 0, 8), "little")
            if length > min(file.num_bytes - 8, LONGEST_HEADER_BYTES):
                raise CheckpointError(
                    f"{url} is truncated or not a safetensors file: it begins with a header length of {length} bytes, "
                    f"found {file.num_bytes} bytes in all (at most {LONGEST_HEADER_BYTES} are allowed)"
                )
            text = self._client.read(file, 8, 8 + length) if length else b""
            self._headers[path] = parse_header(text, path, file.num_bytes)
            self._files[path] = file
        return self._headers[path]

    def load(self, tensor: StoredTensor) -> Tensor:
        """Read a small tensor that was found here.

        Raises:
            CheckpointError: Its type is unknown here.
            RemoteError: Nobody answers, or its file has changed.
        """
        dtype, start = tensor.torch_dtype, tensor.start_bytes
        if not tensor.num_bytes:
            return torch.empty(tensor.shape, dtype=dtype)
        data = self._client.read(self._files[tensor.path], start, start + tensor.num_bytes)
        return torch.frombuffer(bytearray(data), dtype=dtype).reshape(tensor.shape)

    def read_packed(self) -> PackedHeader:
        """Read the header of the packed file that the address names.

        Raises:
            CheckpointError: As `read_packed_header`; or the address names none.
            RemoteError: Nobody answers, there is no such file, or the server does not answer ranges.
        """
        if self.packed is None:
            raise CheckpointError(f"{self.address} names no packed file, a file that ends with {SUFFIX}")
        url = self.url(self.packed)
        file = self._client.look(url)
        size, path = file.num_bytes, self.packed
        prefix = self._client.read(file, 0, min(size, PREFIX_BYTES))
        length = parse_packed_prefix(prefix, path, size)
        text = self._client.read(file, PREFIX_BYTES, PREFIX_BYTES + length) if length else b""
        self._files[path] = file
        return parse_packed_header(prefix, text, path, size)

    def place(self, layout: RowLayout) -> RowLayout:
        """Give a layout of tensors that were found here the addresses of its files.

        The addresses carry the version of the file, so that a table is never opened on another one than its header.
        """

        def address(file: str) -> str:
            found = self._files[Path(file)]
            mark = f"{_VERSION_MARK}{urllib.parse.quote(found.version, safe='')}" if found.version else ""
            return found.url + mark

        parts = tuple(
            dataclasses.replace(
                part,
                extents=tuple(dataclasses.replace(extent, file=address(extent.file)) for extent in part.extents),
            )
            for part in layout.parts
        )
        return dataclasses.replace(layout, parts=parts, tensors=(), scale_tensors=())

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def http_layout(address: str, *, layer: int | str | None = None, **options: Any) -> RowLayout:
    """Find a table on a server by the headers of its files; nothing else is read.

    Args:
        address: Of a checkpoint folder with an index or one ``model.safetensors``, of one ``.safetensors`` file, or of
            a packed file (``.engram``).
        layer: Which table, as `table_layouts` names them; may be left out where there is one.
        options: Fields of `HttpOptions`.

    Returns:
        A layout whose extents name addresses, for `HttpTable`.

    Raises:
        CheckpointError: No table, several and no ``layer``, or malformed files.
        RemoteError: Nobody answers, or the server does not answer ranges.
    """
    from engram_lm.tables.files.sources import choose_layout, table_layouts

    return choose_layout(table_layouts(address, **options), layer, address)
