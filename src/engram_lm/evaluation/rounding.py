"""What other tables do to the loss of a model: its own, quantized, in their place."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engram_lm.errors import MismatchError
from engram_lm.tables import MappedTable, RowLayout
from engram_lm.training.held_out import held_out_loss

__all__ = ["LossChange", "loss_change", "put_tables"]


@dataclasses.dataclass(frozen=True)
class LossChange:
    """Loss of a model on the same tokens, before and after its tables were replaced."""

    loss_before: float
    """Mean nats per token with the model's own tables."""
    loss_after: float
    """With the others."""
    change: float
    """Second less first."""
    num_tokens: int
    """Tokens predicted, each time."""


def loss_change(
    model: Any, layouts: Mapping[int | str, RowLayout], tokens: np.ndarray, *, length: int, batch_size: int = 16
) -> LossChange:
    """Measure the loss, put the tables in, measure it again. The model keeps the new tables.

    Args:
        model: An `EngramForCausalLM`.
        layouts: Block, or name of the table, to the table that takes its place. Tables not named stay.
        tokens: Packed tokens, integers ``[num_tokens]``.
        length: Tokens in a sequence.
        batch_size: Sequences at a time.

    Raises:
        MismatchError: The model has no such table, or one of another size.
        CheckpointError: A file is gone or has been cut.
        DataError: There are fewer than two tokens.
    """
    _check(model, layouts)
    before = held_out_loss(model, tokens, length=length, batch_size=batch_size)
    put_tables(model, layouts)
    after = held_out_loss(model, tokens, length=length, batch_size=batch_size)
    return LossChange(before.loss, after.loss, after.loss - before.loss, after.num_tokens)


def put_tables(model: Any, layouts: Mapping[int | str, RowLayout]) -> None:
    """Let blocks read other tables, mapped from their files, as rows of the type of those they had.

    Raises:
        MismatchError: The model has no such table, or one of another size.
        CheckpointError: A file is gone or has been cut.
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
        own = owns[str(key)]
        if (own.num_rows, own.width) != (layout.num_rows, layout.codec.width):
            raise MismatchError(
                f"the model's table of layer {key} has {own.num_rows} rows of {own.width} numbers, the one to take its "
                f"place {layout.num_rows} of {layout.codec.width}"
            )
