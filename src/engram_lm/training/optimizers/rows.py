"""Optimizers of tables: what all of them share, and Adam on the rows a step touched."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw

from engram_lm.errors import ConfigError
from engram_lm.training.optimizers.exact_state import ExactStateOptimizer
from engram_lm.training.optimizers.options import BiasCorrection, check_choice, check_options

# Numbers of rows that are processed at a time. On a CPU copies of this size stay in the cache (which takes 0.8 of the
# time), and the bound on memory holds however many rows a step touches.
_CHUNK_NUMBERS = {"cpu": 2**16}
_OTHER_CHUNK_NUMBERS = 2**26


def merge_rows(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Add up the entries of a sparse gradient that belong to the same row.

    Args:
        gradient: Sparse COO, one sparse dimension, ``[num_rows, width]``; coalesced or not.

    Returns:
        Distinct rows, int64 ascending ``[n]``, and their gradients ``[n, width]``, in the gradient's type. Entries of
        bfloat16 are added in float32. Takes a quarter of the time of ``Tensor.coalesce`` on a CPU.
    """
    rows, values = gradient._indices()[0], gradient._values()
    if gradient.is_coalesced() or not len(rows):
        return rows, values
    dtype = values.dtype
    values = values.float() if dtype.itemsize < 4 else values
    if values.device.type != "cpu":
        distinct, position = torch.unique(rows, return_inverse=True)
        merged = values.new_zeros(len(distinct), *values.shape[1:])
        return distinct, merged.index_add_(0, position, values).to(dtype)
    # A stable sort adds the entries of a row in their order: same input, same bits.
    ordered, order = torch.sort(rows, stable=True)
    begins = torch.ones(len(rows), dtype=torch.bool)
    torch.ne(ordered[1:], ordered[:-1], out=begins[1:])
    first = begins.nonzero()[:, 0]
    return ordered[first], F.embedding_bag(order, values, first, mode="sum").to(dtype)


class Sharing(NamedTuple):
    """Which ranks hold tables together."""

    sharded: bool = False
    """Whether each rank has only its rows of the tables."""
    group: "dist.ProcessGroup | None" = None
    """Those ranks; all where None."""


class RowOptimizer(ExactStateOptimizer):
    """What all optimizers of tables share: rows without a gradient keep weights and state, bit for bit.

    Gradients must be sparse (``ParameterTable(gradient="sparse")``). State is float32 whatever the table's type, and
    rows of bfloat16 move by updates of any size (`write_rows`). The first dimension of state is the table's rows
    (except for the count of steps), so dividing the table by rows also divides the state.

    ``weight_decay`` of a group is decoupled as in AdamW, and lazy: a row is multiplied by ``1 - lr * weight_decay`` in
    the steps that touch it, and only in those. Rows that are read rarely therefore decay rarely.
    """

    def _step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                if not gradient.is_sparse:
                    raise ConfigError(
                        f"{type(self).__name__} updates touched rows only and was given a dense gradient; make the "
                        "table with gradient='sparse', or train it with torch.optim.AdamW"
                    )
                if not self.state[parameter]:
                    self._allocate(parameter, group)
                state = self.state[parameter]
                state["step"] += 1
                self._update(parameter.detach(), *merge_rows(gradient), state, group)

    def _allocate(self, parameter: Tensor, group: dict[str, Any]) -> None:
        # The count of steps is float32 and stays on the host, as torch's.
        state: dict[str, Tensor] = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
        if group.get("bias_correction") == "row":
            state["row_steps"] = zeros_per_row(parameter, torch.int32)
        self.state[parameter].update(state | self._new_state(parameter, group))

    def _new_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Make the state of a table beside its counters, as it is before the first step."""
        raise NotImplementedError

    def _update(self, weight: Tensor, rows: Tensor, values: Tensor, state: dict[str, Any], group: Any) -> None:
        """Update distinct rows ``[n]``, possibly none, by their gradients ``[n, width]``."""
        raise NotImplementedError


def chunks(rows: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Divide rows ``[n]`` and gradients ``[n, width]`` into pieces to process at a time; gradients in float32."""
    numbers = _CHUNK_NUMBERS.get(values.device.type, _OTHER_CHUNK_NUMBERS)
    num_rows = max(1, numbers // max(1, values.shape[1]))
    for first in range(0, len(rows), num_rows):
        yield rows[first : first + num_rows], values[first : first + num_rows].float()


def write_rows(weight: Tensor, rows: Tensor, values: Tensor, state: dict[str, Any]) -> None:
    """Replace distinct rows ``[n]`` of a table by float32 values ``[n, width]``, in the table's type.

    To bfloat16, which has 8 binary digits, they are rounded up or down at random, so that the mean is the value: an
    update far smaller than the distance between two numbers would be lost every time otherwise. Nothing but the
    ``step`` of the state is needed to repeat it.
    """
    if weight.dtype == torch.bfloat16:
        values = _rounded_at_random(values, int(state["step"]))
    weight.index_copy_(0, rows, values.to(weight.dtype))


def _rounded_at_random(values: Tensor, step: int) -> Tensor:
    """Round float32 ``[n, width]`` to numbers of bfloat16, up with a probability of the distance from the lower one.

    The chance is drawn from the step, the column and the number itself: the same on every device and for every division
    of a table over ranks. Numbers that bfloat16 has stay as they are.

    Source: a hash of 32 bits (``lowbias32``, hash-prospector).
    """
    bits = values.view(torch.int32)
    column = torch.arange(values.shape[1], dtype=torch.int64, device=values.device) * 0x9E3779B1
    seeds = (column + step * 0x85EBCA77).bitwise_and_(2**31 - 1).to(torch.int32)
    noise = bits ^ seeds
    noise ^= (noise >> 16) & 0xFFFF
    noise *= 0x7FEB352D
    noise ^= (noise >> 15) & 0x1FFFF
    noise *= -0x7B935975
    noise ^= (noise >> 16) & 0xFFFF
    # The upper half of a float32 is the bfloat16 below it; adding up to the lower half carries as often as it should.
    noise.bitwise_and_(0xFFFF).add_(bits).bitwise_and_(-0x10000)
    return torch.where(values.isfinite(), noise.view(torch.float32), values)


def add_to_rows(
    weight: Tensor,
    rows: Tensor,
    update: Tensor,
    size: float,
    state: dict[str, Any],
    group: dict[str, Any],
    scale: Tensor | None = None,
) -> None:
    """Move distinct rows ``[n]`` of a table: ``w <- w * (1 - lr * weight_decay) - size * scale * update``.

    The update is float32 ``[n, width]``, the scale one factor per row, float32 ``[n, 1]``; see `write_rows`.
    """
    now = weight.index_select(0, rows).float()
    decay = group["lr"] * group["weight_decay"]
    if decay:
        now.mul_(1 - decay)
    now = now.add_(update, alpha=-size) if scale is None else now.addcmul_(update, scale, value=-size)
    write_rows(weight, rows, now, state)


def bias_sizes(state: dict[str, Any], rows: Tensor, group: dict[str, Any]) -> tuple[float, Tensor | None]:
    """Correct the bias of two moments that began at zero: ``sqrt(1 - beta2^t) / (1 - beta1^t)``.

    Returns the learning rate times the correction if that is the same for all rows. Otherwise counts the touches of the
    rows, and returns the learning rate and the correction of each row, float32 ``[n, 1]``.
    """
    beta1, beta2 = group["betas"]
    beta1 = 0.0 if group.get("first_moment") == "none" else beta1
    if group["bias_correction"] == "step":
        step = int(state["step"])
        return group["lr"] * (1 - beta2**step) ** 0.5 / (1 - beta1**step), None
    touches = state["row_steps"].index_select(0, rows).add_(1)
    state["row_steps"].index_copy_(0, rows, touches)
    # In float64, as 1 - beta^t has few digits in float32 when beta is near 1.
    exponent = touches.double().unsqueeze(1)
    first = 1 - beta1**exponent
    second = 1 - beta2**exponent
    return group["lr"], second.sqrt_().div_(first).float()


def zeros_like_table(parameter: Tensor) -> Tensor:
    """Make a moment of a table: float32 ``[num_rows, width]``."""
    return torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)


def zeros_per_row(parameter: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make a number for each row of a table: ``[num_rows]``."""
    return torch.zeros(len(parameter), dtype=dtype, device=parameter.device)


class RowAdam(RowOptimizer):
    """Adam whose step costs what was touched: rows without a gradient keep their weights and moments.

    Its updates equal those of ``torch.optim.SparseAdam``, with the table options of the paper: no weight decay, and a
    learning rate of its own. By default bias correction counts steps of the optimizer, as there, so a row first touched
    late moves by ``lr * (1 - beta1) / sqrt(1 - beta2)`` and not by ``lr``: 0.45 of it with the betas (0.9, 0.95) that
    training uses here. With ``bias_correction="row"`` each row counts its own touches: it is trained as if it were a
    separate parameter that Adam saw in those steps only, and its first move is ``lr``.

    Args:
        params: Tables, or groups of them.
        lr: Learning rate. The paper multiplies the backbone's by 5.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment, before its bias is corrected.
        weight_decay: Decoupled and lazy, see `RowOptimizer`. The paper has none.
        bias_correction: By the optimizer's steps, or by the touches of each row (4 bytes of state per row more).

    State per table: ``step``; ``exp_avg`` and ``exp_avg_sq``, float32 ``[num_rows, width]``; with ``"row"``
    ``row_steps``, int32 ``[num_rows]``.

    Source: paper, Table 5 (Adam, learning rate x5, no weight decay).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        weight_decay: float = 0.0,
        bias_correction: BiasCorrection = "step",
    ) -> None:
        check_options("RowAdam", lr=lr, eps=eps, weight_decay=weight_decay, betas=betas)
        check_choice("bias_correction", bias_correction, BiasCorrection)
        defaults = {"lr": lr, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay, "bias_correction": bias_correction})

    def _new_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"exp_avg": zeros_like_table(parameter), "exp_avg_sq": zeros_like_table(parameter)}

    def _update(self, weight: Tensor, rows: Tensor, values: Tensor, state: dict[str, Any], group: Any) -> None:
        for some, gradient in chunks(rows, values):
            update = self._by_rows if group["bias_correction"] == "row" else self._by_steps
            update(weight, some, gradient, state, group)

    @staticmethod
    def _by_steps(weight: Tensor, rows: Tensor, gradient: Tensor, state: dict[str, Any], group: Any) -> None:
        """Copy the rows and let torch's fused kernel do the arithmetic in one pass."""
        (beta1, beta2), step = group["betas"], int(state["step"])
        now = weight.index_select(0, rows).float()
        mean = state["exp_avg"].index_select(0, rows)
        square = state["exp_avg_sq"].index_select(0, rows)
        fused = weight.device.type in ("cpu", "cuda")
        adamw(
            [now],
            [gradient],
            [mean],
            [square],
            [],
            [torch.full((), step - 1.0, device=weight.device if fused else "cpu")],
            fused=fused,
            foreach=False,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            # As in SparseAdam, eps is added to the uncorrected root, which the kernel divides.
            eps=group["eps"] / (1 - beta2**step) ** 0.5,
            maximize=False,
        )
        state["exp_avg"].index_copy_(0, rows, mean)
        state["exp_avg_sq"].index_copy_(0, rows, square)
        write_rows(weight, rows, now, state)

    @staticmethod
    def _by_rows(weight: Tensor, rows: Tensor, gradient: Tensor, state: dict[str, Any], group: Any) -> None:
        beta1, beta2 = group["betas"]
        mean = state["exp_avg"].index_select(0, rows).lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].index_select(0, rows).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        state["exp_avg"].index_copy_(0, rows, mean)
        state["exp_avg_sq"].index_copy_(0, rows, square)
        size, scale = bias_sizes(state, rows, group)
        add_to_rows(weight, rows, mean.div_(square.sqrt_().add_(group["eps"])), size, state, group, scale)
