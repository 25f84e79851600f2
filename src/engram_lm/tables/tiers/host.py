"""A table's records in this process's memory, loaded once."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_lm.errors import ConfigError
from engram_lm.tables.available_memory import available_bytes
from engram_lm.tables.layout import RowLayout
from engram_lm.tables.tiers.record_table import RecordTable

# Records fetched at once while loading: long enough for a disk, short beside any table worth loading.
_PIECE_BYTES = 16 << 20


class HostTable(RecordTable):
    """Records in memory, as they are stored, decoded when they are read.

    Args:
        source: Where the rows lie, or an open table to load from (an address, say); the latter stays open and is not
            kept.
        dtype: Type of the rows that `gather` returns. None: as stored, 8-bit floats as bfloat16, integers as float32.
        pinned: Whether the memory is locked for an accelerator to read from.

    Loading takes the table's own size and some megabytes.

    Raises:
        CheckpointError: A file is missing, or has been cut since its layout was made.
        ConfigError: An impossible ``dtype``, a table larger than the memory that is available, or pinned memory
            without an accelerator.
    """

    tier = "host"

    def __init__(
        self, source: RowLayout | RecordTable, dtype: torch.dtype | None = None, *, pinned: bool = False
    ) -> None:
        super().__init__(source.codec, source.num_rows, dtype)
        self.layout = source if isinstance(source, RowLayout) else None
        self.pinned = pinned
        self._remade_from = (source,), {"pinned": pinned}
        if pinned and not torch.cuda.is_available():
            raise ConfigError("pinned memory needs an accelerator, and torch finds none here; use pinned=False")
        size, available = source.num_rows * source.codec.record_bytes, available_bytes()
        if available is not None and size > available:
            raise ConfigError(
                f"the table takes {size} bytes, {available} bytes of memory are available; open it with tier='mmap' "
                "or tier='file'"
            )
        records = torch.empty(self.num_rows, self.codec.record_bytes, dtype=torch.uint8, pin_memory=pinned)
        load_in_pieces(source, records.__setitem__)
        self._held: Tensor | None = records

    def _read_from(self, held: Tensor, numbers: np.ndarray) -> Tensor:
        # Copies whole rows; indexing would copy byte by byte.
        return torch.index_select(held, 0, torch.from_numpy(numbers))

    def stats(self) -> dict[str, Any]:
        """See `Table.stats`; adds what kind of memory it is."""
        return {**super().stats(), "pinned": self.pinned}

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by loading the files again; a table without files copies none of its rows by accident."""
        if self.layout is None:
            raise ConfigError("a host table that was loaded from another table cannot be copied; load it again")
        return super().__reduce__()


def load_in_pieces(source: RowLayout | RecordTable, store: Any) -> None:
    """Call ``store(rows, records)`` with every run of rows, a slice and uint8 ``[n, record_bytes]``, in their order."""
    step = max(1, _PIECE_BYTES // source.codec.record_bytes)
    for start in range(0, source.num_rows, step):
        stop = min(start + step, source.num_rows)
        store(slice(start, stop), source.load_records(start, stop))
