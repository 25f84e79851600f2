"""The memory of a model as a row patch sees it: its hash, its tables on any tier, and the layers that read them.

Only this file knows that there are two kinds of models, those with an adapter and the reference model, and two kinds of
tables: rows of a parameter are changed in place, rows of any other table in an overlay around it.
"""

# Dimension key: B batch, L length, N rows, E row width, V vocabulary.

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engram_lm.adapt.adapter import MemoryAdapter, attached_adapters
from engram_lm.adapt.row_change import bits
from engram_lm.errors import ConfigError, MismatchError, RowRangeError
from engram_lm.hashing import HashSpec
from engram_lm.memory.layer import EngramLayer
from engram_lm.model.table_place import table_name, wanted_tables
from engram_lm.tables import OverlayTable, ParameterTable, StagedTable, Table
from engram_lm.tables.occupancy import TrainedTable


@dataclasses.dataclass(frozen=True, eq=False)
class AppliedPatch:
    """A row patch in a model's tables, and the rows that it replaced."""

    patch: Any
    replaced: dict[str, Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class PatchableMemory:
    """Memory whose rows can be changed."""

    owner: nn.Module
    """The module that the memory belongs to; it keeps the record of the patches that were applied."""
    model: nn.Module
    """The model that computes logits from ``input_ids``."""
    spec: HashSpec
    """The hash, with its token map."""
    tables: MutableMapping[str, Table]
    """The tables, named by the block that reads them, or one called ``shared``."""
    apart: MutableMapping[str, Table]
    """Where the owner keeps those that are no parameters."""
    layers: Mapping[int, EngramLayer]
    """The layers by block."""

    @property
    def record(self) -> list[AppliedPatch]:
        """The patches that were applied and not reverted, in their order; the owner keeps them."""
        record: list[AppliedPatch] = self.owner.__dict__.setdefault("_row_patches", [])
        return record

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
        return self.tables[table].stored(rows.cpu()).cpu()

    def beginning(self, table: str, rows: Tensor) -> Tensor:
        """Copy rows ``[N]`` to the host as a fit begins with them: first numbers in place of zeros, ``[N, E]``."""
        found = self.tables[table]
        if isinstance(found, ParameterTable):
            return found.beginning(rows.cpu())
        values = self.read(table, rows)
        first = wanted_tables(self.spec, found.width)[table].first_rows(next(iter(self.layers.values())).config)
        if first is None:
            return values
        empty = (values == 0).all(-1, keepdim=True)
        return torch.where(empty, first.numbers(rows.cpu(), found.width, values.dtype), values)

    @torch.no_grad()
    def write(self, table: str, rows: Tensor, values: Tensor, *, num_patches: int = 0) -> None:
        """Replace rows ``[N]`` of a table by values ``[N, E]``. With occupancy a row of zeros is then unwritten.

        ``num_patches`` is 1 where a patch is applied, and -1 where one is reverted; the table counts those it holds.

        A table that is no parameter is never written to: its layers read it through an overlay, which is there as long
        as any row differs from the table's own.
        """
        found = self.tables[table]
        if isinstance(found, ParameterTable):
            found.store(rows, values)
            found.num_patches = max(0, found.num_patches + num_patches)
            return
        beneath = found.table if isinstance(found, OverlayTable) else found
        own = (bits(beneath.gather(rows.cpu()).cpu()) == bits(values.cpu())).all(-1)
        if not isinstance(found, OverlayTable):
            found = OverlayTable(found, rows[:0].cpu(), values[:0].cpu())
        found.give_back(rows[own])
        found.replace(rows[~own], values[~own])
        self._put(table, found if len(found.rows) else beneath)

    def device_of(self, table: str) -> torch.device:
        """Return the device that rows of a table are read on."""
        found = self.tables[table]
        return found.weight.device if isinstance(found, ParameterTable) else torch.device("cpu")

    def _put(self, table: str, read: Table) -> None:
        """Let the owner and the layers have another table of this name."""
        self.tables[table] = self.apart[table] = read
        for block, layer in self.layers.items():
            if table_name(self.spec, block) == table:
                if isinstance(layer.table, StagedTable):
                    layer.table.table = read
                else:
                    layer.table = read

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
                    layer.table = OverlayTable(self.tables[name], rows[name], values[name])
            yield
        finally:
            for block, layer in self.layers.items():
                layer.table = before[block]


def patchable_memory(target: Any) -> PatchableMemory:
    """Find the memory of what `RowPatch.fit` accepts.

    Raises:
        ConfigError: There is no memory or more than one, the adapter is detached or disabled, or a table has no rows
            yet.
        TokenMapError: The reference model has not been given its token map.
    """
    from engram_lm.model.pretrained import EngramPreTrainedModel

    if isinstance(target, EngramPreTrainedModel) and target.config.memory is not None:
        owner: Any = target.base_model
        layers = {block: owner.layers[block].memory for block in target.config.memory_layers}
        apart = owner.tables_apart.tables
        return PatchableMemory(owner, target, target.hash_spec, _with_rows(target.tables), apart, layers)
    adapters = attached_adapters(target) if isinstance(target, nn.Module) else {}
    if not isinstance(target, MemoryAdapter):
        if not adapters:
            raise ConfigError(
                f"a row patch is for a model with memory; this {type(target).__name__} has none: name a memory with "
                "--adapter (`engram-lm patch new` makes one), or attach one with MemoryAdapter.from_pretrained or "
                "engram_lm.attach"
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
    apart = target._tables_apart
    return PatchableMemory(target, target.model, target.spec, _with_rows(target.tables), apart, layers)


def trainable_tables(tables: Mapping[str, Table]) -> dict[str, ParameterTable]:
    """Return the tables if all are parameters in memory, whose rows can be changed, or raise a `ConfigError`."""
    for name, table in tables.items():
        if not isinstance(table, ParameterTable):
            raise ConfigError(
                f"the rows of table {name} are read from a {type(table).__name__} and cannot be changed there; load "
                'the model or adapter with table_tier="device", which makes its tables parameters in memory'
            )
    return _with_rows(tables)  # type: ignore[return-value]


def _with_rows(tables: Mapping[str, Table]) -> dict[str, Table]:
    for name, table in tables.items():
        if isinstance(table, TrainedTable) and not isinstance(table, ParameterTable):
            raise ConfigError(
                f"the rows of table {name} are divided over processes; load the model or adapter in one process"
            )
        if isinstance(table, ParameterTable) and table.weight.is_meta:
            raise ConfigError(f"the table {name} has no rows yet (its device is meta); load its weights first")
    return dict(tables)
