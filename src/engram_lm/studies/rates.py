"""``engram-lm study rates``: which learning rates of backbone and tables suit micro models, on text no result uses."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from engram_lm.errors import ConfigError
from engram_lm.page.figure import Picture
from engram_lm.studies.command import StudyCommand
from engram_lm.studies.figures import loss_bars
from engram_lm.studies.micro_models import Family, MicroModelFlags
from engram_lm.studies.study import Arm, Measure, Study, with_seed
from engram_lm.studies.text_flags import like
from engram_lm.training.recipe import Recipe

FIRST_SEED = 1_000_000
"""The seeds of other studies count from 0 and never reach it."""

VALIDATION_LOSS = Measure(
    name="validation_loss",
    title="validation loss",
    unit="nats per token",
    of=lambda trained: ((trained.result.get("texts") or {}).get("validation") or {}).get("loss"),
)
"""The loss on documents that are neither trained on nor held out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RatesStudy(MicroModelFlags, StudyCommand):
    """Choose the learning rates of all other studies of micro models.

    Every family is trained at every rate of the backbone; those with memory also at every rate of the tables, with the
    first rate of the backbone. Models are compared on validation text, with seeds that no other study has.

    Examples::

        engram-lm study rates --data corpus/ --size 100k --tokens 1000000
        engram-lm study rates --families dense_engram --lrs 0.02 0.01 --table-lr-multipliers 15 5 50
    """

    name: ClassVar[str] = "rates"

    seeds: int = 1
    """Repetitions, with seeds that no other study has."""
    tokens: int = 1_000_000
    """Tokens each model is trained on."""
    families: tuple[Family, ...] = ("dense", "moe", "engram", "dense_engram")
    """What is trained at each rate."""
    lrs: tuple[float, ...] = (0.02, 0.006, 0.01, 0.04)
    """Learning rates of the backbone to try, in place of --lr."""
    table_lr_multipliers: tuple[float, ...] = (15.0, 5.0, 50.0)
    """Learning rates of the tables to try, relative to it, in place of --table-lr-multiplier."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("families", "lrs", "table_lr_multipliers"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(
                    f"--{name.replace('_', '-')} names values that differ, and at least one, not {values}"
                )

    def study(self) -> Study:
        """A group of arms for each family, which begin with the same weights."""
        arms = []
        for family in self.families:
            multipliers = self.table_lr_multipliers if "engram" in family else self.table_lr_multipliers[:1]
            for lr, multiplier in itertools.product(self.lrs, multipliers):
                if lr != self.lrs[0] and multiplier != multipliers[0]:
                    continue
                flags = dataclasses.replace(self, lr=lr, table_lr_multiplier=multiplier)
                name, title = f"{family}-{lr:g}", f"{family}, {lr:g}"
                if "engram" in family:
                    name, title = f"{name}-x{multiplier:g}", f"{title}, tables × {multiplier:g}"
                recipe = flags.recipe(flags.model(family, like=like(flags.model("dense"))))
                arms.append(Arm(name=name, title=title, recipe=recipe, x=lr, group=family))
        return Study(
            name=self.name,
            question="Which learning rates suit backbone and tables?",
            arms=tuple(arms),
            seeds=self.seeds,
            measures=(VALIDATION_LOSS,),
            figures=figures,
            recipe_of=with_unused_seed,
        )


def figures(result: Mapping[str, Any]) -> Sequence[Picture]:
    """Draw the validation loss at every rate."""
    return [dataclasses.replace(picture, name="rates") for picture in loss_bars(result)]


def with_unused_seed(arm: Arm, seed: int) -> Recipe:
    """An arm's recipe with a seed that no other study has."""
    return with_seed(arm, FIRST_SEED + seed)
