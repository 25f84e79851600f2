"""What a person sees while a study works."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from engram_lm.training.progress import RunProgress

_RECENT_STEPS = 20


class StudyProgress(RunProgress):
    """Progress of a study on a console.

    Args:
        keeps: What Ctrl-C keeps of the study, as the end of a sentence.
    """

    def __init__(
        self, keeps: str = "all models so far, and checkpoints of those in training; --resume goes on from them"
    ) -> None:
        super().__init__()
        self._keeps = keeps

    @contextlib.contextmanager
    def task(self, title: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """Show training; the yielded function takes the number of steps taken so far, and what else to say."""
        self.note(title)
        with self.tasks(self._keeps) as tasks:
            tasks.begin("training", total)

            def show(done: int, detail: str = "") -> None:
                tasks.show("training", done, total, detail)

            yield show


def recent_losses(losses: Mapping[str, Sequence[float]]) -> str:
    """Write the mean of each arm's last losses, in nats per token."""
    recent = {name: found[-_RECENT_STEPS:] for name, found in losses.items() if found}
    return "loss " + "  ".join(f"{name} {sum(found) / len(found):.3f}" for name, found in recent.items())
