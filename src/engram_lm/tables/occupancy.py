"""Which rows of a trained table were written: those that differ from the numbers that every row begins with.

Where occupancy is asked for, a row of zeros is a row that was never written. Files, and all tables that only read, hold
such rows as zeros, so a row carries its own bit wherever it goes: to other tiers, types and formats. A row that is
trained cannot begin at zero, where the gradient of a normalized key has no bound. In a table that is trained an
unwritten row therefore holds its *first numbers*, which depend on the table's seed and the row's number alone. So
nothing has to be kept beside the rows, and nothing has to be agreed on between processes: the optimizer that changes a
row has written it.
"""

import contextlib
import dataclasses
import functools
import hashlib
import warnings
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from engram_lm.tables.table import Table

# Numbers that are looked at at a time: a few copies of them are made.
_PIECE_NUMBERS = 1 << 22
_BYTES_PER_WORD = 8
# Standard deviation of the 256 evenly spaced numbers -127.5, -126.5, ..., 127.5.
_SPREAD = ((256**2 - 1) / 12) ** 0.5


@dataclasses.dataclass(frozen=True)
class FirstRows:
    """The numbers that the rows of one table begin with.

    They are evenly distributed over 256 values around 0, none of which is 0, and can be held by every floating type, so
    that they are the same numbers on every device, and remain so when a table changes its type.
    """

    name: str
    """What tells the tables of all seeds and models apart."""
    std: float
    """Standard deviation of the numbers."""

    @functools.cached_property
    def _key(self) -> int:
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "little", signed=True)

    def numbers(self, rows: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """Compute the first numbers of rows, int64 of any shape: ``[*rows.shape, width]``."""
        words = -(-width // _BYTES_PER_WORD)
        place = rows.unsqueeze(-1) * words + torch.arange(words, device=rows.device)
        drawn = _mixed(place + self._key).view(torch.int8)[..., :width]
        # Rounded to the type with the fewest digits; the product itself is the same on every device.
        return ((drawn.float() + 0.5) * (self.std / _SPREAD)).to(torch.bfloat16).to(dtype)

    def silenced(self, rows: Tensor, values: Tensor) -> Tensor:
        """Replace the rows that hold their first numbers by zeros.

        ``rows`` are their numbers, int64 of any shape, and ``values`` what was read there, ``[*rows.shape, width]``.
        """
        first = self.numbers(rows, values.shape[-1], values.dtype)
        return values.masked_fill((values.detach() == first).all(-1, keepdim=True), 0)


def _mixed(numbers: Tensor) -> Tensor:
    """Turn different int64 numbers into different ones that look random.

    Source: the finalizer of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
    """
    numbers = (numbers ^ ((numbers >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    numbers = (numbers ^ ((numbers >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return numbers ^ ((numbers >> 31) & (2**33 - 1))


class TrainedTable(nn.Module, Table):
    """What all tables that are trained share: which of their rows were written, and which may be.

    Without ``first_rows`` every row counts as written, and only `trained_rows` matters.
    """

    weight: nn.Parameter
    """The rows of this process."""
    first_row: int = 0
    """Number of the first of them."""
    first_rows: FirstRows | None = None
    """What unwritten rows hold."""
    trained_rows: Tensor | None = None
    """Bool ``[num_rows]``: the rows that training may write; all where None. In training mode the others are read as in
    evaluation mode, and get no gradient."""
    reads_written_only = False
    """Whether rows are read as in evaluation mode in training, too: see `written_only`."""
    _is_filled = False
    _may_hold_first_numbers = True
    _has_warned = False

    @property
    def dtype(self) -> torch.dtype:
        """Type of the numbers that `gather` returns."""
        return self.weight.dtype

    def train(self, mode: bool = True) -> Self:
        """Enter training mode, in which unwritten rows are read as their first numbers, or leave it."""
        if mode:
            self.fill()
        return super().train(mode)

    def take(self, weight: Tensor) -> None:
        """Take rows as files hold them, ``[own rows, width]``, in evaluation mode, whose reads then compare nothing."""
        self.weight = nn.Parameter(weight)
        self._is_filled = self._may_hold_first_numbers = False
        self.eval()

    @torch.no_grad()
    def fill(self) -> None:
        """Give rows of zeros, as files have them, their first numbers. Done once after the rows were loaded."""
        if self.first_rows is None or self._is_filled or self.weight.is_meta:
            return
        for rows, values in self._pieces():
            empty = (values == 0).all(-1).nonzero()[:, 0]
            if len(empty):
                self.weight[rows[0] + empty] = self._first(rows[empty])
        self._is_filled = self._may_hold_first_numbers = True

    @torch.no_grad()
    def stored(self, rows: Tensor) -> Tensor:
        """Read rows of this process as files hold them, whatever the mode is: see `Table.stored`."""
        values = self.weight[(rows - self.first_row).to(self.weight.device)].to(rows.device)
        return values if self.first_rows is None else self.first_rows.silenced(rows, values)

    @torch.no_grad()
    def beginning(self, rows: Tensor) -> Tensor:
        """Read rows of this process as training begins with them: as `stored`, with first numbers for zeros."""
        values = self.stored(rows)
        if self.first_rows is None:
            return values
        first = self.first_rows.numbers(rows, self.width, values.dtype)
        return torch.where((values == 0).all(-1, keepdim=True), first, values)

    @torch.no_grad()
    def store(self, rows: Tensor, values: Tensor) -> None:
        """Replace different rows ``[n]`` of this process by ``[n, width]``; a row of zeros is then unwritten."""
        place, values = (rows - self.first_row).to(self.weight.device), values.to(self.weight)
        self.weight.index_copy_(0, place, values)
        if self.first_rows is not None and self._may_hold_first_numbers:
            empty = (values == 0).all(-1).nonzero()[:, 0]
            self.weight.index_copy_(0, place[empty], self._first(place[empty]))

    @torch.no_grad()
    def saved_weight(self) -> Tensor:
        """The rows of this process as files hold them: the weight itself, or a copy with zeros in unwritten rows."""
        weight = self.weight.detach()
        if self.first_rows is None or weight.is_meta:
            return weight
        result = torch.empty_like(weight)
        for rows, values in self._pieces():
            result[rows] = self.first_rows.silenced(rows + self.first_row, values)
        return result

    def _reset_to_first_rows(self) -> None:
        assert self.first_rows is not None
        if not self.weight.is_meta:
            with torch.no_grad():
                for rows, _ in self._pieces():
                    self.weight[rows] = self._first(rows)
            self._is_filled = True

    def _as_read(self, rows: Tensor, values: Tensor) -> Tensor:
        """What a layer reads, of what the weight holds at these rows."""
        trains = self.training and self.weight.requires_grad and not self.reads_written_only
        if self.first_rows is None and (not trains or self.trained_rows is None):
            return values
        if not trains:
            assert self.first_rows is not None
            if self._may_hold_first_numbers:
                values = self.first_rows.silenced(rows, values)
            is_surprising = values.requires_grad and not self.reads_written_only
            if is_surprising and not self._has_warned and not torch.compiler.is_compiling():
                values.register_hook(self._warn_of_mode)
            return values
        if self.trained_rows is None:
            return values
        chosen = self.trained_rows[rows.to(self.trained_rows.device)].to(values.device).unsqueeze(-1)
        others = values.detach()
        others = others if self.first_rows is None else self.first_rows.silenced(rows, others)
        return torch.where(chosen, values, others)

    def _warn_of_mode(self, gradient: Tensor) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "rows are trained in evaluation mode, where the memory does not read rows that were never written "
                "(occupancy), so none of them will be: call model.train() before training",
                stacklevel=2,
            )

    def _first(self, places: Tensor) -> Tensor:
        assert self.first_rows is not None
        return self.first_rows.numbers(places + self.first_row, self.width, self.weight.dtype)

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Places in the weight, int64 ``[n]``, and what it holds there, ``[n, width]``, some rows at a time."""
        step = max(1, _PIECE_NUMBERS // max(1, self.width))
        for start in range(0, len(self.weight), step):
            rows = torch.arange(start, min(start + step, len(self.weight)), device=self.weight.device)
            yield rows, self.weight.detach()[start : start + step]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.first_rows is not None and not keep_vars:
            destination[f"{prefix}weight"] = self.saved_weight()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._is_filled, self._may_hold_first_numbers = False, True
        if self.training:
            self.fill()


@contextlib.contextmanager
def written_only(model: nn.Module) -> Iterator[None]:
    """Let training read rows as evaluation does inside a ``with`` block: those that were never written are zeros.

    For losses on text that should write no row of its own: they see what memory says there, and train the rows that
    other text has written.
    """
    tables = [part for part in model.modules() if isinstance(part, TrainedTable) and not part.reads_written_only]
    for table in tables:
        table.reads_written_only = True
    try:
        yield
    finally:
        for table in tables:
            table.reads_written_only = False


def num_written_rows(table: Table) -> int:
    """Count the rows of a table that are not zeros, reading all of them."""
    step = max(1, _PIECE_NUMBERS // max(1, table.width))
    starts = range(0, table.num_rows, step)
    pieces = (torch.arange(start, min(start + step, table.num_rows)) for start in starts)
    return sum(int((table.stored(rows) != 0).any(-1).sum()) for rows in pieces)
