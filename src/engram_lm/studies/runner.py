"""Arms times seeds as ordinary training runs: side by side, one after the other, or in parallel processes."""

import collections
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from engram_lm.errors import DivergedError, EngramError, RunFolderError
from engram_lm.files import read_json, read_text, user_path, write_atomically
from engram_lm.studies.progress import StudyProgress, recent_losses
from engram_lm.studies.study import Arm, Study, TrainedArm, short_digest
from engram_lm.threads import allowed_cores
from engram_lm.training.assembly import find_tokenizer, open_text
from engram_lm.training.checkpoints import latest_checkpoint
from engram_lm.training.checkpoints.training_state import export_model
from engram_lm.training.data.text import TrainingText
from engram_lm.training.distribution import start
from engram_lm.training.export import CHECKPOINTS, TOKENIZER
from engram_lm.training.interrupts import Interrupt
from engram_lm.training.job import FAILED, METRICS, MODEL, RESULT, Job
from engram_lm.training.metrics import read_metrics
from engram_lm.training.recipe import Recipe
from engram_lm.training.recipe_file import write_toml
from engram_lm.training.run import RECIPE, Run

Mode = Literal["interleaved", "one_by_one", "processes"]
"""``interleaved``: all arms of a seed in this process, step by step in turn, which compares their speed fairly.
``one_by_one``: one arm after the other. ``processes``: an arm per process of one thread, as many at a time as
`allowed_cores`."""

_POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was trained."""

    seeds: tuple[dict[str, TrainedArm], ...]
    """For each whole seed, its arms by name."""
    cut_short: dict[str, TrainedArm]
    """Arms of the seed that a signal cut short, as far as they came, where they were to be kept; empty otherwise."""
    interrupted: bool
    """Whether a signal ended training early."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Planned:
    """One run of the study."""

    arm: Arm
    seed: int
    recipe: Recipe
    folder: Path

    @property
    def is_first(self) -> bool:
        """Whether the run is this arm's own, and not that of another arm with the same recipe."""
        return self.folder.name == self.arm.name

    def beside(self, ending: str) -> Path:
        """A file beside the run's folder. Inside, it would not be an ordinary run's."""
        return self.folder.with_name(f"{self.arm.name}.{ending}")

    def changes(self) -> list[str]:
        """How the recipe differs from the one that the run was begun with, if anything was trained by that one."""
        path = self.folder / RECIPE
        begun = (self.folder / METRICS).exists() or latest_checkpoint(self.folder / CHECKPOINTS) is not None
        if not (begun and path.is_file()):
            return []
        return self.recipe.differences(_as_if_here(Recipe.read(path).to_dict(), self.recipe))

    def finished(self) -> TrainedArm | None:
        """What the run came to, where it is finished."""
        place = next((path for name in (RESULT, FAILED) if (path := self.folder / name).is_file()), None)
        if place is None or self.changes():
            return None
        advice = f"remove {self.folder}, and --resume trains this model again"
        found = read_json(place, error=RunFolderError, advice=advice)
        trained = TrainedArm(arm=self.arm, seed=self.seed, folder=self.folder, result=found)
        if place.name == FAILED:
            return dataclasses.replace(trained, result={}, failed=str(found.get("failed")))
        whole = (
            found.get("num_steps") == self.recipe.train.num_steps and (self.folder / MODEL / "config.json").is_file()
        )
        return trained if whole else None


class Runner:
    """Trains the arms of a study, each in ``seed-N/ARM/`` of its folder; see `engram_lm.training.run.Run`.

    All arms of a seed come before the next seed. An arm that is finished is not trained again, one that was stopped
    goes on from its last checkpoint, and one that diverged is a result like any other. An arm whose recipe is another
    one now is trained again, and what it came to before is moved to ``seed-N/ARM.earlier/``; the others stay.

    Arms with equal recipes are trained once, such as a model that is measured alone and with a store that it searches.

    Parallel processes of one thread are faster than one process of several threads, which small models do not keep
    busy: six of them took 97 s and 54 s of computing on two busy cores, against 407 s and 154 s on two threads.

    With ``keep_unfinished``, the models of a seed that is cut short are kept as far as they came.
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
        self._tokenizers: set[Path] = set()
        self._texts: dict[Any, TrainingText] = {}

    def run(self) -> Outcome:
        """Train everything that is not trained yet."""
        seeds = [self._planned_seed(seed) for seed in range(self.study.seeds)]
        partial: dict[str, TrainedArm] = {}
        pending = [[one for one in seed if one.is_first and one.finished() is None] for seed in seeds]
        self._move_aside([one for seed in pending for one in seed])
        if self.mode == "processes":
            self._in_processes([one for seed in pending for one in seed])
        else:
            groups = pending if self.mode == "interleaved" else [[one] for seed in pending for one in seed]
            for group in groups:
                if group and not self.interrupt.asked:
                    partial = self._side_by_side(group)
        found = [{one.arm.name: trained for one in seed if (trained := one.finished())} for seed in seeds]
        whole = tuple(arms for arms in found if len(arms) == len(self.study.arms))
        interrupted = len(whole) < len(seeds)
        return Outcome(seeds=whole, cut_short=partial if interrupted else {}, interrupted=interrupted)

    def text(self, recipe: Recipe) -> TrainingText:
        """Tokenize a recipe's text, unless that was done before."""
        recipe = self.complete(recipe)
        key = (recipe.data, recipe.evaluation)
        if key not in self._texts:
            tokenizer = find_tokenizer(recipe, user_path(recipe.tokenizer.path or tokenizer_folder(self.out, recipe)))
            self._texts[key] = open_text(recipe, tokenizer, self.progress)
        return self._texts[key]

    def complete(self, recipe: Recipe) -> Recipe:
        """Let a recipe share its text and its tokenizer with the other runs of the study, which are made once."""
        if recipe.data.cache is None:
            recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, cache=self.out / "text"))
        if recipe.tokenizer.path is not None or recipe.model.weights is not None or recipe.model.base is not None:
            return recipe
        folder = tokenizer_folder(self.out, recipe)
        if folder not in self._tokenizers:
            if not folder.is_dir():
                self.progress.note("training a tokenizer")
            find_tokenizer(recipe, folder)
            self._tokenizers.add(folder)
        return dataclasses.replace(recipe, tokenizer=dataclasses.replace(recipe.tokenizer, path=str(folder)))

    def stop_if_asked(self, amount: int = 0) -> None:
        """Raise a `KeyboardInterrupt` after a signal, to end what follows training; what was trained is kept."""
        if self.interrupt.asked:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def measuring(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show what follows training. The yielded function is told how much more is done, and stops after a signal."""
        with self.progress.tasks("all trained models; --resume measures them again") as tasks:
            tasks.begin(title, total)

            def advance(more: int = 1) -> None:
                self.stop_if_asked()
                tasks.advance(title, more)

            yield advance

    def _planned_seed(self, seed: int) -> list[_Planned]:
        """Plan the runs of a seed. Arms of one recipe, which differ in what is done afterwards, are one run."""
        recipes = [(arm, self.complete(self.study.recipe_of(arm, seed))) for arm in self.study.arms]
        found: list[_Planned] = []
        for arm, recipe in recipes:
            alike = [self.out / f"seed-{seed}" / one.name for one, other in recipes if other == recipe]
            # One that was begun goes on, also where an arm that stands before it came later.
            folder = next((folder for folder in alike if (folder / RECIPE).is_file()), alike[0])
            found.append(_Planned(arm, seed, recipe, folder))
        return found

    def _move_aside(self, pending: Sequence[_Planned]) -> None:
        """Make room for the runs whose recipe is another one now, and say how it differs."""
        changed: dict[str, list[_Planned]] = {}
        for one in pending:
            if changes := one.changes():
                changed.setdefault("; ".join(changes), []).append(one)
        for words, runs in changed.items():
            names = ", ".join(f"{one.arm.name} of seed {one.seed}" for one in runs)
            self.progress.note(f"another recipe, so these are trained again: {names} ({words})")
        for one in (one for runs in changed.values() for one in runs):
            earlier = one.beside("earlier")
            shutil.rmtree(earlier, ignore_errors=True)
            one.folder.rename(earlier)
        if changed:
            self.progress.note("what they came to before is kept in seed-N/ARM.earlier until that happens again")

    def _prepare(self, planned: Sequence[_Planned]) -> None:
        """Write the recipes of runs, for ``engram-lm train`` to read, and tokenize their text."""
        for one in planned:
            write_atomically(one.beside("toml"), write_toml(one.recipe.to_dict()))
            self.text(one.recipe)  # here, where it is seen, and once: parallel processes would all do it

    def _side_by_side(self, group: Sequence[_Planned]) -> dict[str, TrainedArm]:
        """Train some runs in this process, a step of each in turn, so that a slow minute slows all of them alike.

        The runs are returned by arm, where a signal came first and they are to be kept.
        """
        self._prepare(group)
        seed, steps, device = group[0].seed, group[0].recipe.train.num_steps, group[0].recipe.train.device
        which = group[0].arm.title if len(group) == 1 else f"{len(group)} models"
        title = f"seed {seed}: " * (self.study.seeds > 1) + f"training {which}, {steps:,} steps each"
        with contextlib.ExitStack() as stack:
            ranks = stack.enter_context(start(None if device == "auto" else device))
            jobs: dict[_Planned, Job] = {
                one: stack.enter_context(Run(one.recipe, one.folder, ranks, resume=True).open()) for one in group
            }
            show = stack.enter_context(self.progress.task(title, steps))
            losses: dict[str, list[float]] = {one.arm.name: [] for one in group}
            while not self.interrupt.asked and (going := [one for one, job in jobs.items() if not job.done]):
                seconds = tokens = 0.0
                for one in going:
                    try:
                        record, _ = jobs[one].step()
                    except DivergedError as error:
                        self.progress.note(f"{one.arm.title}, seed {one.seed}: {error}")
                        del jobs[one]
                        continue
                    losses[one.arm.name].append(record.loss)
                    seconds, tokens = seconds + record.seconds, tokens + record.num_tokens / record.step
                if seconds:
                    speed = f"{tokens / seconds:,.0f} tokens/s"
                    show(min(job.num_steps_done for job in jobs.values()), f"{recent_losses(losses)}  {speed}")
            unfinished = {one: job for one, job in jobs.items() if not job.done}
            if unfinished:
                step = max(job.num_steps_done for job in unfinished.values())
                self.progress.note(f"interrupted after step {step} of {steps}; saving what was trained")
            for job in unfinished.values():
                job.save(wait=True)
            results = {one: job.finish() for one, job in jobs.items()}
            if not unfinished or not self.keep_unfinished:
                return {}
            for one, job in unfinished.items():
                latest = latest_checkpoint(one.folder / CHECKPOINTS)
                assert latest is not None, "it was saved above"
                export_model(latest, one.folder / MODEL, tokenizer=job.tokenizer)
                if job.text.held_out is not None:
                    results[one]["held_out"] = job.evaluate(job.text.held_out).to_dict()
        return {
            one.arm.name: one.finished()
            or TrainedArm(arm=one.arm, seed=one.seed, folder=one.folder, result=results[one])
            for one in group
        }

    def _in_processes(self, pending: Sequence[_Planned]) -> None:
        """Train some runs in processes of one thread, as many at a time as `allowed_cores`."""
        self._prepare(pending)
        waiting, running = collections.deque(pending), dict[_Planned, subprocess.Popen[bytes]]()
        num_workers = max(1, min(allowed_cores(), len(waiting)))
        steps, told = sum(one.recipe.train.num_steps for one in pending), False
        try:
            with self.progress.task(f"training {len(pending)} models, {num_workers} at a time", steps) as show:
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
        """Go on after the end of a process, if it trained, was stopped or diverged; anything else is an error."""
        trained = one.finished()
        if trained is not None and trained.failed is not None:
            self.progress.note(f"{one.arm.title}, seed {one.seed}: {trained.failed}")
        elif status not in (0, 130, -signal.SIGTERM):  # the last where it had not begun to train
            log = one.beside("log")
            said = read_text(log, errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
            raise EngramError(f"training {one.arm.name} with seed {one.seed} failed: {said[0]} (all of it is in {log})")


def _as_if_here(earlier: dict[str, Any], now: Recipe) -> dict[str, Any]:
    """What the recipe of a run would have been, had its study always been in the folder where it is now."""
    then, here = (Path(path) if path else None for path in (earlier["tokenizer"].get("path"), now.tokenizer.path))
    if then is None or here is None or then.name != here.name or then == here:
        return earlier
    old, new = (json.dumps(f"{path.parent}/")[1:-1] for path in (then, here))
    moved: dict[str, Any] = json.loads(json.dumps(earlier).replace(f'"{old}', f'"{new}'))
    return moved


def tokenizer_folder(study: Path, recipe: Recipe) -> Path:
    """Name the folder of a study's tokenizer, in which all recipes agree that train the same one on the same text."""
    data = recipe.data
    made_of = (recipe.tokenizer, data.sources, data.max_bytes, data.held_out, data.validation)
    return study / f"{TOKENIZER}-{short_digest(made_of)}"


def _started(one: _Planned) -> "subprocess.Popen[bytes]":
    """Start a process that trains one run. A signal to the terminal reaches only this process, which passes it on."""
    command = ["-m", "engram_lm", "train", str(one.beside("toml")), "--out", str(one.folder), "--resume"]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), "1")
    with one.beside("log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **threads, "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _state_of(planned: Sequence[_Planned], running: dict[_Planned, Any]) -> tuple[int, str]:
    """Steps that all runs have done, and the losses of those that are running."""
    done, losses = 0, {}
    for one in planned:
        path = one.folder / METRICS
        lines = read_metrics(path) if path.is_file() else []
        if lines:
            done += lines[-1]["step"]
            if one in running:
                losses[f"{one.arm.name}-{one.seed}"] = [line["loss"] for line in lines if line["loss"] is not None]
    return done, recent_losses(losses) if losses else ""
