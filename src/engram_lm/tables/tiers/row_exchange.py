"""One exchange of rows between the ranks that share a table, and the way back for their gradients.

It is the same on every rank, for one request of any size:

1. Row numbers → distinct rows, in order; the owner of a row is its number divided by the rows of a block.
2. To every rank: how many rows are asked of it, and whether this rank's request is bad. All ranks then know of every
   error and raise the same one; none waits for rows that will not come.
3. Places in the owner's block to the owner (uneven all-to-all), and the rows back (the same in reverse).

Gradients of the distinct rows go the way of the places, under the same counts: nothing is asked twice. Rows travel as
bytes, so rows of every type arrive to the bit.
"""

import contextlib
import dataclasses
import weakref

import torch
import torch.distributed as dist
from torch import Tensor

from engram_lm.errors import EngramError, MismatchError, RowRangeError
from engram_lm.tables.table import version_of

_INTEGERS = (torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_FINE, _OUTSIDE, _WRONG_TYPE = 0, 1, 2
_WORDS = 4
"""Numbers in the first message: rows asked for, state, the worst row or the type, rows in the table."""

COUNTED = (
    "num_exchanges", "requested_rows", "distinct_rows", "remote_rows", "message_bytes",
    "place_bytes_sent", "place_bytes_received", "row_bytes_sent", "row_bytes_received",
    "gradient_bytes_sent", "gradient_bytes_received",
)  # fmt: skip
"""What exchanges add up, see ``ShardedTable.stats``."""


@dataclasses.dataclass(frozen=True, eq=False)
class RankShare:
    """What an exchange needs to know of a table and of this rank's part in it."""

    weight: Tensor
    """This rank's rows, ``[own rows, width]``."""
    num_rows: int
    """Rows of all ranks together."""
    rank: int
    """This rank's number in the group."""
    world_size: int
    """Ranks in the group."""
    group: "dist.ProcessGroup | None"
    """The ranks that share the table."""
    deduplicate: bool
    """Whether a row that is read twice travels once."""
    counts: dict[str, int]
    """Where each exchange adds what it did, one number for each name in `COUNTED`."""


def in_order(rows: Tensor, deduplicate: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sort rows and number the distinct ones, without telling the host how many there are.

    Returns rows in increasing order ``[n]``; the number of each of these ``[n]``; the number of each row given ``[n]``.
    Equal rows get one number only where ``deduplicate``.
    """
    ordered, order = rows.sort()
    is_new = torch.ones_like(ordered)
    if deduplicate:
        is_new[1:] = ordered[1:] != ordered[:-1]
    number = is_new.cumsum(0) - 1
    return ordered, number, torch.empty_like(order).scatter_(0, order, number)


class RowExchange:
    """One request of this rank, what other ranks ask of it at the same time, and the rows that are being sent."""

    @torch.no_grad()
    def __init__(self, share: RankShare, rows: Tensor) -> None:
        self.share = share
        self._work: dist.Work | None = None
        self._asker: weakref.ref[Tensor] | None = None
        self._version: int | None = None
        self.error: EngramError | None = None
        self.num_distinct = 0
        weight, world_size, counts = share.weight, share.world_size, share.counts
        block = max(1, -(-share.num_rows // world_size))
        state, detail = _FINE, 0
        if rows.dtype != torch.int64:
            state, detail = _WRONG_TYPE, _INTEGERS.index(rows.dtype) if rows.dtype in _INTEGERS else -1
            rows = rows.new_empty(0, dtype=torch.int64)
        flat = rows.detach().reshape(-1).to(weight.device)
        counts["num_exchanges"] += 1
        counts["requested_rows"] += flat.numel()
        if weight.device.type == "cpu" and share.deduplicate:
            # Half the time of sorting here; on an accelerator it would wait for the number of rows.
            ordered, self._inverse = torch.unique(flat, return_inverse=True)
            number = torch.arange(len(ordered))
        else:
            ordered, number, self._inverse = in_order(flat, share.deduplicate)
        owner = (ordered // block).clamp_(0, world_size - 1)
        # Repeats of a row have one number, so all of them write the same place with the same value.
        places = torch.empty_like(ordered).scatter_(0, number, ordered - owner * block)
        owners = torch.full_like(ordered, world_size).scatter_(0, number, owner)
        asked = torch.zeros(world_size + 1, dtype=torch.int64, device=weight.device)
        asked.index_add_(0, owners, torch.ones_like(owners))
        message = torch.empty(world_size, _WORDS, dtype=torch.int64, device=weight.device)
        message[:, 0], message[:, 1], message[:, 2], message[:, 3] = asked[:-1], state, detail, share.num_rows
        if ordered.numel():
            low, high = ordered[0], ordered[-1]
            worst = torch.where(low < 0, low, high)
            message[:, 1] = torch.where((low < 0) | (high >= share.num_rows), _OUTSIDE, _FINE)
            message[:, 2] = worst
        answer = torch.empty_like(message)
        dist.all_to_all_single(answer, message, group=self.share.group)
        # The one time that the host waits for the device.
        told = torch.cat([message[:, :1], answer], dim=1).tolist()
        self._sent, self._received = [row[0] for row in told], [row[1] for row in told]
        counts["message_bytes"] += 2 * (world_size - 1) * _WORDS * 8
        self.error = self._agreed_error([row[2:] for row in told])
        if self.error is not None:
            return
        self.num_distinct, own = sum(self._sent), self._sent[share.rank]
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
            who = f"rank {dist.get_process_group_ranks(self.share.group)[rank]}"
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
        work = dist.all_to_all_single(result, given, received, sent, group=self.share.group, async_op=asynchronous)
        counts, rank = self.share.counts, self.share.rank
        counts[f"{counted}_sent"] += (sum(sent) - sent[rank]) * given.shape[1]
        counts[f"{counted}_received"] += (sum(received) - received[rank]) * given.shape[1]
        if asynchronous:
            self._kept = given  # until it has been sent
        return result.view(values.dtype), work

    def expect(self, rows: Tensor) -> None:
        """Remember whose rows these are."""
        self._asker, self._version = weakref.ref(rows), version_of(rows)

    def is_for(self, rows: Tensor) -> bool:
        """Whether these are the numbers that were asked for."""
        return self._asker is not None and self._asker() is rows and self._version == version_of(rows)

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
        """The rows asked for, ``[asked, width]``; raises what the ranks agreed on."""
        if self.error is not None:
            raise self.error
        self._wait()
        rows, self._rows = self._rows, self._rows[:0]
        return rows.index_select(0, self._inverse)

    def gradient(self, gradient: Tensor) -> Tensor:
        """Send the gradients of the rows asked for, ``[asked, width]``, to their owners; collective.

        Returns that of this rank's rows under the mean of all ranks' losses, sparse ``[own rows, width]``, not
        coalesced.
        """
        # Repeats are added up in float32: in a lower type, every addition of a frequent row would be rounded.
        exact = torch.promote_types(gradient.dtype, torch.float32)
        merged = torch.zeros(self.num_distinct, gradient.shape[1], dtype=exact, device=gradient.device)
        merged.index_add_(0, self._inverse, gradient.to(exact))
        values, _ = self._turn(merged.to(gradient.dtype), True, "gradient_bytes")
        # The one place where gradients of tables are scaled.
        values = values.mul_(1 / self.share.world_size)
        shape = self.share.weight.shape
        return torch.sparse_coo_tensor(self._places[None], values, shape, check_invariants=False)
