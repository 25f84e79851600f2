"""A training run: from a recipe to a folder with the trained model, also after an interruption."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engram_lm.errors import RunFolderError
from engram_lm.files import user_path, write_atomically
from engram_lm.training.checkpoints import latest_checkpoint
from engram_lm.training.distribution import Ranks, agree
from engram_lm.training.export import CHECKPOINTS, TOKENIZER
from engram_lm.training.interrupts import Interrupt
from engram_lm.training.job import METRICS, Job
from engram_lm.training.progress import RunProgress
from engram_lm.training.recipe import Recipe
from engram_lm.training.recipe_file import write_toml
from engram_lm.training.run_folder import hold_folder

RECIPE = "recipe.toml"
"""The recipe in a run's folder, with every key."""


class Run:
    """One training run in its folder.

    The folder holds ``recipe.toml`` (every key, resolved), ``metrics.jsonl`` (one object per step), ``checkpoints/``,
    ``tokenizer/`` and, when training has ended, ``model/`` (a Hugging Face folder), ``result.json`` and ``loss.png``.

    Args:
        recipe: What to do.
        out: The run folder. It may hold a run only where ``resume`` says so.
        ranks: The processes, which all do the same; None means this one alone, on the CPU.
        resume: Whether to go on from the last complete checkpoint, or from the start if there is none yet.
        stop_after: Step to stop at, with a checkpoint, before the schedule's end; None goes to the end.
        progress: What people see; None shows nothing.

    Raises:
        RunFolderError: The folder holds something that must not be lost.
        MismatchError: It was begun with another recipe.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        ranks: Ranks | None = None,
        *,
        resume: bool = False,
        stop_after: int | None = None,
        progress: RunProgress | None = None,
    ) -> None:
        self.recipe, self.ranks = recipe, ranks or Ranks()
        self.progress = progress or RunProgress(silent=True)
        self.out = user_path(out).resolve()
        self.resume = resume
        self.last_step = min(recipe.train.num_steps, stop_after or recipe.train.num_steps)

    def execute(self) -> dict[str, Any]:
        """Train to the end, or until a signal arrives; then a checkpoint is left.

        What ``result.json`` holds is returned; ``interrupted`` says whether a signal ended training early.
        """
        with self.open() as job:
            with (
                Interrupt(0.0 if self.ranks.group is None else 2.0, silent=not self.ranks.is_first) as interrupt,
                self.progress.training(job.num_steps_done, self.last_step) as show,
            ):
                while not job.done:
                    record, _ = job.step()
                    show(record, job.held_out)
                    # Ranks agree on this between two steps. Otherwise one would wait for the others' next exchange.
                    if self.ranks.any(interrupt.asked):
                        job.save(wait=True)
                        break
            return job.finish()

    @contextlib.contextmanager
    def open(self) -> Iterator[Job]:
        """Take the folder and prepare everything, so that steps can be taken one at a time.

        Several runs can be open in one process and take steps in turn. Each draws its own random numbers, so its
        result is the same as if it were trained alone.

        Example:
            >>> with Run(recipe, out).open() as job:  # doctest: +SKIP
            ...     while not job.done:
            ...         record, values = job.step()
            ...     result = job.finish()
        """
        with contextlib.ExitStack() as stack:
            with agree(self.ranks):
                if self.ranks.is_first:
                    self._take_folder(stack)
            job = Job(self.recipe, self.out, self.ranks, self.progress, resume=self.resume, last_step=self.last_step)
            try:
                yield job
            finally:
                job.close()

    def _take_folder(self, stack: contextlib.ExitStack) -> None:
        """Make the run folder this run's, or find that it is."""
        known = stack.enter_context(hold_folder(self.out, RECIPE, kind="a training run", work="training"))
        if known:
            self._check_earlier(Recipe.read(self.out / RECIPE))
        try:
            write_atomically(self.out / RECIPE, write_toml(self.recipe.to_dict()))
        except OSError as error:
            raise RunFolderError(
                f"cannot write to {self.out}: {error.strerror}; name a folder you can write to with --out"
            ) from error

    def _check_earlier(self, recipe: Recipe) -> None:
        """Compare this recipe with the one in the folder, if anything was trained by that one."""
        if (self.out / METRICS).exists() or latest_checkpoint(self.out / CHECKPOINTS) is not None:
            if not self.resume:
                raise RunFolderError(
                    f"{self.out} holds a run already; go on with it with --resume, or name another folder with --out"
                )
            self.recipe.check_resumable(recipe.to_dict())
        elif recipe != self.recipe and (self.out / TOKENIZER).is_dir():
            # That run ended before its first step, perhaps by a mistake that is now corrected. Nothing can be lost.
            shutil.rmtree(self.out / TOKENIZER)
