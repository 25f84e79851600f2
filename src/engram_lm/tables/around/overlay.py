"""A table of which some rows are read from elsewhere: changes to rows that never touch the table itself."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engram_lm.tables.table import Table, Ticket
from engram_lm.tables.tiers.record_table import checked_out

# Dimension key: N rows that are replaced, E row width.


class OverlayTable(Table):
    """A table on any tier with other numbers in place of some of its rows.

    All other rows are those of the table below, which is only read: its files keep their bytes. With a tensor
    ``values`` that requires gradients, rows are read differentiably, and only this tensor gets a gradient.

    Args:
        table: Any table. It belongs to this one, which closes it.
        rows: Rows that are replaced, different and ascending, int64 ``[N]``.
        values: The numbers that are read instead, floating ``[N, E]``, rounded to the table's type when they are read.
    """

    def __init__(self, table: Table, rows: Tensor, values: Tensor) -> None:
        self.table = table
        self.num_rows, self.width = table.num_rows, table.width
        self.tier_reason = table.tier_reason
        # One attribute, so that another thread reads the rows from before a change or those after it.
        self._replaced = rows.to(values.device), values

    @property
    def dtype(self) -> torch.dtype:
        """Type of the numbers that `gather` returns."""
        return self.table.dtype

    @property
    def rows(self) -> Tensor:
        """Rows that are replaced, ascending, int64 ``[N]``."""
        return self._replaced[0]

    def replace(self, rows: Tensor, values: Tensor) -> None:
        """Replace rows ``[N]`` (different, in any order) by values ``[N, E]``; rows replaced before stay so."""
        kept, numbers = self._replaced
        stays = ~torch.isin(kept, rows.to(kept.device))
        both = torch.cat([kept[stays], rows.to(kept.device)])
        order = both.argsort()
        joined = torch.cat([numbers[stays], values.to(numbers)])
        self._replaced = both[order], joined[order]

    def give_back(self, rows: Tensor) -> None:
        """Read rows ``[N]`` from the table below again."""
        kept, numbers = self._replaced
        stays = ~torch.isin(kept, rows.to(kept.device))
        self._replaced = kept[stays], numbers[stays]

    def gather(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Table.gather`."""
        replaced, values = self._replaced
        with torch.no_grad():
            found = self.table.gather(rows)
        if not len(replaced):
            return found if out is None else checked_out(out, rows, self.width, self.dtype).copy_(found)
        numbers = rows.to(replaced.device)
        place = torch.searchsorted(replaced, numbers).clamp(max=len(replaced) - 1)
        # Rounded as they will be stored, so that a fit sees the numbers that it will leave.
        apart = F.embedding(place, values.to(self.dtype)).to(found.device)
        here = (replaced[place] == numbers).to(found.device)
        result = torch.where(here.unsqueeze(-1), apart, found)
        return result if out is None else checked_out(out, rows, self.width, self.dtype).copy_(result)

    @property
    def reads_ahead(self) -> bool:
        """Whether the table below reads ahead."""
        return self.table.reads_ahead

    def prefetch(self, rows: Tensor) -> Ticket:
        """See `Table.prefetch`."""
        return self.table.prefetch(rows)

    def stats(self) -> dict[str, Any]:
        """See `Table.stats`; adds how many rows are replaced."""
        return {**self.table.stats(), "replaced_rows": len(self.rows)}

    def close(self) -> None:
        """Close the table below."""
        self.table.close()
