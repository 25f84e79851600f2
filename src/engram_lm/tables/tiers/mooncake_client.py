"""A Mooncake Store client that cannot hang or crash: it has a process of its own, and every call has a deadline."""

import importlib.util
import mmap
import os
import re
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from engram_lm.errors import ConfigError, MissingExtraError, RemoteError
from engram_lm.tables.tiers import mooncake_process

MISSING = -704
"""Mooncake's code for a key that it does not hold."""
LEASE_EXPIRED = -707
"""Mooncake's code for a call that took longer than the master keeps values in place for it."""

_CODES = {
    -200: "no storage process has room for it; start one, or a larger one: mooncake_client "
    "--master_server_address=... --global_segment_size=...",
    MISSING: "the store does not hold it; publish the table again, a store forgets what a storage process held that "
    "has ended",
    LEASE_EXPIRED: "reading took longer than the master's lease; start it with a larger --default_kv_lease_ttl",
    -800: "the storage process that holds it does not answer; start it again and publish the table again",
    -900: "the master does not answer; check the address and that mooncake_master is running there, the next read "
    "connects anew",
}
_FAILED = "Mooncake failed; look into the logs of the master and of the storage processes"
# What the client's process has unless the user says otherwise. Fewer retries than its own: twenty of them take a minute
# and a half where nobody answers. More connections than its own one: many small ranges then take about half the time.
_ENVIRONMENT = {"MC_STORE_CLIENT_SETUP_RETRIES": "2", "MC_LOG_LEVEL": "ERROR", "MC_TCP_LANES_PER_PEER": "8"}


class MooncakeClient:
    """Puts and gets of many values at once, through a buffer of fixed size.

    After a failure the process ends and the next call starts another, so a store that was restarted is found again.
    Not safe for several threads; the caller takes `lock` around filling or reading the buffer and the call.

    Args:
        address: The master, ``"host:port"``, with or without ``mooncake://``.
        timeout_seconds: Deadline of every call.
        buffer_bytes: Size of the buffer, bound of all values of one call.
        metadata: Mooncake's metadata server: ``"P2PHANDSHAKE"`` for none, or ``"http://host:port/metadata"``. The same
            for all that use a store.

    Raises:
        ConfigError: Not an address.
        MissingExtraError: Mooncake is not installed.
        RemoteError: Nobody answers at the address, or a system library is missing.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_seconds: float = 10.0,
        buffer_bytes: int = 32 << 20,
        metadata: str = "P2PHANDSHAKE",
    ) -> None:
        self.master = address.removeprefix("mooncake://").rstrip("/")
        found = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^\s:/]+):(\d{1,5})", self.master)
        if found is None or not 0 < int(found[2]) < 65536:
            raise ConfigError(f"a Mooncake master has an address like mooncake://host:50051, not {address!r}")
        if not timeout_seconds > 0:
            raise ConfigError(f"timeout_seconds is {timeout_seconds}, expected more than 0")
        self._host, self._port = found[1].strip("[]"), int(found[2])
        if importlib.util.find_spec("mooncake") is None:
            raise MissingExtraError(
                "tables on Mooncake Store need Mooncake: install the extra with `pip install 'engram-lm[mooncake]'`, "
                "and the libraries it needs: apt-get install libibverbs1 libnuma1 libcurl4"
            )
        self.timeout_seconds, self.metadata = timeout_seconds, metadata
        self.lock = threading.RLock()
        memory = os.memfd_create("engram-mooncake")
        os.ftruncate(memory, buffer_bytes)
        self._memory = memory
        self._freed = weakref.finalize(self, os.close, memory)
        self.buffer = np.frombuffer(mmap.mmap(memory, buffer_bytes), np.uint8)
        """uint8 ``[buffer_bytes]``: what puts send and gets receive."""
        self._owner = os.getpid()
        self._peer: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped: weakref.finalize[Any, Any] | None = None

    def call(self, what: str, *, deadline: float | None = None, **arguments: Any) -> list[int]:
        """Carry out one call of ``mooncake_process`` by its name, and return Mooncake's codes, one per key.

        Negative codes are failures (see `explain`). The deadline is of `time.monotonic`; `timeout_seconds` from now
        where None.

        Raises:
            RemoteError: No answer came in time, or the client ended, whose process is ended then; or this is a fork of
                the process that made the client.
        """
        if os.getpid() != self._owner:
            raise RemoteError(
                f"the table at {self.master} was opened before this process was forked, and its connection is the "
                "parent's; open the table in this process"
            )
        deadline = time.monotonic() + self.timeout_seconds if deadline is None else deadline
        with self.lock:
            if self._peer is None:
                self._start(deadline)
            return self._ask({"call": what, **arguments}, deadline)

    def get(self, key: str, size: int) -> bytes:
        """Read one whole value of a known size; a `RemoteError` where the store does not hold it."""
        with self.lock:
            code = self.call("get", keys=[key], starts=[0], sizes=[size])[0]
            if code < 0:
                raise self.explain(key, code)
            return self.buffer[:size].tobytes()

    def explain(self, key: str, code: int) -> RemoteError:
        """The error that a negative code of a key means."""
        return RemoteError(f"{key} at {self.master}: {_CODES.get(code, _FAILED)} (Mooncake code {code})")

    def close(self) -> None:
        """End the process. Closing twice is fine."""
        with self.lock:
            if self._stopped is not None:
                self._stopped()
            self._stopped = self._peer = self._process = None

    def _start(self, deadline: float) -> None:
        try:
            # Tried first, because this fails at once where nobody answers; Mooncake would try for minutes.
            probe = socket.create_connection((self._host, self._port), max(deadline - time.monotonic(), 0.001))
            with probe:
                host = probe.getsockname()[0]
        except OSError as error:
            raise RemoteError(
                f"nobody answers at {self.master} ({error}); expected a Mooncake master, start one with "
                "`mooncake_master --rpc_port=...`"
            ) from error
        self._peer, child = socket.socketpair()
        script = str(Path(mooncake_process.__file__))
        # -P: the folder of the script has a module named like the package it imports.
        command = [sys.executable, "-P", script, str(child.fileno()), str(self._memory), str(self.buffer.nbytes)]
        with child:
            self._process = subprocess.Popen(
                command,
                pass_fds=(child.fileno(), self._memory),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**_ENVIRONMENT, **os.environ},
            )
        self._stopped = weakref.finalize(self, _stop, self._process, self._peer, self._owner)
        self._receive(deadline)
        setup = {"host": host, "metadata": self.metadata, "master": self.master}
        code = self._ask({"call": "setup", **setup}, deadline)[0]
        if code:
            self.close()
            raise RemoteError(f"Mooncake could not join the store at {self.master} (Mooncake code {code})")

    def _ask(self, message: dict[str, Any], deadline: float) -> list[int]:
        assert self._peer is not None
        self._peer.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            mooncake_process.send(self._peer, message)
        except OSError:
            self._fail("ended")
        return self._receive(deadline)

    def _receive(self, deadline: float) -> list[int]:
        assert self._peer is not None
        answer = None
        try:
            # Answers are short, so that one wait for the whole of them is enough.
            self._peer.settimeout(max(deadline - time.monotonic(), 0.001))
            answer = mooncake_process.receive(self._peer)
        except TimeoutError:
            self._fail(f"did not answer within {self.timeout_seconds:g} seconds")
        except OSError:
            pass
        if answer is None:
            self._fail("ended")
            raise AssertionError
        if "error" in answer:
            self.close()
            raise RemoteError(
                f"Mooncake failed: {answer['error']}. If a library is missing: apt-get install libibverbs1 libnuma1 "
                "libcurl4"
            )
        return answer["codes"]

    def _fail(self, how: str) -> None:
        code = self._process.poll() if self._process is not None else None
        self.close()
        raise RemoteError(
            f"the Mooncake client for {self.master} {how}{'' if code is None else f' (exit status {code})'}; is the "
            "master alive, and every storage process? The next read connects anew"
        )


def _stop(process: "subprocess.Popen[bytes]", peer: socket.socket, owner: int) -> None:
    peer.close()
    if os.getpid() != owner:
        return  # this object is a fork's copy, and the process belongs to its parent
    process.kill()
    process.wait()
