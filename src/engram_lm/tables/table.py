"""The one interface of all tables: rows by number."""

import abc
import dataclasses
from typing import Any

import torch
from torch import Tensor

from engram_lm.errors import RowRangeError, TableClosedError


@dataclasses.dataclass(frozen=True)
class Ticket:
    """What `Table.prefetch` returns: a promise that rows are on their way.

    A ticket never needs to be waited for; `Table.gather` does that. It says how much was asked.
    """

    num_rows: int
    """Distinct rows requested."""
    num_bytes: int
    """Bytes those rows take."""


class Table(abc.ABC):
    """Rows by number. Every table returns the same bytes for the same rows, whatever tier they come from.

    Safe to read from several threads. Row numbers are int64, in ``[0, num_rows)``, of any shape, repeats allowed; they
    are checked and never clamped.
    """

    num_rows: int
    """Rows in the table."""
    width: int
    """Numbers in a row."""
    tier_reason: str | None = None
    """Why the table is on its tier, where somebody chose it: see `open_table`."""

    @property
    @abc.abstractmethod
    def dtype(self) -> torch.dtype:
        """Type of the numbers that `gather` returns."""

    @abc.abstractmethod
    def gather(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Read rows.

        Args:
            rows: Row numbers, int64, any shape.
            out: Where to write, ``[*rows.shape, width]`` of `dtype`; the caller keeps it. Allocated when absent.

        Returns:
            The rows in the order asked, ``[*rows.shape, width]``.

        Raises:
            RowRangeError: A number is outside the table. Nothing has been written to ``out`` then.
            TableClosedError: The table has been closed.
        """

    def stored(self, rows: Tensor) -> Tensor:
        """Read rows as files hold them, without gradients. A table that is trained may show others to its layers."""
        return self.gather(rows)

    @property
    def reads_ahead(self) -> bool:
        """Whether `prefetch` does anything. Where not, asking would cost a count of distinct rows for nothing."""
        return type(self).prefetch is not Table.prefetch

    def prefetch(self, rows: Tensor) -> Ticket:
        """Ask for rows that will be gathered soon. Returns at once; a failure surfaces at `gather`.

        A table whose rows are already where they are needed has nothing to do, which is this default.
        """
        num_rows = int(rows.unique().numel())
        return Ticket(num_rows=num_rows, num_bytes=num_rows * self.row_bytes)

    def stats(self) -> dict[str, Any]:
        """Size and use of the table, as plain numbers with their unit in the name."""
        stats = {"num_rows": self.num_rows, "width": self.width, "table_bytes": self.num_rows * self.row_bytes}
        return stats if self.tier_reason is None else {**stats, "tier_reason": self.tier_reason}

    def close(self) -> None:
        """Give back what the table holds. Using it afterwards raises `TableClosedError`; closing twice is fine."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as `gather` returns it."""
        return self.width * self.dtype.itemsize

    def _check_rows(self, rows: Tensor) -> None:
        """Refuse row numbers of the wrong type or outside the table (waits for the device the numbers are on)."""
        if rows.dtype != torch.int64:
            raise RowRangeError(f"row numbers must be int64, these are {rows.dtype}; convert with rows.long()")
        if rows.numel() == 0:
            return
        low, high = (int(bound) for bound in torch.aminmax(rows))
        if low < 0 or high >= self.num_rows:
            worst = low if low < 0 else high
            raise RowRangeError(
                f"row {worst} is outside the table, which has rows 0 to {self.num_rows - 1}; "
                "the rows were probably computed with another HashSpec than the table was built for"
            )

    def _refuse_closed(self, closed: bool) -> None:
        if closed:
            raise TableClosedError("this table was closed; open it again to read from it")


def version_of(rows: Tensor) -> int | None:
    """How often the numbers were written over; tensors of inference mode do not say."""
    return None if rows.is_inference() else rows._version
