"""Parts of files at any address that fsspec opens, with the checks that a table needs."""

import dataclasses
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, Self

from engram_lm.errors import ConfigError, EngramError, MissingExtraError, RemoteError, check_whole
from engram_lm.tables.layout import VERSION_MARK, RowLayout

_FIRST_PAUSE_SECONDS = 0.1
# What file systems call the version of a file, in the order of preference.
_VERSIONS = ("ETag", "etag", "generation", "blob_id", "mtime", "LastModified", "last_modified", "Last-Modified")


@dataclasses.dataclass(frozen=True)
class RemoteOptions:
    """How patiently and how widely a server is asked."""

    timeout_seconds: float = 10.0
    """Longest wait for a connection or for the next bytes over http, in seconds; more than 0."""
    request_seconds: float = 60.0
    """Longest time that one request over http may take in all, in seconds; more than 0."""
    num_connections: int = 8
    """Most requests under way at the same time; at least 1."""
    num_retries: int = 3
    """How often a request is made again after a failure that may pass; 0 or more."""
    gap_bytes: int = 16 << 10
    """Rows no further apart than this many bytes are asked for in one request, with what lies between them."""
    longest_range_bytes: int = 4 << 20
    """Most bytes that one request asks for, at least 1; a longer row is still one request."""
    storage_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the file system is made with, as ``fsspec.filesystem`` takes it: credentials, endpoints, headers."""

    def __post_init__(self) -> None:
        for name in ("timeout_seconds", "request_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is more than 0, not {getattr(self, name)!r}")
        check_whole(num_connections=self.num_connections, longest_range_bytes=self.longest_range_bytes)
        check_whole(at_least=0, num_retries=self.num_retries, gap_bytes=self.gap_bytes)
        if not isinstance(self.storage_options, Mapping):
            raise ConfigError(f"storage_options is a mapping of fsspec's options, not {self.storage_options!r:.200}")

    @classmethod
    def named(cls, options: Mapping[str, Any]) -> Self:
        """Make the options from their names; a `ConfigError` for an unknown one."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(options) - known):
            raise ConfigError(f"unknown options {', '.join(unknown)}; a remote table has {', '.join(sorted(known))}")
        return cls(**options)


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file as it was first seen; later answers are checked against this."""

    url: str
    """Its address."""
    num_bytes: int
    """Its size in bytes."""
    version: str | None
    """Its ETag, date or generation, where the server gives one of them."""

    @property
    def marked(self) -> str:
        """The address with the version, as layouts carry it."""
        return self.url + (f"{VERSION_MARK}{urllib.parse.quote(self.version, safe='')}" if self.version else "")


class RemoteFiles:
    """Reads parts of files through fsspec. Safe to use from several threads."""

    def __init__(self, options: RemoteOptions) -> None:
        self.options = options

    def look(self, url: str) -> RemoteFile:
        """Ask for a file's size and version.

        Raises:
            RemoteError: Nobody answers, there is no such file, or it is a folder.
            MissingExtraError: The packages for this kind of address are not installed.
        """
        system = self._system(url)
        try:
            info = system.info(url)
        except Exception as error:
            raise _refusal(url, error) from error
        if info.get("type") == "directory" or type(info.get("size")) is not int:
            raise RemoteError(f"{url} is not a file of known size, so its rows cannot be read")
        version = next((str(info[name]) for name in _VERSIONS if info.get(name) is not None), None)
        return RemoteFile(url, info["size"], version)

    def read(self, wanted: Sequence[tuple[RemoteFile, int, int]]) -> list[bytes]:
        """Read parts of files, several at a time: of each the file, its first byte and one past its last.

        Raises:
            RemoteError: Nobody answers, a file has changed its size, or an answer is not the bytes asked for.
        """
        found: list[Any] = [None] * len(wanted)
        missing = list(range(len(wanted)))
        for attempt in range(self.options.num_retries + 1):
            time.sleep(_FIRST_PAUSE_SECONDS * 2 ** (attempt - 1) if attempt else 0)
            parts = [wanted[index] for index in missing]
            for index, answer in zip(missing, self._cat_ranges(parts), strict=True):
                found[index] = self._checked(answer, *wanted[index])
            missing = [index for index in missing if not isinstance(found[index], bytes)]
            if not missing:
                return found
        url, reason = wanted[missing[0]][0].url, found[missing[0]]
        raise RemoteError(
            f"{url} gave no usable answer in {self.options.num_retries + 1} attempts, the last one failed with "
            f"{type(reason).__name__}: {reason}; check the address and that its server is running"
        ) from reason

    def read_small(self, url: str) -> bytes | None:
        """Read a whole small file; None if there is no such file. Raises `RemoteError` where nobody answers."""
        try:
            return self._system(url).cat_file(url)
        except EngramError:
            raise
        except FileNotFoundError:
            return None
        except Exception as error:
            raise _refusal(url, error) from error

    def _cat_ranges(self, parts: Sequence[tuple[RemoteFile, int, int]]) -> list[Any]:
        """The bytes of each part, or the exception that it met."""
        from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

        system = self._system(parts[0][0].url)
        options: dict[str, Any] = {"batch_size": self.options.num_connections, "on_error": "return"}
        urls = [file.marked if system.protocol[0] == "http" else file.url for file, _, _ in parts]
        starts, ends = [start for _, start, _ in parts], [stop for _, _, stop in parts]
        if not system.async_impl:
            # Such a system reads ranges one after another, and megabytes ahead of each, for nothing.
            system, options["cache_type"] = AsyncFileSystemWrapper(system, asynchronous=False), "none"
        return system.cat_ranges(urls, starts, ends, **options)

    def _checked(self, answer: Any, file: RemoteFile, start: int, stop: int) -> Any:
        """The answer if it is right, or a failure that may pass; raises for one that will not."""
        if isinstance(answer, bytes) and len(answer) == stop - start:
            return answer
        if isinstance(answer, bytes | RemoteError) or getattr(answer, "status", None) == 416:
            now = self.look(file.url)
            if now != file:
                raise RemoteError(
                    f"{file.url} has changed since it was opened: expected version {file.version} of {file.num_bytes} "
                    f"bytes, found version {now.version} of {now.num_bytes}; open it again"
                )
        if isinstance(answer, RemoteError | FileNotFoundError | PermissionError):
            raise _refusal(file.url, answer) from answer
        if isinstance(answer, bytes):
            return EOFError(f"a short answer: {stop - start} bytes were expected, {len(answer)} came")
        return answer

    def _system(self, url: str) -> Any:
        """The file system of an address; fsspec keeps one for each process, thread and set of options."""
        protocol, options = url.partition("://")[0].lower(), dict(self.options.storage_options)
        try:
            import fsspec

            if protocol in ("http", "https"):
                import aiohttp

                from engram_lm.tables.tiers.http_files import HttpFiles, refuse_whole_file

                client = dict(options.get("client_kwargs", {}))
                waits = {"total": self.options.request_seconds, "sock_read": self.options.timeout_seconds}
                client.setdefault("timeout", aiohttp.ClientTimeout(**waits, sock_connect=waits["sock_read"]))
                client.setdefault("raise_for_status", refuse_whole_file)
                # An encoded answer would have other offsets than the file.
                headers = {"User-Agent": "engram-lm", **client.get("headers", {}), "Accept-Encoding": "identity"}
                return HttpFiles(**{**options, "client_kwargs": {**client, "headers": headers}})
            return fsspec.filesystem(protocol, use_listings_cache=False, **options)
        except ImportError as error:
            raise MissingExtraError(
                f"{url} needs fsspec, aiohttp for http, and the package of its own protocol: install the extra with "
                f"`pip install 'engram-lm[remote]'` ({error})"
            ) from error
        except (ValueError, TypeError) as error:
            raise RemoteError(f"{url!r} is not an address that can be opened with these options: {error}") from error


def _refusal(url: str, error: BaseException) -> RemoteError:
    if isinstance(error, RemoteError):
        return error
    reason = error.__cause__ or error  # over http every failure is a file that is not found
    return RemoteError(
        f"{url} cannot be read: {type(reason).__name__}: {reason}; check the address and that its server is running"
    )


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
