"""Muon: momentum made orthogonal, for matrices and stacks of them."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from engram_lm.errors import ConfigError
from engram_lm.training.optimizers.exact_state import ExactStateOptimizer
from engram_lm.training.optimizers.options import check_options

# Numbers that are made orthogonal at a time: enough to fill a device, and a bound on the memory of a step.
_CHUNK_NUMBERS = 2**25
# On a CPU a batch should stay in the caches, which is up to a third faster than one large batch.
_CACHED_NUMBERS = 2**19

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration, as published by Keller Jordan and used by ``torch.optim.Muon``."""


def product_dtype(device: torch.device) -> torch.dtype:
    """Choose bfloat16 where the device multiplies it in hardware."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type != "cpu":
        return torch.float32
    capability = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if capability.get("avx512_bf16") or capability.get("amx_bf16") else torch.float32


def orthogonalize(
    matrices: Tensor,
    *,
    num_steps: int = 5,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = 1e-7,
) -> Tensor:
    """Bring the singular values of matrices ``[n, rows, columns]`` near 1 by Newton-Schulz iteration, in their type.

    After five steps they lie between about 0.7 and 1.2, which trains as well as 1 does. A step turns X into
    ``a X + (b A + c A A) X`` with ``A = X X^T``; ``eps`` is the lower bound of the norm that a matrix is divided by.

    Source: https://kellerjordan.github.io/posts/muon/; the order of operations is that of ``torch.optim.Muon``.
    """
    a, b, c = coefficients
    tall = matrices.shape[-2] > matrices.shape[-1]
    X = matrices.mT if tall else matrices
    X = X / torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True).clamp_min(eps)
    for _ in range(num_steps):
        gram = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


class _Piece(NamedTuple):
    """Whole matrices of one parameter, for one batch."""

    parameter: Tensor
    momentum: Tensor
    part: slice
    """Slice of the first dimension of the local 3-D tensor."""
    num_matrices: int
    """Number of matrices in it."""
    gathered: bool
    """Whether no rank has a whole matrix, so that they are gathered first."""


class Muon(ExactStateOptimizer):
    """Momentum made orthogonal, for matrices ``[out, in]`` and stacks of them ``[n, out, in]``.

    Each slice of a stack is a separate matrix; the experts of one layer are such a stack. For each matrix:

    1. ``M <- mu M + (1 - mu) G``, then Nesterov's ``X = mu M + (1 - mu) G``;
    2. ``O = orthogonalize(X)``, whose root mean square is ``1 / sqrt(max(out, in))``;
    3. ``W <- W (1 - lr * weight_decay) - lr * update_rms * sqrt(max(out, in)) * O``.

    So the root mean square of an update is about ``lr * update_rms`` (for matrices of full rank), close to AdamW's with
    the same ``lr``, and one learning rate serves both. It equals ``torch.optim.Muon`` with
    ``adjust_lr_fn="match_rms_adamw"`` where ``update_rms`` is 0.2. Beyond that it supports stacks and distributed
    tensors, processes matrices of the same shape together, and keeps momentum in float32 whatever the weights' type.

    Distributed tensors (FSDP2): a stack divided by its first dimension is updated in place. Any other is gathered in
    the type of the products, and each rank applies its part of the update. Matrices that several ranks have whole
    (these, and with ``copies`` all those of a DDP model) are divided among the ranks: each orthogonalizes its share of
    the matrices of a shape and sends it to the others by another all-gather. Every rank must have gradients for the
    same parameters.

    Args:
        params: Matrices and stacks, or groups of them; named or not.
        lr: Learning rate.
        momentum: mu.
        weight_decay: Decoupled.
        update_rms: Root mean square of an update relative to ``lr``: 0.18 in DeepSeek-V4.1, 0.2 with Moonshot.
        num_steps: Newton-Schulz iterations.
        eps: Lower bound of the norm that a matrix is divided by before them.
        dtype: Type of the products; where None, bfloat16 if the device multiplies it in hardware, else float32.
        copies: Ranks that hold the same parameters and gradients, as under DDP; None where each works alone.

    State per parameter: ``momentum_buffer``, float32 of the parameter's shape. A step needs memory for 32 million
    numbers (or one gathered parameter) a few times over.

    Source: https://kellerjordan.github.io/posts/muon/; "Muon is scalable for LLM training", arXiv 2502.16982, section
    2.2 (scale, weight decay); DeepSeek-V4.1 technical report (0.95, 0.1, 0.18).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        *,
        weight_decay: float = 0.1,
        update_rms: float = 0.18,
        num_steps: int = 5,
        eps: float = 1e-7,
        dtype: torch.dtype | None = None,
        copies: "dist.ProcessGroup | None" = None,
    ) -> None:
        self._copies = copies
        check_options("Muon", lr=lr, weight_decay=weight_decay, update_rms=update_rms, eps=eps, betas=(momentum,))
        if num_steps < 1:
            raise ConfigError(f"Muon needs num_steps >= 1, not {num_steps}")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "update_rms": update_rms}
        super().__init__(params, {**defaults, "num_steps": num_steps, "eps": eps, "dtype": dtype})
        for group in self.param_groups:
            for number, parameter in enumerate(group["params"]):
                if parameter.dim() not in (2, 3):
                    name = group["param_names"][number] if "param_names" in group else "one parameter"
                    raise ConfigError(
                        f"Muon trains matrices [out, in] and stacks [n, out, in]; {name} has the shape "
                        f"{tuple(parameter.shape)}: give it to torch.optim.AdamW"
                    )

    def _allocate(self, parameter: Tensor, group: dict[str, Any]) -> None:
        self.state[parameter]["momentum_buffer"] = torch.zeros_like(
            parameter, dtype=torch.float32, requires_grad=False, memory_format=torch.contiguous_format
        )

    def _step(self) -> None:
        for group in self.param_groups:
            shapes: dict[Any, list[_Piece]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise ConfigError(
                        "Muon was given a sparse gradient; tables are trained by the optimizers of rows, such as "
                        "RowAdam, embeddings with sparse=False by torch.optim.AdamW"
                    )
                if not self.state[parameter]:
                    self._allocate(parameter, group)
                pieces = self._pieces(parameter)
                # Matrices whose work is shared among ranks are kept apart from those that each rank has alone.
                alike = all(piece.gathered for piece in pieces) or not isinstance(parameter, DTensor)
                key = (tuple(parameter.shape[-2:]), parameter.device, alike)
                shapes.setdefault(key, []).extend(pieces)
            for pieces in shapes.values():
                for batch in _batches(pieces):
                    self._update(batch, group)

    def _pieces(self, parameter: Tensor) -> list[_Piece]:
        """Divide this rank's matrices into pieces of bounded size."""
        momentum = self.state[parameter]["momentum_buffer"]
        matrix_numbers = parameter.shape[-2] * parameter.shape[-1]
        gathered = isinstance(parameter, DTensor) and not (parameter.dim() == 3 and _whole_matrices(parameter))
        if gathered:
            # All ranks must gather the same, so it is not divided.
            count = parameter.shape[0] if parameter.dim() == 3 else 1
            return [_Piece(parameter, momentum, slice(None), count, True)]
        local = _stack(_local(parameter))
        most = max(1, _CHUNK_NUMBERS // max(1, matrix_numbers))
        return [
            _Piece(parameter, momentum, slice(first, first + most), min(most, len(local) - first), False)
            for first in range(0, len(local), most)
        ]

    def _update(self, pieces: list[_Piece], group: dict[str, Any]) -> None:
        first = pieces[0].parameter
        out, columns = first.shape[-2:]
        device = _local(first).device
        dtype = group["dtype"] or product_dtype(device)
        matrices = torch.empty(sum(piece.num_matrices for piece in pieces), out, columns, dtype=dtype, device=device)
        counts = [piece.num_matrices for piece in pieces]
        for piece, target in zip(pieces, matrices.split(counts), strict=True):
            gradient = _stack(_local(piece.parameter.grad))[piece.part]
            momentum = _stack(_local(piece.momentum))[piece.part]
            gradient = gradient.to(momentum.dtype)
            momentum.lerp_(gradient, 1 - group["momentum"])
            update = gradient.lerp(momentum, group["momentum"])
            target.copy_(_gather(update.to(dtype), piece.parameter) if piece.gathered else update)
        options = {"num_steps": group["num_steps"], "eps": group["eps"]}
        among = self._among(first) if pieces[0].gathered or not isinstance(first, DTensor) else None
        matrices = _in_pieces(matrices, options) if among is None else _by_shares(matrices, among, options)
        size = group["lr"] * group["update_rms"] * max(out, columns) ** 0.5
        for piece, update in zip(pieces, matrices.split(counts), strict=True):
            weight = _stack(_local(piece.parameter.detach()))[piece.part]
            if piece.gathered:
                update = _stack(_own_part(update.reshape(piece.parameter.shape), piece.parameter))
            weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-size)

    def _among(self, parameter: Tensor) -> "dist.ProcessGroup | None":
        """Find the ranks that now have a parameter's whole matrices; None where this one works alone."""
        if not isinstance(parameter, DTensor):
            group = self._copies
        elif parameter.device_mesh.ndim == 1:
            group = parameter.device_mesh.get_group()
        else:
            return None
        return group if group is not None and dist.get_world_size(group) > 1 else None


def _in_pieces(matrices: Tensor, options: dict[str, Any]) -> Tensor:
    """Orthogonalize in place, as many matrices at a time as suits the device."""
    most = max(1, _CACHED_NUMBERS // matrices[0].numel()) if matrices.device.type == "cpu" else len(matrices)
    for piece in matrices.split(most):
        piece.copy_(orthogonalize(piece, **options))
    return matrices


def _by_shares(matrices: Tensor, group: "dist.ProcessGroup", options: dict[str, Any]) -> Tensor:
    """Orthogonalize this rank's share of matrices that all ranks have, and receive the other shares."""
    count, world_size = len(matrices), dist.get_world_size(group)
    share = -(-count // world_size)
    first = min(dist.get_rank(group) * share, count)
    # All ranks send equally much; the last ones may send padding.
    own = matrices.new_zeros(share, *matrices.shape[1:])
    mine = matrices[first : first + share]
    if len(mine):
        own[: len(mine)] = _in_pieces(mine, options)
    found = matrices.new_empty(world_size * share, *matrices.shape[1:])
    dist.all_gather_single(found, own, group=group)
    return found[:count]


def _batches(pieces: list[_Piece]) -> Iterable[list[_Piece]]:
    batch: list[_Piece] = []
    numbers = 0
    for piece in pieces:
        own = piece.num_matrices * piece.parameter.shape[-2] * piece.parameter.shape[-1]
        if batch and numbers + own > _CHUNK_NUMBERS:
            yield batch
            batch, numbers = [], 0
        batch.append(piece)
        numbers += own
    if batch:
        yield batch


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _stack(tensor: Tensor) -> Tensor:
    """View as ``[n, out, in]``."""
    return tensor.unsqueeze(0) if tensor.dim() == 2 else tensor


def _whole_matrices(parameter: DTensor) -> bool:
    """Whether every matrix of a stack is whole on its rank."""
    return all(
        isinstance(placement, Replicate) or (isinstance(placement, Shard) and placement.dim == 0)
        for placement in parameter.placements
    )


def _gather(local: Tensor, parameter: Any) -> Tensor:
    """Gather the parts of all ranks: ``[n, out, in]``."""
    local = local.view(_local(parameter).shape)
    whole = DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return _stack(whole.full_tensor())


def _own_part(whole: Tensor, parameter: Any) -> Tensor:
    """Take this rank's part of a tensor that all ranks have, without communication."""
    mesh = parameter.device_mesh
    replicated = DTensor.from_local(whole.contiguous(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=parameter.placements).to_local()
