"""The folder of an adaptation: what is finished is in it, and what is in it is finished."""

import contextlib
import fcntl
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engram_lm.errors import CheckpointError, MismatchError, RunFolderError
from engram_lm.files import replacing_folder, write_atomically
from engram_lm.studies.adaptation.recipe import AdaptationRecipe
from engram_lm.training.recipe_file import write_toml
from engram_lm.training.run_folder import to_json

__all__ = ["AdaptationFolder"]

_LOCK, _RECIPE, _RUNS, _BEFORE, _RESULT = ".lock", "recipe.toml", "runs", "before.json", "result.json"
_ADAPTER = "adapter"


class AdaptationFolder:
    """One run folder.

    It holds ``recipe.toml`` (every key, resolved), ``before.json`` (the base and the text, as they were measured
    first), ``runs/ARM-SEED.json`` for every run that is finished, with what was trained in ``runs/ARM-SEED/``, and at
    the end ``result.json``, ``report.html`` and ``adapter/``. Where a seed tries several learning rates, its runs are
    called ``ARM-SEED-RATE``.

    Args:
        path: Where.
        resume: Whether it may hold a run already.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        self.path = path.expanduser().resolve()
        self._resume = resume

    @contextlib.contextmanager
    def own(self, recipe: AdaptationRecipe) -> Iterator[None]:
        """Hold the folder alone inside a ``with`` block. The kernel gives the lock back however a process ends.

        Raises:
            RunFolderError: It holds something else or a run that is not to be resumed, cannot be written, or another
                process works in it.
            MismatchError: It was begun with another recipe.
        """
        left = (_LOCK, f".{_RECIPE}.")
        found = self.path.is_dir() and any(not file.name.startswith(left) for file in self.path.iterdir())
        if self.path.is_file() or (found and not (self.path / _RECIPE).is_file()):
            raise RunFolderError(
                f"{self.path} holds something that is not an adaptation (no {_RECIPE}), so it is left alone; name "
                "another folder with --out"
            )
        with contextlib.ExitStack() as stack:
            try:
                (self.path / _RUNS).mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context((self.path / _LOCK).open("a"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunFolderError(
                    f"another process is at work in {self.path}; wait until it ends, or name another folder with --out"
                ) from None
            except OSError as error:
                raise RunFolderError(
                    f"cannot write to {self.path}: {error.strerror}; name a folder you can write to with --out"
                ) from error
            if any(self.path.glob(f"{_RUNS}/*.json")):
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

    def check_before(self, origin: dict[str, str], losses: dict[str, float]) -> None:
        """Remember what the base and the text are, or compare with what they were.

        Args:
            origin: Digests, which must be the same.
            losses: Of the base, by text. They may differ as those of two machines do, by less than a thousandth.

        Raises:
            MismatchError: They are not what they were.
        """
        known = self._read(self.path / _BEFORE)
        if known is None:
            write_atomically(self.path / _BEFORE, to_json({**origin, "losses": losses}))
            return
        then = known.get("losses") or {}
        different = [
            f"the {key} is {now}, was {known.get(key)}" for key, now in origin.items() if now != known.get(key)
        ]
        different += [
            f"the base's loss on the {text} text is {now}, was {then.get(text)}"
            for text, now in losses.items()
            if not math.isclose(now, then.get(text, math.nan), rel_tol=1e-3)
        ]
        if different:
            raise MismatchError(
                f"the base model or the text is not what the run in {self.path} was begun with: "
                f"{'; '.join(different)}. Put it back as it was, or begin a new run with another --out"
            )

    def finished(self, name: str) -> dict[str, Any] | None:
        """What a run found, where it is finished.

        Raises:
            CheckpointError: Its file is damaged.
        """
        return self._read(self.path / _RUNS / f"{name}.json")

    def place(self, name: str) -> Path:
        """Where a run writes what it trained: an empty place."""
        folder = self.path / _RUNS / name
        if folder.is_dir():
            shutil.rmtree(folder)  # of a run that was killed before its figures were written
        return folder

    def finish(self, name: str, found: dict[str, Any]) -> None:
        """Write what a run found. It counts as finished from here on."""
        write_atomically(self.path / _RUNS / f"{name}.json", to_json(found))

    def publish_adapter(self, name: str) -> None:
        """Copy the memory of a run to ``adapter/``."""
        source, target = self.path / _RUNS / name / "memory", self.path / _ADAPTER
        with replacing_folder(target, lambda folder: None) as aside:
            shutil.copytree(source, aside, dirs_exist_ok=True)

    def write(self, result: dict[str, Any], report: str | None) -> None:
        """Write the result and its page."""
        write_atomically(self.path / _RESULT, to_json(result))
        if report is not None:
            write_atomically(self.path / "report.html", report)

    def _read(self, path: Path) -> dict[str, Any] | None:
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); delete it, and its run is done again") from error
        if not isinstance(found, dict):
            raise CheckpointError(f"{path} holds no run; delete it, and its run is done again")
        return found
