"""The models that the quickstart compares, and what makes the comparison fair."""

import dataclasses

from engram_lm.memory import EngramConfig
from engram_lm.studies.small_models import SmallModelFlags, like
from engram_lm.studies.study import Arm, Budget, Study

__all__ = ["MEMORY", "TWIN", "quickstart_study"]

MEMORY, TWIN = "memory", "twin"
"""Names of the model with memory and of its memory-less twin."""
_CURVE_POINTS = 7
"""Times that held-out loss is measured along the way."""


def quickstart_study(flags: SmallModelFlags, memory: EngramConfig, *, seeds: int, controls: bool) -> Study:
    """Compare a model with memory with its memory-less twin, and with the controls.

    The twin's feed-forward is wider, so that both spend the same operations on a token. Weights that two models have in
    common start as the same numbers, and those of the twin's extra width as others.

    Args:
        flags: Sizes and training.
        memory: Memory of the first.
        seeds: Repetitions.
        controls: Whether to add the two arms that show what a gain consists of.
    """
    with_memory = flags.model(memory)
    twin = flags.model(None, wider=flags.width_of(memory.flops_per_token()), like=like(with_memory))
    arms = [
        (MEMORY, "with memory", f"reads {memory.num_heads_total * len(memory.layers)} rows per token", with_memory),
        (TWIN, "without memory", "its feed-forward is wider, so that it spends the same operations per token", twin),
    ]
    if controls:
        frozen = dataclasses.replace(with_memory, frozen_tables=True)
        # A channel of the feed-forward is three numbers for each of the block's own, and six operations.
        channels = flags.width_of(2 * memory.num_parameters())
        wide = flags.model(None, wider=channels, like=like(with_memory))
        arms += [
            ("random_table", "random table", "the same model, but its table stays as it was drawn", frozen),
            ("wide", "wide feed-forward", "no memory; the table's bytes went into a wider feed-forward", wide),
        ]
    return Study(
        name="quickstart",
        question="Does memory help on this text?",
        arms=tuple(
            Arm(
                name=name,
                title=title,
                about=about,
                recipe=flags.recipe(model, curve_points=_CURVE_POINTS),
                is_control=name not in (MEMORY, TWIN),
            )
            for name, title, about, model in arms
        ),
        budget=Budget(equal=("flops",), tolerance=0.01),
        seeds=seeds,
    )
