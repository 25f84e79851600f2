"""What a person sees of a run, and only from the first process."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from engram_lm.progress import Progress
from engram_lm.training.loop import StepRecord

CHECKPOINT = "a checkpoint of the last step; --resume goes on from it"
"""What Ctrl-C keeps of training."""


class RunProgress(Progress):
    """Shows the progress of a run; ``silent`` on all processes except the first."""

    @contextlib.contextmanager
    def packing(self) -> Iterator[Callable[[str, int, int | None], None]]:
        """Show how much text has been tokenized. The yielded function is what `pack_to_shards` calls."""
        done, started = 0, time.perf_counter()
        with self.tasks("what is tokenized; the next start goes on from there", unit="bytes") as tasks:

            def advance(name: str, num_bytes: int, total_bytes: int | None) -> None:
                nonlocal done
                if name == "tokenizing":
                    if not done and total_bytes:
                        self.note(f"tokenizing {total_bytes / 1e6:,.1f} MB of text")
                    done += num_bytes
                tasks.advance(f"{name} text", num_bytes, total_bytes)

            yield advance
        if done:
            self.note(f"tokenized {done / 1e6:,.1f} MB in {time.perf_counter() - started:.1f} s")

    @contextlib.contextmanager
    def training(
        self, done: int, num_steps: int, *, keeps: str = CHECKPOINT
    ) -> Iterator[Callable[[StepRecord, dict[str, Any] | None], None]]:
        """Show training. The yielded function takes the record of each step and the newest held-out measurement."""
        self.note(f"training, steps {done + 1:,} to {num_steps:,}" if done < num_steps else "nothing is left to train")
        with self.tasks(keeps) as tasks:
            if done < num_steps:
                tasks.begin("training", num_steps, done=done)

            def show(record: StepRecord, held_out: dict[str, Any] | None) -> None:
                detail = f"loss {record.loss:.3f}"
                detail += "" if held_out is None else f"  held out {held_out['loss']:.3f}"
                speed = record.num_tokens / record.step / record.seconds
                detail += f"  {speed:,.0f} tokens/s" + ("  skipped" if record.skipped else "")
                tasks.show("training", record.step, detail=detail, say=record.step in (done + 1, num_steps))

            yield show
