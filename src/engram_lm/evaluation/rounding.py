"""What other tables, such as rounded ones, do to the loss of a model; ``engram-lm table convert`` with a model."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engram_lm.errors import ConfigError, MismatchError, check_flags
from engram_lm.memory.formats.table_command import Convert
from engram_lm.progress import Progress
from engram_lm.serving.load import load_model
from engram_lm.tables import MappedTable, RowLayout, packed_layout
from engram_lm.tables.files.convert import Converted
from engram_lm.tokenizing import beginning_tokens
from engram_lm.training.data.documents import pack, read_documents
from engram_lm.training.held_out import held_out_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertAndMeasure(Convert):
    """Write the tables of a checkpoint as packed tables: as they are, or rounded to another type.

    Sources are this library's own checkpoints, DeepSeek-V4.1 and Qwen (qwen4_exp) folders, and packed tables. Called
    again, an interrupted conversion continues where it stopped. Where numbers are rounded, it prints the bytes saved
    and the error; with --model and --data also the change in held-out loss.

    Examples::

        engram-lm table convert DeepSeek-V4.1-Flash tables
        engram-lm table convert DeepSeek-V4.1-Flash tables --layer 1 --dtype int4
        engram-lm table convert RUN tables --dtype int8 --model RUN --data held-out.txt
    """

    model: Path | None = None
    """A model of this library: measure its held-out loss with its own tables and with the new ones."""
    data: tuple[Path, ...] = ()
    """Text files or folders to measure it on."""
    sequence_length: int | None = None
    """Tokens in a sequence; the length the model was trained with by default, 1024 at most."""
    max_tokens: int | None = None
    """Measure the loss on this many tokens at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.model is None) != (not self.data):
            raise ConfigError("--model and --data belong together: the loss of a model on text")
        check_flags(self, "sequence_length", "max_tokens")

    def loss_change(self, results: Sequence[Converted]) -> dict[str, Any] | None:
        """See `Convert.loss_change`."""
        if self.model is None:
            return None
        corpus = read_documents(self.data)
        model, tokenizer = load_model(self.model, device="cpu")
        longest = getattr(model.config, "max_position_embeddings", None) or 1024
        tokens = pack(corpus.documents, tokenizer)
        layouts: dict[int | str, RowLayout] = {result.layer: packed_layout(result.path) for result in results}
        length = self.sequence_length or min(longest, 1024)
        _check(model, layouts)
        options: dict[str, Any] = {
            "length": length,
            "max_tokens": self.max_tokens,
            "beginning": beginning_tokens(tokenizer),
        }
        with Progress().tasks("the tables, which are whole; --resume yes leaves them alone") as tasks:
            total = 2 * min(len(tokens) - 1, self.max_tokens or len(tokens))
            options["on_progress"] = lambda more: tasks.advance("loss before and after", more, total)
            before = held_out_loss(model, tokens, **options)
            put_tables(model, layouts)
            after = held_out_loss(model, tokens, **options)
        change = {"loss_before": before.loss, "loss_after": after.loss, "change": after.loss - before.loss}
        return {**change, "num_tokens": after.num_tokens}


def put_tables(model: Any, layouts: Mapping[int | str, RowLayout]) -> None:
    """Let blocks read other tables, mapped from their files, as rows of the type that they had; those not named stay.

    Raises:
        MismatchError: The model has no such table, or one of another size.
        CheckpointError: A file is missing or has been cut.
    """
    _check(model, layouts)
    owns = {name: table.dtype for name, table in model.tables.items()}
    tables = {str(key): MappedTable(layout, owns[str(key)]) for key, layout in layouts.items()}
    shared = model.config.spec.shared_table
    for block in model.config.memory_layers:
        name = next(iter(owns)) if shared else str(block)
        if name in tables:
            model.base_model.layers[block].memory.table = tables[name]


def _check(model: Any, layouts: Mapping[int | str, RowLayout]) -> None:
    owns = getattr(model, "tables", {})
    for key, layout in layouts.items():
        if str(key) not in owns:
            where = Path(layout.files[0]).name
            raise MismatchError(
                f"{where} is the table of layer {key}, the model has those of {', '.join(owns) or 'none'}"
            )
        own, found = owns[str(key)], (layout.num_rows, layout.codec.width)
        if (own.num_rows, own.width) != found:
            raise MismatchError(
                f"the model's table of layer {key} has {own.num_rows} rows of {own.width} numbers, the table that "
                f"should replace it has {found[0]} of {found[1]}"
            )
