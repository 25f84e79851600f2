"""What people see while work runs: a bar on a terminal, plain lines elsewhere, the time left, and what Ctrl-C keeps."""

import contextlib
import time
from collections.abc import Iterator
from typing import Literal

from rich import progress as bars
from rich.console import Console, RenderableType
from rich.text import Text

_FIRST_LINE_SECONDS, _MOST_SECONDS = 20.0, 600.0
"""Where there is no terminal, a line comes after the first of these, and later ever more rarely, up to the second."""

NOTHING = "nothing: results are shown when all is done"
"""What Ctrl-C keeps of work that measures."""


class Progress:
    """Shows how far work is, on a console.

    Args:
        console: Where to show it; the standard error where None.
        silent: Show nothing, as in all processes of a training except the first.
    """

    def __init__(self, console: Console | None = None, *, silent: bool = False) -> None:
        self.console, self.silent = console or Console(stderr=True), silent

    def note(self, text: str) -> None:
        """Say what happens next, with the time of day."""
        if not self.silent:
            self.console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {text}", highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def tasks(self, keeps: str, *, unit: Literal["count", "bytes"] = "count") -> Iterator["Tasks"]:
        """Show one or several tasks while the context is open.

        Args:
            keeps: What is kept if Ctrl-C ends the work now, as the end of the sentence "Ctrl-C keeps ...".
            unit: What the numbers are that `Tasks.show` is given.
        """
        with _Bars(self, keeps, unit) as shown:
            yield Tasks(self, keeps, shown)


class Tasks:
    """Tasks on a console, each known by its title; made by `Progress.tasks`."""

    def __init__(self, progress: Progress, keeps: str, shown: "_Bars") -> None:
        self._progress, self._keeps, self._bars = progress, keeps, shown
        self._known: dict[str, bars.TaskID] = {}
        self._done: dict[str, int] = {}
        self._began: dict[str, tuple[float, int]] = {}
        self._said: float | None = None
        self._started = time.perf_counter()

    def begin(self, title: str, total: int | None = None, *, done: int = 0) -> None:
        """Announce a task before its first part is done, of which ``done`` parts were done in an earlier process."""
        if title not in self._known:
            began = time.perf_counter() if self._known else self._started
            self._known[title] = self._bars.add_task(title, total=total, completed=done, detail="")
            self._began[title], self._done[title] = (began, done), done

    def show(self, title: str, done: int, total: int | None = None, detail: str = "", *, say: bool = False) -> None:
        """Say how much of a task is done.

        Args:
            title: What is being done.
            done: Number of its parts that are done.
            total: Number of all its parts; None where it is not known, or was said before.
            detail: What else to show.
            say: Where there is no terminal, print a line now, and do not wait until it is time for one.
        """
        self.begin(title, total)
        self._done[title] = done
        task = self._known[title]
        self._bars.update(task, completed=done, total=total, detail=detail)  # no total leaves it as it is
        now = time.perf_counter()
        last = self._started if self._said is None else self._said
        wait = max(_FIRST_LINE_SECONDS, min(_MOST_SECONDS, (now - self._started) / 10))
        if self._bars.disable and (say or now - last >= wait):
            self._say(title, now, detail)

    def advance(self, title: str, more: int, total: int | None = None, detail: str = "") -> None:
        """Say that ``more`` parts of a task are done than at the last call."""
        self.show(title, self._done.get(title, 0) + more, total, detail)

    def _say(self, title: str, now: float, detail: str) -> None:
        if self._said is None:
            self._progress.note(f"Ctrl-C keeps {self._keeps}")
        self._said = now
        done, total = self._done[title], self._bars.tasks[self._bars.task_ids.index(self._known[title])].total
        (began, before), left = self._began[title], ""
        if total is not None and done > before:
            left = f"{_clock((now - began) / (done - before) * (total - done))} left"
        words = [title, self._bars.amount(done, total), detail, left]
        self._progress.note("  ".join(filter(None, words)))


class _Bars(bars.Progress):
    """Bars for a terminal, with a line below them that says what Ctrl-C keeps."""

    def __init__(self, progress: Progress, keeps: str, unit: Literal["count", "bytes"]) -> None:
        self._keeps, self._unit = keeps, unit
        amount = bars.DownloadColumn() if unit == "bytes" else bars.MofNCompleteColumn()
        console = progress.console
        super().__init__(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(bar_width=max(8, min(24, console.width - 68))),
            amount,
            bars.TextColumn("{task.fields[detail]}"),
            bars.TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=progress.silent or not console.is_terminal,
        )

    def get_renderables(self) -> Iterator[RenderableType]:
        """The bars and the line below them."""
        yield from super().get_renderables()
        yield Text(f"Ctrl-C keeps {self._keeps}", style="dim")

    def amount(self, done: int, total: float | None) -> str:
        """Write how much is done of how much."""
        of = "" if total is None else f" of {total / 1e6:,.1f}" if self._unit == "bytes" else f" of {total:,.0f}"
        return f"{done / 1e6:,.1f}{of} MB" if self._unit == "bytes" else f"{done:,}{of}"


def _clock(seconds: float) -> str:
    """Write a time as minutes and seconds, with hours where there are some."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
