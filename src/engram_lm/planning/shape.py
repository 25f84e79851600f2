"""How a training step is divided over ranks, kept and sent."""

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args, get_type_hints

from engram_lm.errors import ConfigError, check_whole
from engram_lm.planning.deduplication import CURVES

BackboneOptimizer = Literal["muon", "adamw"]
"""Optimizers of the matrices of hidden layers."""
TableOptimizer = Literal["row_adam", "row_wise_adam", "row_wise_adagrad", "sinkhorn"]
"""Optimizers of tables; `engram_lm.training.optimizers.combined` has their classes."""
TABLE_STATE_BYTES: dict[TableOptimizer, Callable[[int], int]] = {
    "row_adam": lambda width: 8 * width,
    "row_wise_adam": lambda width: 4 * width + 4,
    "row_wise_adagrad": lambda width: 4,
    "sinkhorn": lambda width: 4 * width + 4,
}
"""Bytes of state that each keeps for a row of a width: float32 moments, and numbers of 4 bytes per row."""

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
"""Bytes of a number of each type."""
_MOST_RANKS = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingShape:
    """How a step is divided, kept and sent."""

    world_size: int = 1
    """Ranks; one accelerator each."""
    batch_size: int = 8
    """Sequences in a step, over all ranks."""
    sequence_length: int = 1024
    """Tokens in a sequence."""
    micro_batch_size: int | None = None
    """Sequences that a rank runs at a time; all of its share where None."""
    backbone: Literal["ddp", "fsdp2", "none"] = "ddp"
    """How everything but tables is kept: whole on every rank, divided over them, or whole and never reduced."""
    backbone_optimizer: BackboneOptimizer = "muon"
    """Muon keeps one number per number of a matrix, AdamW two."""
    table_optimizer: TableOptimizer = "row_adam"
    """What is kept per row: two moments; a moment and one number; one number; a moment."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of matrix products (autocast). Weights, gradients and moments are kept in float32."""
    gather_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which FSDP2 gathers weights: float32, or a lower one where products use what was gathered itself (FSDP2's
    ``MixedPrecisionPolicy``) and not copies of it in `dtype`."""
    table_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of rows, and of rows and gradients as they are sent. Moments are float32."""
    checkpointing: bool = False
    """Whether backward computes each block again instead of keeping what it needs."""
    fused_attention: bool = False
    """Whether attention keeps no scores for backward, as kernels of accelerators do. PyTorch's CPU kernel keeps them
    where keys and values are of unequal width, as here."""
    deduplicate: bool = True
    """Whether a rank asks for each distinct row once per gather."""
    shard_tables: bool = True
    """Whether the rows are divided over the ranks; otherwise each rank keeps them all and nothing is exchanged."""
    curve: str = "deepseek-v3"
    """Which of `CURVES` says how many N-grams are distinct."""
    distinct_share: float | None = None
    """Distinct rows over lookups of one gather, in place of the curve, where it was measured."""

    def __post_init__(self) -> None:
        check_whole(world_size=self.world_size, batch_size=self.batch_size, sequence_length=self.sequence_length)
        if self.micro_batch_size is not None:
            check_whole(micro_batch_size=self.micro_batch_size)
        if self.world_size > _MOST_RANKS:
            raise ConfigError(f"world_size must be at most {_MOST_RANKS}, not {self.world_size}")
        choices = {name: get_args(kind) for name, kind in get_type_hints(type(self)).items()}
        for name, allowed in {**choices, "curve": tuple(CURVES)}.items():
            if isinstance(allowed[0] if allowed else None, str) and getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {getattr(self, name)!r}")
        share = self.distinct_share
        if share is not None and not 0 < share <= 1:
            raise ConfigError(f"distinct_share is a share above 0, at most 1, not {share!r}")

    @property
    def sequences_per_rank(self) -> int:
        """Sequences of the rank that has most."""
        return -(-self.batch_size // self.world_size)

    @property
    def micro_batch(self) -> int:
        """Sequences that a rank runs at a time."""
        return min(self.sequences_per_rank, self.micro_batch_size or self.sequences_per_rank)

    @property
    def num_micro_batches(self) -> int:
        """Forward and backward passes of a rank in a step."""
        return -(-self.sequences_per_rank // self.micro_batch)
