"""A training run: everything from a recipe to a folder that holds the trained model, and back after a stop."""

import contextlib
import fcntl
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from engram_lm.errors import CheckpointError, MismatchError, RunFolderError
from engram_lm.files import write_atomically
from engram_lm.planning.sizes import model_sizes
from engram_lm.training.assembly import TrainingText, build_model, find_tokenizer, model_config, open_text
from engram_lm.training.checkpoints import Checkpoints, latest_checkpoint, read_facts
from engram_lm.training.data.batches import Batches
from engram_lm.training.distribution import Ranks, agree
from engram_lm.training.export import CHECKPOINTS, TOKENIZER
from engram_lm.training.held_out import held_out_loss
from engram_lm.training.interrupts import Interrupt
from engram_lm.training.loop import StepRecord, Trainer, best_dtype
from engram_lm.training.metrics import Metrics, check_installed, read_metrics
from engram_lm.training.peak import peak_flops
from engram_lm.training.progress import RunProgress
from engram_lm.training.recipe import Recipe
from engram_lm.training.recipe_file import write_toml
from engram_lm.training.run_folder import commit, run_facts, to_json, versions
from engram_lm.training.state import SPEC_DIGEST, export_model, model_facts, training_tensors

__all__ = ["Run"]

_RECIPE, _RESULT, _MODEL, _METRICS = "recipe.toml", "result.json", "model", "metrics.jsonl"
_LOCK = ".lock"


class Run:
    """One training run in its folder.

    The folder holds ``recipe.toml`` (every key, resolved), ``metrics.jsonl`` (one object per step), ``checkpoints/``,
    ``tokenizer/`` and, when training has ended, ``model/`` (a Hugging Face folder), ``result.json`` and ``loss.png``.

    Args:
        recipe: What to do.
        out: The run folder. It may hold a run only where ``resume`` says so.
        ranks: The processes, all of which run the same.
        resume: Whether to go on from the last complete checkpoint, or from the start where there is none yet.
        stop_after: Step to stop at, with a checkpoint, before the schedule's end; None goes to the end.
        progress: What people see.

    Raises:
        RunFolderError: The folder holds something that is not to be lost.
        MismatchError: It was begun with another recipe.
    """

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        ranks: Ranks,
        *,
        resume: bool = False,
        stop_after: int | None = None,
        progress: RunProgress,
    ) -> None:
        self.recipe, self.ranks, self.progress = recipe, ranks, progress
        self.out = out.expanduser().resolve()
        self.resume = resume
        self.last_step = min(recipe.train.num_steps, stop_after or recipe.train.num_steps)
        self.started = time.time()
        self.commit = commit()

    def execute(self) -> dict[str, Any]:
        """Do all of it.

        Returns:
            What ``result.json`` holds; ``interrupted`` says whether a signal ended it early.
        """
        with self._own_folder():
            return self._execute()

    def _execute(self) -> dict[str, Any]:
        recipe, ranks = self.recipe, self.ranks
        with agree(ranks):
            check_installed(tensorboard=recipe.log.tensorboard, wandb=recipe.log.wandb)
            self.progress.note("finding the tokenizer")
            tokenizer = find_tokenizer(recipe, self.out / TOKENIZER)
        with agree(ranks), self.progress.packing() as advance:
            text = open_text(recipe, tokenizer, advance)
        if text.about is not None:
            self.progress.note(text.about)
        with agree(ranks):
            config = model_config(recipe, tokenizer)
            model = build_model(recipe, config, ranks)
            batches = Batches(
                text.train,
                recipe.train.batch_size,
                recipe.data.sequence_length,
                recipe.train.seed,
                restart_documents=recipe.data.restart_documents,
                num_tokens=text.num_tokens,
            )
            dtype = self._dtype()
            options = recipe.train.for_trainer(dtype)
        trainer = Trainer(
            model, batches, options, recipe.optimizer, recipe.schedule, ranks=ranks, backbone=recipe.parallel.backbone
        )
        checkpoints = Checkpoints(self.out / CHECKPOINTS, keep_last=recipe.checkpoint.keep_last)
        self._restore(trainer, checkpoints, text)
        first = trainer.num_steps_done
        flops = 3 * model_sizes(config, context=recipe.data.sequence_length).flops_per_token
        with agree(ranks):
            metrics = self._open_metrics(trainer) if ranks.rank == 0 else None
        peak = recipe.log.peak_tflops and recipe.log.peak_tflops * 1e12
        speed = _Speed(flops, peak or peak_flops(ranks.device, dtype), ranks.world_size)
        last = None if metrics is None else metrics.last_held_out
        try:
            with (
                Interrupt(0.0 if ranks.group is None else 2.0) as interrupt,
                self.progress.training(trainer.num_steps_done, self.last_step) as show,
            ):
                while trainer.num_steps_done < self.last_step:
                    record, values = self._step(trainer, text, speed)
                    last = values.get("held_out", last)
                    asked_for = record.step % recipe.log.every == 0 or record.details is not None
                    if metrics is not None and (asked_for or "held_out" in values):
                        metrics.write(values)
                    show(record, last)
                    # Between two steps of all processes, or one would wait for the others' next exchange.
                    asked = ranks.any(interrupt.asked)
                    every = recipe.checkpoint.every
                    if asked or record.step == self.last_step or (every and record.step % every == 0):
                        self._save(trainer, checkpoints, text, wait=asked or record.step == self.last_step)
                    if asked:
                        break
        finally:
            # Also where a step failed: what is being written in the background is an earlier step's, and whole.
            try:
                checkpoints.wait()
            finally:
                if metrics is not None:
                    metrics.close()
        interrupted = trainer.num_steps_done < self.last_step
        result = self._result(trainer, config, last, interrupted)
        # The other processes do not wait: writing a large model may take longer than any is waited for.
        if not interrupted and ranks.rank == 0:
            ended = None if trainer.num_steps_done > first else self._ended(first)
            if ended is not None:
                return ended
            self.progress.note("writing the model")
            latest = checkpoints.latest()
            assert latest is not None
            if (self.out / _MODEL).is_dir():
                shutil.rmtree(self.out / _MODEL)  # of an earlier end of this run, which its checkpoint has as well
            export_model(latest, self.out / _MODEL, tokenizer=tokenizer)
            write_atomically(self.out / _RESULT, to_json(result))
            _plot(self.out)
        return result

    @contextlib.contextmanager
    def _own_folder(self) -> Iterator[None]:
        """Hold the run folder alone. The kernel gives the lock back however a process ends."""
        with contextlib.ExitStack() as stack:
            with agree(self.ranks):
                if self.ranks.rank == 0:
                    self._take_folder(stack)
            yield

    def _take_folder(self, stack: contextlib.ExitStack) -> None:
        """Make the run folder this run's, or find that it is."""
        recipe_file = self.out / _RECIPE
        # What a process leaves that is killed before it has written its recipe is nobody's work.
        left = (_LOCK, f".{_RECIPE}.")
        found = [path for path in self.out.iterdir() if not path.name.startswith(left)] if self.out.is_dir() else []
        if found and not recipe_file.is_file():
            raise RunFolderError(
                f"{self.out} holds something that is not a training run (no {_RECIPE}), so it is left alone; name "
                "another folder with --out"
            )
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((self.out / _LOCK).open("a"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunFolderError(
                    f"another process is training in {self.out}; wait until it ends, or name another folder with --out"
                ) from None
            if found:
                self._check_earlier(Recipe.read(recipe_file))
            write_atomically(recipe_file, write_toml(self.recipe.to_dict()))
        except RunFolderError:
            raise
        except OSError as error:
            raise RunFolderError(
                f"cannot write to {self.out}: {error.strerror}; name a folder you can write to with --out"
            ) from error

    def _check_earlier(self, recipe: Recipe) -> None:
        """Compare with the recipe that the folder holds, if anything was trained by it."""
        if (self.out / _METRICS).exists() or latest_checkpoint(self.out / CHECKPOINTS) is not None:
            if not self.resume:
                raise RunFolderError(
                    f"{self.out} holds a run already; go on with it with --resume, or name another folder with --out"
                )
            self.recipe.check_resumable(recipe.to_dict())
        elif recipe != self.recipe and (self.out / TOKENIZER).is_dir():
            # It ended before its first step, over a mistake that is mended now perhaps: there is nothing to lose.
            shutil.rmtree(self.out / TOKENIZER)

    def _ended(self, step: int) -> dict[str, Any] | None:
        """What ``result.json`` says, where the run had ended with this step and its model is there."""
        try:
            result = json.loads((self.out / _RESULT).read_bytes())
            good = result["num_steps"] == step and (self.out / _MODEL / "config.json").is_file()
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return {**result, "out": str(self.out)} if good else None

    def _dtype(self) -> Literal["float32", "bfloat16"]:
        """Type of products; on a machine that chooses otherwise, a run goes on as it was begun."""
        chosen = self.recipe.train.dtype
        if chosen != "auto":
            return chosen
        latest = latest_checkpoint(self.out / CHECKPOINTS)
        begun = None if latest is None else read_facts(latest).get("dtype")
        return begun if begun in ("float32", "bfloat16") else best_dtype(self.ranks.device)

    def _restore(self, trainer: Trainer, checkpoints: Checkpoints, text: TrainingText) -> None:
        """Put everything back as it was when the last complete checkpoint was made, if there is one."""
        with agree(self.ranks):
            latest = latest_checkpoint(checkpoints.folder)
            if latest is not None:
                _check_facts(latest, text.digest)
        if latest is None:
            if self.resume:
                self.progress.note("there is no complete checkpoint yet: beginning at step 1")
            return
        self.progress.note(f"reading {latest.name}")
        tensors = self._tensors(trainer)
        facts = checkpoints.load(
            latest,
            tensors,
            expected={SPEC_DIGEST: model_facts(trainer.model)[SPEC_DIGEST]},
        )
        trainer.num_steps_done, trainer.num_skipped = facts["step"], facts["num_skipped"]
        states = {name: tensor for name, tensor in tensors.items() if name.startswith(self._random)}
        torch.set_rng_state(states[f"{self._random}cpu"])
        if self.ranks.device.type == "cuda":
            torch.cuda.set_rng_state(states[f"{self._random}cuda"], self.ranks.device)

    def _save(self, trainer: Trainer, checkpoints: Checkpoints, text: TrainingText, *, wait: bool) -> None:
        facts = {
            "step": trainer.num_steps_done,
            "num_skipped": trainer.num_skipped,
            "corpus": text.digest,
            "dtype": trainer.options.dtype,
            "recipe": self.recipe.to_dict(),
            "world_size": self.ranks.world_size,
            "versions": versions(),
            **model_facts(trainer.model),
        }
        asynchronous = self.recipe.checkpoint.asynchronous and not wait
        checkpoints.save(trainer.num_steps_done, self._tensors(trainer), facts, asynchronous=asynchronous)

    def _tensors(self, trainer: Trainer) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        states = {f"{self._random}cpu": torch.get_rng_state()}
        if self.ranks.device.type == "cuda":
            states[f"{self._random}cuda"] = torch.cuda.get_rng_state(self.ranks.device)
        return {**training_tensors(trainer.model, trainer.optimizer), **trainer.table_use.tensors(), **states}

    @property
    def _random(self) -> str:
        return f"rng/rank{self.ranks.rank}/"

    def _open_metrics(self, trainer: Trainer) -> Metrics:
        log = self.recipe.log
        return Metrics(
            self.out / _METRICS,
            first_step=trainer.num_steps_done + 1,
            tensorboard=log.tensorboard,
            wandb=log.wandb,
            config=self.recipe.to_dict(),
        )

    def _step(self, trainer: Trainer, text: TrainingText, speed: "_Speed") -> tuple[StepRecord, dict[str, Any]]:
        recipe, number = self.recipe, trainer.num_steps_done + 1
        details_every, every = recipe.log.details_every, recipe.evaluation.every
        record = trainer.step(details=bool(details_every) and number % details_every == 0)
        values = {**record.to_dict(), "num_skipped": trainer.num_skipped, **speed.of(record, trainer)}
        if text.held_out is not None and (number == recipe.train.num_steps or (every and number % every == 0)):
            found = held_out_loss(
                trainer.model,
                text.held_out,
                length=recipe.data.sequence_length,
                batch_size=_sequences_at_once(recipe, self.ranks),
                ranks=self.ranks,
                loss_module=trainer.loss_module,
                document_ends=text.held_out_ends if recipe.data.restart_documents else None,
            )
            values["held_out"] = {"step": number, **found.to_dict()}
        return record, values

    def _result(self, trainer: Trainer, config: Any, held_out: Any, interrupted: bool) -> dict[str, Any]:
        sizes = model_sizes(config, context=self.recipe.data.sequence_length)
        return {
            "format": "engram.train.1",
            **run_facts(self.started, self.commit),
            "world_size": self.ranks.world_size,
            "num_steps": trainer.num_steps_done,
            "num_skipped": trainer.num_skipped,
            "num_tokens": trainer.num_steps_done * trainer.batches.batch_size * trainer.batches.length,
            "parameters": {"total": sizes.total, "tables": sizes.memory_tables, "active": sizes.active},
            "held_out": held_out,
            "interrupted": interrupted,
            "out": str(self.out),
        }


def _check_facts(checkpoint: Path, corpus: str) -> None:
    """Refuse a checkpoint that no run has made, or one whose text was another."""
    facts = read_facts(checkpoint)
    if not all(type(facts.get(name)) is int for name in ("step", "num_skipped")):
        raise CheckpointError(
            f"{checkpoint} does not say how many steps were done; name the folder of a run with --out"
        )
    if facts.get("corpus") != corpus:
        raise MismatchError(
            f"the text is not what it was: {checkpoint} was trained on the corpus {facts.get('corpus')}, the sources "
            f"now give {corpus}; put the text back as it was, or begin a new run with another --out"
        )


def _sequences_at_once(recipe: Recipe, ranks: Ranks) -> int:
    """Sequences that all processes together compute at a time in training."""
    own = -(-recipe.train.batch_size // ranks.world_size)
    return min(own, recipe.train.micro_batch_size or own) * ranks.world_size


class _Speed:
    """Tokens and operations per second of a step."""

    def __init__(self, flops_per_token: int, peak: float | None, world_size: int) -> None:
        self.flops_per_token, self.peak, self.world_size = flops_per_token, peak, world_size

    def of(self, record: StepRecord, trainer: Trainer) -> dict[str, float]:
        tokens = trainer.batches.batch_size * trainer.batches.length / record.seconds
        found = {"tokens_per_second": tokens, "model_tflops": tokens * self.flops_per_token / 1e12}
        if self.peak is not None:
            found["mfu"] = tokens * self.flops_per_token / (self.peak * self.world_size)
        return found


def _plot(folder: Path) -> None:
    """Draw the losses of a run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_metrics(folder / _METRICS)
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    known = [(line["num_tokens"], line["loss"]) for line in lines if line.get("loss") is not None]
    if known:
        axes.plot(*zip(*known, strict=True), linewidth=1, alpha=0.6, label="training")
    held_out = [(line["num_tokens"], line["held_out"]["loss"]) for line in lines if "held_out" in line]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", label="held out")
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss, nats per token")
    if known or held_out:
        axes.legend()
    FigureCanvasAgg(figure).print_png(str(folder / "loss.png"))
