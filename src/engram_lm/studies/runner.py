"""Arms times seeds as ordinary training runs: side by side, one after the other, or in parallel processes."""

import collections
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from engram_lm.errors import DivergedError, EngramError, RunFolderError
from engram_lm.files import write_atomically
from engram_lm.studies.arm_process import FAILED, note_divergence
from engram_lm.studies.progress import StudyProgress, recent_losses
from engram_lm.studies.study import Arm, Study, TrainedArm
from engram_lm.training.assembly import find_tokenizer, open_text
from engram_lm.training.checkpoints import latest_checkpoint
from engram_lm.training.checkpoints.training_state import export_model
from engram_lm.training.data.text import TrainingText
from engram_lm.training.distribution import start
from engram_lm.training.export import CHECKPOINTS, TOKENIZER
from engram_lm.training.interrupts import Interrupt
from engram_lm.training.job import MODEL, RESULT, Job
from engram_lm.training.metrics import read_metrics
from engram_lm.training.recipe import Recipe
from engram_lm.training.recipe_file import write_toml
from engram_lm.training.run import Run

__all__ = ["Mode", "Outcome", "Runner"]

Mode = Literal["interleaved", "one_by_one", "processes"]
"""``interleaved``: all arms of a seed in this process, step by step in turn, which compares their speed fairly.
``one_by_one``: one arm after the other. ``processes``: an arm per process of one thread, as many at a time as there are
cores."""

_POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True, eq=False)
class _Planned:
    """One run of the study."""

    arm: Arm
    seed: int
    recipe: Recipe
    folder: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was trained."""

    seeds: tuple[dict[str, TrainedArm], ...]
    """For each whole seed, its arms by name."""
    cut_short: dict[str, TrainedArm]
    """Arms of the seed that a signal cut short, as far as they came, where they were to be kept; empty otherwise."""
    interrupted: bool
    """Whether a signal ended training early."""


class Runner:
    """Trains the arms of a study, each in ``seed-N/ARM/`` of its folder; see `engram_lm.training.run.Run`.

    All arms of a seed come before the next seed. An arm that is finished is not trained again, one that was stopped
    goes on from its last checkpoint, and one that diverged is a result like any other.

    Several arms train faster in as many processes of one thread as there are cores than in one process of as many
    threads: models of this size do not keep two cores busy.

    Args:
        study: What to train.
        out: The folder of the study.
        mode: How to divide the work.
        progress: What people see.
        interrupt: Tells when to stop.
        keep_unfinished: Whether the models of a seed that is cut short are kept as far as they came.
    """

    def __init__(
        self,
        study: Study,
        out: Path,
        *,
        mode: Mode,
        progress: StudyProgress,
        interrupt: Interrupt,
        keep_unfinished: bool = False,
    ) -> None:
        self.study, self.out, self.mode, self.keep_unfinished = study, out, mode, keep_unfinished
        self.progress, self.interrupt = progress, interrupt
        self._tokenizers: dict[Any, Path] = {}
        self._texts: dict[Any, TrainingText] = {}
        self._silent = StudyProgress(progress.console, silent=True)

    def run(self) -> Outcome:
        """Train everything that is not trained yet.

        Raises:
            DataError: There is too little text.
            MismatchError: A run was begun with another recipe.
            RunFolderError: A folder cannot be written, or a finished run is damaged.
        """
        seeds: list[list[_Planned]] = [
            [self._planned(arm, seed) for arm in self.study.arms] for seed in range(self.study.seeds)
        ]
        partial: dict[str, TrainedArm] = {}
        if self.mode == "processes":
            self._in_processes([one for seed in seeds for one in self._pending(seed)])
        else:
            for seed in seeds:
                pending = self._pending(seed)
                for group in [pending] if self.mode == "interleaved" else [[one] for one in pending]:
                    if group and not self.interrupt.asked:
                        partial = self._side_by_side(group)
        whole = []
        for seed in seeds:
            found = {one.arm.name: trained for one in seed if (trained := _finished(one)) is not None}
            if len(found) == len(seed):
                whole.append(found)
        interrupted = len(whole) < len(seeds)
        return Outcome(seeds=tuple(whole), cut_short=partial if interrupted else {}, interrupted=interrupted)

    def text(self, recipe: Recipe) -> TrainingText:
        """Tokenize a recipe's text, unless that was done before.

        Raises:
            DataError: There is no text, or too little of it.
        """
        recipe = self.complete(recipe)
        key = (recipe.data, recipe.evaluation)
        if key not in self._texts:
            tokenizer = find_tokenizer(recipe, Path(recipe.tokenizer.path or self.out / TOKENIZER))
            with self.progress.packing() as advance:
                self._texts[key] = text = open_text(recipe, tokenizer, advance)
            if text.about is not None:
                self.progress.note(text.about)
        return self._texts[key]

    def complete(self, recipe: Recipe) -> Recipe:
        """Let a recipe share its text and its tokenizer with the other runs of the study, which are made once."""
        if recipe.data.cache is None:
            recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, cache=self.out / "text"))
        if recipe.tokenizer.path is not None or recipe.model.weights is not None:
            return recipe
        key = (recipe.tokenizer, recipe.data)
        if key not in self._tokenizers:
            number = len(self._tokenizers) + 1
            folder = self.out / (TOKENIZER if number == 1 else f"{TOKENIZER}-{number}")
            if not folder.is_dir():
                self.progress.note("training a tokenizer")
            find_tokenizer(recipe, folder)
            self._tokenizers[key] = folder
        options = dataclasses.replace(recipe.tokenizer, path=str(self._tokenizers[key]))
        return dataclasses.replace(recipe, tokenizer=options)

    def _planned(self, arm: Arm, seed: int) -> _Planned:
        recipe = self.complete(self.study.recipe_of(arm, seed))
        return _Planned(arm, seed, recipe, self.out / f"seed-{seed}" / arm.name)

    def _pending(self, planned: Sequence[_Planned]) -> list[_Planned]:
        """Those that are not finished. Beside its folder each gets its recipe, which ``engram-lm train`` can read."""
        pending = [one for one in planned if _finished(one) is None]
        for one in pending:
            self.text(one.recipe)  # here, where it is seen, and once: parallel processes would all do it
            write_atomically(one.folder.with_name(f"{one.arm.name}.toml"), write_toml(one.recipe.to_dict()))
        return pending

    def _side_by_side(self, group: Sequence[_Planned]) -> dict[str, TrainedArm]:
        """Train some runs in this process, a step of each in turn, so that a slow minute slows all of them alike.

        Returns:
            The runs by arm, where a signal came first; then each has a model as far as it came.
        """
        seed, steps = group[0].seed, group[0].recipe.train.num_steps
        which = group[0].arm.title if len(group) == 1 else f"{len(group)} models"
        label = f"seed {seed}: " if self.study.seeds > 1 else ""
        device = group[0].recipe.train.device
        with contextlib.ExitStack() as stack:
            ranks = stack.enter_context(start(None if device == "auto" else device))
            jobs: dict[_Planned, Job] = {}
            for one in group:
                run = Run(one.recipe, one.folder, ranks, resume=True, progress=self._silent)
                jobs[one] = stack.enter_context(run.open())
            show = stack.enter_context(self.progress.task(f"{label}training {which}, {steps:,} steps each", steps))
            losses: dict[str, list[float]] = {one.arm.name: [] for one in group}
            while going := [one for one in jobs if not jobs[one].done]:
                seconds = tokens = 0.0
                for one in going:
                    try:
                        record, _ = jobs[one].step()
                    except DivergedError as error:
                        self._diverged(one, error)
                        del jobs[one]
                        continue
                    losses[one.arm.name].append(record.loss)
                    seconds, tokens = seconds + record.seconds, tokens + record.num_tokens / record.step
                if seconds:
                    done = min(job.num_steps_done for job in jobs.values())
                    show(done, f"{recent_losses(losses)}  {tokens / seconds:,.0f} tokens/s")
                if self.interrupt.asked:
                    break
            unfinished = {one: job for one, job in jobs.items() if not job.done}
            for job in unfinished.values():
                job.save(wait=True)
            results = {one: job.finish() for one, job in jobs.items()}
            if self.keep_unfinished:
                for one, job in unfinished.items():
                    if job.text.held_out is not None:
                        results[one]["held_out"] = job.evaluate(job.text.held_out).to_dict()
            if not unfinished:
                return {}
            step = max(job.num_steps_done for job in unfinished.values())
            self.progress.note(f"interrupted after step {step} of {steps}; saving what was trained")
        return {one.arm.name: _cut_short(one, results[one]) for one in jobs} if self.keep_unfinished else {}

    def _in_processes(self, pending: Sequence[_Planned]) -> None:
        """Train some runs in processes of one thread, as many at a time as there are cores."""
        waiting, running = collections.deque(pending), dict[_Planned, subprocess.Popen[bytes]]()
        num_workers = max(1, min(os.cpu_count() or 1, len(waiting)))
        total, told = sum(one.recipe.train.num_steps for one in pending), False
        try:
            with self.progress.task(f"training {len(pending)} models, {num_workers} at a time", total) as show:
                while running or (waiting and not self.interrupt.asked):
                    while waiting and len(running) < num_workers and not self.interrupt.asked:
                        one = waiting.popleft()
                        running[one] = _started(one)
                    time.sleep(_POLL_SECONDS)
                    if self.interrupt.asked and not told:
                        told = True
                        for process in running.values():
                            process.terminate()
                    for one in [one for one, process in running.items() if process.poll() is not None]:
                        self._ended(one, running.pop(one).returncode)
                    show(*_state_of(pending, running))
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()

    def _ended(self, one: _Planned, status: int) -> None:
        """Note that a process ended; another end than that of training or of a signal is an error."""
        if status not in (0, 130, -signal.SIGTERM):  # the last where it had not begun to train
            log = _log_of(one)
            said = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
            raise EngramError(
                f"training {one.arm.name} with seed {one.seed} ended with status {status}: {said[0]} ({log})"
            )
        trained = _finished(one)
        if trained is not None and trained.failed is not None:
            self.progress.note(f"{one.arm.title}, seed {one.seed}: {trained.failed}")

    def _diverged(self, one: _Planned, error: DivergedError) -> None:
        note_divergence(one.folder, error)
        self.progress.note(f"{one.arm.title}, seed {one.seed}: {error}")


def _started(one: _Planned) -> "subprocess.Popen[bytes]":
    """Start a process that trains one run. A signal to the terminal reaches only this process, which passes it on."""
    with _log_of(one).open("wb") as log:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "engram_lm.studies.arm_process",
                one.folder.with_name(f"{one.arm.name}.toml"),
                one.folder,
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _log_of(one: _Planned) -> Path:
    return one.folder.with_name(f"{one.arm.name}.log")


def _state_of(planned: Sequence[_Planned], running: dict[_Planned, Any]) -> tuple[int, str]:
    """Steps that all runs have done, and the losses of those that are running."""
    done, losses = 0, {}
    for one in planned:
        path = one.folder / "metrics.jsonl"
        lines = read_metrics(path) if path.is_file() else []
        if lines:
            done += lines[-1]["step"]
            if one in running:
                losses[f"{one.arm.name}-{one.seed}"] = [line["loss"] for line in lines if line["loss"] is not None]
    return done, recent_losses(losses) if losses else ""


def _finished(one: _Planned) -> TrainedArm | None:
    """What a run came to, where it is finished.

    Raises:
        MismatchError: It was begun with another recipe.
        RunFolderError: Its result is damaged.
    """
    place = next((path for name in (RESULT, FAILED) if (path := one.folder / name).is_file()), None)
    if place is None:
        return None
    one.recipe.check_resumable(Recipe.read(one.folder / "recipe.toml").to_dict())
    try:
        found = json.loads(place.read_bytes())
        if place.name == FAILED:
            return TrainedArm(arm=one.arm, seed=one.seed, folder=one.folder, result={}, failed=str(found["failed"]))
        whole = found["num_steps"] == one.recipe.train.num_steps and (one.folder / MODEL / "config.json").is_file()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(
            f"{place} is damaged ({error}); remove {one.folder}, and --resume trains this model again"
        ) from error
    return TrainedArm(arm=one.arm, seed=one.seed, folder=one.folder, result=found) if whole else None


def _cut_short(one: _Planned, result: dict[str, Any]) -> TrainedArm:
    """Write the model of a run that was stopped, as far as it came."""
    if not (one.folder / MODEL).is_dir():
        latest = latest_checkpoint(one.folder / CHECKPOINTS)
        assert latest is not None, "the run was saved when it was stopped"
        export_model(latest, one.folder / MODEL, tokenizer=Path(one.recipe.tokenizer.path or ""))
    return TrainedArm(arm=one.arm, seed=one.seed, folder=one.folder, result=result)
