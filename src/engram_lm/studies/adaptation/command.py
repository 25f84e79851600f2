"""``engram-lm adapt``: add memory to a pretrained model by a recipe, and compare it with other ways to adapt it."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from engram_lm.studies.adaptation.recipe import AdaptationRecipe
from engram_lm.training.command import RecipeCommand
from engram_lm.training.recipe_file import write_toml
from engram_lm.training.run_folder import to_json


@dataclasses.dataclass(frozen=True)
class Adapt(RecipeCommand[AdaptationRecipe]):
    """Add memory to a pretrained model by a recipe, compare it with other ways to adapt the model, and report.

    The base is measured first. Then every arm of the recipe is trained from it, on the same text in the same order. Any
    key of the recipe can be given as a flag: --train.num_steps 100 --memory.rows_per_head 50000; --keys lists them. A
    run that was stopped goes on with --resume, in the arm and seed that it had reached.

    Examples::

        engram-lm adapt recipes/adapt-cpu.toml --data.domain '["my-text/"]'
        engram-lm adapt recipes/adapt-cpu.toml --data.domain my-text/ --base.model Qwen/Qwen3-0.6B --controls
        engram-lm adapt runs/adapt-cpu --resume
    """

    recipe_type: ClassVar[type[AdaptationRecipe]] = AdaptationRecipe

    controls: bool = False
    """Also train three controls: rows that stay random, rows that change with position, and LoRA of equal compute."""

    def execute(self, recipe: AdaptationRecipe, out: Path) -> int:
        """Adapt, and say what came out."""
        from engram_lm.studies.adaptation.finding import terminal_table
        from engram_lm.studies.adaptation.run import Adaptation
        from engram_lm.training.progress import RunProgress

        recipe = self._with_controls(recipe)
        result = Adaptation(recipe, out, resume=self.resume, progress=RunProgress()).execute()
        if self.json:
            print(to_json(result), end="")
        else:
            Console().print(terminal_table(result))
            Console().print(_last_words(result), highlight=False, soft_wrap=True)
        return 130 if result["interrupted"] else 0

    def plan(self, recipe: AdaptationRecipe, out: Path) -> int:
        """Print what each arm costs, and how long it takes."""
        from engram_lm.studies.adaptation.bench import Bench
        from engram_lm.studies.adaptation.duration import estimate, estimate_lines, runs_left
        from engram_lm.training.progress import RunProgress

        recipe = self._with_controls(recipe)
        bench = Bench(recipe, RunProgress())
        left = runs_left(recipe, out)
        plan = bench.plan(timed=[name for name, number in left.items() if number])
        estimates = estimate(bench, plan, left)
        nothing = {"num_runs": 0, "seconds_per_run": None, "seconds": 0.0}
        arms = {
            name: {**dataclasses.asdict(cost), "num_steps": num_steps, **estimates.get(name, nothing)}
            for name, (cost, num_steps) in plan.items()
        }
        if self.json:
            memory = {**bench.memory.to_dict(), "num_rows": sum(bench.memory.num_table_rows())}
            print(to_json({"recipe": recipe.to_dict(), "memory": memory, "arms": arms}), end="")
            return 0
        print(write_toml(recipe.to_dict()))
        for name, arm in arms.items():
            print(
                f"{name}: {arm['num_trainable']:,} numbers are trained, {arm['num_trainable_outside_tables']:,} of "
                f"them outside tables; {arm['flops_per_token'] / 1e6:,.2f} MFLOPs per token, {arm['num_steps']:,} steps"
            )
        print()
        print("\n".join(estimate_lines(plan, estimates)))
        return 0

    def _with_controls(self, recipe: AdaptationRecipe) -> AdaptationRecipe:
        return dataclasses.replace(recipe, arms=recipe.arms.with_controls()) if self.controls else recipe


def _last_words(result: dict[str, Any]) -> str:
    from engram_lm.studies.adaptation.finding import adapter_arm

    out = result["out"]
    if result["interrupted"]:
        return (
            f"stopped; what is finished is kept. Go on with: engram-lm adapt {out} --resume\n  look: {out}/report.html"
        )
    words = f"{result['seconds'] / 60:.1f} minutes\n  look: {out}/report.html"
    if (Path(out) / "adapter").is_dir():
        words += f"\n  load: MemoryAdapter.from_pretrained(model, {out + '/adapter'!r})"
        if (adapter_arm(result) or "").partition("+")[0] == "memory_lora":
            words += f"\n  The LoRA that was trained with it lies under {out}/runs, as peft writes it; load both."
    return words
