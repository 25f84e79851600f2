"""``engram-lm adapt``: a recipe, a pretrained model, a folder, and all that happens between."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import tyro
from rich.console import Console
from transformers.utils import logging as transformers_logging

from engram_lm.errors import ConfigError
from engram_lm.studies.adaptation.recipe import AdaptationRecipe
from engram_lm.training.recipe_file import describe_keys, divide, write_toml
from engram_lm.training.run_folder import to_json

__all__ = ["Adapt"]


@dataclasses.dataclass(frozen=True)
class Adapt:
    """Give a pretrained model memory by a recipe, compare it with what else could be trained, and report.

    The base is measured first; then every arm of the recipe is trained from it, on the same text in the same order. Any
    key of the recipe can be given as a flag: --train.num_steps 100 --memory.rows_per_head 50000; --keys lists them. A
    run that was stopped goes on with --resume at the first arm and seed that is not finished.

    Examples::

        engram-lm adapt recipes/adapt-cpu.toml --data.domain '["my-text/"]'
        engram-lm adapt recipes/adapt-cpu.toml --data.domain my-text/ --base.model Qwen/Qwen3-0.6B --controls
        engram-lm adapt runs/adapt-cpu --resume
    """

    recipe: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="RECIPE.toml|RUN")] = None
    """The recipe; or the folder of a run, to go on with it by its own recipe."""
    out: Path | None = None
    """Run folder; runs/NAME for NAME.toml unless given."""
    controls: bool = False
    """Also train with rows that stay random, with a hash that knows no N-grams, and LoRA of as many operations."""
    resume: bool = False
    """Go on with the run in the folder."""
    dry_run: bool = False
    """Print the resolved recipe and what each arm costs, and train nothing."""
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
        own, rest = tyro.cli(
            cls, prog=prog, args=own_arguments, return_unknown_args=True, config=(tyro.conf.FlagCreatePairsOff,)
        )
        return dataclasses.replace(own, overrides=(*keys, *rest))

    def run(self) -> int:
        """Adapt, or say what would be done."""
        if self.keys:
            print(describe_keys(AdaptationRecipe))
            return 0
        if self.recipe is None:
            raise ConfigError(
                "name a recipe: engram-lm adapt RECIPE.toml; engram-lm adapt --keys lists what it may hold"
            )
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        path = self.recipe / "recipe.toml" if self.recipe.is_dir() else self.recipe
        recipe = AdaptationRecipe.read(path, list(self.overrides))
        if self.controls:
            recipe = dataclasses.replace(recipe, arms=recipe.arms.with_controls())
        from engram_lm.studies.adaptation.run import Adaptation
        from engram_lm.training.progress import RunProgress

        out = self.out or (self.recipe if self.recipe.is_dir() else Path("runs") / self.recipe.stem)
        adaptation = Adaptation(recipe, out, resume=self.resume, progress=RunProgress(Console(stderr=True)))
        if self.dry_run:
            return self._plan(adaptation)
        result = adaptation.execute()
        if self.json:
            print(to_json(result), end="")
        else:
            from engram_lm.studies.adaptation.summary import terminal_table

            Console().print(terminal_table(result))
            Console().print(_last_words(result), highlight=False, soft_wrap=True)
        return 130 if result["interrupted"] else 0

    def _plan(self, adaptation: Any) -> int:
        bench = adaptation.prepare()
        arms = {
            name: {**dataclasses.asdict(cost), "num_steps": num_steps}
            for name, (cost, num_steps) in adaptation.plan(bench).items()
        }
        recipe = adaptation.recipe.to_dict()
        if self.json:
            memory = {**bench.memory.to_dict(), "num_rows": sum(bench.memory.num_table_rows())}
            print(to_json({"recipe": recipe, "memory": memory, "arms": arms}), end="")
            return 0
        print(write_toml(recipe))
        for name, arm in arms.items():
            print(
                f"{name}: {arm['num_trainable']:,} numbers are trained, {arm['num_trainable_outside_tables']:,} of "
                f"them outside tables; {arm['flops_per_token'] / 1e6:,.2f} MFLOPs per token, {arm['num_steps']:,} steps"
            )
        return 0


def _last_words(result: dict[str, Any]) -> str:
    out = result["out"]
    if result["interrupted"]:
        return (
            f"stopped; what is finished is kept. Go on with: engram-lm adapt {out} --resume\n  look: {out}/report.html"
        )
    words = f"{result['seconds'] / 60:.1f} minutes\n  look: {out}/report.html"
    if (Path(out) / "adapter").is_dir():
        words += f"\n  load: MemoryAdapter.from_pretrained(model, {out + '/adapter'!r})"
    return words
