"""The table optimizer published with DeepSeek-V4.1: momentum whose rows and columns are balanced."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engram_lm.errors import ConfigError
from engram_lm.training.optimizers.rows import RowOptimizer, check_options, new_step_counters

__all__ = ["SinkhornMomentum"]


class SinkhornMomentum(RowOptimizer):
    """Momentum, balanced by Sinkhorn's iteration so that every row moves by the same amount.

    Per step, with the gradient G of the touched rows:

    1. ``M <- beta M + (1 - beta) G``, then Nesterov's ``X = beta M + (1 - beta) G``;
    2. rows of X whose norm is at most ``threshold`` times the mean norm of rows are set to zero;
    3. X is divided by its row norms and its column norms in turn, ``num_normalizations`` times, beginning and ending
       with rows;
    4. ``W <- W - lr * update_rms * sqrt(width) * X``: the move of each row has a root mean square of
       ``lr * update_rms``.

    The description is of a dense M. Here a step costs what was touched. The momentum of a touched row is exactly the
    dense one: its decay in the steps that did not touch it is made up for. What differs is that rows not touched in
    this step do not move on by what is left of their momentum (densely, a row touched once goes on moving by whole
    steps until ``beta^n`` falls below ``threshold``: 135 steps), and take no part in the mean norm and the column
    norms. Where every step touches every row the two are the same. Rarely read rows move less here for the same ``lr``.

    Args:
        params: Tables, or groups of them.
        lr: Learning rate. DeepSeek-V4.1 multiplies the backbone's by 5.
        momentum: beta.
        update_rms: gamma.
        threshold: tau.
        num_normalizations: K, an odd number.
        eps: The least a norm's square may be.
        weight_decay: Decoupled and lazy, see `RowOptimizer`. Published without.
        sharded: The tables hold this rank's rows of larger ones (`engram_lm.tables.tiers.sharded`). Sums over rows are
            then added over the ranks, ``(num_normalizations + 1) / 2`` times a table of ``width`` numbers, so that an
            update does not depend on the number of ranks. Every rank must step the same tables in the same order.
        group: Those ranks; all where None.

    State per table: ``step``; ``momentum``, float32 ``[num_rows, width]``; ``last_step``, int32 ``[num_rows]``, the
    step that touched the row last.

    Cost: sorting the touched row numbers, reading and writing their rows and momentum, and ``num_normalizations``
    products of a matrix of that size with a vector.
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
        sharded: bool = False,
        group: "dist.ProcessGroup | None" = None,
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
        self._sharded, self._ranks = sharded, group
        defaults = {"lr": lr, "momentum": momentum, "update_rms": update_rms, "threshold": threshold}
        super().__init__(
            params, {**defaults, "num_normalizations": num_normalizations, "eps": eps, "weight_decay": weight_decay}
        )

    def _allocate(self, parameter: Tensor, group: dict[str, Any]) -> None:
        self.state[parameter].update(
            **new_step_counters(parameter, group),
            momentum=torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False),
            last_step=torch.zeros(len(parameter), dtype=torch.int32, device=parameter.device),
        )

    def _update(self, weight: Tensor, rows: Tensor, values: Tensor, state: dict[str, Any], group: Any) -> None:
        if not len(rows) and not self._sharded:
            return
        beta, step, gradient = group["momentum"], int(state["step"]), values.float()
        missed = step - state["last_step"].index_select(0, rows)
        state["last_step"].index_fill_(0, rows, step)
        momentum = state["momentum"].index_select(0, rows)
        momentum.mul_(torch.pow(beta, missed.float()).unsqueeze(1)).add_(gradient, alpha=1 - beta)
        state["momentum"].index_copy_(0, rows, momentum)
        balanced = self._balance(momentum.mul_(beta).add_(gradient, alpha=1 - beta), group)
        now = weight.index_select(0, rows).float()
        if group["weight_decay"]:
            now.mul_(1 - group["lr"] * group["weight_decay"])
        now.sub_(balanced, alpha=group["lr"] * group["update_rms"] * weight.shape[1] ** 0.5)
        weight.index_copy_(0, rows, now.to(weight.dtype))

    def _balance(self, matrix: Tensor, group: dict[str, Any]) -> Tensor:
        """Mask and balance a matrix in place.

        Dividing by norms in turn only ever multiplies rows and columns by factors, so the factors' squares are
        iterated on and the matrix of squares is read, instead of writing the matrix K times.

        Args:
            matrix: float32 ``[n, width]``.
            group: Gives the constants.
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
        if self._sharded and dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums, group=self._ranks)
        return sums
