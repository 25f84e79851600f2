"""``engram-lm train --dry-run``: what a recipe costs on each process and in each step, found without training."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from engram_lm.model.config import EngramLMConfig
from engram_lm.planning.bars import print_bars
from engram_lm.planning.bill import bill
from engram_lm.planning.shape import TrainingShape
from engram_lm.tables.byte_size import byte_size
from engram_lm.training.build import model_config
from engram_lm.training.recipe import Recipe


def priced_config(recipe: Recipe) -> EngramLMConfig:
    """Configure the recipe's model as far as it is known without its tokenizer.

    The vocabulary is the preset's, unless the recipe trains a tokenizer; then it has the size that was asked for.
    """
    model = recipe.model
    if recipe.tokenizer.path is None and model.weights is None and model.config is None:
        backbone = {"vocab_size": recipe.tokenizer.vocab_size, **model.backbone}
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(model, backbone=backbone))
    return model_config(recipe)


def dry_run(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """Price a recipe: ``world_size``, ``num_steps``, ``num_tokens`` and ``bill`` (`engram_lm.planning.bill.Bill`).

    Raises:
        ConfigError: An impossible model, or fewer sequences than processes.
    """
    totals = {
        "world_size": world_size,
        "num_steps": recipe.train.num_steps,
        "num_tokens": recipe.train.num_steps * recipe.train.batch_size * recipe.data.sequence_length,
    }
    if recipe.model.base is not None:
        return {**totals, "bill": _bill_of_base(recipe)}
    config = priced_config(recipe)
    shape = TrainingShape(
        world_size=world_size,
        batch_size=recipe.train.batch_size,
        sequence_length=recipe.data.sequence_length,
        micro_batch_size=recipe.train.micro_batch_size,
        backbone=recipe.parallel.backbone if world_size > 1 else "none",
        backbone_optimizer=recipe.optimizer.backbone,
        table_optimizer=recipe.optimizer.tables,
        dtype="bfloat16" if recipe.train.dtype == "auto" else recipe.train.dtype,
        checkpointing=recipe.train.gradient_checkpointing,
        deduplicate=recipe.parallel.deduplicate,
    )
    return {**totals, "bill": bill(config, shape).to_dict()}


def _bill_of_base(recipe: Recipe) -> dict[str, Any]:
    """Parameters and operations of a recipe that starts from a pretrained model, which is loaded for that."""
    from engram_lm.training.assembly import load_tokenizer
    from engram_lm.training.base_model import AdaptedBase
    from engram_lm.training.distribution import Ranks

    tokenizer = load_tokenizer(recipe.tokenizer.path or recipe.model.base or "", recipe.model.revision)
    built = AdaptedBase(recipe, tokenizer, Ranks())
    return {"parameters": built.sizes, "flops": {"training_per_token": built.training_flops_per_token()}}


def print_dry_run(found: Mapping[str, Any]) -> None:
    """Print the bill as tables."""
    console, costs = Console(), found["bill"]
    console.print(
        f"{found['num_steps']:,} steps, {found['num_tokens']:,} tokens, {found['world_size']} "
        f"process{'es' if found['world_size'] > 1 else ''}",
        highlight=False,
    )
    sent = {f"backbone, {name}": size for name, size in costs.get("backbone_sent", {}).items()}
    if "tables_sent" in costs:
        sent |= {f"tables, {name}": size for name, size in costs["tables_sent"].items()}
        sent |= {"tables, were rows not sent once each": costs["tables_sent_with_duplicates"]["total"]}
    sections: dict[str, tuple[Mapping[str, Any], Callable[[Any], str]]] = {
        "parameters": (costs["parameters"], "{:,}".format),
        "floating-point operations": (costs["flops"], "{:.3g}".format),
        "rows of the tables": (costs.get("rows", {}), "{:,}".format),
        "memory of a process": ({name: size for name, size in costs.get("memory", {}).items() if size}, byte_size),
        "sent by a process in a step": ({name: size for name, size in sent.items() if size}, byte_size),
    }
    for title, (values, write) in sections.items():
        if title == "memory of a process":
            parts = {name: size for name, size in values.items() if name != "total"}
            if parts:
                title = f"{title}: {byte_size(values['total'])}"
            print_bars(console, title, parts, lambda size: byte_size(int(size)))
        elif values:
            table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
            for name, value in values.items():
                table.add_row(name.replace("_", " "), write(value))
            console.print(table)
