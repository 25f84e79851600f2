"""``engram-lm study long_context``: train on short text, extend to long text, and ask for notes at every length."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from engram_lm.errors import ConfigError, DataError, check_flags
from engram_lm.files import write_atomically
from engram_lm.model import EngramLMConfig
from engram_lm.planning.budget import allocate
from engram_lm.studies.command import StudyCommand
from engram_lm.studies.long_context.notes import NoteOptions, code_lines, make_documents
from engram_lm.studies.long_context.recall import TASKS, recall
from engram_lm.studies.long_context.summary import ENGRAM, EQUAL, MOE, figures, long_context_finding, summarize
from engram_lm.studies.result import run_record
from engram_lm.studies.runner import Runner
from engram_lm.studies.study import Arm, Budget, Study, TrainedArm, short_digest, with_seed
from engram_lm.training.checkpoints.training_state import export_model
from engram_lm.training.data.documents import json_lines
from engram_lm.training.data.text_source import TextSource
from engram_lm.training.export import CHECKPOINTS
from engram_lm.training.loop import find_device
from engram_lm.training.metrics import read_metrics
from engram_lm.training.optimizers import OptimizerOptions
from engram_lm.training.recipe import (
    CheckpointOptions,
    DataOptions,
    EvaluationOptions,
    LogOptions,
    ModelOptions,
    Recipe,
    RunOptions,
    TokenizerOptions,
)
from engram_lm.training.schedules import ScheduleOptions
from engram_lm.training.stage import StageOptions

_UNSEEN = 5_000
"""Lines of code that no model is trained on."""
_RATIO = 0.75
"""The experts' share of the sparse parameters, as in the paper's models."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongContextStudy(StudyCommand):
    """Ask whether memory helps a model to find again what it read far back, at equal steps and at equal loss.

    A small mixture of experts and a small memory model, with equal total and active parameters, are trained on short
    sequences of a text in which notes are made and made again. Both are then extended to long sequences by a stage with
    YaRN, and so is the better one of them as it was when its loss equaled the other's last one, as in the paper's
    section 5. All are asked for notes that are hidden in code that they have not seen, up to the long length.

    The folder holds every run, result.json, report.html and recall.png.

    Examples::

        engram-lm study long_context
        engram-lm study long_context --out runs/long --seeds 3 --resume
    """

    name: ClassVar[str] = "long_context"
    result_format: ClassVar[str] = "engram.long_context.1"

    seeds: int = 2
    """Repetitions with other first weights and another order of the text."""
    tokens: int = 1_600_000
    """Tokens that each model is trained on in short sequences."""
    sequence_length: int = 512
    """Tokens of a short sequence."""
    batch_size: int = 8
    """Short sequences in a batch."""
    long_tokens: int = 200_000
    """Tokens of the stage."""
    long_length: int = 4096
    """Tokens of a long sequence."""
    long_batch_size: int = 2
    """Long sequences in a batch."""
    factor: float = 10.0
    """How far YaRN stretches positions; the paper takes 10 for eight times the length."""
    lr: float = 4e-3
    """Learning rate, which stays as it is in short sequences; a quarter of it is the peak of the stage."""
    points: int = 12
    """Measurements of held-out loss in short sequences, each with a checkpoint; equal loss is looked for among them."""
    documents: int = 400
    """Documents of the text."""
    keys: int = 16
    """Keys of notes, at least 8."""
    values: int = 16
    """Values of notes, at least 2."""
    notes_per_line: int = 4
    """Notes behind each line of code of the text."""
    vocab_size: int = 1536
    """Tokens of the tokenizer that is trained."""
    hidden_size: int = 128
    """Width of the models."""
    heads: int = 2
    """Attention heads of 32 channels."""
    experts: int = 16
    """Routed experts of the model without memory, of which a token visits two."""
    haystacks: int = 12
    """Haystacks of each task and length."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of matrix products; auto takes bfloat16 where the processor multiplies it in hardware."""
    device: str = "cpu"
    """Where to train, as torch names it."""

    def __post_init__(self) -> None:
        check_flags(self, "seeds", "tokens", "batch_size", "long_tokens", "long_batch_size", "points", "haystacks")
        check_flags(self, "documents", "heads", "experts", "sequence_length")
        if self.long_length <= self.sequence_length:
            raise ConfigError(
                f"--long-length {self.long_length} must be above --sequence-length {self.sequence_length}"
            )
        if not self.long_length <= self.factor * self.sequence_length < math.inf:
            raise ConfigError(
                f"--factor {self.factor:g} must stretch --sequence-length {self.sequence_length} to --long-length "
                f"{self.long_length} or beyond"
            )
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"--lr is a finite number above 0, not {self.lr}")
        self.study()  # refuses what cannot be

    @property
    def notes(self) -> NoteOptions:
        """What the text is made of."""
        return NoteOptions(
            num_documents=self.documents,
            notes_per_line=self.notes_per_line,
            num_keys=self.keys,
            num_values=self.values,
        )

    @property
    def _text_name(self) -> str:
        return f"text-{short_digest(self.notes)}.jsonl"

    def _of_these_models(self, name: str) -> str:
        """Name a folder with what was made of the short models, so that it is not taken for other models' later."""
        return f"{name}-{short_digest([self._recipe(model) for model in self.models().values()])}"

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of haystacks: the short one, doubled until it is the long one."""
        doubled = [self.sequence_length]
        while 2 * doubled[-1] < self.long_length:
            doubled.append(2 * doubled[-1])
        return (*doubled, self.long_length)

    def models(self) -> dict[str, ModelOptions]:
        """The mixture of experts, and the memory model with as many total and active parameters."""
        backbone: dict[str, Any] = {
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "hidden_size": self.hidden_size,
            "n_routed_experts": self.experts,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "num_streams": 1,
            # Keys as wide as values, for which torch has a fast attention on CPUs.
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 32,
            "max_position_embeddings": self.sequence_length,
            # The usual 0.02 is for wider models.
            "initializer_range": 0.06,
        }
        alone = EngramLMConfig.preset("moe-nano", vocab_size=self.vocab_size, **backbone)
        memory = EngramLMConfig.preset("engram-nano", vocab_size=self.vocab_size, **backbone).memory_config
        found = allocate(alone, _RATIO, memory, tolerance=0.01)
        return {
            MOE: ModelOptions(preset="moe-nano", backbone=backbone),
            ENGRAM: ModelOptions(
                preset="engram-nano",
                backbone={**backbone, **found.backbone},
                memory={"rows_per_head": found.rows_per_head},
            ),
        }

    def study(self) -> Study:
        """Both models on short sequences."""
        titles = {MOE: "mixture of experts", ENGRAM: "with memory"}
        arms = [Arm(name=name, title=titles[name], recipe=self._recipe(model)) for name, model in self.models().items()]
        return Study(
            name=self.name,
            question="Does memory help to find again what was read far back?",
            arms=tuple(arms),
            budget=Budget(equal=("total", "active", "tokens"), tolerance=0.01),
            seeds=self.seeds,
            figures=figures,
            finding=long_context_finding,
        )

    def _recipe(self, model: ModelOptions, *, long: bool = False) -> Recipe:
        length, size = (self.long_length, self.long_batch_size) if long else (self.sequence_length, self.batch_size)
        steps = max(1, round((self.long_tokens if long else self.tokens) / (length * size)))
        every = 0 if long else math.ceil(steps / self.points)
        return Recipe(
            model=model,
            stage=StageOptions(factor=self.factor if long else None),
            tokenizer=TokenizerOptions(vocab_size=self.vocab_size),
            data=DataOptions(
                sources=(TextSource(path=str(self.folder / self._text_name)),),
                cache=self.folder / "text",
                sequence_length=length,
                held_out=0.03,
            ),
            train=RunOptions(
                num_steps=steps, batch_size=size, max_skipped_steps=0, dtype=self.dtype, device=self.device
            ),
            optimizer=OptimizerOptions(backbone="adamw", lr=self.lr / 4 if long else self.lr),
            # A loss along the way can be compared with a last one only where the rate does not fall.
            schedule=ScheduleOptions(kind="cosine") if long else ScheduleOptions(kind="constant", warmup=0.05),
            evaluation=EvaluationOptions(every=every, max_tokens=32_768),
            checkpoint=CheckpointOptions(every=every, keep_last=1 if long else self.points + 1),
            log=LogOptions(details_every=0, tensorboard="no", wandb="no"),
        )

    def prepare(self, out: Path) -> None:
        """Write the text."""
        find_device(self.device)
        if not (out / self._text_name).is_file():
            documents = make_documents(self.notes, self.code()[0])
            write_atomically(out / self._text_name, json_lines(documents))

    def code(self) -> tuple[list[str], list[str]]:
        """Lines of code for the text, and lines for the haystacks, of which none is among those for the text."""
        # Files are chosen by how much is asked for, so both parts are taken of the same lines.
        lines = code_lines(_UNSEEN + self.notes.num_documents * self.notes.lines_per_document)
        trained = lines[_UNSEEN:]
        known = set(trained)
        return trained, [line for line in lines[:_UNSEEN] if line not in known]

    def measure(self, seeds: Sequence[Mapping[str, TrainedArm]], runner: Runner) -> dict[str, Any]:
        """Find where the losses are equal, train the stages, and ask for notes before and after."""
        whole = [arms for arms in seeds if all(one.failed is None for one in arms.values())]
        failed = [one.failed for arms in seeds for one in arms.values() if one.failed is not None]
        if not whole:
            raise DataError(failed[0] if failed else "no seed was trained to its end")
        equal = {arms[MOE].seed: self._equal_loss(arms, runner.out) for arms in whole}
        extended = self._extend(list(equal), runner)
        lines, found = self.code()[1], list[dict[str, Any]]()
        for arms in whole:
            seed = arms[MOE].seed
            runner.progress.note(f"seed {seed}: asking {2 + len(extended[seed])} models for notes")
            ask = functools.partial(self._asked, lines=lines, runner=runner)
            found.append(
                {
                    "seed": seed,
                    "equal_loss": equal[seed],
                    "short": {name: ask(one) for name, one in arms.items()},
                    "long": {name: ask(one) for name, one in extended[seed].items() if one.failed is None},
                }
            )
        return {
            "study": self.name,
            "question": runner.study.question,
            "seeds": found,
            "failed": failed,
            "lengths": list(self.lengths),
            "num_values": self.values,
            "summary": summarize(found),
        }

    def _equal_loss(self, arms: Mapping[str, TrainedArm], out: Path) -> dict[str, Any]:
        """Take the model that is ahead out of the checkpoint whose loss is nearest to the other's last one."""
        last = {name: float(one.result["held_out"]["loss"]) for name, one in arms.items()}
        behind, ahead = (choose(last, key=lambda name: last[name]) for choose in (max, min))
        curve = {
            line["step"]: line["held_out"]["loss"]
            for line in read_metrics(arms[ahead].folder / "metrics.jsonl")
            if "held_out" in line
        }
        step = min(curve, key=lambda one: abs(curve[one] - last[behind]))
        folder = arms[ahead].folder.with_name(self._of_these_models(EQUAL))
        if not (folder / "config.json").is_file():
            _, tokenizer = arms[ahead].load()
            export_model(arms[ahead].folder / CHECKPOINTS / f"step-{step:08d}", folder, tokenizer=tokenizer)
        steps = arms[ahead].arm.recipe.train.num_steps
        return {"arm": ahead, "step": step, "num_steps": steps, "loss": curve[step], "wanted_loss": last[behind]}

    def _extend(self, seeds: Sequence[int], runner: Runner) -> dict[int, dict[str, TrainedArm]]:
        """Train the stages of all seeds, in a folder of their own; they resume like everything else."""
        titles = {MOE: "mixture of experts", ENGRAM: "with memory", EQUAL: "the one ahead, at equal loss"}
        places = {MOE: f"{MOE}/model", ENGRAM: f"{ENGRAM}/model", EQUAL: self._of_these_models(EQUAL)}

        def recipe_of(arm: Arm, index: int) -> Recipe:
            weights = runner.out / f"seed-{seeds[index]}" / places[arm.name]
            recipe = self._recipe(ModelOptions(weights=weights), long=True)
            return with_seed(dataclasses.replace(arm, recipe=recipe), seeds[index])

        first = self._recipe(ModelOptions(weights=runner.out / f"seed-{seeds[0]}" / places[MOE]), long=True)
        stages = Study(
            name=f"{self.name}, longer",
            question=runner.study.question,
            arms=tuple(Arm(name=name, title=title, recipe=first) for name, title in titles.items()),
            seeds=len(seeds),
            recipe_of=recipe_of,
        )
        outcome = Runner(
            stages,
            runner.out / self._of_these_models("long"),
            mode=runner.mode,
            progress=runner.progress,
            interrupt=runner.interrupt,
        ).run()
        if outcome.interrupted:
            raise KeyboardInterrupt
        return {seeds[index]: arms for index, arms in enumerate(outcome.seeds)}

    def _asked(self, trained: TrainedArm, *, lines: Sequence[str], runner: Runner) -> dict[str, Any]:
        """What training one model came to, and how many notes it finds again."""
        model, tokenizer = trained.load(self.device)
        lengths, seed = self.lengths, trained.seed
        with runner.measuring(f"asking {trained.arm.name}", len(TASKS) * len(lengths) * self.haystacks) as advance:
            found = recall(
                model,
                tokenizer,
                self.notes,
                lines,
                lengths=lengths,
                num_haystacks=self.haystacks,
                seed=seed,
                on_progress=lambda: advance(1),
            )
        return {**run_record(trained, curve_points=50), "recall": found}
