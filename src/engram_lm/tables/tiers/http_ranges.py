"""Pieces of files on an HTTP server, by range requests: kept connections, deadlines, retries, unchanged files."""

import dataclasses
import http.client
import io
import random
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable
from typing import Any, TypeVar

from engram_lm.errors import ConfigError, RemoteError

__all__ = ["HttpOptions", "RangeClient", "RemoteFile", "split_address"]

_Result = TypeVar("_Result")

_LONGEST_REDIRECTION = 5
_REDIRECTIONS = (301, 302, 303, 307, 308)
# Worth another try: too many requests, and what a server or the gateway before it says while it restarts.
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 5.0
_READ_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class HttpOptions:
    """How patiently and how widely a server is asked."""

    timeout_seconds: float = 10.0
    """How long one wait may take: to connect, or for the next bytes."""
    request_seconds: float = 60.0
    """How long one request may take in all, however steadily its bytes trickle."""
    num_connections: int = 8
    """Connections at the same time, at most; 1 to 256."""
    num_retries: int = 3
    """How often a request is made again after it failed for a reason that may pass."""
    gap_bytes: int = 16 << 10
    """Rows no further apart than this are asked for in one request, with what lies between them."""
    longest_range_bytes: int = 4 << 20
    """What one request asks for at most; a longer row is still one request."""

    def __post_init__(self) -> None:
        for name in ("timeout_seconds", "request_seconds"):
            if not 0 < getattr(self, name) < 86_400:
                raise ConfigError(f"{name} is more than 0 and less than a day, not {getattr(self, name)!r}")
        for name, low, high in (
            ("num_connections", 1, 256),
            ("num_retries", 0, 20),
            ("gap_bytes", 0, 1 << 30),
            ("longest_range_bytes", 1, 1 << 30),
        ):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ConfigError(f"{name} is an integer between {low} and {high}, not {value!r}")


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file on a server as it was first seen; later answers are held against this."""

    url: str
    """Its address."""
    num_bytes: int
    """Its size."""
    version: str | None
    """Its ETag, else its Last-Modified date, where the server says either."""


class RangeClient:
    """Reads ranges of files from HTTP servers. Safe to use from several threads.

    Args:
        options: How patiently and how widely servers are asked.
    """

    def __init__(self, options: HttpOptions | None = None) -> None:
        self.options = options or HttpOptions()
        self._idle: dict[tuple[str, str], list[_Connection]] = {}
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(self.options.num_connections)
        self._closed = False
        self._targets: dict[str, str] = {}

    def look(self, url: str) -> RemoteFile:
        """Ask for a file's size and version, and whether the server answers ranges.

        Raises:
            RemoteError: Nobody answers, there is no such file, or the server does not answer ranges.
        """

        def look(answer: http.client.HTTPResponse) -> RemoteFile:
            if answer.status == 200:
                raise RemoteError(
                    f"{url}: the server ignores range requests (expected status 206, found 200), so rows cannot be "
                    "read without the whole file; use a server that answers them, or download the file"
                )
            if answer.status == 416:
                raise RemoteError(f"{url} is empty: expected at least one byte")
            start, end, size = _content_range(answer, url)
            if (start, end) != (0, 0):
                raise RemoteError(f"{url}: byte 0 was asked for, the server sent bytes {start} to {end}")
            _read_body(answer, 1, url)
            return RemoteFile(url, size, _version(answer))

        return self._retry(url, {"Range": "bytes=0-0"}, look)

    def read(self, file: RemoteFile, start: int, stop: int) -> bytes:
        """Read bytes ``start`` to ``stop`` (exclusive) of a file that must still be the one that was looked at.

        Raises:
            RemoteError: Nobody answers, the file has changed, or the answer is something else than these bytes.
        """
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        if file.version is not None and not file.version.startswith("W/"):
            # A server that holds another version answers with all of it, and status 200.
            headers["If-Range"] = file.version

        def read(answer: http.client.HTTPResponse) -> bytes:
            version = _version(answer)
            if answer.status in (200, 416) or (version != file.version and answer.status == 206):
                raise RemoteError(
                    f"{file.url} has changed since it was opened: expected version {file.version} of {file.num_bytes} "
                    f"bytes, found version {version}; open it again"
                )
            found = _content_range(answer, file.url)
            if found != (start, stop - 1, file.num_bytes):
                raise RemoteError(
                    f"{file.url}: bytes {start} to {stop - 1} of {file.num_bytes} were asked for, the server sent "
                    f"{found[0]} to {found[1]} of {found[2]}; the file has changed, or the server is broken"
                )
            return _read_body(answer, stop - start, file.url)

        return self._retry(file.url, headers, read)

    def fetch(self, url: str, limit_bytes: int) -> bytes | None:
        """Read a whole small file; None where there is none.

        Raises:
            RemoteError: Nobody answers, or the file is longer than ``limit_bytes``.
        """

        def fetch(answer: http.client.HTTPResponse) -> bytes | None:
            if answer.status == 404:
                return None
            if answer.status != 200:
                raise RemoteError(f"{url}: expected status 200, found {answer.status} {answer.reason}")
            size = answer.getheader("Content-Length")
            if size is not None and size.isdecimal():
                if int(size) > limit_bytes:
                    raise RemoteError(f"{url} is {size} bytes long, at most {limit_bytes} were expected")
                return _read_body(answer, int(size), url)
            body = _read_up_to(answer, limit_bytes + 1)
            if len(body) > limit_bytes:
                raise RemoteError(f"{url} is longer than the {limit_bytes} bytes that were expected at most")
            return body

        return self._retry(url, {}, fetch, missing_is_fine=True)

    def close(self) -> None:
        """Close the connections; those in use are closed when their request ends."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, {}
        for connections in idle.values():
            for connection in connections:
                connection.close()

    def forget(self) -> None:
        """Close the connections in a forked process, where a thread of the other one may have held the lock."""
        self._lock = threading.Lock()
        self.close()

    def __del__(self) -> None:
        self.close()

    def _retry(
        self,
        url: str,
        headers: dict[str, str],
        take: Callable[[http.client.HTTPResponse], _Result],
        *,
        missing_is_fine: bool = False,
    ) -> _Result:
        """Make a request, again where it failed for a reason that may pass."""
        for attempt in range(self.options.num_retries + 1):
            if attempt:
                pause = min(_FIRST_PAUSE_SECONDS * 2 ** (attempt - 1), _LONGEST_PAUSE_SECONDS)
                # Clients that failed together do not come back together.
                time.sleep(pause * random.uniform(0.5, 1.0))
            try:
                with self._slots:
                    return self._request(url, headers, take, missing_is_fine)
            except _PassingError as error:
                reason: Exception = error
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, RemoteError | ssl.SSLCertVerificationError):
                    if isinstance(error, RemoteError):
                        raise
                    raise RemoteError(f"{url}: {error}") from error
                reason = error
        raise RemoteError(
            f"{url} gave no usable answer in {self.options.num_retries + 1} attempts, the last one failed with "
            f"{type(reason).__name__.lstrip('_')}: {reason}; check the address and that its server is running"
        ) from reason

    def _request(
        self, url: str, headers: dict[str, str], take: Callable[[http.client.HTTPResponse], _Result], fine: bool
    ) -> _Result:
        """Make one request, follow redirections, and hand the connection back if it can be used again."""
        with self._lock:
            target = self._targets.get(url, url)
        redirected = target != url
        for _ in range(_LONGEST_REDIRECTION):
            connection = self._take_connection(target)
            healthy = False
            try:
                answer = connection.ask(target, headers)
                status = answer.status
                if status in _REDIRECTIONS:
                    place = urllib.parse.urljoin(target, answer.getheader("Location") or "")
                    split_address(place)
                    if target.startswith("https:") and not place.startswith("https:"):
                        raise RemoteError(f"{url} redirects from https to {place}, which is refused")
                elif status in _PASSING or (redirected and status in (401, 403, 404, 410)):
                    # The address that a redirection gave may have run out: the next attempt asks the first one again.
                    with self._lock:
                        self._targets.pop(url, None)
                    raise _PassingError(f"status {status} {answer.reason}")
                elif status not in (200, 206, 416) and not (fine and status == 404):
                    raise RemoteError(f"{url}: expected a file, found status {status} {answer.reason}")
                else:
                    result = take(answer)
                    # Only what was read to its end leaves the connection at the beginning of the next answer.
                    healthy = answer.length == 0 and not answer.will_close
                    answer.close()
                    if target != url:
                        with self._lock:
                            self._targets[url] = target
                    return result
                target = place
            finally:
                self._give_connection(connection, healthy)
        raise RemoteError(f"{url} redirects more than {_LONGEST_REDIRECTION} times")

    def _take_connection(self, url: str) -> "_Connection":
        key = split_address(url)
        with self._lock:
            idle = self._idle.get(key)
            if idle:
                return idle.pop()
        return _Connection(*key, self.options)

    def _give_connection(self, connection: "_Connection", healthy: bool) -> None:
        with self._lock:
            if healthy and not self._closed:
                self._idle.setdefault(connection.key, []).append(connection)
                return
        connection.close()


class _PassingError(Exception):
    """A failure that may pass."""


class _Connection:
    """One connection to one server, whose every wait ends."""

    def __init__(self, scheme: str, place: str, options: HttpOptions) -> None:
        self.key, self._options = (scheme, place), options
        kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
        self._connection = kind(place, timeout=options.timeout_seconds)
        self._deadline = 0.0
        self._connection.response_class = self._response  # type: ignore[assignment]  # called like the class

    def ask(self, url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
        """Send a request and read the head of its answer; try again at once if a kept connection has gone."""
        parts = urllib.parse.urlsplit(url)
        path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~") + (
            f"?{parts.query}" if parts.query else ""
        )
        headers = {"Accept-Encoding": "identity", "User-Agent": "engram-lm", **headers}
        kept = self._connection.sock is not None
        while True:
            self._deadline = time.monotonic() + self._options.request_seconds
            try:
                if self._connection.sock is not None:
                    self._connection.sock.settimeout(self._options.timeout_seconds)
                self._connection.request("GET", path, headers=headers)
                return self._connection.getresponse()
            except (ConnectionError, http.client.RemoteDisconnected, http.client.CannotSendRequest):
                self._connection.close()
                if not kept:
                    raise
                # The server closed a connection that nobody had used for a while.
                kept = False

    def _response(self, sock: socket.socket, *arguments: Any, **options: Any) -> http.client.HTTPResponse:
        wire = _Wire(sock, self._options.timeout_seconds, self._deadline)
        return http.client.HTTPResponse(wire, *arguments, **options)  # type: ignore[arg-type]  # it only makes a file

    def close(self) -> None:
        self._connection.close()


class _Wire:
    """A socket as a response sees it: something that a file of the bytes to come can be made of."""

    def __init__(self, sock: socket.socket, timeout_seconds: float, deadline: float) -> None:
        self._sock, self._timeout, self._deadline = sock, timeout_seconds, deadline

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Bytes(self._sock, self._timeout, self._deadline), _READ_BYTES)


class _Bytes(io.RawIOBase):
    """The bytes of a socket until a moment; a server that sends one byte at a time does not put it off."""

    def __init__(self, sock: socket.socket, timeout_seconds: float, deadline: float) -> None:
        super().__init__()
        self._sock, self._timeout, self._deadline = sock, timeout_seconds, deadline
        self._raw = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request took longer than request_seconds")
        self._sock.settimeout(min(left, self._timeout))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._raw.close()


def split_address(url: str) -> tuple[str, str]:
    """Scheme and host with port.

    Raises:
        RemoteError: Not an address that can be asked.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        parts.port  # noqa: B018  # raises where it is no number
    except ValueError as error:
        raise RemoteError(f"{url!r} is not an address: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RemoteError(f"{url!r} is not an http or https address")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return parts.scheme, f"{host}:{parts.port}" if parts.port else host


def _version(answer: http.client.HTTPResponse) -> str | None:
    return answer.getheader("ETag") or answer.getheader("Last-Modified")


def _content_range(answer: http.client.HTTPResponse, url: str) -> tuple[int, int, int]:
    """First byte, last byte and size of the file, from the answer's Content-Range."""
    text = answer.getheader("Content-Range") or ""
    span, _, size = text.removeprefix("bytes ").partition("/")
    first, _, last = span.partition("-")
    numbers = [first.strip(), last.strip(), size.strip()]
    if not text.startswith("bytes ") or not all(n.isascii() and n.isdecimal() and len(n) < 19 for n in numbers):
        raise RemoteError(
            f"{url}: expected a Content-Range of bytes with the size of the file, found {text!r:.200}; use a server "
            "that answers range requests"
        )
    return int(numbers[0]), int(numbers[1]), int(numbers[2])


def _read_body(answer: http.client.HTTPResponse, size: int, url: str) -> bytes:
    """Read a body of exactly ``size`` bytes."""
    length = answer.getheader("Content-Length")
    if length is not None and length != str(size):
        raise RemoteError(f"{url}: {size} bytes were expected, the server announces {length}")
    body = _read_up_to(answer, size)
    if len(body) != size:
        raise _PassingError(f"a short answer: {size} bytes were expected, {len(body)} came")
    return body


def _read_up_to(answer: http.client.HTTPResponse, size: int) -> bytes:
    pieces, left = [], size
    while left:
        piece = answer.read1(left)
        if not piece:
            break
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)
