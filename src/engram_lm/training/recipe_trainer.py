"""The training loop of a recipe, for whoever takes its steps: a run, or a measurement of how long a step takes."""

import dataclasses
from typing import Any, Literal

from engram_lm.tokenizing import beginning_tokens
from engram_lm.training.base_model import AdaptedBase
from engram_lm.training.build import OwnModel
from engram_lm.training.compilation import can_compile
from engram_lm.training.data.batches import Batches
from engram_lm.training.data.text import TrainingText
from engram_lm.training.distribution import Ranks, agree
from engram_lm.training.loop import Trainer
from engram_lm.training.recipe import Recipe
from engram_lm.training.retention import Retention

_SHORT_STEP_SECONDS = 2.0
"""A step as short as this is taken twice more: the first one also allocates."""


def batches_of(
    recipe: Recipe, text: TrainingText, tokenizer: Any, batch_size: int, *, general: bool = False
) -> Batches:
    """Cut the text to train on, or the general text, into sequences as the recipe says."""
    return Batches(
        text.general if general else text.train,  # type: ignore[arg-type]
        batch_size,
        recipe.data.sequence_length,
        recipe.train.seed,
        restart_documents=recipe.data.restart_documents,
        num_tokens=None if general else text.num_tokens,
        beginning=beginning_tokens(tokenizer),
    )


def trainer_of(
    recipe: Recipe,
    trained: OwnModel | AdaptedBase,
    text: TrainingText,
    tokenizer: Any,
    *,
    dtype: Literal["float32", "bfloat16"],
    ranks: Ranks,
) -> Trainer:
    """Make the trainer of a recipe's model on its text; collective.

    Raises:
        DataError: There is too little text.
    """
    with agree(ranks):
        batches, retention = batches_of(recipe, text, tokenizer, recipe.train.batch_size), None
        if trained.retention_loss is not None:
            general = batches_of(recipe, text, tokenizer, recipe.retention.batch_size, general=True)
            retention = Retention(trained.retention_loss, general, recipe.retention.weight)
    wanted = recipe.train.compile
    compiled = wanted == "yes" or (wanted == "auto" and _can_be_compiled(trained, ranks))
    return Trainer(
        trained.module,
        batches,
        dataclasses.replace(recipe.train, dtype=dtype, compile=compiled),  # type: ignore[arg-type]
        recipe.optimizer,
        recipe.schedule,
        ranks=ranks,
        backbone=recipe.parallel.backbone,
        retention=retention,
        dependence=trained.dependence_loss,
    )


def _can_be_compiled(trained: OwnModel | AdaptedBase, ranks: Ranks) -> bool:
    return isinstance(trained, OwnModel) and ranks.group is None and can_compile(ranks.device)


def seconds_per_step(trainer: Trainer) -> float:
    """Take a step and say how long it took, in seconds; of short steps, the shortest of three.

    The model is trained by that, so let it be one that is thrown away.
    """
    seconds = trainer.step().seconds
    if seconds < _SHORT_STEP_SECONDS:
        seconds = min(trainer.step().seconds for _ in range(2))
    return seconds
