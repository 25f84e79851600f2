"""Small dense models with memory or without: what the quickstart and the study of depth train."""

import dataclasses
import math
from typing import Any

from engram_lm.errors import ConfigError, check_flags
from engram_lm.memory import EngramConfig
from engram_lm.studies.text_flags import TextFlags
from engram_lm.training.optimizers import OptimizerOptions
from engram_lm.training.recipe import ModelOptions

_HEAD_WIDTH = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallModelFlags(TextFlags):
    """Text, sizes and training of small dense models with memory or without."""

    lr: float = 4e-3
    """Peak learning rate."""
    table_lr_multiplier: float = 5.0
    """Learning rate of the tables relative to it."""
    hidden_size: int = 128
    """Width of the models."""
    blocks: int = 4
    """Transformer blocks."""
    memory_dim: int = 128
    """Width of the memory vector, over all heads."""
    heads: int = 8
    """Hash heads per order."""
    rows_per_head: int = 32_768
    """Rows asked for per head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flags(self, "blocks")
        if self.hidden_size % _HEAD_WIDTH:
            raise ConfigError(
                f"--hidden-size must be a multiple of {_HEAD_WIDTH} (the width of a head), not {self.hidden_size}"
            )
        if not (0 < self.lr < math.inf and 0 <= self.table_lr_multiplier < math.inf):
            raise ConfigError("--lr must be above 0 and --table-lr-multiplier at least 0")

    @property
    def optimizer(self) -> OptimizerOptions:
        """AdamW for the backbone, and faster learning tables."""
        return OptimizerOptions(backbone="adamw", lr=self.lr, table_lr_multiplier=self.table_lr_multiplier)

    @property
    def longest_question(self) -> int:
        """Tokens that the models have to see at once after training, whatever they are trained on."""
        return 0

    @property
    def num_streams(self) -> int:
        """Residual streams of the models."""
        return 1

    def memory_in(self, blocks: tuple[int, ...], memory_dim: int | None = None) -> EngramConfig:
        """Memory in some blocks, whose vector has the given width, or that of the flag."""
        return EngramConfig(
            hidden_size=self.hidden_size,
            layers=blocks,
            memory_dim=memory_dim or self.memory_dim,
            num_heads=self.heads,
            rows_per_head=self.rows_per_head,
            num_streams=self.num_streams,
            table_std=0.02,
            value_init="zero",
        )

    def model(self, memory: EngramConfig | None, *, wider: int = 0, **options: Any) -> ModelOptions:
        """Choose a model with memory or without, whose feed-forward has ``wider`` channels more in every block.

        The options are other fields of the recipe's ``[model]``.
        """
        heads = self.hidden_size // _HEAD_WIDTH
        backbone = {
            "num_hidden_layers": self.blocks,
            "first_k_dense_replace": self.blocks,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.hidden_size * 11 // 4 + wider,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "kv_lora_rank": self.hidden_size // 2,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": _HEAD_WIDTH,
            "max_position_embeddings": max(self.sequence_length, self.longest_question),
            # The usual 0.02 is for wider models. At this width attention then forms late, at a step that depends on
            # the seed, and seeds differ by more than models do.
            "initializer_range": 0.06,
            "tie_word_embeddings": True,
            "num_streams": self.num_streams,
        }
        if memory is None:
            return ModelOptions(preset="dense-nano", backbone=backbone, **options)
        fields = ("layers", "memory_dim", "num_heads", "rows_per_head", "table_std", "value_init")
        chosen = {name: getattr(memory, name) for name in fields} | {"layers": list(memory.layers)}
        return ModelOptions(preset="engram-nano", backbone=backbone, memory=chosen, **options)

    def width_of(self, flops: int) -> int:
        """Channels that the feed-forward of every block grows by to spend some operations more per token."""
        return round(flops / (6 * self.hidden_size * self.blocks))
