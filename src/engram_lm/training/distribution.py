"""Several processes train one model: who they are, what each does, and how none is left waiting for another.

PyTorch distributes the backbone (DDP or FSDP2). It does not distribute tables: their rows have owners, see
`engram_lm.tables.tiers.sharded`. Both divide gradients by the number of ranks, once, so what a rank back-propagates is
its part of the mean loss: `loss_weight`.
"""

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import engram_lm.errors
from engram_lm.errors import ConfigError, EngramError
from engram_lm.tables import ParameterTable
from engram_lm.tables.tiers.sharded import ShardedTable


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The processes that train together, seen by one of them.

    It is a context manager: ``with start() as ranks: ...`` leaves the other processes at the end.
    """

    rank: int = 0
    """This process, counted from 0."""
    world_size: int = 1
    """Number of processes."""
    local_rank: int = 0
    """This process among those of its machine, counted from 0."""
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    """Where this process computes."""
    group: "dist.ProcessGroup | None" = dataclasses.field(default=None, repr=False, compare=False)
    """All processes; exchanges tensors of the host and of the device. None in a process that is alone."""

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Add up a tensor over all ranks; collective. The tensor itself does not change."""
        if self.group is None:
            return values
        total = values.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def mean(self, value: Tensor) -> float:
        """The mean over all ranks of a number; collective."""
        return float(self.sum(value.detach().double())) / self.world_size

    def any(self, condition: bool) -> bool:
        """Whether the condition holds on at least one rank; collective."""
        return condition if self.group is None else bool(self.sum(torch.tensor(int(condition))))

    def barrier(self) -> None:
        """Wait until all ranks have reached this call; collective."""
        self.sum(torch.zeros(()))

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stop(self)


def start(device: str | torch.device | None = None, *, timeout_seconds: float = 600.0) -> Ranks:
    """Join the other processes that ``torchrun`` started; without torchrun, be alone.

    Args:
        device: ``"cpu"`` or ``"cuda"``; CUDA where None and there is a GPU for this process. Tensors on a GPU travel by
            NCCL, those of the host by gloo.
        timeout_seconds: How long a rank waits for the others, here and in each exchange, before it fails.

    Raises:
        ConfigError: The environment contradicts itself, there is no such device, or other ranks did not come in time.
    """
    given = os.environ
    if "RANK" not in given and "WORLD_SIZE" not in given:
        return Ranks(device=_device(device, 0))
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not given.get(name)]
    if missing:
        raise ConfigError(f"the environment says RANK or WORLD_SIZE but not {', '.join(missing)}; start with torchrun")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    for name in names:
        if not given.get(name, "0").isdecimal():
            raise ConfigError(f"{name} in the environment must be a whole number from 0, not {given[name]!r}")
    rank, world_size, local_rank, _ = (int(given.get(name, "0")) for name in names)
    if not rank < world_size:
        raise ConfigError(f"RANK is {rank} and WORLD_SIZE {world_size}; ranks go from 0 to WORLD_SIZE - 1")
    if dist.is_initialized():
        raise ConfigError("torch.distributed was started in this process before; stop() it first")
    place = _device(device, local_rank)
    options: dict[str, Any] = {"backend": "gloo"}
    if place.type == "cuda":
        torch.cuda.set_device(place)
        # One group for both kinds of tensors; objects and errors go over the host's.
        options = {"backend": "cpu:gloo,cuda:nccl", "device_id": place}
    try:
        dist.init_process_group(**options, timeout=datetime.timedelta(seconds=timeout_seconds))
    except (RuntimeError, ValueError) as error:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
        where = f"{given['MASTER_ADDR']}:{given['MASTER_PORT']}"
        raise ConfigError(
            f"rank {rank} of {world_size} could not join the others at {where} within {timeout_seconds:g} s "
            f"({str(error).splitlines()[0]}); see that all ranks were started and reach that address"
        ) from error
    return Ranks(rank, world_size, local_rank, place, dist.group.WORLD)


def stop(ranks: Ranks) -> None:
    """Leave the other processes. Does nothing where `start` found none, or when called a second time."""
    if ranks.group is not None and dist.is_initialized():
        dist.destroy_process_group()
        # A group that lives until Python itself ends may abort the process then, with its threads still running.
        object.__setattr__(ranks, "group", None)


def _device(name: str | torch.device | None, local_rank: int) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        name = "cuda" if local_rank < count else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"there is no device {name!r}; use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"processes exchange tensors on cpu or cuda, not on {device.type}")
    if device.type == "cpu":
        return torch.device("cpu")
    index = local_rank if device.index is None else device.index
    if index >= count:
        raise ConfigError(
            f"process {local_rank} of this machine wants GPU {index}, and there are {count}; start as many processes "
            "as GPUs (torchrun --nproc-per-node), or use cpu"
        )
    return torch.device("cuda", index)


@contextlib.contextmanager
def agree(ranks: Ranks, doing: str = "") -> Iterator[None]:
    """Make all ranks leave a block in the same way: if one raises, all raise the same error with the same words.

    Without it, the others would wait for that rank in their next exchange until it times out. Collective: all ranks
    enter equally often and in the same order, and exchange nothing inside, since a rank that raises does not take part.
    Where all goes well, one number per rank is exchanged.

    An `EngramError` keeps its class; any other exception becomes an `EngramError` on the ranks that did not raise it.
    An interrupt is not agreed on: torchrun then ends the other processes. ``doing`` says in the message what the block
    does, such as ``"reading batch 7"``.

    Raises:
        EngramError: A rank raised one. The message names the rank.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        if ranks.world_size == 1:
            raise
        error = raised
    if ranks.world_size == 1:
        return
    failed = torch.tensor([int(error is not None)])
    dist.all_reduce(failed, group=ranks.group)
    if not int(failed):
        return
    told: list[Any] = [None] * ranks.world_size
    mine = None if error is None else (type(error).__name__, str(error) or type(error).__name__)
    dist.all_gather_object(told, mine, group=ranks.group)
    rank, (name, words) = next((rank, one) for rank, one in enumerate(told) if one is not None)
    known = name in engram_lm.errors.__all__
    message = f"rank {rank}{f', {doing}' if doing else ''}: {words if known else f'{name}: {words}'}"
    raise (getattr(engram_lm.errors, name) if known else EngramError)(message) from error


def share(batch_size: int, ranks: Ranks) -> tuple[int, int]:
    """Find this rank's samples of a global batch: ``[start, stop)``, in the order of ranks, sizes differing by 1.

    Raises:
        ConfigError: There are fewer samples than ranks, so one rank would have none.
    """
    if batch_size < ranks.world_size:
        raise ConfigError(
            f"a batch of {batch_size} cannot be divided over {ranks.world_size} ranks; each needs a sample: use a "
            f"batch of at least {ranks.world_size}, or fewer ranks"
        )
    return batch_size * ranks.rank // ranks.world_size, batch_size * (ranks.rank + 1) // ranks.world_size


def loss_weight(num_samples: int, batch_size: int, ranks: Ranks) -> float:
    """Compute what a rank multiplies the mean loss of its samples by before ``backward``.

    The mean over ranks of the products, which is what gradients are of, is then the mean over the global batch of
    ``batch_size`` samples, uneven shares or not. The loss is the mean of ``num_samples`` of this rank, equally long.
    """
    return num_samples * ranks.world_size / batch_size


class LossModule(nn.Module):
    """A model and its loss as one module, whose ``forward`` is what is wrapped.

    DDP and FSDP2 act when the module they wrap is called. A loss that used parts of the model without calling its
    ``forward`` would bypass them. ``loss`` is called with the model and the arguments of `forward` and returns a
    scalar, as `engram_lm.training.loss.language_model_loss` does.
    """

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the loss."""
        return self.loss(self.model, *args, **kwargs)


def wrap_backbone(loss_module: LossModule, kind: Literal["ddp", "fsdp2", "none"], ranks: Ranks) -> nn.Module:
    """Let PyTorch distribute everything but the tables over the ranks; call it after `shard_tables`.

    All ranks begin with the weights and buffers of the first one; tables keep their own.

    With ``"ddp"`` every rank has the whole backbone. With ``"fsdp2"`` each rank has its part of every parameter, which
    is a DTensor from here on, and a block is gathered when it computes. So make the optimizer afterwards, and evaluate
    by calling what is returned, since the model inside it has only parts (call ``unshard()`` first to generate).
    Buffers are whole on every rank and are never broadcast again: the selection bias of experts moves the same way
    everywhere, because `engram_lm.model.balance_experts` adds the counts of all ranks.

    Args:
        loss_module: The model and its loss.
        kind: ``"ddp"``, ``"fsdp2"``, or ``"none"`` for one process.
        ranks: The processes.

    Returns:
        The module to call in place of the loss module; with ``"none"`` and ``"fsdp2"`` it is the same module.

    Raises:
        ConfigError: ``"none"`` with several ranks, another kind without a process group, or tables that are not sharded
            although they must be.
    """
    if kind not in ("ddp", "fsdp2", "none"):
        raise ConfigError(f"the backbone is distributed by 'ddp', 'fsdp2' or 'none', not {kind!r}")
    if kind == "none":
        if ranks.world_size > 1:
            raise ConfigError(f"{ranks.world_size} ranks would train a backbone each; use 'ddp' or 'fsdp2'")
        return loss_module
    if ranks.group is None:
        raise ConfigError(f"{kind!r} needs a process group; start with torchrun, or use 'none'")
    own = {id(weight) for weight in sharded_weights(loss_module)}
    if kind == "fsdp2" and any(
        isinstance(module, ParameterTable) and module.gradient == "sparse" for module in loss_module.modules()
    ):
        raise ConfigError("FSDP2 cannot divide a table with sparse gradients; call shard_tables(model) first")
    tensors = [*loss_module.named_parameters(), *loss_module.named_buffers()]
    for name, value in tensors:
        if value.is_meta:
            raise ConfigError(f"{name} is on the meta device; give the model its weights before it is wrapped")
    if kind == "ddp":
        # There is no other way (pytorch/pytorch#43690); the names are those in the module that is wrapped.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            loss_module, [name for name, value in tensors if id(value) in own]
        )
        return DistributedDataParallel(
            loss_module,
            device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
            process_group=ranks.group,
            forward_sync_buffers=False,
        )
    for _, value in tensors:
        if id(value) not in own:
            dist.broadcast(value.detach(), 0, group=ranks.group)
    mesh = DeviceMesh.from_group(ranks.group, ranks.device.type)
    tables = set(sharded_weights(loss_module))
    model: Any = loss_module.model
    for block in model.base_model.layers:
        fully_shard(block, mesh=mesh, ignored_params=tables)
    fully_shard(loss_module, mesh=mesh, ignored_params=tables)
    return loss_module


def reshard(wrapped: nn.Module) -> None:
    """Free what FSDP2 gathered for a forward pass that no backward pass followed, as in an evaluation."""
    for module in wrapped.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def sharded_weights(model: nn.Module) -> list[nn.Parameter]:
    """List the parameters of which each rank has its own rows: the weights of the `ShardedTable`s."""
    return [module.weight for module in model.modules() if isinstance(module, ShardedTable)]


@contextlib.contextmanager
def without_sync(wrapped: nn.Module) -> Iterator[None]:
    """Keep the backbone's gradients on each rank for now, as for all but the last part of an accumulated batch.

    Put both the forward and the backward pass inside. Gradients of tables go to their owners every time: they are
    sparse, and the ranks that read the rows would otherwise have to keep them. FSDP2's gradients are also exchanged:
    kept back, they would take the memory of a whole model on every rank.
    """
    with wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else contextlib.nullcontext():
        yield
