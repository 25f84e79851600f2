"""``engram-lm train``: train a model by a recipe, into a folder."""

import dataclasses
import json as json_module
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Self, TypeVar

import tyro
from transformers.utils import logging as transformers_logging

from engram_lm.errors import ConfigError
from engram_lm.training.recipe import Recipe
from engram_lm.training.recipe_file import RecipeFile, describe_keys, divide, write_toml

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


@dataclasses.dataclass(frozen=True)
class Train(RecipeCommand[Recipe]):
    """Train a model by a recipe, in this process or, under torchrun, in many.

    Any key of the recipe can be given as a flag: --train.num_steps 100 --model.memory.rows_per_head 50000; --keys lists
    them. A run that was stopped, by Ctrl-C, SIGTERM or a crash, goes on with --resume from its last complete checkpoint
    as if it had never stopped.

    Examples::

        engram-lm train recipes/nano-cpu.toml
        engram-lm train recipes/nano-cpu.toml --out runs/mine --train.num_steps 200
        engram-lm train runs/mine --resume
        engram-lm train recipes/paper-27b.toml --dry-run --world-size 64
        torchrun --nproc-per-node 2 -m engram-lm train recipes/nano-cpu.toml
    """

    recipe_type: ClassVar[type[Recipe]] = Recipe

    max_steps: int | None = None
    """Stop after this step, with a checkpoint. The schedule remains that of all steps."""
    world_size: int | None = None
    """Number of processes that --dry-run assumes; by default those that were started."""

    def __post_init__(self) -> None:
        if self.max_steps is not None and self.max_steps < 1:
            raise ConfigError(f"--max-steps must be at least 1, not {self.max_steps}")
        if self.world_size is not None and (self.world_size < 1 or not self.dry_run):
            raise ConfigError("--world-size is a number from 1, and for --dry-run only; torchrun decides it otherwise")

    def execute(self, recipe: Recipe, out: Path) -> int:
        """Train."""
        from engram_lm.training.distribution import start
        from engram_lm.training.progress import RunProgress
        from engram_lm.training.run import Run

        # Blocks hand on a view of what they computed; nothing writes to it, which is what FSDP2 warns of.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        with start(None if recipe.train.device == "auto" else recipe.train.device) as ranks:
            first = ranks.rank == 0
            progress = RunProgress(silent=not first)
            run = Run(recipe, out, ranks, resume=self.resume, stop_after=self.max_steps, progress=progress)
            result = run.execute()
        if first:
            print(json_module.dumps(result) if self.json else _last_words(result))
        return 130 if result["interrupted"] else 0

    def plan(self, recipe: Recipe, out: Path) -> int:
        """Print what the recipe costs."""
        from engram_lm.training.dry_run import dry_run, print_dry_run

        world_size = self.world_size or int(os.environ.get("WORLD_SIZE", "1"))
        found = dry_run(recipe, world_size)
        if self.json:
            print(json_module.dumps({"recipe": recipe.to_dict(), **found}))
        else:
            print(write_toml(recipe.to_dict()))
            print_dry_run(found)
        return 0


def _last_words(result: dict[str, Any]) -> str:
    held_out = result["held_out"]
    loss = ""
    if held_out is not None:
        when = "" if held_out["step"] == result["num_steps"] else f" after step {held_out['step']:,}"
        loss = f", held-out loss {held_out['loss']:.3f} nats per token{when}"
    skipped = f", {result['num_skipped']} of them skipped" if result["num_skipped"] else ""
    words = f"{result['num_steps']:,} steps{skipped}, {result['num_tokens']:,} tokens{loss}, {result['seconds']:.0f} s"
    if result["interrupted"]:
        return f"stopped after {words}; go on with --resume"
    out = result["out"]
    if (Path(out) / "model").is_dir():
        return f"{words}\n  continue: engram-lm generate {out}/model --prompt '...'"
    if (Path(out) / "memory").is_dir():
        return f"{words}\n  load: MemoryAdapter.from_pretrained(model, {out + '/memory'!r})"
    return words
