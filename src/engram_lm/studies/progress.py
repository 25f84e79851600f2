"""What a person sees while a study works: live bars on a terminal, plain lines elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.progress import TaskProgressColumn, TextColumn, TimeRemainingColumn

from engram_lm.training.progress import RunProgress

_PLAIN_LINES = 10
"""Lines that a task prints where there is no terminal."""
_RECENT_STEPS = 20


class StudyProgress(RunProgress):
    """Progress of a study on a console."""

    @contextlib.contextmanager
    def task(self, title: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """Show training; the yielded function takes the number of steps taken so far, and what else to say."""
        self.note(title)
        started, said = time.perf_counter(), 0
        columns = (TaskProgressColumn(), TextColumn("{task.fields[detail]}"), TimeRemainingColumn(compact=True))
        with self._bar(*columns) as bar:
            task = bar.add_task(title, total=total, detail="")

            def show(done: int, detail: str = "") -> None:
                nonlocal said
                bar.update(task, completed=done, detail=detail)
                if bar.disable and detail and done - said >= max(1, total // _PLAIN_LINES) and done < total:
                    said = done
                    left = (time.perf_counter() - started) / done * (total - done)
                    self.note(f"step {done:,} of {total:,}  {detail}  {int(left) // 60}:{int(left) % 60:02d} left")

            yield show


def recent_losses(losses: Mapping[str, Sequence[float]]) -> str:
    """Write the mean of each arm's last losses, in nats per token."""
    recent = {name: found[-_RECENT_STEPS:] for name, found in losses.items() if found}
    return "loss " + "  ".join(f"{name} {sum(found) / len(found):.3f}" for name, found in recent.items())
