"""Which rows a model reads, recorded for the simulation of caches and for rows that stay in one."""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from engram_lm.errors import ConfigError
from engram_lm.files import replacing
from engram_lm.memory.interface import MemoryLayer


class RowTrace:
    """Row numbers that a model read, in the order in which it read them. See `record_rows`."""

    def __init__(self) -> None:
        self.rows: dict[int, list[np.ndarray]] = {}
        """Block to one int64 ``[B * L * H]`` per forward pass, repeats kept."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trace as ``.npz``: for each block an int64 ``[n]`` called ``rows_<block>``.

        Raises:
            ConfigError: Nothing was recorded, or the path does not end in ``.npz``.
        """
        path = Path(path)
        if not self.rows or path.suffix != ".npz":
            raise ConfigError(
                f"{path} cannot hold a trace of {len(self.rows)} blocks; a trace has at least one block, and its file "
                "is called NAME.npz"
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
    with contextlib.ExitStack() as hooks:
        for block, layer in enumerate(model.base_model.layers):
            if isinstance(layer.memory, MemoryLayer):
                record = functools.partial(_record, trace, block)
                hooks.callback(layer.memory.register_forward_pre_hook(record).remove)
        yield trace


def _record(trace: RowTrace, block: int, layer: nn.Module, args: tuple[Any, Tensor]) -> None:
    trace.rows.setdefault(block, []).append(args[1].cpu().reshape(-1).numpy().copy())
