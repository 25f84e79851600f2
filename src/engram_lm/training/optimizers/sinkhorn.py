"""The table optimizer published with DeepSeek-V4.1: momentum whose rows and columns are balanced."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engram_lm.errors import ConfigError
from engram_lm.training.optimizers.options import check_options
from engram_lm.training.optimizers.rows import (
    RowOptimizer,
    Sharing,
    add_to_rows,
    zeros_like_table,
    zeros_per_row,
)


class SinkhornMomentum(RowOptimizer):
    """Momentum, balanced by Sinkhorn's iteration so that every row moves by the same amount.

    Per step, with the gradient G of the touched rows:

    1. ``M <- beta M + (1 - beta) G``, then Nesterov's ``X = beta M + (1 - beta) G``;
    2. rows of X whose norm is at most ``threshold`` times the mean norm of rows are set to zero;
    3. X is divided by its row norms and its column norms in turn, ``num_normalizations`` times, beginning and ending
       with rows;
    4. ``W <- W - lr * update_rms * sqrt(width) * X``: the move of each row has a root mean square of
       ``lr * update_rms``.

    The published description is of a dense M. Here a step costs what was touched. The momentum of a touched row is
    exactly the dense one: its decay in the steps that did not touch it is made up for. The difference is that rows not
    touched in this step do not move by what is left of their momentum (in the dense form a row touched once keeps
    moving by whole steps until ``beta^n`` falls below ``threshold``, for 135 steps), and do not count in the mean norm
    and the column norms. Where every step touches every row, the two forms are equal.

    Args:
        params: Tables, or groups of them.
        lr: Learning rate. DeepSeek-V4.1 multiplies the backbone's by 5.
        momentum: beta.
        update_rms: gamma.
        threshold: tau.
        num_normalizations: K, an odd number.
        eps: Lower bound of the square of a norm.
        weight_decay: Decoupled and lazy, see `RowOptimizer`. Published without.
        sharing: Where the tables hold this rank's rows of larger ones (`engram_lm.tables.tiers.sharded`), sums over
            rows are added over the ranks, so that an update does not depend on their number. Every rank must step the
            same tables in the same order.

    State per table: ``step``; ``momentum``, float32 ``[num_rows, width]``; ``last_step``, int32 ``[num_rows]``, the
    step that touched the row last.

    Source: DeepSeek-V4.1 technical report, section 2.4.2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        *,
        update_rms: float = 0.18,
        threshold: float = 1e-3,
        num_normalizations: int = 11,
        eps: float = 1e-20,
        weight_decay: float = 0.0,
        sharing: Sharing | None = None,
    ) -> None:
        check_options(
            "SinkhornMomentum",
            lr=lr,
            update_rms=update_rms,
            threshold=threshold,
            eps=eps,
            weight_decay=weight_decay,
            betas=(momentum,),
        )
        if num_normalizations < 1 or num_normalizations % 2 == 0:
            raise ConfigError(
                f"num_normalizations must be odd, to begin and end with rows, and is {num_normalizations}; "
                "published is 11"
            )
        self._sharing = sharing or Sharing()
        defaults = {"lr": lr, "momentum": momentum, "update_rms": update_rms, "threshold": threshold}
        super().__init__(
            params, {**defaults, "num_normalizations": num_normalizations, "eps": eps, "weight_decay": weight_decay}
        )

    def _new_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"momentum": zeros_like_table(parameter), "last_step": zeros_per_row(parameter, torch.int32)}

    def _update(self, weight: Tensor, rows: Tensor, values: Tensor, state: dict[str, Any], group: Any) -> None:
        if not len(rows) and not self._sharing.sharded:
            return
        beta, step, gradient = group["momentum"], int(state["step"]), values.float()
        missed = step - state["last_step"].index_select(0, rows)
        state["last_step"].index_fill_(0, rows, step)
        momentum = state["momentum"].index_select(0, rows)
        momentum.mul_(torch.pow(beta, missed.float()).unsqueeze(1)).add_(gradient, alpha=1 - beta)
        state["momentum"].index_copy_(0, rows, momentum)
        balanced = self._balance(momentum.mul_(beta).add_(gradient, alpha=1 - beta), group)
        size = group["lr"] * group["update_rms"] * weight.shape[1] ** 0.5
        add_to_rows(weight, rows, balanced, size, state, group)

    def _balance(self, matrix: Tensor, group: dict[str, Any]) -> Tensor:
        """Mask and balance a matrix, float32 ``[n, width]``, in place.

        Dividing by norms in turn only multiplies rows and columns by factors. So the squares of the factors are
        iterated and the matrix of squares is read, instead of writing the matrix K times.
        """
        eps = group["eps"]
        norms = torch.linalg.vector_norm(matrix, dim=1)
        total = self._over_ranks(torch.stack([norms.sum(), norms.new_tensor(float(len(norms)))]))
        kept = norms > group["threshold"] * total[0] / total[1].clamp_min(1)
        matrix.mul_(torch.where(kept, norms.reciprocal(), 0.0).unsqueeze(1))
        squares = matrix.square()
        row_factors = kept.float()
        column_factors = None
        for _ in range(group["num_normalizations"] // 2):
            column_factors = self._over_ranks(squares.mT @ row_factors).clamp_min_(eps).reciprocal_()
            row_factors = (squares @ column_factors).clamp_min_(eps).reciprocal_()
        if column_factors is not None:
            matrix.mul_(row_factors.sqrt_().unsqueeze(1)).mul_(column_factors.sqrt_())
        return matrix

    def _over_ranks(self, sums: Tensor) -> Tensor:
        if self._sharing.sharded and dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums, group=self._sharing.group)
        return sums
