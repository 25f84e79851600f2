"""Parts of files at any address that fsspec opens: checked, bounded in number and time, and tried again.

fsspec brings the protocols (https, s3, gs, hf, …), their credentials and their connections. What is added here is what
a table needs: every answer is checked against the size and version that a file had when it was opened, and a server
that sends something else than the bytes asked for is refused before it can send the rest.
"""

import asyncio
import dataclasses
import random
import re
import threading
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Self, TypeVar

from engram_lm.errors import ConfigError, EngramError, MissingExtraError, RemoteError, TableClosedError, check_whole

__all__ = ["RemoteFile", "RemoteFiles", "RemoteOptions", "check_host", "is_http"]

_Result = TypeVar("_Result")

_MOST_REDIRECTS = 5
# Answers worth another try: too many requests, and what a server or its gateway says while it restarts.
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 5.0
# What file systems call the version of a file, in the order of preference.
_VERSIONS = ("ETag", "etag", "generation", "blob_id", "oid", "mtime", "LastModified", "last_modified", "updated")


@dataclasses.dataclass(frozen=True)
class RemoteOptions:
    """How patiently and how widely a server is asked."""

    timeout_seconds: float = 10.0
    """Longest wait for a connection or for the next bytes over http, in seconds; more than 0."""
    request_seconds: float = 60.0
    """Longest time that one request may take in all, in seconds; more than 0."""
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
            if not 0 < getattr(self, name) < 86_400:
                raise ConfigError(f"{name} is more than 0 and less than a day, not {getattr(self, name)!r}")
        check_whole(num_connections=self.num_connections, longest_range_bytes=self.longest_range_bytes)
        check_whole(at_least=0, num_retries=self.num_retries, gap_bytes=self.gap_bytes)
        if not isinstance(self.storage_options, Mapping):
            raise ConfigError(f"storage_options is a mapping of fsspec's options, not {self.storage_options!r:.200}")

    @classmethod
    def named(cls, options: Mapping[str, Any]) -> Self:
        """Make the options from their names.

        Raises:
            ConfigError: An unknown name, or an impossible value.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
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


class RemoteFiles:
    """Reads parts of files through fsspec. Safe to use from several threads.

    Args:
        options: How patiently and how widely servers are asked.
    """

    def __init__(self, options: RemoteOptions) -> None:
        self.options = options
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._systems: dict[str, Any] = {}
        self._sessions: list[Any] = []
        self._gate = asyncio.Semaphore(self.options.num_connections)
        self._closed = False

    def begin_anew(self) -> None:
        """Leave connections, locks and the event loop to the process that this one was forked from."""
        # Kept, because the end of a session would speak over its connections, which are the other process's.
        self._left_behind = (self._systems, self._sessions)
        closed = self._closed
        self._begin()
        self._closed = closed

    def look(self, url: str) -> RemoteFile:
        """Ask for a file's size and version, and over http whether the server answers ranges.

        Raises:
            RemoteError: Nobody answers, there is no such file, or the server does not answer ranges.
            MissingExtraError: The packages for this kind of address are not installed.
        """
        system = self._system(url)

        async def look_over_http() -> RemoteFile:
            found: list[RemoteFile] = []

            async def check(response: Any) -> None:
                _check_status(response, url, None)
                start, end, size = _content_range(response, url)
                if (start, end) != (0, 0):
                    raise RemoteError(f"{url}: byte 0 was asked for, the server sent bytes {start} to {end}")
                found.append(RemoteFile(url, size, _version(response.headers)))

            await _get(system, url, check, 0, 1)
            return found[0]

        async def look() -> RemoteFile:
            info = await system._info(system._strip_protocol(url))
            if info.get("type") == "directory" or type(info.get("size")) is not int:
                raise RemoteError(f"{url} is not a file of known size, so its rows cannot be read")
            return RemoteFile(url, info["size"], _version(info))

        return self._run(system, self._patiently(url, look_over_http if is_http(url) else look))

    def read(self, wanted: Sequence[tuple[RemoteFile, int, int]], take: Callable[[int, bytes], None]) -> None:
        """Read parts of files, several at a time.

        Args:
            wanted: File, first byte and one past the last byte of each part.
            take: Called with the index of a part and its bytes when they have come, one call at a time.

        Raises:
            RemoteError: Nobody answers, a file has changed, or an answer is something else than the bytes asked for.
            TableClosedError: These files have been closed.
        """
        systems = {file.url: self._system(file.url) for file, _, _ in wanted}

        async def read_part(index: int) -> None:
            file, start, stop = wanted[index]
            part = _part_over_http if is_http(file.url) else _part
            take(index, await self._patiently(file.url, lambda: part(systems[file.url], file, start, stop)))

        async def read_all() -> None:
            async with asyncio.TaskGroup() as tasks:
                for index in range(len(wanted)):
                    tasks.create_task(read_part(index))

        if len(wanted) == 1:
            self._run(systems[wanted[0][0].url], read_part(0))
        elif wanted:
            self._run(next(iter(systems.values())), read_all())

    def read_part(self, file: RemoteFile, start: int, stop: int) -> bytes:
        """Read bytes ``start`` to ``stop`` (exclusive) of one file; raises what `read` raises."""
        parts: list[bytes] = []
        self.read([(file, start, stop)], lambda _, data: parts.append(data))
        return parts[0]

    def read_small(self, url: str, limit_bytes: int) -> bytes | None:
        """Read a whole small file; None where there is none.

        Raises:
            RemoteError: Nobody answers, or the file is longer than ``limit_bytes``.
        """
        system = self._system(url)

        def refuse_long(size: int | None) -> None:
            if size is not None and size > limit_bytes:
                raise RemoteError(f"{url} is {size} bytes long, at most {limit_bytes} were expected")

        async def check(response: Any) -> None:
            if response.status == 404:
                raise FileNotFoundError(url)
            _check_status(response, url, None, expected=200)
            refuse_long(response.content_length)

        async def read() -> bytes | None:
            try:
                if is_http(url):
                    return await _get(system, url, check)
                path = system._strip_protocol(url)
                refuse_long((await system._info(path)).get("size"))
                return await system._cat_file(path)
            except FileNotFoundError:
                return None

        return self._run(system, self._patiently(url, read))

    def close(self) -> None:
        """Close the connections. Requests that are under way fail with `TableClosedError`."""
        with self._lock:
            self._closed = True
            systems, self._systems, sessions, self._sessions = self._systems, {}, self._sessions, []
        if sessions:
            import fsspec.asyn

            for session in sessions:
                fsspec.asyn.sync(next(iter(systems.values())).loop, session.close)

    def _system(self, url: str) -> Any:
        """The asynchronous file system of an address; made on first use."""
        protocol = url.partition("://")[0].lower()
        if protocol in ("http", "https"):
            check_host(url)
        with self._lock:
            if self._closed:
                raise TableClosedError(f"{url} was closed; open it again to read from it")
            if protocol not in self._systems:
                self._systems[protocol] = self._make_system(protocol, url)
            return self._systems[protocol]

    def _make_system(self, protocol: str, url: str) -> Any:
        options = dict(self.options.storage_options)
        try:
            import fsspec
            from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper

            if protocol in ("http", "https"):
                options |= self._http_options(options)
            # Not fsspec's shared instance: its session would outlive this table, and could be closed by another.
            system = fsspec.filesystem(protocol, skip_instance_cache=True, **options)
        except ImportError as error:
            raise MissingExtraError(
                f"{url} needs fsspec, aiohttp for http, and the package of its own protocol: install the extra with "
                f"`pip install 'engram-lm[remote]'` ({error})"
            ) from error
        except ValueError as error:
            raise RemoteError(f"{url!r} is not an address that can be opened: {error}") from error
        except TypeError as error:
            raise ConfigError(f"storage_options do not fit addresses like {url}: {error}") from error
        return system if system.async_impl else AsyncFileSystemWrapper(system, asynchronous=False)

    def _http_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        import aiohttp

        timeout = self.options.timeout_seconds
        client = dict(given.get("client_kwargs", {}))
        client.setdefault("timeout", aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout))
        # An encoded answer would have other offsets than the file.
        headers = {"User-Agent": "engram-lm", **client.get("headers", {}), "Accept-Encoding": "identity"}

        async def get_client(**kwargs: Any) -> Any:
            self._sessions.append(aiohttp.ClientSession(**kwargs))
            return self._sessions[-1]

        return {"client_kwargs": {**client, "headers": headers}, "get_client": given.get("get_client", get_client)}

    def _run(self, system: Any, coroutine: Awaitable[_Result]) -> _Result:
        """Wait for a coroutine that runs on fsspec's event loop, which has a thread of its own."""
        import fsspec.asyn

        async def call() -> _Result:
            return await coroutine

        try:
            return fsspec.asyn.sync(system.loop, call)
        except BaseExceptionGroup as group:
            # The first failure of a part; the others were cancelled or failed for the same reason.
            raise group.exceptions[0] from group.exceptions[0].__cause__

    async def _patiently(self, url: str, once: Callable[[], Awaitable[_Result]]) -> _Result:
        """Make a request, again where it failed for a reason that may pass."""
        reason: Exception | None = None
        for attempt in range(self.options.num_retries + 1):
            if attempt:
                pause = min(_FIRST_PAUSE_SECONDS * 2 ** (attempt - 1), _LONGEST_PAUSE_SECONDS)
                # Clients that failed together shall not come back together.
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            try:
                async with self._gate, asyncio.timeout(self.options.request_seconds):
                    return await once()
            except EngramError:
                raise
            except (FileNotFoundError, PermissionError) as error:
                raise RemoteError(f"{url} cannot be read: {type(error).__name__}: {error}") from error
            except Exception as error:
                if self._closed:
                    raise TableClosedError(f"{url} was closed while it was read") from error
                reason = error if str(error) else TimeoutError("the request took longer than request_seconds")
        raise RemoteError(
            f"{url} gave no usable answer in {self.options.num_retries + 1} attempts, the last one failed with "
            f"{type(reason).__name__.lstrip('_')}: {reason}; check the address and that its server is running"
        ) from reason


class _PassingError(Exception):
    """A failure that may pass."""


async def _get(
    system: Any,
    url: str,
    check: Callable[[Any], Awaitable[None]],
    start: int | None = None,
    stop: int | None = None,
) -> bytes:
    """Make one http request; ``check`` sees the head of the answer before the body is read."""
    import aiohttp

    async def check_place(response: Any) -> None:
        if url.lower().startswith("https:") and response.url.scheme != "https":
            raise RemoteError(f"{url} redirects from https to {response.url}, which is refused")
        await check(response)

    try:
        return await system._cat_file(
            url, start=start, end=stop, raise_for_status=check_place, max_redirects=_MOST_REDIRECTS
        )
    except aiohttp.TooManyRedirects as error:
        raise RemoteError(f"{url} redirects more than {_MOST_REDIRECTS} times") from error


async def _part_over_http(system: Any, file: RemoteFile, start: int, stop: int) -> bytes:
    """Bytes ``start`` to ``stop`` of a file that must still be the one that was looked at."""

    async def check(response: Any) -> None:
        _check_status(response, file.url, file)
        found = _content_range(response, file.url)
        if found != (start, stop - 1, file.num_bytes):
            raise RemoteError(
                f"{file.url}: bytes {start} to {stop - 1} of {file.num_bytes} were asked for, the server sent "
                f"{found[0]} to {found[1]} of {found[2]}; the file has changed, or the server is broken"
            )
        if response.content_length not in (None, stop - start):
            raise RemoteError(
                f"{file.url}: {stop - start} bytes were expected, the server announces {response.content_length}"
            )

    data = await _get(system, file.url, check, start, stop)
    if len(data) != stop - start:
        raise _PassingError(f"a short answer: {stop - start} bytes were expected, {len(data)} came")
    return data


async def _part(system: Any, file: RemoteFile, start: int, stop: int) -> bytes:
    """The same where fsspec alone knows the protocol; what it gives is checked for its length."""
    # Ordinary files of fsspec read megabytes ahead, which would be read for nothing.
    options = {"cache_type": "none"} if hasattr(system, "sync_fs") else {}
    data = await system._cat_file(system._strip_protocol(file.url), start=start, end=stop, **options)
    if len(data) != stop - start:
        raise RemoteError(
            f"{file.url} has changed since it was opened: expected {file.num_bytes} bytes, but of bytes {start} to "
            f"{stop - 1} there are {len(data)}; open it again"
        )
    return data


def _check_status(response: Any, url: str, file: RemoteFile | None, expected: int = 206) -> None:
    """Refuse an answer that is not what a good server sends of this file."""
    status, version = response.status, _version(response.headers)
    if status in _PASSING:
        raise _PassingError(f"status {status} {response.reason}")
    if file is not None and (status in (200, 416) or (status == 206 and version != file.version)):
        raise RemoteError(
            f"{url} has changed since it was opened: expected version {file.version} of {file.num_bytes} bytes, found "
            f"version {version}; open it again"
        )
    if status == 200 and expected == 206:
        raise RemoteError(
            f"{url}: the server ignores range requests (expected status 206, found 200), so rows cannot be read "
            "without the whole file; use a server that answers them, or download the file"
        )
    if status == 416:
        raise RemoteError(f"{url} is empty: expected at least one byte")
    if status != expected:
        raise RemoteError(f"{url}: expected a file, found status {status} {response.reason}")


def _content_range(response: Any, url: str) -> tuple[int, int, int]:
    """First byte, last byte and size of the file, from the answer's Content-Range."""
    text = response.headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})", text.strip())
    if found is None:
        raise RemoteError(
            f"{url}: expected a Content-Range of bytes with the size of the file, found {text!r:.200}; use a server "
            "that answers range requests"
        )
    return int(found[1]), int(found[2]), int(found[3])


def _version(said: Mapping[str, Any]) -> str | None:
    """The version of a file, from the head of an answer or from what a file system says of it."""
    names = (*_VERSIONS, "Last-Modified")
    return next((str(said[name]) for name in names if said.get(name) is not None), None)


def is_http(url: str) -> bool:
    """Whether an address is of http or https, whose answers are checked here and whose parts may be quoted."""
    return url.lower().startswith(("http://", "https://"))


def check_host(url: str) -> None:
    """Refuse an http address without a host, or with a port that is no number.

    Raises:
        RemoteError: As said.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        parts.port  # noqa: B018  # raises where it is no number
    except ValueError as error:
        raise RemoteError(f"{url!r} is not an address: {error}") from error
    if not parts.hostname:
        raise RemoteError(f"{url!r} is not an http or https address: it names no host")
