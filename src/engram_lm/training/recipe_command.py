"""What the commands that follow a recipe file have in common: its keys as flags, and going on from a run's folder."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Self, TypeVar

import tyro
from transformers.utils import logging as transformers_logging

from engram_lm.errors import ConfigError
from engram_lm.training.recipe_file import RecipeFile, describe_keys, divide

__all__ = ["RecipeCommand"]

_Recipe = TypeVar("_Recipe", bound=RecipeFile)


@dataclasses.dataclass(frozen=True)
class RecipeCommand(Generic[_Recipe]):
    """Flags that ``engram-lm train`` and ``engram-lm adapt`` have in common."""

    recipe_type: ClassVar[type[Any]]
    """What its file holds."""

    recipe: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="RECIPE.toml|RUN")] = None
    """The recipe, or the folder of a run to go on with by its own recipe."""
    out: Path | None = None
    """Run folder; by default runs/NAME for NAME.toml."""
    resume: bool = False
    """Go on with the run in the folder."""
    dry_run: bool = False
    """Print the resolved recipe and what it costs, and train nothing."""
    keys: bool = False
    """List every key of a recipe with its meaning and default."""
    json: bool = False
    """Print the result, or the plan of --dry-run, as JSON."""
    overrides: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Keys of the recipe given as flags."""

    @classmethod
    def from_arguments(cls, arguments: Sequence[str], prog: str) -> Self:
        """Parse a command line; what is no flag of this verb is a key of the recipe."""
        own_arguments, keys = divide(arguments)
        # A key's value that stands before the recipe would be taken for it, so keys go first.
        own, rest = tyro.cli(
            cls, prog=prog, args=own_arguments, return_unknown_args=True, config=(tyro.conf.FlagCreatePairsOff,)
        )
        return dataclasses.replace(own, overrides=(*keys, *rest))

    def run(self) -> int:
        """Do what the recipe says, or say what would be done.

        Returns:
            Exit status: 0, or 130 after a signal.
        """
        if self.keys:
            print(describe_keys(self.recipe_type))
            return 0
        if self.recipe is None:
            prog = self.recipe_type.prog
            raise ConfigError(f"name a recipe: {prog} RECIPE.toml; {prog} --keys lists what it may hold")
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        path = self.recipe / "recipe.toml" if self.recipe.is_dir() else self.recipe
        out = self.out or (self.recipe if self.recipe.is_dir() else Path("runs") / self.recipe.stem)
        recipe = self.recipe_type.read(path, self.overrides)
        return self.plan(recipe, out) if self.dry_run else self.execute(recipe, out)

    def execute(self, recipe: _Recipe, out: Path) -> int:
        """Do what the recipe says, in the folder ``out``."""
        raise NotImplementedError

    def plan(self, recipe: _Recipe, out: Path) -> int:
        """Print what it costs."""
        raise NotImplementedError
