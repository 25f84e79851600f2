"""Arms of ``engram-lm bench serve`` as processes, seen from the command: started, told to take a pass, ended."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engram_lm.errors import EngramError

_PATIENCE_SECONDS = 10
_LOG_LINES = 15


class ArmProcess:
    """One arm, whose engine is loaded when it is made and which waits between passes without computing."""

    def __init__(self, name: str, nursery: socket.socket, settings: Mapping[str, Any], log: Path) -> None:
        self.name, self._log = name, log
        own, other = socket.socketpair()
        with other:
            socket.send_fds(nursery, [str(log).encode()], [other.fileno()])
        self._socket, self._lines = own, own.makefile("rw", encoding="utf-8")
        self.about = self._ask(dict(settings))
        """What the arm says of its start."""

    def take_pass(self) -> dict[str, Any]:
        """Have all requests run once."""
        return self._ask({"do": "pass"})

    def count_rows(self) -> dict[str, Any]:
        """Have the rows of the last pass counted."""
        return self._ask({"do": "count"})

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):
            self._lines.write(json.dumps(message) + "\n")
            self._lines.flush()
        line = self._lines.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "its process has ended"}
        if "error" in answer:
            said = self._log.read_text(errors="replace").splitlines()[-_LOG_LINES:] if self._log.exists() else []
            raise EngramError("\n  ".join([f"the arm {self.name} failed: {answer['error']}; its last words:", *said]))
        return answer

    def close(self) -> None:
        """End it."""
        self._lines.close()
        self._socket.close()
        with contextlib.suppress(OSError, AttributeError):
            os.kill(self.about["pid"], signal.SIGTERM)


@contextlib.contextmanager
def nursery(engine: str, environment: Mapping[str, str]) -> Iterator[socket.socket]:
    """Start the process that forks arms of one engine, in an environment of variables; it ends with the block."""
    own, other = socket.socketpair()
    command = [sys.executable, "-m", "engram_lm.serving.bench.serve_worker", str(other.fileno()), engine]
    with own, other:
        process = subprocess.Popen(
            command,
            pass_fds=[other.fileno()],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        other.close()
        try:
            yield own
        finally:
            own.close()
            try:
                process.wait(_PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


@contextlib.contextmanager
def file_server(folder: Path) -> Iterator[str]:
    """Serve the files of a folder from another process; yields the address."""
    command = [sys.executable, "-m", "engram_lm.serving.bench.file_server", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()
