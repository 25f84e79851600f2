"""The folder of an adaptation: what is finished is in it, and what is in it is finished."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engram_lm.errors import ConfigError, MismatchError, RunFolderError
from engram_lm.files import read_json, replacing_folder, write_atomically
from engram_lm.studies.adaptation.recipe import AdaptationRecipe
from engram_lm.training.recipe import Recipe
from engram_lm.training.recipe_file import write_toml
from engram_lm.training.run_folder import hold_folder, to_json

__all__ = ["AdaptationFolder"]

_RECIPE, _RUNS, _BEFORE, _RESULT, _ADAPTER = "recipe.toml", "runs", "before.json", "result.json", "adapter"
_DELETE = "delete it, and its run is done again"


class AdaptationFolder:
    """One run folder.

    It holds ``recipe.toml`` (every key, resolved), ``before.json`` (which base, text and hash it was begun
    with), ``runs/ARM-SEED.json`` for every run that is finished, with the training run itself in ``runs/ARM-SEED/``,
    and at the end ``result.json``, ``report.html`` and ``adapter/``. Where a seed tries several learning rates, its
    runs are called ``ARM-SEED-RATE``.

    Args:
        path: Where.
        resume: Whether it may hold a run already.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        self.path = path.expanduser().resolve()
        self._resume = resume

    @contextlib.contextmanager
    def own(self, recipe: AdaptationRecipe) -> Iterator[None]:
        """Hold the folder alone inside a ``with`` block.

        Raises:
            RunFolderError: It holds something else or a run that is not to be resumed, cannot be written, or another
                process works in it.
            MismatchError: It was begun with another recipe.
        """
        with hold_folder(self.path, _RECIPE, kind="an adaptation", work="at work"):
            if any(self.path.glob(f"{_RUNS}/*")):
                if not self._resume:
                    raise RunFolderError(
                        f"{self.path} holds a run already; go on with it with --resume, or name another folder with "
                        "--out"
                    )
                recipe.check_resumable(AdaptationRecipe.read(self.path / _RECIPE).to_dict())
            else:
                (self.path / _BEFORE).unlink(missing_ok=True)
            write_atomically(self.path / _RECIPE, write_toml(recipe.to_dict()))
            yield

    def check_origin(self, origin: dict[str, str]) -> None:
        """Remember what the base, the text and the hash are, or compare them with what they were.

        Args:
            origin: A digest of each.

        Raises:
            MismatchError: They are not what they were.
        """
        path = self.path / _BEFORE
        if not path.is_file():
            write_atomically(path, to_json(origin))
            return
        known = read_json(path, advice=_DELETE)
        changed = {key: now for key, now in origin.items() if now != known.get(key)}
        if changed:
            different = "; ".join(f"the {key} is {now}, was {known.get(key)}" for key, now in changed.items())
            raise MismatchError(
                f"the base model or the text is not what the run in {self.path} was begun with: {different}. Put it "
                "back as it was, or begin a new run with another --out"
            )

    def finished(self, name: str) -> dict[str, Any] | None:
        """Read what a run found, if it is finished.

        Raises:
            CheckpointError: Its file is damaged.
        """
        path = self.path / _RUNS / f"{name}.json"
        return read_json(path, advice=_DELETE) if path.is_file() else None

    def place(self, name: str, recipe: Recipe) -> Path:
        """The folder of a run. One that was begun by another recipe is removed: its learning rate was another."""
        folder = self.path / _RUNS / name
        try:
            if (folder / _RECIPE).is_file():
                recipe.check_resumable(Recipe.read(folder / _RECIPE).to_dict())
        except (MismatchError, ConfigError):
            shutil.rmtree(folder)
        return folder

    def finish(self, name: str, found: dict[str, Any]) -> None:
        """Write what a run found. It counts as finished from here on."""
        write_atomically(self.path / _RUNS / f"{name}.json", to_json(found))

    def publish_adapter(self, name: str) -> None:
        """Copy the memory of a run to ``adapter/``."""
        source, target = self.path / _RUNS / name / "memory", self.path / _ADAPTER
        with replacing_folder(target, lambda folder: None) as aside:
            shutil.copytree(source, aside, dirs_exist_ok=True)

    def write(self, result: dict[str, Any]) -> None:
        """Write the result and its page."""
        from engram_lm.studies.adaptation.report import render_report

        write_atomically(self.path / _RESULT, to_json(result))
        write_atomically(self.path / "report.html", render_report(result))
