"""Rows of all blocks asked for as soon as the tokens are known, and recorded where somebody wants to know them."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from engram_lm.errors import ConfigError
from engram_lm.files import replacing
from engram_lm.memory.layer import EngramLayer
from engram_lm.tables import Table

__all__ = ["RowTrace", "ask_for_rows", "record_rows"]

_TRACES = "_row_traces"


def ask_for_rows(layers: nn.ModuleList, rows: Mapping[int, Tensor]) -> None:
    """Ask every table for the rows that its block will read; each block waits for its own when it comes to them.

    Args:
        layers: The model's blocks.
        rows: Block to its row numbers, int64 ``[B, L, H]``, in the order in which blocks run.
    """
    for block, numbers in rows.items():
        table = cast(EngramLayer, layers[block].memory).table
        if isinstance(table, Table) and table.reads_ahead:
            table.prefetch(numbers)


class RowTrace:
    """Row numbers that a model read, in the order in which it read them. See `record_rows`."""

    def __init__(self) -> None:
        self.rows: dict[int, list[np.ndarray]] = {}
        """Block to one int64 ``[B * L * H]`` per forward pass, repeats kept."""

    def add(self, rows: Mapping[int, Tensor]) -> None:
        """Record one forward pass: block to row numbers of any shape."""
        for block, numbers in rows.items():
            self.rows.setdefault(block, []).append(numbers.detach().cpu().reshape(-1).numpy().copy())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace as ``.npz``: for each block an int64 ``[n]`` called ``rows_<block>``.

        Raises:
            ConfigError: Nothing was recorded, or the path does not end in ``.npz``.
        """
        path = Path(path)
        if not self.rows or path.suffix != ".npz":
            raise ConfigError(
                f"{path} shall hold the rows of {len(self.rows)} blocks; a trace has at least one and ends in .npz"
            )
        arrays: dict[str, Any] = {f"rows_{block}": np.concatenate(pieces) for block, pieces in self.rows.items()}
        with replacing(path) as aside, open(aside, "wb") as file:
            np.savez(file, **arrays)


@contextlib.contextmanager
def record_rows(model: Any) -> Iterator[RowTrace]:
    """Record which rows a model's forward passes read.

    Args:
        model: An `EngramForCausalLM` or `EngramModel`, not compiled.

    Yields:
        The trace, which grows with each forward pass: for ``engram-lm table simulate`` and `most_frequent`.

    Example:
        >>> with record_rows(model) as trace:  # doctest: +SKIP
        ...     model.generate(**tokenizer("def main", return_tensors="pt"))
        >>> trace.save("rows.npz")  # doctest: +SKIP
    """
    trace = RowTrace()
    traces: list[RowTrace] = model.base_model.__dict__[_TRACES]
    traces.append(trace)
    try:
        yield trace
    finally:
        traces[:] = [one for one in traces if one is not trace]
