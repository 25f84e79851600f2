"""A trained table whose rows are divided over the ranks of a process group; rows travel to whoever reads them.

One exchange, the same on every rank, for one request of any size:

1. Row numbers → distinct rows, in order; the owner of a row is its number divided by the rows of a block.
2. To every rank: how many rows are asked of it, and whether this rank's request is bad. All ranks then know of every
   error, and raise the same one; none waits for rows that will not come.
3. Places in the owner's block to the owner (uneven all-to-all), the rows back (the same, turned round).

Gradients of the distinct rows go the way of the places, under the same counts: nothing is asked twice. Bytes travel as
bytes, so every type of row does, to the bit.
"""

import contextlib
import weakref
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from engram_lm.errors import ConfigError, EngramError, MismatchError, RowRangeError
from engram_lm.tables.table import Table, Ticket
from engram_lm.tables.tiers.resident import ParameterTable

__all__ = ["ShardedTable", "block_of", "draw_rows", "shard_tables"]

_ROWS_DRAWN_AT_ONCE = 4096
"""Rows of one random generator. A number that every table's first values depend on."""
_INTEGERS = (torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_FINE, _OUTSIDE, _WRONG_TYPE = 0, 1, 2
_WORDS = 4
"""Numbers in the first message: rows asked for, state, the worst row or the type, rows in the table."""


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

    Never on how many ranks there are, the device or which rows are drawn beside it (the width and the type matter, of
    course). Values are drawn on the host, 4096 rows from a generator of their own.

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


class ShardedTable(nn.Module, Table):
    """A trained table of which every rank of a group has its own rows.

    Reading is collective: all ranks of the group call `gather` (and `prefetch`, where they do) as often and in the same
    order, with whatever rows each needs, none included. A rank with nothing to read gathers an empty tensor. The same
    holds for the backward pass. Not for several threads.

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
    ) -> None:
        super().__init__()
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        self._group = group
        self.rank, self.world_size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        if self.rank < 0:
            raise ConfigError("this rank is not in the group that shares the table; make the table on its ranks only")
        self.num_rows, self.width, self.std, self.seed, self.deduplicate = num_rows, width, std, seed, deduplicate
        self.first_row, num_own = block_of(num_rows, self.rank, self.world_size)
        self._mesh: DeviceMesh | None = None
        self._pending: dict[int, list[_Exchange]] = {}
        self._counts = dict.fromkeys(_COUNTED, 0)
        self.weight = nn.Parameter(torch.empty(num_own, width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw this rank's rows anew, from ``seed`` and their numbers."""
        if not self.weight.is_meta:
            draw_rows(self.weight, self.first_row, seed=self.seed, std=self.std)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the numbers that `gather` returns."""
        return self.weight.dtype

    @property
    def reads_ahead(self) -> bool:
        """Whether there is anybody to ask."""
        return self.world_size > 1

    def prefetch(self, rows: Tensor) -> Ticket:
        """Begin the exchange for rows that will be gathered soon; collective. See `Table.prefetch`.

        Counts and places are exchanged at once, which waits until all ranks have come here; the rows themselves travel
        while this rank computes. `gather` takes them when it is given this very tensor, unchanged. They are the rows
        as they are now: ask after the optimizer's step, not before.

        An exchange whose tensor no longer exists is forgotten, since nobody can come for it.
        """
        self._forget_the_dead()
        if not self.reads_ahead or self.weight.is_meta:
            return Ticket(num_rows=rows.numel(), num_bytes=rows.numel() * self.row_bytes)
        exchange = _Exchange(self, rows)
        exchange.expect(rows)
        self._pending.setdefault(id(rows), []).append(exchange)
        return Ticket(num_rows=exchange.num_distinct, num_bytes=exchange.num_distinct * self.row_bytes)

    def gather(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Read rows, differentiably; collective. See `Table.gather`.

        Rows come back on the device of their numbers.

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
            exchange = self._asked_before(rows) or _Exchange(self, rows)
            result = _Gather.apply(self.weight, exchange)
            result = result.view(*rows.shape, self.width).to(rows.device)
        return result if out is None else out.copy_(result)

    forward = gather

    def _gather_own(self, rows: Tensor) -> Tensor:
        self._counts["requested_rows"] += rows.numel()
        try:
            return F.embedding(rows.to(self.weight.device), self.weight, sparse=True).to(rows.device)
        except (IndexError, RuntimeError):
            self._check_rows(rows)
            raise

    def _asked_before(self, rows: Tensor) -> "_Exchange | None":
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

    def discard_prefetched(self) -> None:
        """Drop every exchange that was begun and not gathered."""
        for waiting in self._pending.values():
            for exchange in waiting:
                exchange.drop()
        self._pending.clear()

    def close(self) -> None:
        """Drop what was asked for and not gathered."""
        self.discard_prefetched()

    def distributed(self, local: Tensor) -> Tensor:
        """See all ranks' parts of something that has one entry per row as one tensor; nothing is communicated.

        Args:
            local: ``[own rows, ...]``, anything that lies beside `weight`: itself, a moment of an optimizer, a number
                per row. What already is a DTensor is returned as it is.

        Returns:
            A DTensor ``[num_rows, ...]``, ``Shard(0)`` over the group, of the same memory. Without a process group the
            tensor itself, which is whole.

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
            destination[f"{prefix}weight"] = self.distributed(self.weight.detach())

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

        ``requested_rows`` were asked for, ``distinct_rows`` of them differ, ``remote_rows`` of these belong to others.
        Bytes leave out what a rank sends to itself: ``message_bytes`` are the counts, both ways; ``place_bytes``,
        ``row_bytes`` and ``gradient_bytes`` are what was ``_sent`` and ``_received`` of each.
        """
        own = {"own_rows": self.weight.shape[0], "first_row": self.first_row, "world_size": self.world_size}
        return {**super().stats(), **own, **self._counts}

    def reset_stats(self) -> None:
        """Count anew."""
        self._counts = dict.fromkeys(_COUNTED, 0)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.num_rows}, {self.width}, rank {self.rank} of {self.world_size} has {self.weight.shape[0]} rows"


_COUNTED = (
    "num_exchanges", "requested_rows", "distinct_rows", "remote_rows", "message_bytes",
    "place_bytes_sent", "place_bytes_received", "row_bytes_sent", "row_bytes_received",
    "gradient_bytes_sent", "gradient_bytes_received",
)  # fmt: skip


def _in_order(rows: Tensor, deduplicate: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sort rows and number the distinct ones, without telling the host how many there are.

    Args:
        rows: int64 ``[n]``.
        deduplicate: Whether equal rows get one number.

    Returns:
        Rows in increasing order ``[n]``; the number of each of these ``[n]``; the number of each row given ``[n]``.
    """
    ordered, order = rows.sort()
    is_new = torch.ones_like(ordered)
    if deduplicate:
        is_new[1:] = ordered[1:] != ordered[:-1]
    number = is_new.cumsum(0) - 1
    return ordered, number, torch.empty_like(order).scatter_(0, order, number)


class _Exchange:
    """One request of this rank, what the others ask of it at the same time, and the rows on their way."""

    @torch.no_grad()
    def __init__(self, table: ShardedTable, rows: Tensor) -> None:
        self.table, self._group = table, table._group
        self._work: dist.Work | None = None
        self._asker: weakref.ref[Tensor] | None = None
        self._version: int | None = None
        self.error: EngramError | None = None
        self.num_distinct = 0
        weight, world_size, counts = table.weight, table.world_size, table._counts
        block = max(1, -(-table.num_rows // world_size))
        state, detail = _FINE, 0
        if rows.dtype != torch.int64:
            state, detail = _WRONG_TYPE, _INTEGERS.index(rows.dtype) if rows.dtype in _INTEGERS else -1
            rows = rows.new_empty(0, dtype=torch.int64)
        flat = rows.detach().reshape(-1).to(weight.device)
        counts["num_exchanges"] += 1
        counts["requested_rows"] += flat.numel()
        if weight.device.type == "cpu" and table.deduplicate:
            # Half the time of sorting here; on an accelerator it would wait for the number of rows.
            ordered, self._inverse = torch.unique(flat, return_inverse=True)
            number = torch.arange(len(ordered))
        else:
            ordered, number, self._inverse = _in_order(flat, table.deduplicate)
        owner = (ordered // block).clamp_(0, world_size - 1)
        # A row that stands there several times has one number; whoever comes last writes what the others wrote.
        places = torch.empty_like(ordered).scatter_(0, number, ordered - owner * block)
        owners = torch.full_like(ordered, world_size).scatter_(0, number, owner)
        asked = torch.zeros(world_size + 1, dtype=torch.int64, device=weight.device)
        asked.index_add_(0, owners, torch.ones_like(owners))
        message = torch.empty(world_size, _WORDS, dtype=torch.int64, device=weight.device)
        message[:, 0], message[:, 1], message[:, 2], message[:, 3] = asked[:-1], state, detail, table.num_rows
        if ordered.numel():
            low, high = ordered[0], ordered[-1]
            worst = torch.where(low < 0, low, high)
            message[:, 1] = torch.where((low < 0) | (high >= table.num_rows), _OUTSIDE, _FINE)
            message[:, 2] = worst
        answer = torch.empty_like(message)
        dist.all_to_all_single(answer, message, group=self._group)
        # The one time that the host waits for the device.
        told = torch.cat([message[:, :1], answer], dim=1).tolist()
        self._sent, self._received = [row[0] for row in told], [row[1] for row in told]
        counts["message_bytes"] += 2 * (world_size - 1) * _WORDS * 8
        self.error = self._agreed_error([row[2:] for row in told])
        if self.error is not None:
            return
        self.num_distinct, own = sum(self._sent), self._sent[table.rank]
        counts["distinct_rows"] += self.num_distinct
        counts["remote_rows"] += self.num_distinct - own
        # Half the bytes wherever a block has at most 2 ** 31 rows.
        wire = torch.int32 if block <= 2**31 else torch.int64
        self._places = self._turn(places[: self.num_distinct].to(wire)[:, None], True, "place_bytes")[0][:, 0].long()
        self._rows, self._work = self._turn(weight.detach().index_select(0, self._places), False, "row_bytes", True)

    def _agreed_error(self, told: list[list[int]]) -> EngramError | None:
        """What all ranks raise: each sees the same list of (state, detail, rows in the table) by rank."""
        tables = [num_rows for _, _, num_rows in told]
        if len(set(tables)) > 1:
            return MismatchError(
                f"the ranks read different tables at the same time, of {tables} rows by rank; every rank must read the "
                "same tables in the same order (a rank with nothing to read gathers no rows)"
            )
        for rank, (state, detail, num_rows) in enumerate(told):
            who = f"rank {dist.get_process_group_ranks(self._group)[rank]}"
            if state == _WRONG_TYPE:
                given = _INTEGERS[detail] if detail >= 0 else "no integers"
                return RowRangeError(f"{who}: row numbers must be int64, these are {given}; convert with rows.long()")
            if state == _OUTSIDE:
                return RowRangeError(
                    f"{who}: row {detail} is outside the table, which has rows 0 to {num_rows - 1}; the rows were "
                    "probably computed with another HashSpec than the table was built for"
                )
        return None

    def _turn(
        self, values: Tensor, to_owners: bool, counted: str, asynchronous: bool = False
    ) -> tuple[Tensor, "dist.Work | None"]:
        """Send ``[n, k]``, one entry per row, to the rows' owners or back from them; as bytes, so of any type."""
        sent, received = (self._sent, self._received) if to_owners else (self._received, self._sent)
        given = values.contiguous().view(torch.uint8)
        result = given.new_empty(sum(received), given.shape[1])
        work = dist.all_to_all_single(result, given, received, sent, group=self._group, async_op=asynchronous)
        counts, rank = self.table._counts, self.table.rank
        counts[f"{counted}_sent"] += (sum(sent) - sent[rank]) * given.shape[1]
        counts[f"{counted}_received"] += (sum(received) - received[rank]) * given.shape[1]
        if asynchronous:
            self._kept = given  # until it has been sent
        return result.view(values.dtype), work

    def expect(self, rows: Tensor) -> None:
        """Remember whose rows these are."""
        self._asker, self._version = weakref.ref(rows), _version(rows)

    def is_for(self, rows: Tensor) -> bool:
        """Whether these are the numbers that were asked for."""
        return self._asker is not None and self._asker() is rows and self._version == _version(rows)

    @property
    def is_wanted(self) -> bool:
        """Whether somebody can still come for it."""
        return self._asker is not None and self._asker() is not None

    def drop(self) -> None:
        """Wait for what is on its way, and let go of it. The others send it in any case."""
        with contextlib.suppress(RuntimeError):
            self._wait()
        self._rows = self._places = self._inverse = torch.empty(0)

    def _wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = self._kept = None  # type: ignore[assignment]

    def rows(self) -> Tensor:
        """The rows asked for, ``[asked, width]``.

        Raises:
            EngramError: What the ranks agreed on.
        """
        if self.error is not None:
            raise self.error
        self._wait()
        rows, self._rows = self._rows, self._rows[:0]
        return rows.index_select(0, self._inverse)

    def gradient(self, gradient: Tensor) -> Tensor:
        """Send the gradients of the rows asked for to their owners; collective.

        Args:
            gradient: ``[asked, width]``.

        Returns:
            That of this rank's rows under the mean of all ranks' losses, sparse ``[own rows, width]``, not coalesced.
        """
        # Repeats are added up in float32: in a lower type, every addition of a frequent row would be rounded.
        exact = torch.promote_types(gradient.dtype, torch.float32)
        merged = torch.zeros(self.num_distinct, gradient.shape[1], dtype=exact, device=gradient.device)
        merged.index_add_(0, self._inverse, gradient.to(exact))
        values, _ = self._turn(merged.to(gradient.dtype), True, "gradient_bytes")
        # The one place where gradients of tables are scaled.
        values = values.mul_(1 / self.table.world_size)
        shape = self.table.weight.shape
        return torch.sparse_coo_tensor(self._places[None], values, shape, check_invariants=False)


class _Gather(torch.autograd.Function):
    """Rows forward, gradients back."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.rows()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.gradient(gradient), None


def _version(rows: Tensor) -> int | None:
    """How often the numbers were written over; tensors of inference mode do not say."""
    return None if rows.is_inference() else rows._version


def shard_tables(
    model: Any,
    group: "dist.ProcessGroup | None" = None,
    *,
    seed: int | None = None,
    device: torch.device | str | None = None,
    deduplicate: bool = True,
) -> dict[str, ShardedTable]:
    """Divide the trained tables of an Engram model over ranks, in place: every rank keeps its own rows.

    Call it before the model is wrapped and before its optimizer is made. With a seed the rows are drawn anew and are
    the same under any number of ranks, one included; without one, rows that exist are kept (every rank must then have
    built the same model), and rows on the meta device stay there, to be drawn from the seed 0 by
    ``reset_parameters``. A table on the meta device is never allocated whole.

    Args:
        model: An `EngramForCausalLM` or `EngramModel`.
        group: Ranks that share the tables; all of them where None. A group that is used for nothing else lets rows
            travel beside the gradients of the backbone.
        seed: Of the rows, see `draw_rows`; each table has one of its own under it.
        device: Where the rows shall be; where they are if None.
        deduplicate: See `ShardedTable`.

    Returns:
        Name to table, as in ``model.tables``.

    Raises:
        ConfigError: A table is trained with dense gradients, or is none that is trained.
    """
    base = model.base_model
    for name, table in model.tables.items():
        if not isinstance(table, ParameterTable):
            raise ConfigError(
                f"table {name} is a {type(table).__name__}; only a ParameterTable is divided over ranks: load the "
                "model with its tables on the device"
            )
        if table.gradient != "sparse":
            raise ConfigError(f"table {name} has dense gradients; tables over ranks need table_gradient='sparse'")
    made = {}
    for number, (name, table) in enumerate(model.tables.items()):
        target = torch.device(device) if device is not None else table.weight.device
        # Drawn at once only where a seed says so: what exists is about to be copied.
        options = {"group": group, "std": table.std, "dtype": table.dtype, "deduplicate": deduplicate}
        seeds = (0 if seed is None else seed, number)
        sharded = ShardedTable(table.num_rows, table.width, seed=seeds, device="meta", **options)
        if target.type != "meta":
            sharded = sharded.to_empty(device=target)
            if seed is not None or table.weight.is_meta:
                sharded.reset_parameters()
            else:
                stop = sharded.first_row + sharded.weight.shape[0]
                with torch.no_grad():
                    sharded.weight.copy_(table.weight[sharded.first_row : stop])
        sharded.weight.requires_grad_(table.weight.requires_grad)
        made[name] = sharded.train(table.training)
        base.memory_tables[name] = sharded
        for layer in base.layers:
            if layer.memory is not None and layer.memory.table is table:
                layer.memory.table = sharded
    return made
