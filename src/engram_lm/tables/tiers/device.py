"""Tables whose decoded rows are in the memory of a device: one to read from, one to train."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram_lm.errors import ConfigError
from engram_lm.tables.layout import RowLayout
from engram_lm.tables.occupancy import FirstRows, TrainedTable
from engram_lm.tables.table import Table
from engram_lm.tables.tiers.host import load_in_pieces
from engram_lm.tables.tiers.record_table import RecordTable


class ResidentTable(Table):
    """The obvious table: one tensor, read by indexing. The twin that every other tier is tested against.

    The tensor is ``[num_rows, width]``, of any floating type, on any device, and is kept, not copied.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight: Tensor | None = weight
        self._dtype = weight.dtype
        self.num_rows, self.width = weight.shape

    @property
    def dtype(self) -> torch.dtype:
        """Type of the numbers that `gather` returns."""
        return self._dtype

    def gather(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Table.gather`."""
        # Held until the end, so that another thread may close the table meanwhile.
        weight = self._weight
        self._refuse_closed(weight is None)
        assert weight is not None
        self._check_rows(rows)
        result = weight[rows.to(weight.device)].to(rows.device)
        return result if out is None else out.copy_(result)

    def close(self) -> None:
        """Drop the reference to the tensor."""
        self._weight = None


def load_resident(
    source: RowLayout | RecordTable,
    dtype: torch.dtype | None = None,
    *,
    device: torch.device | str | None = None,
) -> ResidentTable:
    """Load and decode a whole table into the memory of a device.

    Args:
        source: Where the rows lie, or an open table to load from, which stays open and is not kept.
        dtype: Type of the rows. None: as stored, 8-bit floats as bfloat16, integers as float32.
        device: The device; where None, the accelerator, or the CPU without an accelerator.

    Raises:
        CheckpointError: A file is missing, or has been cut since its layout was made.
        ConfigError: An impossible ``dtype``, or a device without room for the rows.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    codec = source.codec
    returned = codec.checked_dtype(dtype)
    try:
        weight = torch.empty(source.num_rows, codec.width, dtype=returned, device=device)
    except RuntimeError as error:
        raise ConfigError(
            f"{device} has no room for {source.num_rows} rows of {codec.width} numbers of {returned}; use tier='host'"
        ) from error

    def store(rows: slice, records: Tensor) -> None:
        weight[rows] = codec.decode(records, returned).to(device)

    load_in_pieces(source, store)
    return ResidentTable(weight)


class ParameterTable(TrainedTable):
    """A table that is trained: one parameter, whose gradient holds only the rows that were read.

    Args:
        num_rows: Rows in the table.
        width: Numbers in a row.
        gradient: ``"sparse"`` (the default: a step costs what was touched) or ``"dense"`` (what ordinary optimizers,
            FSDP2 and CUDA graphs need).
        std: Standard deviation of the initial rows. Rows feed normalized keys, whose gradient grows as rows shrink
            (worst row gradient about 5 at 1.0, 65 at 0.02, 1e4 and more at 1e-6), so it must not be zero.
        device: Where the rows are; ``"meta"`` allocates nothing.
        dtype: Floating type of the rows.
        first_rows: What rows hold that were never written, and that are read as zeros except in training (occupancy);
            where None, all rows begin from a normal distribution and count as written.

    Optimizers tell tables from other parameters by this class: a mark on the parameter itself would be lost when a
    model is copied or loaded.
    """

    def __init__(
        self,
        num_rows: int,
        width: int,
        *,
        gradient: Literal["sparse", "dense"] = "sparse",
        std: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        first_rows: FirstRows | None = None,
    ) -> None:
        super().__init__()
        if gradient not in ("sparse", "dense"):
            raise ConfigError(f"gradient must be 'sparse' or 'dense', not {gradient!r}")
        self.num_rows, self.width, self.gradient, self.std = num_rows, width, gradient, std
        self.first_rows = first_rows
        self.num_patches = 0
        """Row patches whose numbers it holds in place of its own, so that no file of the table has them."""
        self.weight = nn.Parameter(torch.empty(num_rows, width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all rows anew from a normal distribution, or let them begin as `first_rows` says."""
        if self.first_rows is not None:
            self._reset_to_first_rows()
        else:
            nn.init.normal_(self.weight, std=self.std)

    def gather(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """Read rows, differentiably. See `Table.gather`.

        Rows are returned on the device of their numbers: if the table is on the host and the model is not, the numbers
        travel one way and their rows the other.

        On an accelerator the range is checked by the device itself, which ends the process with an assertion: no
        host synchronization is spent on it here.
        """
        if self.weight.is_meta and not rows.is_meta:
            raise ConfigError(
                "this table has no rows (its device is meta). accelerate's hooks do not serve tables: load the model "
                'with from_pretrained(..., device_map="auto"), which keeps them on the host'
            )
        try:
            result = F.embedding(rows.to(self.weight.device), self.weight, sparse=self.gradient == "sparse")
            result = self._as_read(rows, result.to(rows.device))
        except (IndexError, RuntimeError):
            self._check_rows(rows)
            raise
        return result if out is None else out.copy_(result)

    forward = gather

    def stats(self) -> dict[str, Any]:
        """See `Table.stats`; adds how gradients are kept."""
        return {**super().stats(), "gradient": self.gradient}

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.num_rows}, {self.width}, gradient={self.gradient!r}"
