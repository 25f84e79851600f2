"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere, and only from the first process."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engram_lm.training.loop import StepRecord

_SECONDS_BETWEEN_LINES = 20.0


class RunProgress:
    """Shows the progress of a run, live on a terminal; ``silent`` on all processes except the first."""

    def __init__(self, console: Console, *, silent: bool = False) -> None:
        self.console, self.silent = console, silent

    def note(self, text: str) -> None:
        """Say what happens next."""
        if not self.silent:
            self.console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {text}", highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def packing(self) -> Iterator[Callable[[str, int, int | None], None]]:
        """Show how much text has been tokenized. The yielded function is what `pack_to_shards` calls."""
        done: dict[str, int] = {}
        started = said = time.perf_counter()
        with self._bar(TextColumn("{task.fields[detail]}")) as bar:
            tasks: dict[str, Any] = {}

            def advance(name: str, num_bytes: int, total_bytes: int | None) -> None:
                nonlocal said
                if name not in tasks:
                    tasks[name] = bar.add_task(f"{name} text", total=total_bytes, detail="")
                    if name == "tokenizing" and total_bytes:
                        self.note(f"tokenizing {total_bytes / 1e6:,.1f} MB of text")
                done[name] = done.get(name, 0) + num_bytes
                bar.update(tasks[name], completed=done[name], detail=f"{done[name] / 1e6:,.1f} MB")
                if bar.disable and time.perf_counter() - said > _SECONDS_BETWEEN_LINES:
                    said = time.perf_counter()
                    self.note(f"{name} text: {done[name] / 1e6:,.1f} MB")

            yield advance
        if "tokenizing" in done:
            self.note(f"tokenized {done['tokenizing'] / 1e6:,.1f} MB in {time.perf_counter() - started:.1f} s")

    @contextlib.contextmanager
    def training(self, done: int, num_steps: int) -> Iterator[Callable[[StepRecord, dict[str, Any] | None], None]]:
        """Show training. The yielded function takes the record of each step and the newest held-out measurement."""
        self.note(f"training, steps {done + 1:,} to {num_steps:,}" if done < num_steps else "nothing is left to train")
        tokens, started, said = 0, time.perf_counter(), time.perf_counter()
        columns = (MofNCompleteColumn(), TextColumn("{task.fields[detail]}"), TimeRemainingColumn(compact=True))
        with self._bar(*columns) as bar:
            task = bar.add_task("training", total=num_steps, completed=done, detail="")

            def show(record: StepRecord, held_out: dict[str, Any] | None) -> None:
                nonlocal said, tokens
                per_step = record.num_tokens / record.step
                detail = f"loss {record.loss:.3f}"
                detail += "" if held_out is None else f"  held out {held_out['loss']:.3f}"
                detail += f"  {per_step / record.seconds:,.0f} tokens/s" + ("  skipped" if record.skipped else "")
                bar.update(task, completed=record.step, detail=detail)
                now = time.perf_counter()
                if bar.disable and (now - said > _SECONDS_BETWEEN_LINES or record.step in (done + 1, num_steps)):
                    said = now
                    left = (now - started) / (record.step - done) * (num_steps - record.step)
                    self.note(f"step {record.step}/{num_steps}  {detail}  {int(left) // 60}:{int(left) % 60:02d} left")

            yield show

    def _bar(self, *columns: Any) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            *columns,
            console=self.console,
            transient=True,
            disable=self.silent or not self.console.is_terminal,
        )
