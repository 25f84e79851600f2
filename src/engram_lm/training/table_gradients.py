"""Tables in data-parallel training by anybody's loop: their sparse gradients, averaged over the ranks.

DistributedDataParallel expects sparse gradients of ``nn.Embedding`` alone, and NCCL does not add sparse tensors at all.
So tables are kept out of its buckets, and each gradient is averaged as soon as a backward pass has made it: what
travels are the rows that some rank touched. `engram_lm.training.distribution` is for `engram-lm train`, where ranks own
rows.
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

__all__ = ["SharedTables", "average_rows", "share_tables", "sparse_tables"]

_IGNORED = "_ddp_params_and_buffers_to_ignore"


class SharedTables:
    """What `share_tables` has begun, until `remove`.

    Args:
        model: The model whose tables DDP shall leave alone.
        weights: The tables by every name that they have in it; none where there is nothing to share.
        handles: What averages their gradients.
        group: The group that was made for it and ends with it, if any.
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
            # The one way there is (pytorch/pytorch#43690); named as in the module that is wrapped.
            ignored = sorted({*self._others, *weights})
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)

    def remove(self) -> None:
        """Average no more, and hide the tables no longer: DDP then refuses a model that is wrapped anew."""
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
    """Trainable tables of a model whose gradients are sparse, by every name that they have in it."""
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
    """Make a model ready for DistributedDataParallel, which would fail at a table with sparse gradients.

    Call it on every rank, with the module that is going to be wrapped, before it is wrapped (also by
    ``accelerator.prepare``). All ranks then begin with the first one's tables, and after each backward pass every rank
    has the mean of all ranks' gradients, as it has for all other parameters. Tables with dense gradients are DDP's own
    business. Nothing happens in a process that is alone.

    Args:
        model: A model with tables, not wrapped yet.
        group: The ranks that train it together, as a group beside the one that DDP is given (``dist.new_group``), since
            the two do not exchange in the same order on every rank; all ranks, and a new group of them, where None.
        is_due: Asked after each backward pass; False keeps the gradient on this rank for now, as for all but the last
            part of an accumulated batch. The same answer on every rank. Without it accumulation is right too (a mean
            stays what it is when it is averaged again) and exchanges more than it has to.

    Returns:
        What ends it by ``remove()``.

    Raises:
        ConfigError: The model is wrapped already.
    """
    if isinstance(model, DistributedDataParallel | DataParallel):
        raise ConfigError(
            f"{type(model).__name__} has taken the tables in already; call share_tables(model) first and wrap it then"
        )
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return SharedTables(model, {}, [])
    named = sparse_tables(model)
    if not named:
        return SharedTables(model, {}, [])
    # A group of our own. DDP sends a bucket when its last gradient is there, or at once where find_unused_parameters
    # knows of none; so ranks that used different parameters would meet in another order, and wait for ever.
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
        gradient: Sparse COO ``[num_rows, width]``, one sparse dimension; rows differ from rank to rank.
        group: The ranks; all where None.

    Returns:
        Coalesced, of the same type and device: the rows that any rank touched.

    Cost: each rank receives the touched rows of all, padded to the longest list.
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
    theirs = [(all_rows[start : start + n], all_values[start : start + n]) for start, n in _spans(listed, longest)]
    distinct, position = torch.unique(torch.cat([rows for rows, _ in theirs]), return_inverse=True)
    total = torch.zeros(len(distinct), width, dtype=torch.float32, device=place)
    # Rank by rank, and the rows of one rank are distinct: nothing is added in an order that may vary between ranks.
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


def _spans(lengths: list[int], longest: int) -> list[tuple[int, int]]:
    return [(rank * longest, length) for rank, length in enumerate(lengths)]


def _padded(tensor: Tensor, length: int) -> Tensor:
    filled = tensor.new_zeros(length, *tensor.shape[1:])
    filled[: len(tensor)] = tensor
    return filled


def _place(tensor: Tensor, group: "dist.ProcessGroup | None") -> torch.device:
    """Where a group can exchange this tensor: NCCL alone has no way for those of the host."""
    if tensor.device.type == "cpu" and dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return tensor.device


def _broadcast(weight: Tensor, group: "dist.ProcessGroup | None") -> None:
    moved = weight.to(_place(weight, group))
    dist.broadcast(moved, group=group, group_src=0)
    if moved is not weight:
        weight.copy_(moved)
