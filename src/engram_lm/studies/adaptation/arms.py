"""The arms of the comparison: each is an ordinary training run from the same base."""

import dataclasses
from typing import Literal

from engram_lm.studies.adaptation.recipe import AdaptationRecipe, ArmName
from engram_lm.training.data.text import EvaluationText
from engram_lm.training.dependence import DependenceOptions
from engram_lm.training.optimizers import OptimizerOptions
from engram_lm.training.recipe import (
    AdapterOptions,
    CheckpointOptions,
    DataOptions,
    EvaluationOptions,
    LogOptions,
    LoraOptions,
    ModelOptions,
    Recipe,
    RunOptions,
)
from engram_lm.training.retention import RetentionOptions
from engram_lm.training.writing import WritingOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArmKind:
    """One way to adapt the base."""

    title: str
    """For people, in two or three words."""
    about: str
    """What it is, in a sentence."""
    memory: bool = False
    """Whether it has memory."""
    lora: bool = False
    """Whether it has low-rank matrices."""
    frozen_tables: bool = False
    """Whether the rows stay as they were drawn."""
    control: Literal["none", "permuted_hash", "one_row", "embeddings"] = "none"
    """What memory reads in place of its rows: see `AdapterOptions.control`."""
    transfer: bool = False
    """Whether rows begin as the base's hidden states, whatever the recipe says."""
    features: tuple[str, ...] = ()
    """What was added to it: see `FEATURES`."""

    @property
    def is_control(self) -> bool:
        """Whether it is there to be compared with, and not to be used."""
        return self.frozen_tables or self.control != "none"

    @property
    def has_memory(self) -> bool:
        """Whether it has memory that can be switched off, and not something in its place."""
        return self.memory and self.control != "embeddings"

    @property
    def has_rows(self) -> bool:
        """Whether it trains rows that can be told apart by the texts that read them."""
        return self.has_memory and self.control != "one_row" and not self.frozen_tables

    @property
    def is_kept(self) -> bool:
        """Whether what was trained is written down; a whole model is as large as the base."""
        return (self.memory or self.lora) and not self.is_control


ARMS: dict[str, ArmKind] = {
    "memory": ArmKind(title="memory", about="memory is trained, the base stays as it is", memory=True),
    "lora": ArmKind(
        title="LoRA",
        about="low-rank matrices are trained, of as many operations per token as the memory's, beside the frozen base",
        lora=True,
    ),
    "memory_lora": ArmKind(
        title="memory + LoRA", about="both are trained, the base stays as it is", memory=True, lora=True
    ),
    "full": ArmKind(title="full fine-tuning", about="every weight of the base is trained"),
    "random_table": ArmKind(
        title="random table",
        about="memory whose rows stay as they were drawn; a gain that remains comes from the projections alone",
        memory=True,
        frozen_tables=True,
    ),
    "permuted_hash": ArmKind(
        title="permuted hash",
        about="memory where an N-gram reads other rows at every position; a gain that remains does not come from "
        "knowing N-grams",
        memory=True,
        control="permuted_hash",
    ),
    "one_row": ArmKind(
        title="one row",
        about="memory that reads the same row everywhere; a gain that remains does not need a table",
        memory=True,
        control="one_row",
    ),
    "embeddings": ArmKind(
        title="no table",
        about="gated means of the model's own token embeddings in place of memory, as in NGM; a gain that remains "
        "needs no rows",
        memory=True,
        control="embeddings",
    ),
    "transfer": ArmKind(
        title="memory, transferred",
        about="memory whose rows begin as the base's hidden states for the domain's frequent N-grams",
        memory=True,
        transfer=True,
    ),
}
"""Every way to adapt by its name in a recipe."""


FEATURES = {
    "occupancy": "it speaks only where training has written",
    "sparse": "only rows whose use stands out against general text are trained",
    "retention": "it is held to what the base says of general text",
}
"""What can be added to an arm, and what that means."""


def arm_kind(name: ArmName) -> ArmKind:
    """Return what an arm is, of its name in a recipe."""
    plain, *features = name.split("+")
    kind = ARMS[plain]
    if not features:
        return kind
    return dataclasses.replace(
        kind,
        title=" + ".join([kind.title, *features]),
        about="; ".join([kind.about, *(FEATURES[feature] for feature in features)]),
        features=tuple(features),
    )


def arm_recipe(
    recipe: AdaptationRecipe,
    name: ArmName,
    *,
    lora_rank: int,
    dtype: Literal["float32", "bfloat16"],
    seed: int = 0,
    rate: float = 1e-3,
    num_steps: int = 1,
) -> Recipe:
    """Write down one run of an arm as a recipe, which ``engram-lm train`` can read.

    ``rate`` is the peak learning rate, and ``lora_rank`` matters to arms with low-rank matrices alone.
    """
    kind, base, data, train = arm_kind(name), recipe.base, recipe.data, recipe.train
    adapter, lora = AdapterOptions(), LoraOptions()
    if kind.memory:
        initialization = "random" if kind.is_control else "transfer" if kind.transfer else recipe.memory.initialization
        adapter = dataclasses.replace(recipe.memory, initialization=initialization, control=kind.control)
        # Another seed is another hash, and other first rows, as well as another order of the text.
        adapter = dataclasses.replace(adapter, seed=recipe.memory.seed + seed)
        if kind.frozen_tables:
            adapter = dataclasses.replace(adapter, occupancy="none")  # no row of it is ever written
        elif "occupancy" in kind.features and adapter.occupancy == "none":
            adapter = dataclasses.replace(adapter, occupancy="ngrams")
    if kind.lora:
        lora = LoraOptions(
            rank=lora_rank, alpha=recipe.lora.alpha, dropout=recipe.lora.dropout, targets=recipe.lora.targets
        )
    writing, retention = recipe.writing, recipe.retention
    if "sparse" in kind.features and writing.rule == "all":
        writing = dataclasses.replace(writing, rule="tf_idf")
    if "retention" in kind.features and not retention.weight:
        retention = dataclasses.replace(retention, weight=1.0)
    texts = tuple(
        EvaluationText(name=name, sources=(source,), held_out=data.retained_held_out, max_tokens=data.retained_tokens)
        for name, source in data.retained_texts.items()
    )
    return Recipe(
        model=ModelOptions(
            base=base.model,
            revision=base.revision,
            layer_list=base.layer_list,
            base_dtype=base.dtype,
            frozen_tables=kind.frozen_tables,
        ),
        adapter=adapter,
        lora=lora,
        data=DataOptions(
            sources=data.domain,
            cache=data.cache,
            sequence_length=data.sequence_length,
            held_out=data.held_out,
            validation=data.validation,
            general=data.general,
            general_held_out=data.general_held_out,
        ),
        train=RunOptions(
            num_steps=num_steps,
            batch_size=train.batch_size,
            micro_batch_size=train.micro_batch_size,
            seed=seed,
            dtype=dtype,
            device=train.device,
            max_grad_norm=train.max_grad_norm,
        ),
        optimizer=OptimizerOptions(
            backbone="adamw",
            lr=rate,
            table_lr_multiplier=recipe.rates.table_lr_multiplier,
            weight_decay=recipe.rates.weight_decay,
        ),
        schedule=recipe.schedule,
        writing=writing if kind.has_rows else WritingOptions(),
        retention=retention if kind.has_memory or kind.lora else RetentionOptions(),
        dependence=recipe.dependence if kind.has_memory else DependenceOptions(),
        evaluation=EvaluationOptions(
            points=train.curve_points,
            start=True,
            max_tokens=data.held_out_tokens,
            curve_tokens=train.curve_tokens,
            texts=texts,
        ),
        checkpoint=CheckpointOptions(every=0, keep_last=0, asynchronous=False, write_model=kind.is_kept),
        log=LogOptions(details_every=0, tensorboard="no", wandb="no"),
    )
