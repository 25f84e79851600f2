"""``engram eval``: loss of a model on text files."""

import dataclasses
import json as json_module
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import Progress

from engram.errors import ConfigError
from engram.evaluation.loss import held_out_loss
from engram.serving.load import TableFlags, load_model
from engram.training.batches import pack
from engram.training.corpus import read_corpus

__all__ = ["Eval"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval(TableFlags):
    """Measure the loss of a model on text.

    The model is a quickstart run, or any folder with a causal language model and its tokenizer.
    """

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """Folder of the model."""
    data: tuple[Path, ...]
    """Text files or folders."""
    sequence_length: int | None = None
    """Tokens in a sequence; what the model was trained with unless given, 1024 at most."""
    batch_size: int = 16
    """Sequences at a time."""
    max_tokens: int | None = None
    """Evaluate so many tokens at most."""
    device: str = "cpu"
    """Where to run, as torch names it."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sequence_length", "batch_size", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if not self.data:
            raise ConfigError("--data needs at least one file or folder")

    def run(self) -> int:
        """Print loss, perplexity, bits per byte and speed."""
        corpus = read_corpus(self.data)
        model, tokenizer = load_model(self.model, device=self.device, tables=self)
        longest = getattr(model.config, "max_position_embeddings", None) or 1024
        length = self.sequence_length or min(longest, 1024)
        with Progress(console=Console(stderr=True), transient=True) as progress:
            tokens = pack(corpus.documents, tokenizer)
            count = min(len(tokens) - 1, self.max_tokens or len(tokens))
            task = progress.add_task("evaluating", total=count)
            found = held_out_loss(
                model,
                tokens,
                length=length,
                batch_size=self.batch_size,
                max_tokens=self.max_tokens,
                num_bytes=corpus.num_bytes if self.max_tokens is None else None,
                on_progress=lambda done: progress.advance(task, done),
            )
        if self.json:
            values = {"model": str(self.model), "files": len(corpus.documents), "skipped": corpus.skipped}
            print(json_module.dumps({**values, "sequence_length": length, **dataclasses.asdict(found)}))
            return 0
        print(f"loss            {found.loss:.4f} nats per token")
        print(f"perplexity      {found.perplexity:.2f}")
        if found.bits_per_byte is not None:
            print(f"bits per byte   {found.bits_per_byte:.4f}")
        print(f"text            {len(corpus.documents):,} files, {found.num_tokens:,} tokens, sequences of {length}")
        for reason, number in corpus.skipped.items():
            print(f"skipped         {number} files: {reason}")
        print(f"speed           {found.tokens_per_second:,.0f} tokens/s")
        return 0
