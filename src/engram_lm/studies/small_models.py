"""Small models on local text: the flags that the quickstart and other studies share, and the recipes they come to."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from engram_lm.errors import ConfigError, check_flags
from engram_lm.files import new_folder
from engram_lm.memory import EngramConfig
from engram_lm.training.data.documents import read_documents, split_documents
from engram_lm.training.data.text_source import TextSource
from engram_lm.training.data.tokenizer import train_tokenizer
from engram_lm.training.export import TOKENIZER
from engram_lm.training.optimizers import OptimizerOptions
from engram_lm.training.recipe import (
    CheckpointOptions,
    DataOptions,
    EvaluationOptions,
    LikeOptions,
    LogOptions,
    ModelOptions,
    Recipe,
    RunOptions,
    TokenizerOptions,
)

_HEAD_WIDTH = 32
_HELD_OUT_SHARE = 0.03
"""Share of the documents that models are compared on and not trained on."""
_ALL_TOKENS = 1 << 40
_CURVE_TOKENS = 16_384
"""Held-out tokens for a point along the way; the final figure uses all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallModelFlags:
    """Text, sizes and training of small dense models with memory or without."""

    data: tuple[Path, ...] = ()
    """Text files or folders to train on, instead of the Python standard library's own sources."""
    max_bytes: int = 64_000_000
    """Text to read at most."""
    tokens: int = 1_300_000
    """Tokens each model is trained on."""
    batch_size: int = 16
    """Sequences in a batch."""
    sequence_length: int = 256
    """Tokens in a sequence."""
    lr: float = 4e-3
    """Peak learning rate."""
    table_lr_multiplier: float = 5.0
    """Learning rate of the tables relative to it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of matrix products; auto takes bfloat16 where the processor multiplies it in hardware."""
    device: str = "cpu"
    """Where to train, as torch names it."""
    vocab_size: int = 4096
    """Tokens of the tokenizer that is trained."""
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
        check_flags(self, "tokens", "batch_size", "sequence_length", "blocks", "max_bytes")
        if self.vocab_size < 258:
            raise ConfigError(
                f"--vocab-size must be at least 258 (all bytes and two special tokens), not {self.vocab_size}"
            )
        if self.hidden_size % _HEAD_WIDTH:
            raise ConfigError(
                f"--hidden-size must be a multiple of {_HEAD_WIDTH} (the width of a head), not {self.hidden_size}"
            )
        if not (0 < self.lr < math.inf and 0 <= self.table_lr_multiplier < math.inf):
            raise ConfigError("--lr must be above 0 and --table-lr-multiplier at least 0")

    @property
    def num_steps(self) -> int:
        """Optimizer steps that the tokens make."""
        return max(1, round(self.tokens / (self.batch_size * self.sequence_length)))

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
            "max_position_embeddings": self.sequence_length,
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

    def prepare_tokenizer(self, study: Path) -> list[str]:
        """Train the tokenizer of a study on the text of its models, and keep it where `Runner` looks for it.

        Returns:
            Names of the documents that are held out, in order; empty where the tokenizer is there already.
        """
        if (study / TOKENIZER).is_dir():
            return []
        train, held_out = split_documents(read_documents(self.data, max_bytes=self.max_bytes), _HELD_OUT_SHARE)
        tokenizer = train_tokenizer((document.text for document in train), self.vocab_size)
        with new_folder(study / TOKENIZER) as aside:
            tokenizer.save_pretrained(aside)
        return [document.name for document in held_out]

    def recipe(self, model: ModelOptions, *, curve_points: int = 0) -> Recipe:
        """Write the recipe of a model, with some measurements of held-out loss along the way."""
        return Recipe(
            model=model,
            tokenizer=TokenizerOptions(vocab_size=self.vocab_size),
            data=DataOptions(
                sources=tuple(TextSource(path=str(path)) for path in self.data),
                max_bytes=self.max_bytes,
                sequence_length=self.sequence_length,
                held_out=_HELD_OUT_SHARE,
            ),
            train=RunOptions(
                num_steps=self.num_steps,
                batch_size=self.batch_size,
                max_skipped_steps=0,
                dtype=self.dtype,
                device=self.device,
            ),
            optimizer=OptimizerOptions(backbone="adamw", lr=self.lr, table_lr_multiplier=self.table_lr_multiplier),
            evaluation=EvaluationOptions(
                points=curve_points, max_tokens=_ALL_TOKENS, curve_tokens=_CURVE_TOKENS if curve_points else None
            ),
            checkpoint=CheckpointOptions(keep_last=1),
            log=LogOptions(details_every=0, tensorboard="no", wandb="no"),
        )


def like(*models: ModelOptions, part: Literal["all", "memory"] = "all") -> tuple[LikeOptions, ...]:
    """Models whose first weights an arm takes over."""
    return tuple(
        LikeOptions(preset=model.preset, backbone=model.backbone, memory=model.memory, part=part) for model in models
    )
