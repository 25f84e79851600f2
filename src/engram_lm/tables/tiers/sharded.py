"""A trained table whose rows are divided over the ranks of a process group; rows travel to whoever reads them."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from engram_lm.errors import ConfigError, MismatchError
from engram_lm.tables.occupancy import FirstRows, TrainedTable
from engram_lm.tables.table import Ticket
from engram_lm.tables.tiers.row_exchange import COUNTED, RankShare, RowExchange

_ROWS_DRAWN_AT_ONCE = 4096
"""Rows of one random generator. A number that every table's first values depend on."""


def block_of(num_rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """First row and number of rows of a rank: blocks of ``ceil(num_rows / world_size)``, the last ones cut or empty.

    Source: how ``torch.distributed.tensor.Shard(0)`` divides a tensor.
    """
    block = -(-num_rows // world_size)
    first = min(rank * block, num_rows)
    return first, min(block, num_rows - first)


@torch.no_grad()
def draw_rows(weight: Tensor, first_row: int, *, seed: int | tuple[int, ...], std: float) -> None:
    """Fill rows from a normal distribution, so that a row's values depend on the seed and its number only.

    They depend neither on the number of ranks, nor on the device, nor on which rows are drawn beside it (but on the
    width and the type). Values are drawn on the host, 4096 rows from a generator of their own.

    Args:
        weight: ``[n, width]``, rows ``first_row`` to ``first_row + n - 1`` of a table, written in place.
        first_row: Number of its first row.
        seed: Not negative; several tables of a model have several seeds.
        std: Standard deviation.
    """
    size, seeds = _ROWS_DRAWN_AT_ONCE, (seed,) if isinstance(seed, int) else seed
    last_row = first_row + weight.shape[0]
    for block in range(first_row // size, -(-last_row // size) if len(weight) else 0):
        # The state is 128 bits wide: no two blocks of any table start alike.
        generator = np.random.default_rng((*seeds, block))
        values = torch.from_numpy(generator.standard_normal((size, weight.shape[1]), dtype=np.float32)).mul_(std)
        start, stop = max(first_row, block * size), min(last_row, (block + 1) * size)
        weight[start - first_row : stop - first_row].copy_(values[start - block * size : stop - block * size])


class ShardedTable(TrainedTable):
    """A trained table of which every rank of a group has its own rows.

    Reading is collective: all ranks of the group call `gather` (and `prefetch`, if any does) equally often and in the
    same order, each with the rows that it needs. A rank with nothing to read gathers an empty tensor. The same holds
    for the backward pass. A table is not safe for several threads.

    The gradient of `weight` is that of the mean of the ranks' losses, as ``DistributedDataParallel`` has it for the
    rest: a row's gradients are summed over all ranks and divided once by their number. It is sparse, of this rank's
    rows; a row that several ranks read stands in it once for each of them.

    Without a process group, and in a group of one, it is a plain table of this process.

    Args:
        num_rows: Rows in the table, of all ranks together.
        width: Numbers in a row.
        group: Ranks that share the table; all of them where None.
        std: Standard deviation of the initial rows, see `ParameterTable`.
        seed: Of the initial rows, see `draw_rows`.
        device: Where this rank's rows are; ``"meta"`` allocates nothing. The group must be able to exchange from there.
        dtype: Floating type of the rows.
        deduplicate: Whether a row that is read twice travels once. False is for comparison: nothing else changes.
        first_rows: As for `ParameterTable`.
    """

    def __init__(
        self,
        num_rows: int,
        width: int,
        *,
        group: "dist.ProcessGroup | None" = None,
        std: float = 1.0,
        seed: int | tuple[int, ...] = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        deduplicate: bool = True,
        first_rows: FirstRows | None = None,
    ) -> None:
        super().__init__()
        self.first_rows = first_rows
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        self._group = group
        self.rank, self.world_size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        if self.rank < 0:
            raise ConfigError("this rank is not in the group that shares the table; make the table on its ranks only")
        self.num_rows, self.width, self.std, self.seed, self.deduplicate = num_rows, width, std, seed, deduplicate
        self.first_row, num_own = block_of(num_rows, self.rank, self.world_size)
        self._mesh: DeviceMesh | None = None
        self._pending: dict[int, list[RowExchange]] = {}
        self._counts = dict.fromkeys(COUNTED, 0)
        self.weight = nn.Parameter(torch.empty(num_own, width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw this rank's rows anew, from ``seed`` (or as `first_rows` says) and their numbers."""
        if self.first_rows is not None:
            self._reset_to_first_rows()
        elif not self.weight.is_meta:
            draw_rows(self.weight, self.first_row, seed=self.seed, std=self.std)

    @property
    def reads_ahead(self) -> bool:
        """Whether there is anybody to ask."""
        return self.world_size > 1

    def prefetch(self, rows: Tensor) -> Ticket:
        """Begin the exchange for rows that will be gathered soon; collective. See `Table.prefetch`.

        Counts and places are exchanged at once, which waits until all ranks have come here; the rows themselves travel
        while this rank computes. `gather` takes them when it is given this very tensor, unchanged. They are the rows
        as they are now: ask after the optimizer's step, not before.

        An exchange whose tensor no longer exists is dropped, since nobody can gather it any more.
        """
        self._forget_the_dead()
        if not self.reads_ahead or self.weight.is_meta:
            return Ticket(num_rows=rows.numel(), num_bytes=rows.numel() * self.row_bytes)
        exchange = RowExchange(self._share(), rows)
        exchange.expect(rows)
        self._pending.setdefault(id(rows), []).append(exchange)
        return Ticket(num_rows=exchange.num_distinct, num_bytes=exchange.num_distinct * self.row_bytes)

    def gather(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Read rows, differentiably; collective. See `Table.gather`.

        Rows are returned on the device of their numbers.

        Raises:
            RowRangeError: A row number of any rank is bad. All ranks raise it, with the same words.
            MismatchError: The ranks are not all reading the same table. All of them raise it.
            ConfigError: The table has no rows yet (its device is meta).
        """
        if self.weight.is_meta:
            if not rows.is_meta:
                raise ConfigError("this table has no rows (its device is meta); call to_empty() and reset_parameters()")
            result = torch.empty(*rows.shape, self.width, dtype=self.dtype, device="meta")
        elif self.world_size == 1:
            result = self._gather_own(rows)
        else:
            exchange = self._asked_before(rows) or RowExchange(self._share(), rows)
            result = _Gather.apply(self.weight, exchange)
            result = self._as_read(rows, result.view(*rows.shape, self.width).to(rows.device))
        return result if out is None else out.copy_(result)

    forward = gather

    def _share(self) -> RankShare:
        own = self.rank, self.world_size, self._group, self.deduplicate, self._counts
        return RankShare(self.weight, self.num_rows, *own)

    def _gather_own(self, rows: Tensor) -> Tensor:
        self._counts["requested_rows"] += rows.numel()
        try:
            read = F.embedding(rows.to(self.weight.device), self.weight, sparse=True).to(rows.device)
            return self._as_read(rows, read)
        except (IndexError, RuntimeError):
            self._check_rows(rows)
            raise

    def _asked_before(self, rows: Tensor) -> "RowExchange | None":
        # Every rank finds the same: what is compared is the order of its own calls, not what others sent.
        waiting = self._pending.pop(id(rows), [])
        while waiting:
            exchange = waiting.pop(0)
            if exchange.is_for(rows):
                if waiting:
                    self._pending[id(rows)] = waiting
                return exchange
            exchange.drop()
        return None

    def _forget_the_dead(self) -> None:
        for key, waiting in list(self._pending.items()):
            if not waiting[0].is_wanted:
                for exchange in self._pending.pop(key):
                    exchange.drop()

    def close(self) -> None:
        """Drop every exchange that was begun and not gathered."""
        for waiting in self._pending.values():
            for exchange in waiting:
                exchange.drop()
        self._pending.clear()

    def distributed(self, local: Tensor) -> Tensor:
        """See all ranks' parts of something that has one entry per row as one tensor; nothing is communicated.

        ``local`` is ``[own rows, ...]``, anything that lies beside `weight`: itself, a moment of an optimizer, a number
        per row. Returns a DTensor ``[num_rows, ...]``, ``Shard(0)`` over the group, of the same memory; a DTensor, and
        a tensor without a process group, as it is.

        Raises:
            MismatchError: It has another number of rows than this rank.
        """
        if isinstance(local, DTensor):
            return local
        if local.dim() < 1 or local.shape[0] != self.weight.shape[0]:
            raise MismatchError(
                f"this rank has {self.weight.shape[0]} of {self.num_rows} rows (from row {self.first_row}), the tensor "
                f"is {tuple(local.shape)}; give one with an entry for each of this rank's rows"
            )
        if self._group is None:
            return local
        device = "cuda" if self.weight.is_cuda else "cpu"
        if self._mesh is None or self._mesh.device_type != device:
            self._mesh = DeviceMesh.from_group(self._group, device)
        shape = torch.Size((self.num_rows, *local.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # A slice under the name of the whole would be loaded as something it is not.
        if self.world_size == 1:
            super()._save_to_state_dict(destination, prefix, keep_vars)
        else:
            destination[f"{prefix}weight"] = self.distributed(self.saved_weight())

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Take this rank's rows from the whole table, or from a DTensor divided as this table is."""
        name = f"{prefix}weight"
        given = state_dict.get(name)
        if given is not None and self.world_size > 1:
            whole = (self.num_rows, self.width)
            if tuple(given.shape) != whole:
                problems = args[-1]
                problems.append(f"{name}: expected the whole table {whole} or a DTensor of it, not {given.shape}")
                return
            stop = self.first_row + self.weight.shape[0]
            own = given.to_local() if isinstance(given, DTensor) else given[self.first_row : stop]
            state_dict = {name: own}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def stats(self) -> dict[str, Any]:
        """See `Table.stats`; adds what this rank asked for and what went over the wire, since `reset_stats`.

        ``requested_rows`` were asked for; ``distinct_rows`` of them differ, and ``remote_rows`` of those are on other
        ranks. Bytes leave out what a rank sends to itself: ``message_bytes`` are the counts, in both directions;
        ``place_bytes``, ``row_bytes`` and ``gradient_bytes`` are what was ``_sent`` and ``_received`` of each.
        """
        own = {"own_rows": self.weight.shape[0], "first_row": self.first_row, "world_size": self.world_size}
        return {**super().stats(), **own, **self._counts}

    def reset_stats(self) -> None:
        """Start counting from zero."""
        self._counts.update(dict.fromkeys(COUNTED, 0))

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.num_rows}, {self.width}, rank {self.rank} of {self.world_size} has {self.weight.shape[0]} rows"


class _Gather(torch.autograd.Function):
    """Rows forward, gradients back."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, exchange: RowExchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.rows()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.gradient(gradient), None
