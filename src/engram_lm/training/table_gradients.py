"""Averages the sparse gradients of tables over the ranks, for data-parallel training in any loop.

DistributedDataParallel supports sparse gradients of ``nn.Embedding`` only, and NCCL does not add sparse tensors at all.
So tables are kept out of its buckets, and each gradient is averaged as soon as a backward pass has made it. Only the
rows that a rank touched travel. `engram-lm train`, where ranks own rows, uses `engram_lm.training.distribution`.
"""

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from engram_lm.errors import ConfigError
from engram_lm.tables import ParameterTable
from engram_lm.training.optimizers.rows import merge_rows

_IGNORED = "_ddp_params_and_buffers_to_ignore"


class SharedTables:
    """Tables that `share_tables` shares, until `remove`.

    ``weights`` are the tables under every name that they have in the model. ``handles`` are the hooks that average
    their gradients, and ``group`` is a process group that was made for them and ends with them.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: dict[str, nn.Parameter],
        handles: list[RemovableHandle],
        group: "dist.ProcessGroup | None" = None,
    ) -> None:
        self._model, self._weights, self._handles, self._group = model, weights, handles, group
        self._others: list[str] = list(getattr(model, _IGNORED, ()))
        if weights:
            # There is no other way (pytorch/pytorch#43690); the names are those in the module that is wrapped.
            ignored = sorted({*self._others, *weights})
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)

    def remove(self) -> None:
        """Stop averaging and hiding the tables; DDP then refuses the model if it is wrapped again."""
        for handle in self._handles:
            handle.remove()
        if self._weights:
            setattr(self._model, _IGNORED, self._others)
            for weight in self._weights.values():
                weight.__dict__.pop("_ddp_ignored", None)
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._handles, self._weights, self._group = [], {}, None


def sparse_tables(model: nn.Module) -> dict[str, nn.Parameter]:
    """Find the trainable tables of a model whose gradients are sparse, under every name that they have in it."""
    return {
        f"{name}.weight" if name else "weight": module.weight
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, ParameterTable) and module.gradient == "sparse" and module.weight.requires_grad
    }


def share_tables(
    model: nn.Module,
    *,
    group: "dist.ProcessGroup | None" = None,
    is_due: Callable[[], bool] = lambda: True,
) -> SharedTables:
    """Prepare a model for DistributedDataParallel, which would fail on a table with sparse gradients.

    Call it on every rank, with the module that is going to be wrapped, before it is wrapped (also by
    ``accelerator.prepare``). All ranks then begin with the first one's tables, and after each backward pass every rank
    has the mean of all ranks' gradients, as for all other parameters. DDP itself handles tables with dense gradients.
    Nothing happens in a process that is alone.

    Args:
        model: A model with tables, not wrapped yet.
        group: The ranks that train it together, as a group other than DDP's own (``dist.new_group``), since the two do
            not communicate in the same order on every rank; a new group of all ranks where None.
        is_due: Called after each backward pass; False keeps the gradient on this rank for now, as for all but the last
            part of an accumulated batch. It returns the same on every rank. Without it accumulation is also correct (a
            mean does not change when it is averaged again) but communicates more than necessary.

    Returns:
        The shared tables, whose ``remove()`` ends the sharing.

    Raises:
        ConfigError: The model has been wrapped already.
    """
    if isinstance(model, DistributedDataParallel | DataParallel):
        raise ConfigError(
            f"{type(model).__name__} has taken in the tables already; call share_tables(model) before wrapping it"
        )
    named = sparse_tables(model)
    if not named or not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return SharedTables(model, {}, [])
    # A separate group. DDP sends a bucket when its last gradient is there, or at once if find_unused_parameters sees
    # that there will be none. Ranks that used different parameters would communicate in different orders and deadlock.
    own = dist.new_group() if group is None else None
    group = own or group
    handles = []
    for weight in {id(weight): weight for weight in named.values()}.values():
        _broadcast(weight.detach(), group)
        handles.append(weight.register_post_accumulate_grad_hook(functools.partial(_average, group, is_due)))
    return SharedTables(model, named, handles, own)


def average_rows(gradient: Tensor, group: "dist.ProcessGroup | None" = None) -> Tensor:
    """Average a sparse gradient over the ranks; collective. Every rank gets the same bits.

    Args:
        gradient: Sparse COO ``[num_rows, width]``, one sparse dimension; each rank may have other rows.
        group: The ranks; all where None.

    Returns:
        The rows that any rank touched, coalesced, of the same type and device.

    Cost: each rank receives the touched rows of all ranks, padded to the longest list.
    """
    world_size = dist.get_world_size(group)
    rows, values = merge_rows(gradient)
    place = _place(values, group)
    counts = torch.empty(world_size, dtype=torch.int64, device=place)
    dist.all_gather_single(counts, torch.tensor([len(rows)], device=place), group=group)
    listed: list[int] = counts.tolist()
    longest = max(listed)
    width = values.shape[1]
    all_rows = torch.empty(world_size * longest, dtype=torch.int64, device=place)
    all_values = torch.empty(world_size * longest, width, dtype=values.dtype, device=place)
    dist.all_gather_single(all_rows, _padded(rows.to(place), longest), group=group)
    dist.all_gather_single(all_values, _padded(values.to(place), longest), group=group)
    spans = [slice(rank * longest, rank * longest + count) for rank, count in enumerate(listed)]
    theirs = [(all_rows[span], all_values[span]) for span in spans]
    distinct, position = torch.unique(torch.cat([rows for rows, _ in theirs]), return_inverse=True)
    total = torch.zeros(len(distinct), width, dtype=torch.float32, device=place)
    # Rank by rank, and the rows of one rank are distinct, so the order of additions is the same on all ranks.
    for where, (_, part) in zip(position.split(listed), theirs, strict=True):
        total.index_add_(0, where, part.float())
    mean = (total / world_size).to(gradient.dtype)
    return torch.sparse_coo_tensor(
        distinct[None].to(gradient.device),
        mean.to(gradient.device),
        gradient.shape,
        is_coalesced=True,
        check_invariants=False,
    )


def _average(group: "dist.ProcessGroup | None", is_due: Callable[[], bool], weight: Tensor) -> None:
    if is_due() and weight.grad is not None:
        weight.grad = average_rows(weight.grad, group)


def _padded(tensor: Tensor, length: int) -> Tensor:
    filled = tensor.new_zeros(length, *tensor.shape[1:])
    filled[: len(tensor)] = tensor
    return filled


def _place(tensor: Tensor, group: "dist.ProcessGroup | None") -> torch.device:
    """Find where a group can exchange this tensor: NCCL cannot exchange tensors of the host."""
    if tensor.device.type == "cpu" and dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return tensor.device


def _broadcast(weight: Tensor, group: "dist.ProcessGroup | None") -> None:
    moved = weight.to(_place(weight, group))
    dist.broadcast(moved, group=group, group_src=0)
    if moved is not weight:
        weight.copy_(moved)
