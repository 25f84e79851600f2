"""Ctrl-C as a request: the first is noticed between two steps, the second ends the process as usual."""

import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Self

_NOTICED = b"\nstopping after this step; what is done so far is kept. A second Ctrl-C ends at once\n"


class Interrupt:
    """Catches SIGINT and SIGTERM while the context is open.

    Args:
        same_seconds: A signal that follows the first within this time counts as the same request. Under torchrun one
            Ctrl-C arrives twice: from the terminal, and from torchrun, which forwards it to every process.
        silent: Do not say on stderr that the signal was noticed.

    Example:
        >>> with Interrupt() as interrupt:
        ...     while not interrupt.asked:
        ...         break  # a step
    """

    def __init__(self, same_seconds: float = 0.0, *, silent: bool = False) -> None:
        self.asked = False
        self._same_seconds, self._asked_at, self._silent = same_seconds, 0.0, silent
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._notice)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _notice(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._asked_at = True, now
            if not self._silent and sys.__stderr__ is not None:
                with contextlib.suppress(OSError, ValueError):  # past the stream's buffer, which may be in use now
                    os.write(sys.__stderr__.fileno(), _NOTICED)
        elif now - self._asked_at > self._same_seconds:
            raise KeyboardInterrupt
