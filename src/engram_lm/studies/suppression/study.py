"""``engram-lm study suppression``: train a model on facts and passages, ask both, with memory on and suppressed."""

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from engram_lm.analysis.suppression import Condition, suppression_effect
from engram_lm.errors import ConfigError, DataError, check_flags
from engram_lm.evaluation.task_scores import score_tasks
from engram_lm.evaluation.tasks import read_tasks, write_tasks
from engram_lm.files import write_atomically
from engram_lm.studies.command import StudyCommand
from engram_lm.studies.runner import Runner
from engram_lm.studies.study import Arm, Study, TrainedArm, short_digest
from engram_lm.studies.suppression.families import FamilyOptions, make_families
from engram_lm.studies.suppression.summary import figures, summarize, suppression_finding
from engram_lm.training.data.documents import json_lines
from engram_lm.training.recipe import Recipe
from engram_lm.training.recipe_file import override, read_table

RECIPE = Path(__file__).with_name("recipe.toml")
"""How the models are trained unless another recipe is named."""

_TASKS, _RUN, _TWIN = "tasks.jsonl", "run", "twin"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuppressionStudy(StudyCommand):
    """Ask a model for facts it has learned and for facts it can read, with its memory on, at zero and shuffled.

    A text about invented people is written, a small model is trained on it by a recipe (some minutes on one CPU core),
    and two families of questions are asked, in which the same words are the answers: recall, whose answers are in the
    weights or nowhere, and reading, whose answers are in the context and nowhere else.

    The folder holds, for each seed, the text, the questions (a task file for engram-lm eval --tasks) and the training
    run; beside them are result.json, report.html and retained.png.

    Examples::

        engram-lm study suppression
        engram-lm study suppression --out runs/suppression --seeds 3 --twin --resume
    """

    name: ClassVar[str] = "suppression"
    result_format: ClassVar[str] = "engram.suppression.1"

    seeds: int = 1
    """Repetitions with other people, other facts and other weights; gives mean and standard deviation."""
    twin: bool = False
    """Also train the recipe's model without memory, for comparison (as long again)."""
    recipe: Path | None = None
    """A recipe to train by, in place of the study's own; its data, seed and cache are the study's."""
    people: int = FamilyOptions.num_people
    """People whose facts are learned; each has four."""
    documents: int = FamilyOptions.num_documents
    """Documents of the text: passages, and lists of facts."""
    questions: int = FamilyOptions.num_questions
    """Questions of each family."""
    batch_size: int = 64
    """Sequences at a time when questions are asked."""

    def __post_init__(self) -> None:
        check_flags(self, "seeds", "batch_size")
        self.families(0)  # refuses what cannot be

    def families(self, seed: int) -> FamilyOptions:
        """What a seed's text and questions are made of."""
        return FamilyOptions(
            num_people=self.people, num_documents=self.documents, num_questions=self.questions, seed=seed
        )

    @functools.cached_property
    def _recipe_table(self) -> dict[str, Any]:
        return read_table(self.recipe or RECIPE)

    def settings(self) -> dict[str, Any]:
        """What decides the study."""
        families = dataclasses.asdict(self.families(0))
        return {"seeds": self.seeds, "families": families, "twin": self.twin, "recipe": self._recipe_table}

    def _text(self, seed: int) -> Path:
        """The file with the text of a seed."""
        return self.folder / f"seed-{seed}" / f"text-{short_digest(self.families(seed))}.jsonl"

    def study(self) -> Study:
        """The recipe's model with memory, and without if that is asked for."""
        arms = [Arm(name=_RUN, title="with memory", recipe=Recipe.from_dict(self._recipe_table))]
        if self.twin:
            table = copy.deepcopy(self._recipe_table)
            model = table.setdefault("model", {})
            kind, _, size = str(model.get("preset")).partition("-")
            if kind != "engram":
                raise ConfigError(
                    f"--twin needs a recipe whose model.preset begins with engram-, not {model.get('preset')!r}"
                )
            model["preset"] = f"moe-{size}"
            model.pop("memory", None)
            arms.append(Arm(name=_TWIN, title="without memory", recipe=Recipe.from_dict(table)))
        return Study(
            name=self.name,
            question="What does a model still know, and still read, with its memory suppressed?",
            arms=tuple(arms),
            seeds=self.seeds,
            figures=figures,
            finding=suppression_finding,
            recipe_of=self._recipe_of,
        )

    def _recipe_of(self, arm: Arm, seed: int) -> Recipe:
        """The recipe of an arm, on the text of a seed."""
        folder = self.folder / f"seed-{seed}"
        table = override(arm.recipe.to_dict(), ["--train.seed", str(seed)])
        data = table.get("data", {}) | {"sources": [str(self._text(seed))], "cache": str(folder / "shards")}
        return Recipe.from_dict(table | {"data": data})

    def prepare(self, out: Path) -> None:
        """Write the text and the questions of every seed."""
        for seed in range(self.seeds):
            families = make_families(self.families(seed))
            lines = json_lines(families.documents)
            text = self._text(seed)
            if not text.is_file() or text.read_text(encoding="utf-8") != lines:  # training remembers which file it was
                write_atomically(text, lines)
            write_tasks(out / f"seed-{seed}" / _TASKS, families.items)

    def measure(self, seeds: Sequence[Mapping[str, TrainedArm]], runner: Runner) -> dict[str, Any]:
        """Ask the questions of every seed that was trained to its end; there must be one."""
        failed = [one.failed for arms in seeds for one in arms.values() if one.failed is not None]
        found = [
            {"seed": arms[_RUN].seed} | {name: self._asked(one, runner) for name, one in arms.items()}
            for arms in seeds
            if all(one.failed is None for one in arms.values())
        ]
        if not found:
            raise DataError(failed[0])
        return {
            "seeds": found,
            "failed": failed,
            # A model that copies any value of the context, whatever was asked, gets this share right.
            "reading_by_copying_any": 1 / self.families(0).facts_per_passage,
            "summary": summarize(found),
        }

    def _asked(self, one: TrainedArm, runner: Runner) -> dict[str, Any]:
        """What training one model came to, and how it answers."""
        runner.stop_if_asked()
        kept = ("num_steps", "num_tokens", "seconds", "parameters", "held_out")
        training = {key: one.result[key] for key in kept}
        model, tokenizer = one.load()
        items = read_tasks(one.folder.with_name(_TASKS))
        if one.arm.name == _TWIN:
            scores = score_tasks(model, tokenizer, items, batch_size=self.batch_size)
            return {"training": training, "scores": {name: score.to_dict() for name, score in scores.items()}}
        runner.progress.note(f"seed {one.seed}: asking {len(items):,} questions with memory on and suppressed")

        def asked(condition: Condition) -> None:
            runner.progress.note(f"asked: {condition.name}")
            runner.stop_if_asked()

        effect = suppression_effect(
            model, tokenizer, items=items, batch_size=self.batch_size, seed=one.seed, on_progress=asked
        )
        return {"training": training, "effect": effect.to_dict()}
