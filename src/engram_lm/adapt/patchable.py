"""The memory of a model as a row patch sees it: its hash, its trainable tables and the layers that read them.

Only this file knows that there are two kinds of models: those with an adapter, and the reference model.
"""

# Dimension key: L length, N rows, E row width, V vocabulary.

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram_lm.adapt.adapter import MemoryAdapter, attached_adapters
from engram_lm.errors import ConfigError, MismatchError, RowRangeError
from engram_lm.hashing import HashSpec
from engram_lm.memory.layer import EngramLayer
from engram_lm.model.table_place import table_name
from engram_lm.tables import ParameterTable, Table


@dataclasses.dataclass(frozen=True, eq=False)
class PatchableMemory:
    """Memory whose rows can be changed in place."""

    owner: nn.Module
    """The module that the memory belongs to; it keeps the record of the patches that were applied."""
    model: nn.Module
    """The model that computes logits from ``input_ids``."""
    spec: HashSpec
    """The hash, with its token map."""
    tables: Mapping[str, ParameterTable]
    """The tables, named by the block that reads them, or one called ``shared``."""
    layers: Mapping[int, EngramLayer]
    """The layers by block."""

    def layers_of(self, table: str) -> list[int]:
        """Return the published ids of the layers that read a table."""
        pairs = zip(self.spec.blocks, self.spec.layers, strict=True)
        return [layer for block, layer in pairs if table_name(self.spec, block) == table]

    def check_rows(self, table: str, rows: Tensor) -> None:
        """Refuse a table that this memory does not have (`MismatchError`) and rows outside it (`RowRangeError`)."""
        if table not in self.tables:
            raise MismatchError(f"this memory has no table {table!r}; its tables are {', '.join(self.tables)}")
        num_rows = self.tables[table].num_rows
        outside = rows[(rows < 0) | (rows >= num_rows)]
        if len(outside):
            raise RowRangeError(
                f"row {int(outside[0])} is outside table {table}, which has rows 0 to {num_rows - 1}; it belongs to "
                "another memory"
            )

    @torch.no_grad()
    def read(self, table: str, rows: Tensor) -> Tensor:
        """Copy rows ``[N]`` of a table to the host, ``[N, E]``; zeros for those that occupancy calls unwritten."""
        return self.tables[table].stored(rows.cpu())

    def beginning(self, table: str, rows: Tensor) -> Tensor:
        """Copy rows ``[N]`` to the host as a fit begins with them: first numbers in place of zeros, ``[N, E]``."""
        return self.tables[table].beginning(rows.cpu())

    @torch.no_grad()
    def write(self, table: str, rows: Tensor, values: Tensor) -> None:
        """Replace rows ``[N]`` of a table by values ``[N, E]``. With occupancy a row of zeros is then unwritten."""
        self.tables[table].store(rows, values)

    def logits(self, tokens: np.ndarray | Sequence[int]) -> Tensor:
        """Compute the logits of one sequence ``[L]``, or of a batch of sequences of one length ``[B, L]``.

        They are ``[L, V]`` or ``[B, L, V]``, in the model's type, on its device.
        """
        ids = torch.as_tensor(np.asarray(tokens, dtype=np.int64))
        device = next((p.device for p in self.model.parameters() if not p.is_meta), torch.device("cpu"))
        result: Tensor = self.model(input_ids=ids.to(device).reshape(-1, ids.shape[-1]), use_cache=False)[0]
        return result[0] if ids.dim() == 1 else result

    @contextlib.contextmanager
    def reading(self, rows: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
        """Let the layers read some rows from separate tensors, with gradient, inside a ``with`` block.

        ``rows`` names them by table, ascending, int64 ``[N]``; ``values`` holds the numbers that are read instead,
        ``[N, E]``, rounded to the table's type when they are read.
        """
        before = {block: layer.table for block, layer in self.layers.items()}
        try:
            for block, layer in self.layers.items():
                name = table_name(self.spec, block)
                if name in rows:
                    layer.table = _RowsApart(self.tables[name], rows[name], values[name])
            yield
        finally:
            for block, layer in self.layers.items():
                layer.table = before[block]


class _RowsApart(Table):
    """A table that reads some of its rows from a small tensor; only this tensor gets a gradient."""

    def __init__(self, table: ParameterTable, rows: Tensor, values: Tensor) -> None:
        self.table, self.values = table, values
        self.rows = rows.to(values.device)
        self.num_rows, self.width = table.num_rows, table.width

    @property
    def dtype(self) -> torch.dtype:
        """See `Table.dtype`."""
        return self.table.dtype

    def gather(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Table.gather`."""
        with torch.no_grad():
            found = self.table.gather(rows)
        numbers = rows.to(self.rows.device)
        place = torch.searchsorted(self.rows, numbers).clamp(max=len(self.rows) - 1)
        # Rounded as they will be stored, so that the fit sees the numbers that it will leave.
        apart = F.embedding(place, self.values.to(self.dtype)).to(found.device)
        here = (self.rows[place] == numbers).to(found.device)
        result = torch.where(here.unsqueeze(-1), apart, found)
        return result if out is None else out.copy_(result)


def patchable_memory(target: Any) -> PatchableMemory:
    """Find the memory of what `RowPatch.fit` accepts.

    Raises:
        ConfigError: There is no memory or more than one, the adapter is detached or disabled, or a table is not a
            parameter in memory.
        TokenMapError: The reference model has not been given its token map.
    """
    from engram_lm.model.pretrained import EngramPreTrainedModel

    if isinstance(target, EngramPreTrainedModel) and target.config.memory is not None:
        owner: Any = target.base_model
        layers = {block: owner.layers[block].memory for block in target.config.memory_layers}
        return PatchableMemory(owner, target, target.hash_spec, trainable_tables(target.tables), layers)
    adapters = attached_adapters(target) if isinstance(target, nn.Module) else {}
    if not isinstance(target, MemoryAdapter):
        if not adapters:
            raise ConfigError(
                f"a row patch is for a model with memory; this {type(target).__name__} has none: attach one with "
                "MemoryAdapter.from_pretrained, or engram_lm.attach and training"
            )
        if len(adapters) > 1:
            raise ConfigError(
                f"a row patch is for one memory; this {type(target).__name__} has the adapters {sorted(adapters)}; "
                "pass one of these MemoryAdapters"
            )
        target = next(iter(adapters.values()))
    if target.model is None or not target.enabled:
        state = "detached" if target.model is None else "disabled"
        raise ConfigError(
            f"the memory adapter {target.name!r} is {state}, so its rows are not read; attach or enable it first"
        )
    layers = {block: target.layers[str(block)] for block in target.spec.blocks}
    return PatchableMemory(target, target.model, target.spec, trainable_tables(target.tables), layers)


def trainable_tables(tables: Mapping[str, Table]) -> dict[str, ParameterTable]:
    """Return the tables if all are parameters in memory, whose rows can be changed, or raise a `ConfigError`."""
    for name, table in tables.items():
        if not isinstance(table, ParameterTable):
            raise ConfigError(
                f"the rows of table {name} are read from a {type(table).__name__} and cannot be changed there; load "
                'the model or adapter with table_tier="device", which makes its tables parameters in memory'
            )
        if table.weight.is_meta:
            raise ConfigError(f"the table {name} has no rows yet (its device is meta); load its weights first")
    return dict(tables)  # type: ignore[arg-type]
