"""All arms and seeds of an adaptation, one after the other, in a folder where what is finished stays finished."""

import dataclasses
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engram_lm.errors import ConfigError, DataError, DivergedError, MismatchError, RunFolderError
from engram_lm.files import read_json, replacing_folder, user_path, write_atomically
from engram_lm.studies.adaptation.arms import arm_kind
from engram_lm.studies.adaptation.bench import ArmCost, Bench
from engram_lm.studies.adaptation.diagnostics import look_inside, loss_values, measure_tasks, retained_losses
from engram_lm.studies.adaptation.duration import estimate, estimate_lines, run_label, runs_left
from engram_lm.studies.adaptation.recipe import AdaptationRecipe, ArmName
from engram_lm.studies.summary import spread
from engram_lm.training.interrupts import Interrupt
from engram_lm.training.progress import RunProgress
from engram_lm.training.recipe import Recipe
from engram_lm.training.recipe_file import write_toml
from engram_lm.training.run import Run
from engram_lm.training.run_folder import commit, hold_folder, run_facts, to_json

_RECIPE, _ORIGIN = "recipe.toml", "before.json"
_TRIAL = ("lr", "validation", "domain", "retained", "texts", "tasks")
_DELETE = "delete it, and its run is done again"
_KEEPS = "all runs that are finished, and a checkpoint of this one; --resume goes on from it"

_Entry = dict[str, Any]
"""An entry of ``arms.NAME.runs`` in ``result.json``."""


class Adaptation:
    """One ``engram-lm adapt`` in its folder.

    Arms are ordinary training runs. They are trained one after the other, because the learning rate of some is known
    only when another is finished.

    The folder holds ``recipe.toml`` (every key, resolved), ``before.json`` (which base, text and hash it was begun
    with), ``runs/ARM-SEED.json`` for every run that is finished, with the training run itself in ``runs/ARM-SEED/``,
    and at the end ``result.json``, ``report.html`` and ``adapter/``. Where a seed tries several learning rates, its
    runs are called ``ARM-SEED-RATE``.
    """

    def __init__(self, recipe: AdaptationRecipe, out: Path, *, resume: bool = False, progress: RunProgress) -> None:
        self.recipe, self.progress, self._resume = recipe, progress, resume
        self.out = user_path(out).resolve()
        self._started, self._commit = time.time(), commit()
        self._counted: dict[str, Any] = {}
        self._runs: dict[ArmName, list[_Entry]] = {name: [] for name in recipe.arms.names}
        self._tried: dict[ArmName, list[_Entry]] = {}

    def execute(self) -> dict[str, Any]:
        """Do all of it.

        Returns:
            What ``result.json`` holds; ``interrupted`` says whether a signal ended it early.

        Raises:
            RunFolderError: The folder holds something else or a run that is not to be resumed, cannot be written, or
                another process works in it.
            MismatchError: The run was begun with another recipe, base or text.
        """
        from engram_lm.studies.adaptation.report import render_report

        with hold_folder(self.out, _RECIPE, kind="an adaptation", work="at work"):
            self._check_earlier()
            bench = Bench(self.recipe, self.progress)
            self._check_origin({"base": bench.fingerprint, "text": bench.text.digest, "hash": bench.spec.digest})
            left = runs_left(self.recipe, self.out)
            plan = bench.plan(timed=[name for name, number in left.items() if number])
            for line in estimate_lines(plan, estimate(bench, plan, left)):
                self.progress.note(line)
            with Interrupt() as interrupt:
                interrupted = not all(
                    self._train(bench, name, seed, plan[name][1], interrupt) for name, seed in self._order()
                )
            result = self._result(bench, plan, interrupted)
            if not interrupted:
                self._publish_adapter()
            write_atomically(self.out / "result.json", to_json(result))
            write_atomically(self.out / "report.html", render_report(result))
        return {**result, "out": str(self.out)}

    def _check_earlier(self) -> None:
        """Compare the recipe with the one in the folder, if anything was trained by that one, and write it there."""
        if any(self.out.glob("runs/*")):
            if not self._resume:
                raise RunFolderError(
                    f"{self.out} holds a run already; go on with it with --resume, or name another folder with --out"
                )
            self.recipe.check_resumable(AdaptationRecipe.read(self.out / _RECIPE).to_dict())
        else:
            (self.out / _ORIGIN).unlink(missing_ok=True)
        write_atomically(self.out / _RECIPE, write_toml(self.recipe.to_dict()))

    def _check_origin(self, origin: dict[str, str]) -> None:
        """Write down digests of the base, the text and the hash, or compare them with what they were."""
        path = self.out / _ORIGIN
        if not path.is_file():
            write_atomically(path, to_json(origin))
        known = read_json(path, advice=_DELETE)
        changed = {key: now for key, now in origin.items() if now != known.get(key)}
        if changed:
            different = "; ".join(f"the {key} is {now}, was {known.get(key)}" for key, now in changed.items())
            raise MismatchError(
                f"the base model or the text is not what the run in {self.out} was begun with: {different}. Put it "
                "back as it was, or begin a new run with another --out"
            )

    def _publish_adapter(self) -> None:
        """Copy the memory of the first arm that is no control to ``adapter/``."""
        useful = [
            name for name, runs in self._runs.items() if runs and arm_kind(name).memory and arm_kind(name).is_kept
        ]
        if useful:
            rate, several = self._runs[useful[0]][0]["lr"], len(self._tried[useful[0]]) > 1
            source = self.out / "runs" / run_label(useful[0], 0, rate if several else None) / "memory"
            if not source.is_dir():  # somebody has made room, and its .json says that it is finished
                there = (self.out / "adapter").is_dir()
                ending = "stays as it is" if there else f"is not written; delete {source.parent}.json to train it again"
                self.progress.note(f"{source} is gone, so adapter/ {ending}")
                return
            with replacing_folder(self.out / "adapter", lambda folder: None) as aside:
                shutil.copytree(source, aside, dirs_exist_ok=True)

    def _order(self) -> Iterator[tuple[ArmName, int]]:
        """All arms of a seed before the next seed, so that a run that is stopped has compared them."""
        for seed in range(self.recipe.train.seeds):
            # Memory first: others take its rate.
            for name in sorted(self.recipe.arms.names, key=lambda name: name != "memory"):
                yield name, seed

    def _train(self, bench: Bench, name: ArmName, seed: int, num_steps: int, interrupt: Interrupt) -> bool:
        """Train an arm with a seed, with the first one at each of its learning rates; False if a signal came first."""
        rates = self._rates(name) if seed == 0 else (_best(self._tried[name])["lr"],)
        several = len(rates) > 1
        if several and not self.recipe.data.validation:
            raise ConfigError(
                f"rates.{name} are several, and data.validation = 0 leaves no text to choose one by; give one rate"
            )
        found: list[_Entry] = []
        for rate in rates:
            recipe = bench.arm_recipe(name, seed=seed, rate=rate, num_steps=num_steps)
            label = run_label(name, seed, rate if several else None)
            try:
                entry = self._run(bench, recipe, name, label, interrupt)
            except DivergedError as error:
                # A rate that is too high has lost the comparison, and a later seed is told of; neither ends the others.
                if seed == 0 and not several:
                    raise
                self.progress.note(f"{arm_kind(name).title}, seed {seed}, learning rate {rate:g}: {error}")
                nothing = dict.fromkeys(("domain", "retained", "texts", "tasks"))
                entry = {"seed": seed, "lr": rate, "failed": str(error), **nothing}
                self._write_entry(label, entry)
            if entry is None:
                return False
            found.append(entry if several else {**entry, "validation": None})
        if seed == 0:
            self._tried[name] = found
        self._runs[name].append(_best(found) if seed == 0 else found[0])
        return True

    def _rates(self, name: ArmName) -> tuple[float, ...]:
        """The rates that an arm tries. What is the same as memory but for one thing has the same rate, too."""
        if "memory" in self._tried and (arm_kind(name).is_control or arm_kind(name).transfer):
            return (_best(self._tried["memory"])["lr"],)
        return self.recipe.rates.of(name)

    def _run(self, bench: Bench, recipe: Recipe, name: ArmName, label: str, interrupt: Interrupt) -> _Entry | None:
        """Do one run, or read what it found before; None where a signal came first."""
        seed, rate = recipe.train.seed, recipe.optimizer.lr
        folder = self.out / "runs" / label
        done = folder.with_name(f"{label}.json")
        if done.is_file() and (earlier := read_json(done, advice=_DELETE))["lr"] == rate:
            return earlier  # another rate where arms were added, and by them another one chosen
        if interrupt.asked:
            return None
        try:
            if (folder / _RECIPE).is_file():
                recipe.check_resumable(Recipe.read(folder / _RECIPE).to_dict())
        except (MismatchError, ConfigError):
            shutil.rmtree(folder)  # its learning rate was another
        title = arm_kind(name).title
        self.progress.note(f"{title}, seed {seed}, learning rate {rate:g}")
        with Run(recipe, folder, bench.ranks, resume=True).open() as job:
            with self.progress.training(job.num_steps_done, job.last_step, keeps=_KEEPS) as show:
                while not job.done:
                    show(job.step()[0], None)
                    if interrupt.asked and not job.done:
                        job.save(wait=True)
                        return None
            assert job.held_out is not None
            loss = job.held_out["loss"]
            if loss is None or not math.isfinite(loss):
                raise DivergedError(
                    f"the trained model's loss is {math.nan if loss is None else loss}; lower the learning rate"
                )
            tasks = measure_tasks(job.model, job.tokenizer, self.recipe.tasks)
            inside = look_inside(job, self._counted, measure=self.recipe.train.look_inside)
            result = job.finish()
        found = {
            "seed": seed,
            "lr": rate,
            "domain": loss_values(result["held_out"]),
            **retained_losses(result["texts"]),
            "tasks": tasks,
            "curve": result["curve"],
            "validation": loss_values(result["texts"].get("validation")),
            **inside,
            "writing": result["writing"],
            "num_steps": result["num_steps"],
            "seconds": result["seconds"],
        }
        self._write_entry(label, found)
        knew = "" if found["retained"] is None else f", {found['retained']['loss']:.3f} on what it knew"
        self.progress.note(
            f"{title}, seed {seed}: {loss:.3f} nats per token on the domain{knew}, {found['seconds']:.0f} s"
        )
        return found

    def _write_entry(self, label: str, found: _Entry) -> None:
        """Write what a run found. It counts as finished from here on."""
        write_atomically(self.out / "runs" / f"{label}.json", to_json(found))

    def _result(self, bench: Bench, plan: Mapping[ArmName, tuple[ArmCost, int]], interrupted: bool) -> dict[str, Any]:
        text, recipe, memory = bench.text, self.recipe, bench.memory
        retained = {name: len(one.tokens) for name, one in text.texts.items() if name != "validation"}
        tokens_per_step = recipe.train.batch_size * recipe.data.sequence_length
        arms = {}
        for name, (cost, num_steps) in plan.items():
            runs, tried = self._runs[name], self._tried.get(name, [])
            arms[name] = {
                "title": arm_kind(name).title,
                "about": arm_kind(name).about,
                **dataclasses.asdict(cost),
                "num_steps": num_steps,
                "num_tokens": num_steps * tokens_per_step,
                "training_flops": cost.preparation_flops + num_steps * tokens_per_step * cost.flops_per_token,
                "lr": runs[0]["lr"] if runs else None,
                "trials": [{key: run.get(key) for key in _TRIAL} for run in tried],
                "runs": runs,
                "summary": _summary(runs, bench.before),
            }
        return {
            "format": "engram.adaptation.1",
            **run_facts(self._started, self._commit),
            "recipe": recipe.to_dict(),
            "base": bench.base,
            "data": {
                "domain": text.facts["source"],
                "domain_tokens": text.num_tokens,
                "held_out_tokens": 0 if text.held_out is None else len(text.held_out),
                "retained": ", ".join(retained) or None,
                "retained_tokens": sum(retained.values()),
                "digest": text.digest,
            },
            "memory": {
                **memory.to_dict(),
                "num_rows": sum(memory.num_table_rows()),
                "table_bytes": memory.table_bytes(4),
                "digest": bench.spec.digest,
            },
            "dtype": bench.dtype,
            "before": bench.before,
            "arms": arms,
            "interrupted": interrupted,
        }


def _best(trials: Sequence[_Entry]) -> _Entry:
    """The run with the lowest validation loss, or the only one; a DataError if every rate diverged."""
    good = [run for run in trials if "failed" not in run]
    if not good:
        raise DataError(f"no learning rate of {[run['lr'] for run in trials]} trains: {trials[-1]['failed']}")
    return good[0] if len(good) == 1 else min(good, key=lambda run: run["validation"]["loss"])


def _summary(runs: Sequence[_Entry], before: Mapping[str, Any]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for text in ("domain", "retained"):
        over_seeds = spread(run[text]["loss"] for run in runs if run.get(text) is not None)
        found[f"{text}_mean"], found[f"{text}_std"] = over_seeds["mean"], over_seeds["std"]
    retained = found["retained_mean"]
    found["forgetting_mean"] = None if retained is None else retained - before["retained"]["loss"]
    return found
