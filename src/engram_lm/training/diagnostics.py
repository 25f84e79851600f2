"""What a step did, in numbers: norms of gradients and updates by group, and which rows of the tables are in use."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from engram_lm.tables import Table
from engram_lm.tables.tiers.sharded import ShardedTable
from engram_lm.training.distribution import Ranks, sharded_weights
from engram_lm.training.optimizers import CombinedOptimizer, merge_rows
from engram_lm.training.optimizers.groups import is_trainable_table

_ROWS_AT_ONCE = 1 << 16


def gradient_norms(model: nn.Module, optimizer: CombinedOptimizer, ranks: Ranks) -> dict[str, Any]:
    """Measure the norm of the gradient of each group of parameters: ``{"grad_norms": {group: norm}}``."""
    gradients = (
        (name, parameter, merge_rows(parameter.grad)[1] if parameter.grad.is_sparse else parameter.grad)
        for name, parameter in _with_gradient(optimizer)
        if parameter.grad is not None
    )
    return {"grad_norms": _norms(gradients, model, ranks)}


@contextlib.contextmanager
def update_norms(
    model: nn.Module, optimizer: CombinedOptimizer, ranks: Ranks, *, enabled: bool
) -> Iterator[dict[str, Any]]:
    """Measure how far the parameters of each group move while the context is open.

    Keeps a second copy of the backbone, and of the touched rows of tables, for that time. What is yielded holds
    ``{"update_norms": {group: norm}}`` after the context has ended; it stays empty if not enabled.
    """
    found: dict[str, Any] = {}
    before: list[tuple[str, nn.Parameter, Tensor | None, Tensor]] = []
    for name, parameter in _with_gradient(optimizer) if enabled else ():
        rows = merge_rows(parameter.grad)[0] if parameter.grad is not None and parameter.grad.is_sparse else None
        before.append((name, parameter, rows, _read(parameter, rows).clone()))
    yield found
    if enabled:
        moves = ((name, parameter, _read(parameter, rows) - old) for name, parameter, rows, old in before)
        found["update_norms"] = _norms(moves, model, ranks)


class TableUse:
    """Which rows of a model's tables have been trained, and how far their norms have moved since the start.

    Costs a byte per row, and the touched rows of each step. Tables that are not trained are left out. Those of an
    `EngramForCausalLM` keep their names, others are named by their place among the modules.
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
        """By table: 1 for every row of this process that a step has trained, uint8 ``[rows here]``."""

    def note(self) -> None:
        """Note the rows that the gradients of this step touch; call it before the gradients are cleared."""
        for name, table in self._tables.items():
            gradient = table.weight.grad
            if gradient is None:
                continue
            if gradient.is_sparse:
                # A row whose gradient is 0, such as one that was read at padding, is not trained by it.
                rows, values = gradient._indices()[0], gradient._values()
                self.touched[name][rows[(values != 0).any(1)]] = 1
            else:
                self.touched[name] |= (_local(gradient) != 0).any(1).to(torch.uint8)

    def tensors(self) -> dict[str, Tensor]:
        """Name what a checkpoint keeps: ``touched/TABLE``, over all processes ``[rows]``, sharing memory with this."""
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
        """Summarize each table, alike on every process.

        ``occupancy`` is the share of rows ever trained, ``row_norm`` the mean norm of those, and ``row_norm_drift``
        that norm divided by the norm expected at the start.
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
                sums = self._ranks.sum(sums)  # a table that every process has whole counts once
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


def _with_gradient(optimizer: CombinedOptimizer) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that have a gradient, each with the name of its group."""
    for group in optimizer.param_groups:
        yield from ((group["name"], parameter) for parameter in group["params"] if parameter.grad is not None)


def _norms(values: Iterable[tuple[str, nn.Parameter, Tensor]], model: nn.Module, ranks: Ranks) -> dict[str, float]:
    """Norm of each group over all processes, where each holds a part of some parameters."""
    own = {id(weight) for weight in sharded_weights(model)}
    squares: dict[str, Tensor] = {}
    for name, parameter, value in values:
        total = _local(value).float().square().sum()
        if id(parameter) in own or isinstance(value, DTensor):
            total = ranks.sum(total)
        squares[name] = squares[name] + total if name in squares else total
    return {name: float(total.sqrt()) for name, total in squares.items()}


def _read(parameter: nn.Parameter, rows: Tensor | None) -> Tensor:
    value = parameter.detach()
    return value if rows is None else value.index_select(0, rows)


def _local(values: Tensor) -> Tensor:
    """This process's part of what FSDP2 has divided; anything else unchanged."""
    return values.to_local() if isinstance(values, DTensor) else values
