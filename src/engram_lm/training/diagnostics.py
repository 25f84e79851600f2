"""What a step did, in numbers: norms of gradients and updates by group, and which rows of the tables are in use."""

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from engram_lm.tables import Table
from engram_lm.tables.tiers.sharded import ShardedTable
from engram_lm.training.distribution import Ranks, sharded_weights
from engram_lm.training.optimizers import CombinedOptimizer, merge_rows
from engram_lm.training.optimizers.groups import is_trainable_table

__all__ = ["TableUse", "UpdateMeter", "gradient_norms"]

_ROWS_AT_ONCE = 1 << 16


def gradient_norms(model: nn.Module, optimizer: CombinedOptimizer, ranks: Ranks) -> dict[str, Any]:
    """Measure the norm of the gradient of each group of parameters.

    Returns:
        ``{"grad_norms": {group: norm}}``.
    """
    squares: dict[str, Tensor] = {}
    own = {id(weight) for weight in sharded_weights(model)}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                gradient = parameter.grad
                values = merge_rows(gradient)[1] if gradient.is_sparse else gradient
                _add(squares, group["name"], _square_sum(values, id(parameter) in own, ranks))
    return {"grad_norms": {name: float(total.sqrt()) for name, total in squares.items()}}


class UpdateMeter:
    """Measures how far a step moves the parameters of each group, while the context is open.

    Takes a second copy of the backbone, and of the touched rows of tables, for as long.

    Args:
        model: Whose parameters.
        optimizer: Which of them, by group.
        ranks: The processes.
        enabled: Whether to measure at all.
    """

    def __init__(self, model: nn.Module, optimizer: CombinedOptimizer, ranks: Ranks, *, enabled: bool) -> None:
        self._own = {id(weight) for weight in sharded_weights(model)}
        self._optimizer, self._ranks, self._enabled = optimizer, ranks, enabled
        self.norms: dict[str, Any] = {}
        """``{"update_norms": {group: norm}}`` after the context has ended; empty where not enabled."""

    def __enter__(self) -> Self:
        self._before: list[tuple[str, nn.Parameter, Tensor | None, Tensor]] = []
        for group in self._optimizer.param_groups if self._enabled else ():
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                rows = merge_rows(parameter.grad)[0] if parameter.grad.is_sparse else None
                self._before.append((group["name"], parameter, rows, _read(parameter, rows).clone()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._enabled or error is not None:
            return
        squares: dict[str, Tensor] = {}
        for name, parameter, rows, before in self._before:
            moved = _read(parameter, rows) - before
            _add(squares, name, _square_sum(moved, id(parameter) in self._own, self._ranks))
        self.norms = {"update_norms": {name: float(total.sqrt()) for name, total in squares.items()}}
        self._before = []


class TableUse:
    """Which rows of a model's tables have been trained, and how far their norms are from where they began.

    Costs a byte per row, and the touched rows of each step.

    Args:
        model: A model with memory, its own or attached; tables that are not trained here are left out. Those of an
            `EngramForCausalLM` are called as it calls them, others by their place among the modules.
        ranks: The processes among which tables are divided.
    """

    def __init__(self, model: Any, ranks: Ranks) -> None:
        self._ranks = ranks
        self._tables: dict[str, Any] = {
            name: table
            for name, table in _find_tables(model).items()
            if isinstance(table, nn.Module) and isinstance(table, Table) and table.weight.requires_grad
        }
        self.touched = {
            name: torch.zeros(len(_local(table.weight)), dtype=torch.uint8, device=table.weight.device)
            for name, table in self._tables.items()
        }
        """By table: 1 for every row of this process that some step has trained, uint8 ``[rows here]``."""

    def note(self) -> None:
        """Count the rows that the gradients of this step touch; before the gradients are cleared."""
        for name, table in self._tables.items():
            gradient = table.weight.grad
            if gradient is None:
                continue
            if gradient.is_sparse:
                self.touched[name][gradient._indices()[0]] = 1
            else:
                self.touched[name] |= (_local(gradient) != 0).any(1).to(torch.uint8)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it: ``touched/TABLE``, over all processes ``[rows]``, of the same memory."""
        found: dict[str, Tensor] = {}
        for name, table in self._tables.items():
            touched, weight = self.touched[name], table.weight
            if isinstance(table, ShardedTable):
                touched = table.distributed(touched)
            elif isinstance(weight, DTensor):  # a table with dense gradients under FSDP2
                whole, step = torch.Size((table.num_rows,)), (1,)
                touched = DTensor.from_local(
                    touched, weight.device_mesh, weight.placements, run_check=False, shape=whole, stride=step
                )
            found[f"touched/{name}"] = touched
        return found

    def summary(self) -> dict[str, dict[str, float]]:
        """Summarize each table.

        Returns:
            By table: ``occupancy``, the share of rows ever trained; ``row_norm``, the mean norm of those, and
            ``row_norm_drift``, the same over what it was expected to be at the start. Every process gets the same.
        """
        found = {}
        for name, table in self._tables.items():
            weight = table.weight.detach()
            sums = torch.zeros(2, dtype=torch.float64, device=table.weight.device)
            # In pieces: all rows together would be a second table in memory.
            rows, touched = (part.split(_ROWS_AT_ONCE) for part in (_local(weight), self.touched[name]))
            for some, used in zip(rows, touched, strict=True):
                norms = some.float().norm(dim=1) * used
                sums += torch.stack([used.sum().double(), norms.sum().double()])
            if isinstance(table, ShardedTable) or isinstance(weight, DTensor):
                sums = self._ranks.sum(sums)  # what every process has a copy of counts once
            num_touched, norm_sum = (float(value) for value in sums)
            mean = norm_sum / max(num_touched, 1)
            found[name] = {
                "occupancy": num_touched / table.num_rows,
                "row_norm": mean,
                "row_norm_drift": mean / (table.std * table.width**0.5),
            }
        return found


def _find_tables(model: nn.Module) -> dict[str, Any]:
    own = dict(getattr(model, "tables", {}))
    known = {id(table) for table in own.values()}
    attached = {name: module for name, module in model.named_modules() if is_trainable_table(module)}
    return own | {name: table for name, table in attached.items() if id(table) not in known}


def _read(parameter: nn.Parameter, rows: Tensor | None) -> Tensor:
    value = parameter.detach()
    return value if rows is None else value.index_select(0, rows)


def _square_sum(values: Tensor, divided: bool, ranks: Ranks) -> Tensor:
    """Sum of squares over all processes, where each holds a part."""
    total = _local(values).float().square().sum()
    return ranks.sum(total) if divided or isinstance(values, DTensor) else total


def _local(values: Tensor) -> Tensor:
    """This process's part of something that FSDP2 has divided; anything else as it is."""
    return values.to_local() if isinstance(values, DTensor) else values


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value
