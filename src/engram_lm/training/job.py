"""A run under way: the model, text, optimizer and checkpoints of a recipe, which take one step at a time."""

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from engram_lm.errors import CheckpointError, ConfigError, DivergedError, MismatchError
from engram_lm.files import write_atomically
from engram_lm.training.assembly import find_tokenizer, open_text
from engram_lm.training.base_model import AdaptedBase
from engram_lm.training.build import OwnModel
from engram_lm.training.checkpoints import Checkpoints, latest_checkpoint, read_facts
from engram_lm.training.data.text import TrainingText
from engram_lm.training.distribution import Ranks, agree
from engram_lm.training.export import CHECKPOINTS, TOKENIZER
from engram_lm.training.flops import peak_flops
from engram_lm.training.held_out import HeldOutLoss, held_out_loss
from engram_lm.training.loop import StepRecord, best_dtype
from engram_lm.training.metrics import Metrics, check_installed, read_metrics
from engram_lm.training.progress import RunProgress
from engram_lm.training.recipe import Recipe
from engram_lm.training.recipe_file import to_plain
from engram_lm.training.recipe_trainer import batches_of, trainer_of
from engram_lm.training.run_folder import commit, run_facts, to_json, versions
from engram_lm.training.writing import WRITABLE, WritableRows, choose_rows, kept_choice

METRICS, RESULT, MODEL, FAILED = "metrics.jsonl", "result.json", "model", "failed.json"
"""What a run writes into its folder: a line per step, the result, and the trained model; or why training diverged."""

_COUNTED_AT_ONCE = 1 << 15
"""Tokens whose rows are counted at a time."""


class Job:
    """A run that `engram_lm.training.run.Run.open` has prepared, in a folder that this process holds.

    All ranks call the same methods in the same order. With ``resume``, people are told if there is no checkpoint to go
    on from.

    Raises:
        CheckpointError: The newest checkpoint is damaged, or was not made by a run.
        MismatchError: The newest checkpoint was made with another text, another hash or another base.
    """

    def __init__(
        self, recipe: Recipe, out: Path, ranks: Ranks, progress: RunProgress, *, resume: bool, last_step: int
    ) -> None:
        self.recipe, self.out, self.ranks, self.progress = recipe, out, ranks, progress
        self.last_step = last_step
        self._started, self._commit = time.time(), commit()  # now: the tree may change under a long run
        self._metrics: Metrics | None = None
        self._saved_step: int | None = None
        with agree(ranks):
            check_installed(tensorboard=recipe.log.tensorboard, wandb=recipe.log.wandb)
            progress.note("finding the tokenizer")
            self.tokenizer = find_tokenizer(recipe, out / TOKENIZER)
        with agree(ranks):
            self.text: TrainingText = open_text(recipe, self.tokenizer, progress)
            """What is trained and evaluated on."""
        with agree(ranks):
            kind = OwnModel if recipe.model.base is None else AdaptedBase
            self.trained: OwnModel | AdaptedBase = kind(recipe, self.tokenizer, ranks)
            """The model, and how it is saved."""
            dtype = self._dtype()
        self.trainer = trainer_of(recipe, self.trained, self.text, self.tokenizer, dtype=dtype, ranks=ranks)
        self._random = self._random_states()
        self.flops_per_token = self.trained.training_flops_per_token()
        """Operations that training on one token takes."""
        self._checkpoints = Checkpoints(out / CHECKPOINTS, keep_last=max(1, recipe.checkpoint.keep_last))
        self.writable: WritableRows | None = None
        """The rows of memory that may be trained; None where all may."""
        if recipe.writing.rule != "all":
            self.writable = self._choose_rows()
        self._restore(resume)
        self._first = self.trainer.num_steps_done
        with agree(ranks):
            if ranks.rank == 0:
                self._metrics = Metrics(
                    out / METRICS,
                    first_step=self.num_steps_done + 1 if self.num_steps_done else 0,
                    tensorboard=recipe.log.tensorboard,
                    wandb=recipe.log.wandb,
                    config=recipe.to_dict(),
                )
        peak = recipe.log.peak_tflops and recipe.log.peak_tflops * 1e12
        self._peak_flops = peak or peak_flops(ranks.device, dtype)
        self._measured: dict[str, Any] = {} if self._metrics is None else self._metrics.measured
        self._due = recipe.evaluation.steps(recipe.train.num_steps)
        if recipe.evaluation.start and self.text.held_out is not None and self.num_steps_done == 0:
            self._write({"step": 0, "num_tokens": 0, "held_out": self._measure_held_out(0)})

    @property
    def model(self) -> Any:
        """The model that is trained."""
        return self.trained.module

    @property
    def num_steps_done(self) -> int:
        """Steps taken so far, those before a resume among them."""
        return self.trainer.num_steps_done

    @property
    def done(self) -> bool:
        """Whether no step is left to take."""
        return self.num_steps_done >= self.last_step

    @property
    def held_out(self) -> dict[str, Any] | None:
        """The newest measurement of held-out loss; on the first rank, also one made before the run was resumed."""
        return self._measured.get("held_out")

    def step(self) -> tuple[StepRecord, dict[str, Any]]:
        """Take the next step; measure held-out loss, write metrics and save a checkpoint where they are due.

        Returns:
            What the step did; and its line of ``metrics.jsonl``, with ``held_out`` where that was measured.

        Raises:
            DivergedError: Training diverged: see `Trainer.step`. ``failed.json`` says why.
            CheckpointError: A checkpoint could not be written.
        """
        recipe, number = self.recipe, self.num_steps_done + 1
        details = bool(recipe.log.details_every) and number % recipe.log.details_every == 0
        with self._own_random_numbers():
            try:
                record = self.trainer.step(details=details)
            except DivergedError as error:
                write_atomically(self.out / FAILED, to_json({"failed": str(error)}))
                raise
        values = {**record.to_dict(), "num_skipped": self.trainer.num_skipped, **self._speed(record)}
        if number in self._due and self.text.held_out is not None:
            values["held_out"] = self._measure_held_out(number)
        if number == recipe.train.num_steps:
            values |= self._measure_at_the_end()
        if number % recipe.log.every == 0 or details or values.keys() & {"held_out", "texts"}:
            self._write(values)
        last = number == self.last_step
        due = last or (recipe.checkpoint.every and number % recipe.checkpoint.every == 0)
        # After the last step of a run that keeps no checkpoint, one is needed only to take the model out of it.
        if due and (number < recipe.train.num_steps or recipe.checkpoint.keep_last or self.trained.needs_checkpoint):
            self.save(wait=last)
        return record, values

    def save(self, *, wait: bool) -> None:
        """Save a checkpoint of the step just taken, unless there is one already, and wait until it is written.

        Without ``wait``, the recipe decides whether it is written in the background.
        """
        if self._saved_step != self.num_steps_done:
            facts = {
                "step": self.num_steps_done,
                "num_skipped": self.trainer.num_skipped,
                "corpus": self.text.digest,
                "dtype": self.trainer.options.dtype,
                "recipe": self.recipe.to_dict(),
                "world_size": self.ranks.world_size,
                "versions": versions(),
                **self.trained.facts(),
            }
            asynchronous = self.recipe.checkpoint.asynchronous and not wait
            self._checkpoints.save(self.num_steps_done, self._tensors(), facts, asynchronous=asynchronous)
            self._saved_step = self.num_steps_done
        if wait:
            self._checkpoints.wait()

    def close(self) -> None:
        """Wait for a checkpoint that is being written, and close the metrics; called by `Run.open`.

        This is right after a failed step too: the checkpoint being written is that of an earlier step.
        """
        try:
            self._checkpoints.wait()
        finally:
            if self._metrics is not None:
                self._metrics.close()
                self._metrics = None

    def finish(self) -> dict[str, Any]:
        """Write the model, the result and a plot of the losses, if the last step has been taken.

        The contents of ``result.json`` are returned; ``interrupted`` says whether steps are left.
        """
        self.close()
        result = self._result()
        # The other processes do not wait for this: writing a large model may take longer than their time limit.
        if self.done and self.ranks.rank == 0:
            ended = self._ended_before(self._first) if self.num_steps_done == self._first else None
            if ended is not None:
                return ended
            if self.recipe.checkpoint.write_model:
                self.progress.note("writing the model")
                self.trained.write(self.out, self._checkpoints.latest(), self.tokenizer)
            write_atomically(self.out / RESULT, to_json(result))
            _plot(self.out)
            if not self.recipe.checkpoint.keep_last:
                shutil.rmtree(self._checkpoints.folder, ignore_errors=True)
        return result

    def _speed(self, record: StepRecord) -> dict[str, float]:
        """Tokens and operations per second of a step, and their share of what the devices can do at best."""
        tokens = record.num_tokens / record.step / record.seconds
        flops = tokens * self.flops_per_token
        found = {"tokens_per_second": tokens, "model_tflops": flops / 1e12}
        if self._peak_flops is not None:
            found["mfu"] = flops / (self._peak_flops * self.ranks.world_size)
        return found

    def _choose_rows(self) -> WritableRows:
        """Restrict the tables to the rows that may be trained, which are chosen once and kept in the run folder."""
        found = self.trained.rows()
        if found is None or not found[2]:
            raise ConfigError("writing.rule chooses rows of memory to train, and none is trained here")
        spec, row_map, tables = found
        recipe = self.recipe
        at_once = max(1, _COUNTED_AT_ONCE // recipe.data.sequence_length)
        domain, general = (
            batches_of(recipe, self.text, self.tokenizer, at_once, general=general) for general in (False, True)
        )
        data = [recipe.data.sequence_length, recipe.data.restart_documents, recipe.train.seed]
        made_from = {"text": self.text.digest, "hash": spec.digest, "control": recipe.adapter.control}

        def choose() -> WritableRows:
            self.progress.note("counting which rows the texts read")
            return choose_rows(spec, domain, general, recipe.writing, row_map=row_map)

        writable = kept_choice(
            self.out / WRITABLE,
            choose,
            made_from={**made_from, "writing": to_plain(recipe.writing), "train": data},
            ranks=self.ranks,
        )
        writable.restrict(tables)
        return writable

    def _write(self, values: dict[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.write(values)

    def _measure_held_out(self, number: int) -> dict[str, Any]:
        """Measure held-out loss after step ``number``, on as many tokens as the recipe says."""
        whole = self.recipe.evaluation.curve_tokens is None or number == self.recipe.train.num_steps
        self._measured["held_out"] = {"step": number, **self.evaluate_held_out(whole=whole).to_dict()}
        return self._measured["held_out"]

    def _measure_at_the_end(self) -> dict[str, Any]:
        """Measure the other texts, and the last point of a curve that has tokens of its own."""
        found: dict[str, Any] = {}
        if self.recipe.evaluation.curve_tokens is not None and self.text.held_out is not None:
            found["curve_loss"] = self.evaluate_held_out(whole=False).loss
        if self.text.texts:
            found["texts"] = self._measured["texts"] = {
                name: self.evaluate(text.tokens, num_bytes=text.num_bytes).to_dict()
                for name, text in self.text.texts.items()
            }
        return found

    def evaluate_held_out(self, *, whole: bool = True) -> HeldOutLoss:
        """Measure the model's loss on the held-out text as it stands; on ``evaluation.curve_tokens`` if not whole."""
        assert self.text.held_out is not None
        return self.evaluate(
            self.text.held_out,
            max_tokens=None if whole else self.recipe.evaluation.curve_tokens,
            num_bytes=self.text.held_out_bytes if whole else None,
            document_ends=self.text.held_out_ends if self.recipe.data.restart_documents else None,
        )

    def evaluate(self, tokens: np.ndarray, **options: Any) -> HeldOutLoss:
        """Measure the model's loss on a text as it stands; ``options`` are others of `held_out_loss`."""
        return held_out_loss(
            self.model,
            tokens,
            length=self.recipe.data.sequence_length,
            batch_size=sequences_at_once(self.recipe, self.ranks),
            ranks=self.ranks,
            loss_module=self.trainer.loss_module,
            beginning=self.trainer.batches.beginning,
            **options,
        )

    def _ended_before(self, step: int) -> dict[str, Any] | None:
        """Read ``result.json``, if the run had ended with this step and its model is there."""
        try:
            result = json.loads((self.out / RESULT).read_bytes())
            written = not self.recipe.checkpoint.write_model or self.trained.is_written(self.out)
            good = result["num_steps"] == step and written
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return {**result, "out": str(self.out)} if good else None

    def _dtype(self) -> Literal["float32", "bfloat16"]:
        """Choose the type of matrix products; a resumed run keeps its own, whatever this machine would choose."""
        chosen = self.recipe.train.dtype
        if chosen != "auto":
            return chosen
        latest = latest_checkpoint(self.out / CHECKPOINTS)
        begun = None if latest is None else read_facts(latest).get("dtype")
        return begun if begun in ("float32", "bfloat16") else best_dtype(self.ranks.device)

    def _restore(self, resume: bool) -> None:
        """Put everything back as it was when the last complete checkpoint was made, if there is one."""
        with agree(self.ranks):
            latest = latest_checkpoint(self._checkpoints.folder)
            if latest is not None:
                _check_facts(latest, self.text.digest)
        if latest is None and self._ended_before(self.last_step) is not None:
            self.trainer.num_steps_done = self.last_step  # its checkpoints were removed at its end
        elif latest is None:
            self.trained.prepare(self.text)
            if resume:
                self.progress.note("there is no complete checkpoint yet: beginning at step 1")
        else:
            if self.recipe.model.frozen_tables:
                self.trained.prepare(self.text)  # frozen rows are in no checkpoint
            self.progress.note(f"reading {latest.name}")
            facts = self._checkpoints.load(latest, self._tensors(), expected=self.trained.identity())
            self.trainer.num_steps_done, self.trainer.num_skipped = facts["step"], facts["num_skipped"]
            self._saved_step = facts["step"]

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        states = {f"rng/rank{self.ranks.rank}/{place}": state for place, state in self._random.items()}
        return {**self.trained.tensors(self.trainer.optimizer), **self.trainer.table_use.tensors(), **states}

    def _random_states(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self.ranks.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.ranks.device)
        return states

    @contextlib.contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        """Draw this run's random numbers, and leave those of the process as they were."""
        device = self.ranks.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.set_rng_state(self._random["cpu"])
            if device.type == "cuda":
                torch.cuda.set_rng_state(self._random["cuda"], device)
            yield
            self._random = self._random_states()

    def _result(self) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "format": "engram.train.1",
            **run_facts(self._started, self._commit),
            "world_size": self.ranks.world_size,
            "dtype": trainer.options.dtype,
            "num_steps": trainer.num_steps_done,
            "num_skipped": trainer.num_skipped,
            "num_tokens": trainer.num_steps_done * trainer.batches.batch_size * trainer.batches.length,
            "parameters": self.trained.sizes,
            "held_out": self.held_out,
            "curve": _curve(self.out / METRICS) if self.ranks.rank == 0 else None,
            "texts": self._measured.get("texts", {}),
            "writing": None if self.writable is None else dict(self.writable.facts),
            "interrupted": not self.done,
            "out": str(self.out),
        }


def _check_facts(checkpoint: Path, corpus: str) -> None:
    """Refuse a checkpoint that was not made by a run, or was made with another text."""
    facts = read_facts(checkpoint)
    if not all(type(facts.get(name)) is int for name in ("step", "num_skipped")):
        raise CheckpointError(
            f"{checkpoint} does not say how many steps were done; name the folder of a run with --out"
        )
    if facts.get("corpus") != corpus:
        raise MismatchError(
            f"the text is not what it was: {checkpoint} was trained on the corpus {facts.get('corpus')}, the sources "
            f"now give {corpus}; put the text back as it was, or begin a new run with another --out (a version of "
            "engram-lm that packs text differently gives another corpus too)"
        )


def sequences_at_once(recipe: Recipe, ranks: Ranks) -> int:
    """Number of sequences that all processes together compute at a time in training."""
    own = -(-recipe.train.batch_size // ranks.world_size)
    return min(own, recipe.train.micro_batch_size or own) * ranks.world_size


def _curve(metrics: Path) -> list[list[Any]]:
    """Pair the tokens trained on with the held-out loss, for every measurement of a run."""
    lines = [line for line in read_metrics(metrics) if "held_out" in line]
    return [[line["num_tokens"], line.get("curve_loss", line["held_out"]["loss"])] for line in lines]


def _plot(folder: Path) -> None:
    """Draw the losses of a run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_metrics(folder / METRICS)
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    known = [(line["num_tokens"], line["loss"]) for line in lines if line.get("loss") is not None]
    if known:
        axes.plot(*zip(*known, strict=True), linewidth=1, alpha=0.6, label="training")
    held_out = [(tokens, loss) for tokens, loss in _curve(folder / METRICS) if loss is not None]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", label="held out")
    axes.set(xlabel="tokens", ylabel="loss, nats per token")
    if known or held_out:
        axes.legend()
    FigureCanvasAgg(figure).print_png(str(folder / "loss.png"))
