"""Optimizers of tables with one second moment per row: a state of half the table, or of next to nothing."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from engram_lm.training.optimizers.options import (
    BiasCorrection,
    FirstMoment,
    check_choice,
    check_options,
)
from engram_lm.training.optimizers.rows import (
    RowOptimizer,
    add_to_rows,
    bias_sizes,
    chunks,
    zeros_like_table,
    zeros_per_row,
)


class RowWiseAdam(RowOptimizer):
    """Adam with one second moment per row, the mean over the row of what Adam would keep for each number.

    ``v <- beta2 v + (1 - beta2) mean(g^2)``, one number per row; ``w <- w - lr m / (sqrt(v) + eps)`` with the bias of
    both moments corrected as in `RowAdam`, whose other options it has. ``first_moment`` is ``"full"``, as large as the
    table, or ``"none"``: the gradient itself, as if ``beta1`` were 0.

    State per table: ``step``; ``exp_avg_sq``, float32 ``[num_rows]``; with ``"full"`` ``exp_avg``, float32
    ``[num_rows, width]``; with ``"row"`` ``row_steps``, int32 ``[num_rows]``.

    Source: FBGEMM's ``PARTIAL_ROWWISE_ADAM`` (first moment full).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        weight_decay: float = 0.0,
        first_moment: FirstMoment = "full",
        bias_correction: BiasCorrection = "step",
    ) -> None:
        check_options("RowWiseAdam", lr=lr, eps=eps, weight_decay=weight_decay, betas=betas)
        check_choice("bias_correction", bias_correction, BiasCorrection)
        check_choice("first_moment", first_moment, FirstMoment)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "first_moment": first_moment, "bias_correction": bias_correction})

    def _new_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        first = {"exp_avg": zeros_like_table(parameter)} if group["first_moment"] == "full" else {}
        return {**first, "exp_avg_sq": zeros_per_row(parameter)}

    def _update(self, weight: Tensor, rows: Tensor, values: Tensor, state: dict[str, Any], group: Any) -> None:
        beta1, beta2 = group["betas"]
        for some, gradient in chunks(rows, values):
            square = state["exp_avg_sq"].index_select(0, some)
            square.mul_(beta2).add_(_mean_square(gradient), alpha=1 - beta2)
            state["exp_avg_sq"].index_copy_(0, some, square)
            mean = gradient
            if group["first_moment"] == "full":
                mean = state["exp_avg"].index_select(0, some).lerp_(gradient, 1 - beta1)
                state["exp_avg"].index_copy_(0, some, mean)
            size, correction = bias_sizes(state, some, group)
            scale = square.sqrt_().add_(group["eps"]).reciprocal_().unsqueeze(1)
            if correction is not None:
                scale *= correction
            add_to_rows(weight, some, mean, size, state, group, scale)


class RowWiseAdagrad(RowOptimizer):
    """Adagrad with one sum of squares per row: 4 bytes of state per row.

    ``s <- s + mean(g^2)``; ``w <- w - lr g / (sqrt(s) + eps)``. The first move of a row has a root mean square of
    ``lr``, its n-th of about ``lr / sqrt(n)``. Weight decay is that of `RowOptimizer`.

    State per table: ``step``; ``sum``, float32 ``[num_rows]``.

    Source: FBGEMM's ``EXACT_ROWWISE_ADAGRAD``.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-2, eps: float = 1e-10, *, weight_decay: float = 0.0
    ) -> None:
        check_options("RowWiseAdagrad", lr=lr, eps=eps, weight_decay=weight_decay)
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    def _new_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"sum": zeros_per_row(parameter)}

    def _update(self, weight: Tensor, rows: Tensor, values: Tensor, state: dict[str, Any], group: Any) -> None:
        for some, gradient in chunks(rows, values):
            total = state["sum"].index_select(0, some).add_(_mean_square(gradient))
            state["sum"].index_copy_(0, some, total)
            scale = total.sqrt_().add_(group["eps"]).reciprocal_().unsqueeze(1)
            add_to_rows(weight, some, gradient, group["lr"], state, group, scale)


def _mean_square(gradient: Tensor) -> Tensor:
    """Mean square of each row, ``[n]``."""
    return torch.linalg.vecdot(gradient, gradient).div_(max(1, gradient.shape[1]))
