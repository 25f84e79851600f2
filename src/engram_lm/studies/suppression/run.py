"""``engram-lm study suppression``: train a model on facts and passages, ask both, with memory on and suppressed."""

import copy
import dataclasses
import json as json_module
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils import logging as transformers_logging

from engram_lm.analysis.suppression.effect import suppression_effect
from engram_lm.errors import ConfigError
from engram_lm.evaluation.task_scores import TaskScores, score_tasks
from engram_lm.evaluation.tasks import read_tasks, write_tasks
from engram_lm.files import replacing, write_atomically
from engram_lm.serving.load import load_model
from engram_lm.studies.study_folder import take_folder
from engram_lm.studies.suppression.families import Families, FamilyOptions, make_families
from engram_lm.studies.suppression.summary import save_picture, summarize, terminal_table
from engram_lm.training.distribution import start
from engram_lm.training.progress import RunProgress
from engram_lm.training.recipe import Recipe
from engram_lm.training.recipe_file import override, read_table
from engram_lm.training.run import Run
from engram_lm.training.run_folder import commit, run_facts, to_json

__all__ = ["RECIPE", "SuppressionStudy"]

RECIPE = Path(__file__).with_name("recipe.toml")
"""How the models are trained unless another recipe is named."""

_RESULT, _PICTURE = "result.json", "retained.png"
_TEXT, _TASKS, _RUN, _TWIN = "text.jsonl", "tasks.jsonl", "run", "twin"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SuppressionStudy:
    """Ask a model for facts it has learned and for facts it can read, with its memory on, at zero and shuffled.

    A text about invented people is written, a small model is trained on it by a recipe (some minutes on one CPU core),
    and two families of questions are asked, in which the same words are the answers: recall, whose answers are in the
    weights or nowhere, and reading, whose answers are in the context and nowhere else.

    The folder holds, for each seed, the text, the questions (a task file for engram-lm eval --tasks) and the training
    run; beside them are result.json and retained.png.

    Examples::

        engram-lm study suppression
        engram-lm study suppression --out runs/suppression --seeds 3 --twin --resume
    """

    out: Path = Path("runs/suppression")
    """Folder of the study."""
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
    resume: bool = False
    """Go on with the study in the folder; what is trained is not trained again."""
    json: bool = False
    """Print the result as JSON instead of a table."""

    def __post_init__(self) -> None:
        for name in ("seeds", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        self.families(0)  # refuses what cannot be

    def families(self, seed: int) -> FamilyOptions:
        """What a seed's text and questions are made of."""
        return FamilyOptions(
            num_people=self.people, num_documents=self.documents, num_questions=self.questions, seed=seed
        )

    def run(self) -> int:
        """Do all of it.

        Returns:
            Exit status: 0, or 130 after an interruption (``--resume`` goes on then).
        """
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        started, made_at = time.time(), commit()
        progress = RunProgress(Console(stderr=True))
        recipe = read_table(self.recipe or RECIPE)
        out = self.out.expanduser().resolve()
        # A twin may be added to a study that had none.
        take_folder(
            out,
            self._settings(recipe),
            resume=self.resume,
            may_change=("twin",),
            decided_by="options or another recipe",
        )
        seeds = []
        for seed in range(self.seeds):
            found = self._seed(seed, out / f"seed-{seed}", recipe, progress)
            if found is None:
                progress.note(f"interrupted; go on with: engram-lm study suppression --out {self.out} --resume")
                return 130
            seeds.append(found)
        result = {
            "format": "engram.suppression.1",
            **run_facts(started, made_at),
            "settings": self._settings(recipe),
            "seeds": seeds,
            # A model that copies any value of the context, whatever was asked, gets so many right.
            "reading_by_copying_any": 1 / self.families(0).facts_per_passage,
            "summary": summarize(seeds),
        }
        with replacing(out / _PICTURE) as aside:
            save_picture(result, aside)
        write_atomically(out / _RESULT, to_json(result))
        if self.json:
            print(to_json(result), end="")
        else:
            console = Console()
            console.print(terminal_table(result))
            console.print(f"\n  {out / _RESULT}\n  {out / _PICTURE}", highlight=False, soft_wrap=True)
        return 0

    def _settings(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """What decides the result, and so must not change under ``--resume``."""
        return {"families": dataclasses.asdict(self.families(0)), "twin": self.twin, "recipe": recipe}

    def _seed(self, seed: int, folder: Path, recipe: dict[str, Any], progress: RunProgress) -> dict[str, Any] | None:
        """Train and ask; None where training was interrupted."""
        text, tasks = folder / _TEXT, folder / _TASKS
        families = make_families(self.families(seed))
        _write_text(text, families)
        write_tasks(tasks, families.items)
        found: dict[str, Any] = {"seed": seed}
        for name in (_RUN, _TWIN) if self.twin else (_RUN,):
            progress.note(f"seed {seed}: {'the model' if name == _RUN else 'its twin without memory'}")
            trained = _train(_of_seed(recipe, seed, text, twin=name == _TWIN), folder / name, progress)
            if trained is None:
                return None
            kept = ("num_steps", "num_tokens", "seconds", "parameters", "held_out")
            found[name] = {"training": {key: trained[key] for key in kept}}
            model, tokenizer = load_model(folder / name / "model")
            items = read_tasks(tasks)
            if name == _RUN:
                progress.note(f"seed {seed}: asking {len(items):,} questions with memory on and suppressed")
                effect = suppression_effect(
                    model,
                    tokenizer,
                    items=items,
                    batch_size=self.batch_size,
                    seed=seed,
                    on_progress=lambda condition: progress.note(f"asked: {condition}"),
                )
                found[name]["effect"] = effect.to_dict()
            else:
                scores = score_tasks(model, tokenizer, items, batch_size=self.batch_size)
                found[name]["scores"] = _scores(scores)
        return found


def _scores(scores: TaskScores) -> dict[str, Any]:
    families: dict[str, Any] = scores.to_dict()["families"]
    return families


def _write_text(path: Path, families: Families) -> None:
    """Write the text, unless it is there: training remembers which file it was made of."""
    lines = "".join(json_module.dumps({"text": document}) + "\n" for document in families.documents)
    if not path.is_file() or path.read_text(encoding="utf-8") != lines:
        write_atomically(path, lines)


def _of_seed(recipe: dict[str, Any], seed: int, text: Path, *, twin: bool) -> Recipe:
    """The study's recipe for one model."""
    table = override(copy.deepcopy(recipe), ["--train.seed", str(seed)])
    table["data"] = {**table.get("data", {}), "sources": [str(text)], "cache": str(text.parent / "shards")}
    if twin:
        table["model"] = {**table.get("model", {}), "preset": _twin_of(str(table.get("model", {}).get("preset")))}
        table["model"].pop("memory", None)
    return Recipe.from_dict(table)


def _twin_of(preset: str) -> str:
    kind, _, size = preset.partition("-")
    if kind != "engram":
        raise ConfigError(f"--twin needs a recipe whose model.preset begins with engram-, not {preset!r}")
    return f"moe-{size}"


def _train(recipe: Recipe, out: Path, progress: RunProgress) -> dict[str, Any] | None:
    """Train, or go on, or find that it is done; None where it was interrupted."""
    with start(None if recipe.train.device == "auto" else recipe.train.device) as ranks:
        result = Run(recipe, out, ranks, resume=True, progress=progress).execute()
    return None if result["interrupted"] else result
