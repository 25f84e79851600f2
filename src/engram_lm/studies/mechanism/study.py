"""``engram-lm study mechanism``: what memory does to the layers and to the answers of models that read it."""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from engram_lm.analysis.cka.cka import Cka, CkaFindings
from engram_lm.analysis.lens import LogitLens
from engram_lm.analysis.reading import Analysis, NotApplicable, read_text
from engram_lm.analysis.subject import find_subject
from engram_lm.analysis.suppression import suppression_effect
from engram_lm.errors import ConfigError, check_flags
from engram_lm.evaluation.task_scores import score_tasks
from engram_lm.evaluation.tasks import read_tasks, write_tasks
from engram_lm.files import write_atomically
from engram_lm.memory import EngramConfig
from engram_lm.studies.command import StudyCommand
from engram_lm.studies.mechanism.summary import BASELINE, figures, mechanism_finding, summarize
from engram_lm.studies.result import study_result
from engram_lm.studies.runner import Runner
from engram_lm.studies.small_models import SmallModelFlags
from engram_lm.studies.study import Arm, Budget, Study, TrainedArm, short_digest
from engram_lm.studies.suppression.families import FamilyOptions, make_families
from engram_lm.studies.text_flags import like
from engram_lm.training.data.documents import json_lines, read_documents, split_documents
from engram_lm.training.data.text_source import TextSource
from engram_lm.training.loop import find_device
from engram_lm.training.recipe import ModelOptions, Recipe

_TASKS = "tasks.jsonl"
_SUPPRESSED_TOKENS = 4_096
"""Held-out tokens that every arm reads with its memory on, at zero and shuffled."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MechanismStudy(SmallModelFlags, StudyCommand):
    """Ask how memory helps: how much depth it stands for, and what a model still knows and reads without it.

    Small models are trained on the same batches, from the same initial weights where they have the same: one without
    memory (its feed-forward is wider, so that it spends the same operations per token), one for every block that may
    read memory, and one whose budget is divided between two blocks. Their held-out losses are the paper's layer sweep.
    The logit lens and CKA against the model without memory say how many layers memory saves (the paper's section 6.1).
    Facts about invented people and passages about others are mixed into the text, and both are asked for with memory on
    and suppressed (section 6.3). Like the paper's, the models have four residual streams.

    With no arguments it takes about an hour on two CPU cores. The folder holds every model, the questions (a task file
    for engram-lm eval --tasks), result.json, report.html, and a picture for each part.

    Examples::

        engram-lm study mechanism --seeds 3
        engram-lm study mechanism --parts sweep lens cka --streams 1 --hidden-size 64 --tokens 150000
    """

    name: ClassVar[str] = "mechanism"
    result_format: ClassVar[str] = "engram.mechanism.1"
    may_compile: ClassVar[bool] = True

    seeds: int = 1
    """Repetitions with other weights and another order of batches; gives mean and standard deviation."""
    parts: tuple[Literal["sweep", "lens", "cka", "suppression"], ...] = ("sweep", "lens", "cka", "suppression")
    """What to do. Without sweep, the only single module is at block 1. Without suppression, the text has no facts."""

    blocks: int = 6
    """Transformer blocks, from 2."""
    split: tuple[int, ...] = ()
    """Two blocks, counted from 0, that divide the budget between them; like the paper's (1 and 2 of 6) unless given."""
    tokens: int = 1_000_000
    """Tokens each model is trained on."""
    sequence_length: int = 128
    """Tokens in a sequence."""
    vocab_size: int = 2048
    """Tokens of the tokenizer that is trained."""
    hidden_size: int = 96
    """Width of the models."""
    streams: int = 4
    """Residual streams; the paper has 4, and 1 is faster."""
    memory_dim: int = 128
    """Width of the memory vector of one module, over all heads; each of two has half of it."""
    rows_per_head: int = 16_384
    """Rows asked for per head."""
    max_bytes: int = 3_000_000
    """Text to read at most, beside the facts."""
    people: int = 32
    """People whose facts the text states again and again; each has four."""
    documents: int = 4_000
    """Documents of facts, and of passages to be read, that are mixed into the text."""
    questions: int = 256
    """Questions of each family."""

    analysis_tokens: int = 8_192
    """Held-out tokens that lens and CKA read."""
    positions: Literal["all", "word_ends", "names", "ngrams"] = "word_ends"
    """Where CKA compares hidden states; the paper takes the last token of a named entity."""
    top_k: int = 2
    """Layers that a layer's soft alignment averages over; the paper takes 5 of its 30."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks < 2:
            raise ConfigError(f"--blocks must be at least 2, or there is no depth to choose, not {self.blocks}")
        if not self.split:
            object.__setattr__(self, "split", default_split(self.blocks))
        if self.split and (len(self.split) != 2 or len(set(self.split)) != 2):
            raise ConfigError(f"--split names two blocks, not {self.split}")
        if any(not 0 <= block < self.blocks for block in self.split):
            raise ConfigError(f"--split {self.split} names blocks beyond the {self.blocks}, counted from 0")
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise ConfigError(f"--parts names at least one part, and each of them once, not {self.parts}")
        check_flags(self, "seeds", "streams", "analysis_tokens", "top_k")
        for blocks in ((0,), self.split or (0,)):
            self.memory_of(blocks)  # refuses what cannot be
        _ = self.families  # refuses what cannot be, too

    @property
    def longest_question(self) -> int:
        """Tokens of a question at most: they have fewer bytes than this."""
        return 256 if "suppression" in self.parts else 0

    @property
    def num_streams(self) -> int:
        """Residual streams of the models."""
        return self.streams

    @property
    def families(self) -> FamilyOptions:
        """What facts and passages are made of."""
        return FamilyOptions(num_people=self.people, num_documents=self.documents, num_questions=self.questions)

    def memory_of(self, blocks: tuple[int, ...]) -> EngramConfig:
        """Memory at the start of some blocks.

        Two modules have rows of half the width, and each as many of them as one module, so that the tables of all arms
        hold as much (but for the primes, which differ by some rows) and their projections cost as much.
        """
        one = self.memory_in((0,))
        divisor = len(blocks) * one.num_heads_total
        if self.memory_dim % divisor:
            raise ConfigError(
                f"--memory-dim {self.memory_dim} is divided among {len(blocks)} modules of {one.num_heads_total} "
                f"heads; choose a multiple of {divisor}"
            )
        return self.memory_in(blocks, self.memory_dim // len(blocks))

    def study(self) -> Study:
        """No memory, one module at every block (at block 1 alone without the sweep), and a divided one.

        What two arms have in common starts as the same numbers: the backbone of all of them, and memory wherever it is
        inserted. The feed-forward of the model without memory is wider by what one module's operations are.
        """
        one = self.memory_of((0,))
        baseline = self.model(None, wider=self.width_of(one.flops_per_token()))
        single = range(self.blocks) if "sweep" in self.parts else [min(1, self.blocks - 1)]
        first = (*like(baseline), *like(self.model(one), part="memory"))
        arms = [Arm(name=BASELINE, title="no memory", recipe=self.recipe(baseline))]
        for block in single:
            recipe = self.recipe(self.model(self.memory_of((block,)), like=first))
            arms.append(Arm(name=f"block-{block}", title=f"memory in block {block}", recipe=recipe, x=float(block)))
        if self.split:
            name, title = (joint.join(map(str, self.split)) for joint in ("-", " and "))
            recipe = self.recipe(self.model(self.memory_of(self.split), like=like(baseline)))
            arms.append(Arm(name=f"blocks-{name}", title=f"memory in blocks {title}", recipe=recipe))
        return Study(
            name=self.name,
            question="How does memory help: how much depth does it stand for, and what is only in it?",
            arms=tuple(arms),
            budget=Budget(equal=("flops", "tokens"), tolerance=0.02),
            seeds=self.seeds,
            figures=figures,
            finding=mechanism_finding,
        )

    def recipe(self, model: ModelOptions, *, curve_points: int = 0) -> Recipe:
        """Write the recipe of a model; with suppression, on a text that facts are mixed into."""
        recipe = super().recipe(model, curve_points=curve_points)
        if "suppression" not in self.parts:
            return recipe
        train, held_out = self._texts
        data = dataclasses.replace(
            recipe.data,
            sources=(TextSource(path=str(train)),),
            held_out_sources=(TextSource(path=str(held_out)),),
            held_out=0.0,
            max_bytes=None,
        )
        return dataclasses.replace(recipe, data=data)

    @property
    def _texts(self) -> tuple[Path, Path]:
        """Files with the text to train on, facts included, and with the text to be judged on, which has none."""
        digest = short_digest((self.data, self.max_bytes, self.families))
        return self.folder / f"text-{digest}.jsonl", self.folder / f"held-out-{digest}.jsonl"

    def prepare(self, out: Path) -> None:
        """Write text and questions, or, without suppression, train a tokenizer on text that is not held out."""
        find_device(self.device)
        if "suppression" not in self.parts:
            self.prepare_tokenizer(out)
            return
        families = make_families(self.families)
        write_tasks(out / _TASKS, families.items)
        if all(path.is_file() for path in self._texts):
            return
        parts = split_documents(read_documents(self.data, max_bytes=self.max_bytes), self.held_out_share)
        train, held_out = ([document.text for document in part] for part in parts)
        train += families.documents
        random.Random(0).shuffle(train)
        for path, documents in zip(self._texts, (train, held_out), strict=True):
            write_atomically(path, json_lines(documents))

    def measure(self, seeds: Sequence[Mapping[str, TrainedArm]], runner: Runner) -> dict[str, Any]:
        """Compare the losses; look at the layers of every seed's models, and ask them questions."""
        text = runner.text(runner.study.arms[0].recipe)
        result = study_result(runner.study, seeds)
        looks = [
            {**self._layers(number, arms, text.held_out, runner), **self._answers(number, arms, text.held_out, runner)}
            for number, arms in enumerate(seeds)
        ]
        counts = {name: text.facts[name] for name in ("source", "bytes", "train_tokens", "held_out_tokens")}
        return {
            **result,
            "data": {"files": text.facts["documents"], **counts},
            "looks": looks,
            "summary": summarize(result, looks),
        }

    def _layers(self, seed: int, arms: Mapping[str, TrainedArm], tokens: Any, runner: Runner) -> dict[str, Any]:
        """The logit lens of every model, and CKA with the model without memory, as plain values by arm."""
        chosen: dict[str, Analysis] = {"lens": LogitLens(), "cka": Cka(baseline=BASELINE, positions=self.positions)}
        chosen = {part: analysis for part, analysis in chosen.items() if part in self.parts}
        trained = {name: one for name, one in arms.items() if one.failed is None}
        if not chosen or BASELINE not in trained:
            return {}
        runner.stop_if_asked()
        runner.progress.note(f"seed {seed}: {' and '.join(chosen)} of {len(trained)} models")
        subjects = [find_subject(*one.load(self.device), name=name) for name, one in trained.items()]
        with runner.measuring("reading text", min(len(tokens), self.analysis_tokens or len(tokens))) as advance:
            read = read_text(
                subjects,
                tokens,
                chosen,
                length=self.sequence_length,
                max_tokens=self.analysis_tokens,
                on_progress=advance,
            )
        found: dict[str, Any] = {}
        for part, result in read.items():
            if isinstance(result, NotApplicable):
                runner.progress.note(f"{part} does not apply: {result.reason}")
                found[part] = {"not_applicable": result.reason}
            elif isinstance(result, CkaFindings):
                found[part] = {one.column_model: one.to_dict(self.top_k) for one in result.maps}
            else:
                found[part] = result.to_dict()["models"]
        return found

    def _answers(self, seed: int, arms: Mapping[str, TrainedArm], tokens: Any, runner: Runner) -> dict[str, Any]:
        """What models answer with memory on and suppressed, by arm, and what the one without memory answers."""
        if "suppression" not in self.parts:
            return {}
        items = read_tasks(runner.out / _TASKS)
        found: dict[str, Any] = {}
        for name, one in arms.items():
            if one.failed is not None:
                continue
            runner.stop_if_asked()
            runner.progress.note(f"seed {seed}: asking the model with {one.arm.title} {len(items):,} questions")
            model, tokenizer = one.load(self.device)
            if name == BASELINE:
                scores = score_tasks(model, tokenizer, items)
                found[name] = {"scores": {family: score.to_dict() for family, score in scores.items()}}
                continue
            effect = suppression_effect(
                model,
                tokenizer,
                items=items,
                tokens=tokens[:_SUPPRESSED_TOKENS],
                length=self.sequence_length,
                seed=seed,
                on_progress=lambda _: runner.stop_if_asked(),
            )
            found[name] = {"effect": effect.to_dict()}
        return {"suppression": found}


def default_split(num_blocks: int) -> tuple[int, ...]:
    """The second block and the one before the middle, as layers 2 and 6 of 12 are in the paper; none of two blocks."""
    return (1, max(2, num_blocks // 2 - 1)) if num_blocks > 2 else ()
