"""A study as a value: a question, the arms that answer it, the budget that they share, and what is measured."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from engram_lm.errors import ConfigError, RunFolderError
from engram_lm.files import only_finite, read_json, write_atomically
from engram_lm.model import EngramLMConfig
from engram_lm.planning.sizes import ModelSizes, model_sizes
from engram_lm.studies.figures import Figures, loss_bars
from engram_lm.studies.page import Finding
from engram_lm.studies.summary import study_finding
from engram_lm.training.metrics import read_metrics
from engram_lm.training.recipe import Recipe

Quantity = Literal["total", "active", "bytes", "flops", "tokens"]
"""What arms can have in common: all parameters, parameters that take part in a token, bytes of the weights, operations
of the whole training, or tokens trained on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the models that a study compares."""

    name: str
    """Its key in the result and the name of its folder."""
    title: str
    """What a reader sees, in two or three words."""
    recipe: Recipe
    """Everything that decides it. ``engram-lm train`` can run it alone."""
    about: str = ""
    """What is special about it, in a sentence."""
    x: float | None = None
    """Its place on the axis of a sweep."""
    group: str = ""
    """Arms of one group share the budget, and are compared with the first of them."""
    is_control: bool = False
    """Whether it only shows what a difference consists of. The budget does not bind a control."""
    extra_bytes: int = 0
    """Bytes that it needs beside its weights when it is used, such as those of a store that it searches; less those of
    weights that it needs in training alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What the arms of a group, but for controls, have in common with its first; checked before anything is trained."""

    equal: tuple[Quantity, ...] = ()
    """Quantities that must be equal."""
    tolerance: float = 0.005
    """Largest relative difference that counts as equal, at least 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedArm:
    """What one arm came to with one seed."""

    arm: Arm
    """Which arm."""
    seed: int
    """Which seed, counted from 0."""
    folder: Path
    """The folder of its training run; the model is in ``model/``."""
    result: Mapping[str, Any]
    """What the run's ``result.json`` holds; empty where training diverged."""
    failed: str | None = None
    """Why training diverged; None where it did not."""

    @functools.cached_property
    def records(self) -> Sequence[Mapping[str, Any]]:
        """Lines of the run's ``metrics.jsonl``, one for each step that was logged."""
        return read_metrics(self.folder / "metrics.jsonl")

    @functools.cached_property
    def sizes(self) -> ModelSizes:
        """What the trained model holds and costs."""
        config = EngramLMConfig.from_pretrained(self.folder / "model")
        return model_sizes(config, context=self.arm.recipe.data.sequence_length)

    def load(self, device: str = "cpu") -> tuple[Any, Any]:
        """Load the trained model, in evaluation mode, and its tokenizer."""
        from engram_lm.serving.load import load_model

        return load_model(self.folder / "model", device=device)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measure:
    """A number that is taken of every trained model."""

    name: str
    """Its key in the result."""
    title: str
    """What a reader sees."""
    unit: str
    """Its unit."""
    of: Callable[[TrainedArm], float | None]
    """Takes the number; None where it does not apply."""


HELD_OUT_LOSS = Measure(
    name="loss",
    title="held-out loss",
    unit="nats per token",
    of=lambda trained: (trained.result.get("held_out") or {}).get("loss"),
)
"""The loss that training itself measured after its last step."""


def with_seed(arm: Arm, seed: int) -> Recipe:
    """An arm's recipe with another seed, which decides its first weights and the order of its text."""
    return dataclasses.replace(arm.recipe, train=dataclasses.replace(arm.recipe.train, seed=seed))


def short_digest(value: object) -> str:
    """Name a value, such as options that a text is made by, in eight characters.

    Files that are made for a study have it in their names, so that a recipe which names such a file is another one when
    the file would be.
    """
    return hashlib.sha256(repr(value).encode()).hexdigest()[:8]


def kept(path: Path, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Read what an earlier call of a study found and kept in a file, or find it and keep it; NaN becomes None.

    What decides it is best named by the file (`short_digest`).
    """
    if not path.is_file():
        write_atomically(path, json.dumps(only_finite(make()), indent=2) + "\n")
    return read_json(path, error=RunFolderError, advice="remove it, and --resume makes it anew")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A question and how it is answered."""

    name: str
    """What stands behind ``engram-lm study``."""
    question: str
    """The question, in a sentence."""
    arms: tuple[Arm, ...]
    """The models; the others are compared with the first one, or with the first of their group."""
    budget: Budget = Budget()
    """What the arms share."""
    seeds: int = 3
    """Repetitions with other first weights and another order of the text, at least 1."""
    measures: tuple[Measure, ...] = (HELD_OUT_LOSS,)
    """What is measured; the first is what figures and headline are about."""
    figures: Figures = loss_bars
    """What is drawn of the result."""
    finding: Callable[[Mapping[str, Any]], Finding] = study_finding
    """Says what came out, for the terminal and for the page."""
    recipe_of: Callable[[Arm, int], Recipe] = with_seed
    """The recipe of an arm with a seed."""

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if not names or len(set(names)) < len(names) or any(not name or "/" in name for name in names):
            raise ConfigError(f"the arms of a study need names that differ and can be folders, not {names}")
        if self.seeds < 1:
            raise ConfigError(f"--seeds must be at least 1, not {self.seeds}")
        if not self.measures:
            raise ConfigError(f"the study {self.name} measures nothing; name at least one measure")
