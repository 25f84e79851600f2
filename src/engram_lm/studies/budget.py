"""What the arms of a study cost, and whether they share the budget that the study says they share."""

import dataclasses

import torch

from engram_lm.errors import ConfigError
from engram_lm.page.number_text import count_text
from engram_lm.planning.sizes import model_sizes
from engram_lm.studies.page import Table
from engram_lm.studies.study import Arm, Study
from engram_lm.tables.byte_size import byte_size
from engram_lm.training.dry_run import priced_config
from engram_lm.training.flops import peak_flops
from engram_lm.training.loop import best_dtype
from engram_lm.training.recipe import Recipe

_WEIGHT_BYTES = 4
"""Weights are trained in float32."""
_UTILIZATION = 0.1
"""Share of the best speed of a CPU that training a small model reaches: 0.09 to 0.14 on one core of an EPYC."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What one arm holds and takes with one seed."""

    total: int
    """All parameters."""
    active: int
    """Parameters that take part in a token, without the vocabulary's."""
    bytes: int
    """Bytes of the weights, as they are trained, and of what an arm needs beside them when it is used."""
    flops: int
    """Operations of the whole training."""
    tokens: int
    """Tokens trained on."""


def price(recipe: Recipe) -> Cost:
    """Work out what a recipe costs without building its model."""
    sizes = model_sizes(priced_config(recipe), context=recipe.data.sequence_length)
    tokens = recipe.train.num_steps * recipe.train.batch_size * recipe.data.sequence_length
    return Cost(
        total=sizes.total,
        active=sizes.active,
        bytes=_WEIGHT_BYTES * sizes.total,
        flops=3 * sizes.flops_per_token * tokens,
        tokens=tokens,
    )


def arm_cost(arm: Arm) -> Cost:
    """Work out what an arm costs with one seed."""
    cost = price(arm.recipe)
    return dataclasses.replace(cost, bytes=cost.bytes + arm.extra_bytes)


def check_budget(study: Study) -> dict[str, Cost]:
    """Price every arm by name, and refuse a study whose arms do not share what it says they share."""
    costs = {arm.name: arm_cost(arm) for arm in study.arms}
    firsts: dict[str, Arm] = {}
    for arm in study.arms:
        first = firsts.setdefault(arm.group, arm)
        for quantity in () if arm.is_control else study.budget.equal:
            ours, wanted = getattr(costs[arm.name], quantity), getattr(costs[first.name], quantity)
            if abs(ours - wanted) > study.budget.tolerance * wanted:
                raise ConfigError(
                    f"the study {study.name} compares arms of equal {quantity}, but {arm.name} has {ours:,} and "
                    f"{first.name} {wanted:,}, which differ by more than {study.budget.tolerance:.1%}; change the "
                    "sizes, or the budget of the study"
                )
    return costs


def estimated_seconds(study: Study) -> float | None:
    """Guess how many seconds the whole study takes on this machine's CPU, by the speed of its matrix products.

    It is right within a factor of about two for small models, and None on another device.
    """
    if any(arm.recipe.train.device not in ("auto", "cpu") for arm in study.arms):
        return None
    peak = peak_flops(torch.device("cpu"), best_dtype(torch.device("cpu")))
    assert peak is not None, "a CPU is measured"
    recipes = [arm.recipe for arm in study.arms]
    trained = [recipe for number, recipe in enumerate(recipes) if recipe not in recipes[:number]]
    return study.seeds * sum(price(recipe).flops for recipe in trained) / (peak * _UTILIZATION)


def cost_table(study: Study) -> Table:
    """Lay out what each arm costs with one seed, a line for each."""
    rows = []
    for arm in study.arms:
        cost = arm_cost(arm)
        counts = [count_text(cost.total), count_text(cost.active), byte_size(cost.bytes)]
        rows.append([arm.title, *counts, count_text(cost.tokens), count_text(cost.flops)])
    return Table(
        title="What each arm costs",
        columns=("Arm", "Parameters", "Active", "Bytes", "Tokens", "FLOPs"),
        rows=rows,
        note="With one seed. Active parameters are those that take part in a token, without the vocabulary's; bytes "
        "are those of the weights and of what an arm needs beside them; FLOPs are those of the whole training.",
    )
