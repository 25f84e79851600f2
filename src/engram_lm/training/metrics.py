"""What a run reports in each step: to metrics.jsonl always, to TensorBoard and Weights & Biases on request."""

import contextlib
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from engram_lm.errors import MissingExtraError, RunFolderError
from engram_lm.files import only_finite, read_text, replacing


class Metrics:
    """The metrics of a run: one JSON object a line, each with ``step``.

    Every line reaches the file at once, so a process that is killed loses none. When a run is resumed, lines of steps
    that will be taken again are removed first.

    TensorBoard's event files are written to ``tensorboard/`` beside it; ``config`` describes the run to Weights &
    Biases.

    Raises:
        MissingExtraError: One of the two was requested with ``"yes"`` and is not installed.
        RunFolderError: The file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        *,
        first_step: int = 1,
        tensorboard: Literal["auto", "yes", "no"] = "no",
        wandb: Literal["auto", "yes", "no"] = "no",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        check_installed(tensorboard=tensorboard, wandb=wandb)
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] < first_step] if path.exists() else []
        with replacing(path) as aside:
            aside.write_text("".join(_line(values) for values in kept), encoding="utf-8")
        self.measured = {
            name: values[name] for values in kept for name in ("held_out", "texts") if values.get(name) is not None
        }
        """The newest ``held_out`` and ``texts`` of the lines that were kept."""
        # Without a buffer: what a full disk refused would be written again, and refused again, on closing.
        self._file = path.open("ab", buffering=0)
        self._board = self._wandb = None
        if tensorboard != "no" and _is_installed("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(path.parent / "tensorboard"), purge_step=first_step)
        if wandb != "no" and _is_installed("wandb") and (wandb == "yes" or os.environ.get("WANDB_PROJECT")):
            import wandb as client

            self._wandb = client.init(dir=str(path.parent), config=dict(config or {}), resume="allow")

    def write(self, values: Mapping[str, Any]) -> None:
        """Add a line of ``step`` and whatever else JSON can hold; TensorBoard and Weights & Biases get the numbers.

        Raises:
            RunFolderError: The disk is full.
        """
        try:
            rest = _line(values).encode()
            while rest:
                rest = rest[self._file.write(rest) :]
            self._show(values)
        except OSError as error:
            raise RunFolderError(
                f"cannot write the metrics in {self.path.parent}: {error.strerror}; free some space and resume"
            ) from error

    def _show(self, values: Mapping[str, Any]) -> None:
        if self._board is None and self._wandb is None:
            return
        numbers = dict(_numbers("", values))
        step = int(numbers.pop("step"))
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        """Close the file and the other two."""
        self._file.close()
        if self._board is not None:
            # It writes in the background and may repeat here an error that `write` has raised already.
            with contextlib.suppress(OSError):
                self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def check_installed(*, tensorboard: str, wandb: str) -> None:
    """Refuse, by a MissingExtraError, a package that was requested with ``"yes"`` and is not installed."""
    for module, choice in (("tensorboard", tensorboard), ("wandb", wandb)):
        if choice == "yes" and not _is_installed(module):
            raise MissingExtraError(f"log.{module} = 'yes' needs {module}: pip install {module}, or leave it at 'auto'")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a ``metrics.jsonl``, except for a last line that a killed process left unfinished.

    Raises:
        RunFolderError: Another line is not a JSON object with a ``step``.
    """
    found: list[dict[str, Any]] = []
    lines = read_text(path, errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            values = json.loads(line)
            if not isinstance(values["step"], int):
                raise TypeError("step")
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise RunFolderError(f"line {number} of {path} is not an object with a step: {line[:80]!r}") from error
        found.append(values)
    return found


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(only_finite(values), allow_nan=False) + "\n"


def _numbers(prefix: str, values: Mapping[str, Any]) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _numbers(f"{prefix}{name}/", value)
        elif isinstance(value, int | float):
            found.append((f"{prefix}{name}", value))
    return found


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
