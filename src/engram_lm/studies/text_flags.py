"""What studies of models trained on text share: the flags of text and training, and the recipes they come to."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from engram_lm.errors import ConfigError, check_flags
from engram_lm.files import new_folder
from engram_lm.studies.runner import tokenizer_folder
from engram_lm.training.data.documents import Document, read_documents, split_documents
from engram_lm.training.data.text_source import TextSource
from engram_lm.training.data.tokenizer import train_tokenizer
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
from engram_lm.training.schedules import ScheduleOptions

_ALL_TOKENS = 1 << 40
_FEW_TOKENS = 500_000
"""Tokens of a run below which compiling takes longer than it saves."""
_CURVE_TOKENS = 16_384
"""Held-out tokens for a point along the way; the final figure uses more."""
_TOKENIZER_BYTES = 64_000_000
"""Text that a tokenizer is trained on at most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFlags:
    """Text and training of models of one study."""

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
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of matrix products; auto takes bfloat16 where the processor multiplies it in hardware."""
    device: str = "cpu"
    """Where to train, as torch names it."""
    vocab_size: int = 4096
    """Tokens of the tokenizer that is trained."""

    def __post_init__(self) -> None:
        check_flags(self, "tokens", "batch_size", "sequence_length", "max_bytes")
        if self.vocab_size < 258:
            raise ConfigError(
                f"--vocab-size must be at least 258 (all bytes and two special tokens), not {self.vocab_size}"
            )

    @property
    def num_steps(self) -> int:
        """Optimizer steps that the tokens make."""
        return max(1, round(self.tokens / (self.batch_size * self.sequence_length)))

    # What kinds of models decide ---------------------------------------------------------------------------------

    held_out_share: ClassVar[float] = 0.03
    """Share of the documents that models are compared on and not trained on."""
    validation_share: ClassVar[float] = 0.0
    """Share beside it for choices such as that of a learning rate, which no result uses."""
    may_compile: ClassVar[bool] = False
    """Whether training is compiled where that is possible, unless it is over before that would pay."""

    @property
    def held_out_tokens(self) -> int:
        """Held-out tokens that the final loss is measured on at most."""
        return _ALL_TOKENS

    @property
    def optimizer(self) -> OptimizerOptions:
        """How all models are trained."""
        raise NotImplementedError

    @property
    def schedule(self) -> ScheduleOptions:
        """How the learning rate changes."""
        return ScheduleOptions()

    @property
    def cache(self) -> Path | None:
        """Folder of token shards; the study's own where None."""
        return None

    # What is made of them ----------------------------------------------------------------------------------------

    def prepare_tokenizer(self, study: Path) -> list[str]:
        """Train the tokenizer of a study on the text of its models, and keep it where `Runner` looks for it.

        Returns:
            Names of the documents that are held out, in order; empty where the tokenizer is there already.
        """
        folder = tokenizer_folder(study, self.recipe(ModelOptions()))
        if folder.is_dir():
            return []
        share = self.held_out_share + self.validation_share
        train, held_out = split_documents(read_documents(self.data, max_bytes=self.max_bytes), share)
        tokenizer = train_tokenizer(_sample(train, _TOKENIZER_BYTES), self.vocab_size)
        with new_folder(folder) as aside:
            tokenizer.save_pretrained(aside)
        return [document.name for document in held_out]

    def recipe(self, model: ModelOptions, *, curve_points: int = 0) -> Recipe:
        """Write the recipe of a model, with some measurements of held-out loss along the way."""
        return Recipe(
            model=model,
            tokenizer=TokenizerOptions(vocab_size=self.vocab_size),
            data=DataOptions(
                sources=tuple(TextSource(path=str(path)) for path in self.data),
                cache=self.cache,
                max_bytes=self.max_bytes,
                sequence_length=self.sequence_length,
                held_out=self.held_out_share,
                validation=self.validation_share,
            ),
            train=RunOptions(
                num_steps=self.num_steps,
                batch_size=self.batch_size,
                max_skipped_steps=0,
                dtype=self.dtype,
                device=self.device,
                compile="auto" if self.may_compile and self.tokens >= _FEW_TOKENS else "no",
            ),
            optimizer=self.optimizer,
            schedule=self.schedule,
            evaluation=EvaluationOptions(
                points=curve_points,
                max_tokens=self.held_out_tokens,
                curve_tokens=_CURVE_TOKENS if curve_points else None,
            ),
            checkpoint=CheckpointOptions(keep_last=1),
            log=LogOptions(details_every=0, tensorboard="no", wandb="no"),
        )


def like(*models: ModelOptions, part: Literal["all", "memory"] = "all") -> tuple[LikeOptions, ...]:
    """Models whose first weights an arm takes over."""
    return tuple(
        LikeOptions(preset=model.preset, backbone=model.backbone, memory=model.memory, part=part) for model in models
    )


def _sample(documents: Sequence[Document], num_bytes: int) -> Iterator[str]:
    """Every document, or every n-th where they hold more text."""
    every = -(-sum(len(document.text.encode()) for document in documents) // num_bytes)
    return (document.text for document in itertools.islice(documents, 0, None, max(1, every)))
