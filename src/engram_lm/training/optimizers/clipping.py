"""The global norm of all gradients, dense, sparse and distributed."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from engram_lm.training.optimizers.rows import merge_rows


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[nn.Parameter],
    max_norm: float,
    *,
    is_sharded: Callable[[nn.Parameter], bool] = lambda parameter: False,
    group: "dist.ProcessGroup | None" = None,
) -> float:
    """Scale all gradients so that their global norm is at most ``max_norm``; sparse ones count by their merged rows.

    Sparse gradients are left merged (coalesced), as the optimizer needs them. A norm that is not finite scales
    nothing; the step should be skipped. It is the same on every rank, so all ranks skip the same steps.

    Args:
        parameters: All parameters of the model, the same on every rank.
        max_norm: Largest norm; infinity only measures.
        is_sharded: Whether a parameter that is not a DTensor holds this rank's part of a larger one, as the weight of a
            ``ShardedTable`` does. Squares of such gradients and of DTensors are added over the ranks; all others count
            once, because every rank has the same.
        group: The ranks that share the parts; all where None. Every one of them must call this.

    Returns:
        The norm before scaling; 0 where there is no gradient.
    """
    replicated: list[tuple[Tensor, float]] = []
    parts: list[tuple[Tensor, float]] = []
    any_parts = False
    for parameter in parameters:
        divided = isinstance(parameter, DTensor) or is_sharded(parameter)
        any_parts |= divided
        gradient = parameter.grad
        if gradient is None:
            continue
        share = 1.0
        if gradient.is_sparse:
            rows, merged = merge_rows(gradient)
            parameter.grad = torch.sparse_coo_tensor(
                rows[None], merged, gradient.shape, is_coalesced=True, check_invariants=False
            )
            gradient = merged
        elif isinstance(gradient, DTensor):
            mesh = gradient.device_mesh
            # Every copy of a part is added up below, so each counts for its share.
            copies = [mesh.size(axis) for axis, kind in enumerate(gradient.placements) if isinstance(kind, Replicate)]
            share = 1 / math.prod(copies)
            gradient = gradient.to_local()
        (parts if divided else replicated).append((gradient, share))
    gradients = [gradient for gradient, _ in replicated + parts]
    device = gradients[0].device if gradients else None
    total = _squares(replicated, device)
    if any_parts:
        spread = _squares(parts, device)
        if dist.is_available() and dist.is_initialized():
            spread = spread.to(_device_of(group))
            dist.all_reduce(spread, group=group)
        total = total + spread.to(total.device)
    norm = float(total.sqrt())
    if math.isfinite(norm) and norm > max_norm:
        for gradient in gradients:
            gradient.mul_(max_norm / norm)
    return norm


def _squares(gradients: list[tuple[Tensor, float]], device: torch.device | None) -> Tensor:
    """Add up the squares of gradients, each times its share, float64 of no dimension."""
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32).to(device) for gradient, _ in gradients]
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    shares = torch.tensor([share for _, share in gradients], dtype=torch.float64, device=device)
    return torch.stack(norms).double().square().mul_(shares).sum()


def _device_of(group: "dist.ProcessGroup | None") -> torch.device:
    """Find the device on which a group's backend adds numbers, wherever the gradients are (a rank may have none)."""
    backend = dist.get_backend(group)
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in backend else torch.device("cpu")
