"""The process that holds a Mooncake client: its C++ library may then hang or abort without taking its user along.

Run by path, not imported: ``python -P mooncake_process.py SOCKET BUFFER BUFFER_BYTES``, with the numbers of two
inherited descriptors. Requests and answers are frames of JSON behind their length (4 bytes, little endian); the bytes
of values lie in the buffer, memory that both processes map. It needs Mooncake and the standard library only.
"""

import ctypes
import json
import mmap
import os
import select
import socket
import sys
import threading
from typing import Any

LONGEST_FRAME_BYTES = 1 << 28


def receive(peer: socket.socket) -> dict[str, Any] | None:
    """Read one frame; None after the other side has ended."""
    head = _receive_bytes(peer, 4)
    if head is None:
        return None
    length = int.from_bytes(head, "little")
    if length > LONGEST_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes")
    body = _receive_bytes(peer, length)
    return None if body is None else json.loads(body)


def send(peer: socket.socket, message: dict[str, Any]) -> None:
    """Write one frame."""
    body = json.dumps(message).encode()
    peer.sendall(len(body).to_bytes(4, "little") + body)


def _receive_bytes(peer: socket.socket, length: int) -> bytes | None:
    data = bytearray()
    while len(data) < length:
        piece = peer.recv(min(length - len(data), 1 << 20))
        if not piece:
            return None
        data += piece
    return bytes(data)


class _Client:
    """Answers requests with the Mooncake client."""

    def __init__(self, buffer: int, buffer_bytes: int) -> None:
        from mooncake import store

        self._mapping = mmap.mmap(buffer, buffer_bytes)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        self._buffer_bytes = buffer_bytes
        self._store = store.MooncakeDistributedStore()
        self._pinned = store.ReplicateConfig()
        # A table without some of its blocks is no table: its blocks are not the master's to evict.
        self._pinned.with_hard_pin = True

    def setup(self, host: str, metadata: str, master: str) -> list[int]:
        code = self._store.setup(host, metadata, 0, 0, "tcp", "", master)
        if code == 0:
            code = self._store.register_buffer(self._address, self._buffer_bytes)
        return [code]

    def put(self, keys: list[str], starts: list[int], sizes: list[int]) -> list[int]:
        addresses = [self._address + start for start in starts]
        return list(self._store.batch_put_from(keys, addresses, sizes, self._pinned))

    def get(self, keys: list[str], starts: list[int], sizes: list[int]) -> list[int]:
        return list(self._store.batch_get_into(keys, [self._address + start for start in starts], sizes))

    def get_ranges(
        self, keys: list[str], starts: list[list[int]], sizes: list[list[int]], offsets: list[list[int]]
    ) -> list[int]:
        """Bytes read of each key, or a negative code; one question to the master for all keys."""
        codes = list(self._store.batch_get_session_start(keys))
        try:
            if any(code < 0 for code in codes):
                return [min(code, 0) for code in codes]
            addresses = [[self._address + start for start in some] for some in starts]
            return list(self._store.batch_get_into_multi_buffer_ranges(keys, addresses, sizes, offsets))
        finally:
            self._store.batch_get_session_end(keys)

    def sizes(self, keys: list[str]) -> list[int]:
        return [self._store.get_size(key) for key in keys]

    def exist(self, keys: list[str]) -> list[int]:
        return list(self._store.batch_is_exist(keys))

    def remove(self, keys: list[str]) -> list[int]:
        return list(self._store.batch_remove(keys, True))


def _end_with(peer: socket.socket) -> None:
    """End this process when the other side ends, even during a call that hangs."""
    waiting = select.poll()
    waiting.register(peer, select.POLLRDHUP)
    waiting.poll()
    os._exit(0)


def main() -> None:
    """Answer until the other side ends."""
    peer = socket.socket(fileno=int(sys.argv[1]))
    threading.Thread(target=_end_with, args=(peer,), daemon=True).start()
    try:
        client = _Client(int(sys.argv[2]), int(sys.argv[3]))
        send(peer, {"codes": [0]})
    except Exception as error:
        send(peer, {"error": f"{type(error).__name__}: {error}"})
        return
    while (request := receive(peer)) is not None:
        try:
            answer = {"codes": getattr(client, request.pop("call"))(**request)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        send(peer, answer)
    # At once, because the library's own end may take seconds, or hang if the master has ended.
    os._exit(0)


if __name__ == "__main__":
    main()
