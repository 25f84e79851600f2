"""Optimizers: Adam on the rows a step touched for tables, AdamW for everything else."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from engram.errors import ConfigError
from engram.tables import ParameterTable

__all__ = ["RowAdam", "clip_gradients", "merge_rows", "parameter_groups"]


def parameter_groups(model: nn.Module, *, weight_decay: float) -> tuple[list[dict[str, Any]], list[nn.Parameter]]:
    """Sort a model's trainable parameters by how they are trained.

    Args:
        model: Any model; its tables are the weights of `engram.tables.ParameterTable`.
        weight_decay: For matrices; vectors (norms, biases), the convolution and the embedding have none.

    Returns:
        Groups for AdamW, and the tables.
    """
    decayed, plain, tables = [], [], []
    table_weights = {id(module.weight) for module in model.modules() if isinstance(module, ParameterTable)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in table_weights:
            tables.append(parameter)
        elif parameter.dim() >= 2 and not name.endswith(("_norm", "conv_weight", "embed_tokens.weight")):
            decayed.append(parameter)
        else:
            plain.append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]], tables


def merge_rows(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Add up the entries of a sparse gradient that belong to the same row.

    Args:
        gradient: Sparse COO, one sparse dimension, ``[num_rows, width]``; coalesced or not.

    Returns:
        Distinct rows, int64 ascending ``[n]``, and their gradients ``[n, width]``.
    """
    rows, values = gradient._indices()[0], gradient._values()
    if gradient.is_coalesced():
        return rows, values
    distinct, position = torch.unique(rows, return_inverse=True)
    merged = values.new_zeros(len(distinct), *values.shape[1:])
    return distinct, merged.index_add_(0, position, values)


class RowAdam(torch.optim.Optimizer):
    """Adam whose step costs what was touched: rows without a gradient keep weights and moments as they are.

    Equal to ``torch.optim.SparseAdam`` in its updates, with the table options of the paper: no weight decay, and a
    learning rate given apart from the backbone's. Bias correction counts steps of the optimizer, as there, so a row
    first touched late moves by ``lr * (1 - beta1) / sqrt(1 - beta2)`` and not by ``lr``: 0.45 of it with the betas
    (0.9, 0.95) that training uses here.

    Gradients must be sparse (``ParameterTable(gradient="sparse")``).

    Args:
        params: Tables, or groups of them.
        lr: Learning rate. The paper multiplies the backbone's by 5.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.

    Cost: sorting the touched row numbers, and reading and writing their rows and two moments.
    Source: paper, Table 5 (Adam, learning rate x5, no weight decay).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        if lr < 0 or eps < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"RowAdam needs lr >= 0, eps >= 0 and betas in [0, 1), not {lr}, {eps}, {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the rows that have a gradient.

        Raises:
            ConfigError: A gradient is dense.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if not gradient.is_sparse:
            raise ConfigError(
                "RowAdam updates touched rows only and was given a dense gradient; make the table with "
                "gradient='sparse', or train it with torch.optim.AdamW"
            )
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        rows, values = merge_rows(gradient)
        if not len(rows):
            return
        values = values.to(parameter.dtype)
        (beta1, beta2), step = group["betas"], state["step"]
        mean = state["exp_avg"].index_select(0, rows).lerp_(values, 1 - beta1)
        square = state["exp_avg_sq"].index_select(0, rows).mul_(beta2).addcmul_(values, values, value=1 - beta2)
        state["exp_avg"].index_copy_(0, rows, mean)
        state["exp_avg_sq"].index_copy_(0, rows, square)
        size = group["lr"] * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        # Same form as SparseAdam: eps is added to the uncorrected root.
        parameter.index_add_(0, rows, mean.div_(square.sqrt_().add_(group["eps"])), alpha=-size)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale all gradients so that their global norm is at most ``max_norm``; sparse ones count by their merged rows.

    Sparse gradients are left merged (coalesced), which the optimizer would do next anyway.

    Returns:
        The norm before scaling.
    """
    squares: list[Tensor] = []
    values: list[Tensor] = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.is_sparse:
            rows, merged = merge_rows(gradient)
            parameter.grad = torch.sparse_coo_tensor(
                rows[None], merged, gradient.shape, is_coalesced=True, check_invariants=False
            )
            gradient = merged
        values.append(gradient)
        squares.append(gradient.float().square().sum())
    if not squares:
        return 0.0
    norm = float(torch.stack(squares).sum().sqrt())
    if norm > max_norm:
        for value in values:
            value.mul_(max_norm / norm)
    return norm
