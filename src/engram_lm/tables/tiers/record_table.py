"""What all tables have in common whose rows are kept as records: check the numbers, fetch the bytes, decode them."""

import abc
import contextlib
import functools
import os
import threading
import weakref
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.tables.codec import RowCodec
from engram_lm.tables.layout import RowLayout
from engram_lm.tables.table import Table


class RecordTable(Table):
    """A table that fetches records and decodes them. A tier says only where records come from, in `_read`.

    ``dtype`` is the type of the rows that `gather` returns; where None, the type that loses nothing.
    """

    tier: ClassVar[str]
    """Name of the tier, for `stats`."""
    _held: Any = None
    """What rows are read from; None when the table is closed. A read keeps it, so closing harms no read under way."""
    _remade_from: tuple[tuple[Any, ...], dict[str, Any]]
    """Arguments of the class that open the same table again, those by position without the ``dtype``."""
    _copied_from: RowLayout | None = None
    """Files of this machine from which a long run of rows is read faster than row by row."""

    def __init__(self, codec: RowCodec, num_rows: int, dtype: torch.dtype | None = None) -> None:
        self.codec, self.num_rows, self.width = codec, num_rows, codec.width
        self._dtype = codec.checked_dtype(dtype)
        self._is_stored_so = codec.scale == "none" and codec.stored_dtype == self._dtype
        self._count_lock = threading.Lock()
        self._num_gathers = self._rows_read = 0
        renew_when_forked(self)

    def _renew(self) -> None:
        """Start anew in a forked process, which has none of the other threads; see `renew_when_forked`."""
        self._count_lock = threading.Lock()

    @property
    def dtype(self) -> torch.dtype:
        """Type of the numbers that `gather` returns."""
        return self._dtype

    def gather(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Table.gather`. Rows are returned on the CPU, or in ``out``."""
        records = self.read_records(rows)
        # The usual case first: a small request costs microseconds, and each call into torch is one of them.
        result = records.view(self._dtype) if self._is_stored_so else self.codec.decode(records, self._dtype)
        if rows.dim() != 1:
            result = result.view(*rows.shape, self.width)
        return result if out is None else checked_out(out, rows, self.width, self._dtype).copy_(result)

    def read_records(self, rows: Tensor) -> Tensor:
        """Fetch rows as they are stored: uint8 ``[rows.numel(), codec.record_bytes]`` on the CPU, the caller's own."""
        self._refuse_closed(self._closed)
        numbers = self._checked_numbers(rows)
        records = self._read(numbers) if len(numbers) else torch.empty(0, self.codec.record_bytes, dtype=torch.uint8)
        with self._count_lock:
            self._num_gathers += 1
            self._rows_read += len(numbers)
        return records

    def _checked_numbers(self, rows: Tensor) -> np.ndarray:
        """Row numbers of any shape as int64 ``[n]`` on the CPU, refused as `Table._check_rows` refuses them."""
        if rows.dtype != torch.int64:
            self._check_rows(rows)
        numbers = rows.detach().cpu().numpy().reshape(-1)
        # Without their sign negative numbers are larger than any table: one pass finds both kinds of wrong ones.
        if len(numbers) and numbers.view(np.uint64).max() >= self.num_rows:
            self._check_rows(rows)
        return numbers

    def load_records(self, start: int, stop: int) -> Tensor:
        """Fetch a run of rows as they are stored: uint8 ``[stop - start, codec.record_bytes]``, for copying."""
        self._refuse_closed(self._closed)
        if self._copied_from is not None:
            return self._copied_from.load_records(start, stop)
        return self.read_records(torch.arange(start, stop))

    def _read(self, numbers: np.ndarray) -> Tensor:
        """Fetch the records of checked row numbers, int64 ``[n]``, n > 0: uint8 ``[n, record_bytes]``, contiguous."""
        held = self._held
        self._refuse_closed(held is None)
        return self._read_from(held, numbers)

    @abc.abstractmethod
    def _read_from(self, held: Any, numbers: np.ndarray) -> Tensor:
        """Do what `_read` does, from what the open table holds."""

    @property
    def _closed(self) -> bool:
        return self._held is None

    def close(self) -> None:
        """Let go of what rows are read from. A gather that another thread has begun still completes."""
        self._held = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by opening the table again."""
        arguments, options = self._remade_from
        return functools.partial(type(self), **options), (*arguments, self._dtype)

    def stats(self) -> dict[str, Any]:
        """See `Table.stats`; adds the tier, what rows take where they are stored, and how often they were asked for."""
        return {
            **super().stats(),
            "tier": self.tier,
            "record_bytes": self.codec.record_bytes,
            "stored_bytes": self.num_rows * self.codec.record_bytes,
            "num_gathers": self._num_gathers,
            "gathered_rows": self._rows_read,
        }


def cut_error(file: str, expected: int, found: int) -> CheckpointError:
    """Say that a file has fewer bytes than its table was opened with."""
    return CheckpointError(
        f"{file} was cut after its header was read: expected at least {expected} bytes, found {found}; put the whole "
        "file back, in place or by opening the table again"
    )


def checked_out(out: Tensor, rows: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Refuse an ``out`` that is not ``[*rows.shape, width]`` of the table's type, by a `ConfigError`."""
    if out.shape != (*rows.shape, width) or out.dtype != dtype:
        raise ConfigError(f"out is {tuple(out.shape)} of {out.dtype}; expected {(*rows.shape, width)} of {dtype}")
    return out


class _Renewed(Protocol):
    def _renew(self) -> None: ...


def renew_when_forked(owner: _Renewed) -> None:
    """Have ``owner._renew()`` called in every process that is forked while it lives, before anything else runs there.

    The owner is kept by a weak reference. While ``_renew`` runs the process has no other thread.
    """
    if hasattr(os, "register_at_fork"):
        _owners().add(owner)


@functools.cache
def _owners() -> "weakref.WeakSet[_Renewed]":
    owners: weakref.WeakSet[_Renewed] = weakref.WeakSet()

    def renew() -> None:
        for owner in list(owners):
            with contextlib.suppress(AttributeError):  # another thread was just making it, and nobody can have it
                owner._renew()

    os.register_at_fork(after_in_child=renew)
    return owners
