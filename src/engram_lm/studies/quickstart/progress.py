"""What a person sees while the quickstart works: live bars on a terminal, plain lines elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from engram_lm.training.loop import StepRecord

__all__ = ["Progress"]

_PLAIN_LINES = 10
"""Lines that training prints where there is no terminal."""


class Progress:
    """Progress of the quickstart on a console.

    Args:
        console: Where to show it; live if it is a terminal.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._rich = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            MofNCompleteColumn() if not console.is_terminal else TextColumn(""),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rich.stop()

    def note(self, text: str) -> None:
        """Say what happens next."""
        self.console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {text}", highlight=False)

    @contextlib.contextmanager
    def task(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a task of known length; the yielded function advances it."""
        self.note(name)
        task = self._rich.add_task(name, total=total, detail="")
        try:
            yield lambda amount: self._rich.advance(task, amount)
        finally:
            self._rich.remove_task(task)

    @contextlib.contextmanager
    def training(
        self, name: str, num_steps: int, arms: Sequence[str]
    ) -> Iterator[Callable[[Mapping[str, Sequence[StepRecord]]], None]]:
        """Show training; the yielded function takes the records of all arms after every step."""
        self.note(f"{name}, {num_steps} steps each")
        task = self._rich.add_task(name, total=num_steps, detail="")
        started = time.perf_counter()
        every = max(1, num_steps // _PLAIN_LINES)

        def show(records: Mapping[str, Sequence[StepRecord]]) -> None:
            step = records[arms[0]][-1].step
            detail = "  ".join(f"{arm} {_recent_loss(records[arm]):.3f}" for arm in arms)
            recent = [record for arm in arms for record in records[arm][-20:]]
            tokens = records[arms[0]][0].num_tokens
            speed = len(recent) * tokens / sum(record.seconds for record in recent)
            detail = f"loss {detail}  {speed:,.0f} tokens/s"
            self._rich.update(task, completed=step, detail=detail)
            if not self.console.is_terminal and step % every == 0 and step < num_steps:
                left = (time.perf_counter() - started) / step * (num_steps - step)
                self.note(f"step {step}/{num_steps}  {detail}  {_duration(left)} left")

        try:
            yield show
        finally:
            self._rich.remove_task(task)


def _recent_loss(records: Sequence[StepRecord]) -> float:
    last = records[-20:]
    return sum(record.loss for record in last) / len(last)


def _duration(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
