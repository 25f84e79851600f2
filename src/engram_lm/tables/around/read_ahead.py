"""Rows read in the background before they are needed, for any table.

All row numbers of a forward pass are known before it starts: reading them while the blocks before compute hides what a
slow tier costs.
"""

import dataclasses
import functools
import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_lm.errors import ConfigError, TableClosedError
from engram_lm.tables.table import Table, Ticket
from engram_lm.tables.tiers.forked import renew_when_forked
from engram_lm.tables.tiers.record_table import RecordTable, checked_out

__all__ = ["ReadAheadTable"]

_PATIENCE = 64
"""Gathers that a batch waits for its own before it is given up. Something asked for rows and never came for them, as a
forward pass that was interrupted; it must neither hold bytes nor be searched for ever."""


@dataclasses.dataclass(eq=False)
class _Batch:
    """Rows on their way, or here."""

    rows: np.ndarray
    """Distinct row numbers in increasing order, int64 ``[n]``."""
    values: "Future[Tensor]"
    """``[n, width]``, or why they could not be read."""
    num_bytes: int
    used: np.ndarray
    """Which were gathered, bool ``[n]``."""
    passed_over: int = 0
    """Gathers since it was asked for that wanted none of it."""

    def find(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of the numbers it has, bool, and where, int64."""
        places = np.searchsorted(self.rows, numbers)
        places[places == len(self.rows)] = 0
        return self.rows[places] == numbers, places


class ReadAheadTable(Table):
    """A table whose `prefetch` reads in the background. Never changes what is returned.

    ``prefetch(rows)`` returns at once, whatever the table below does; ``gather(rows)`` takes what was staged, waits for
    what is on its way and overlaps with the request, and reads the rest itself. Staged rows are dropped when all of
    their batch have been gathered once. A read that failed in the background raises at the gather that wants its rows.

    Args:
        table: Any table. It belongs to this one from here on, which closes it.
        max_bytes: Bounds what is staged and on its way, as rows are returned. A prefetch beyond it is skipped and
            counted: gather then reads these rows itself.
        num_threads: Reads in the background at a time.

    Raises:
        ConfigError: An impossible bound or number of threads.
    """

    def __init__(self, table: Table, *, max_bytes: int = 256 << 20, num_threads: int = 2) -> None:
        if max_bytes < 1 or num_threads < 1:
            raise ConfigError(f"reading ahead needs at least one byte and one thread, not {max_bytes}, {num_threads}")
        self.table, self.max_bytes, self.num_threads = table, max_bytes, num_threads
        self.num_rows, self.width = table.num_rows, table.width
        self._lock = threading.Lock()
        self._batches: list[_Batch] = []
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="engram-read-ahead")
        self._closed = False
        self._held_bytes = self._staged_rows = self._used_rows = self._wasted_rows = 0
        self._skipped = self._failed = self._num_gathers = self._gathered_rows = 0
        renew_when_forked(self)

    def _renew(self) -> None:
        """Forget what threads of another process are reading, see `renew_when_forked`."""
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(self.num_threads, thread_name_prefix="engram-read-ahead")
        self._batches, self._held_bytes = [], 0

    @property
    def dtype(self) -> torch.dtype:
        """Type of the numbers that `gather` returns."""
        return self.table.dtype

    def prefetch(self, rows: Tensor) -> Ticket:
        """Begin to read rows. See `Table.prefetch`.

        Row numbers that the table does not have are left to `gather`, which refuses them.

        Raises:
            TableClosedError: The table has been closed.
        """
        self._refuse_closed(self._closed)
        numbers = np.unique(rows.detach().cpu().numpy())
        if numbers.dtype != np.int64:
            numbers = np.empty(0, dtype=np.int64)
        elif len(numbers) and (numbers[0] < 0 or numbers[-1] >= self.num_rows):
            numbers = numbers[(numbers >= 0) & (numbers < self.num_rows)]
        num_bytes = len(numbers) * self.row_bytes
        ticket = Ticket(num_rows=len(numbers), num_bytes=num_bytes)
        if not len(numbers):
            return ticket
        with self._lock:
            self._refuse_closed(self._closed)
            if self._held_bytes + num_bytes > self.max_bytes:
                self._skipped += 1
                return ticket
            self._held_bytes += num_bytes
            self._staged_rows += len(numbers)
            future = self._threads.submit(self.table.gather, torch.from_numpy(numbers))
            self._batches.append(_Batch(numbers, future, num_bytes, np.zeros(len(numbers), dtype=bool)))
        return ticket

    def gather(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Table.gather`. Rows come back on the CPU, or in ``out``.

        Raises:
            EngramError: What the table below raises, here or while it read ahead.
        """
        self._refuse_closed(self._closed)
        self._check_rows(rows)
        numbers = rows.detach().cpu().reshape(-1).numpy()
        result = self._staged(numbers).view(*rows.shape, self.width)
        with self._lock:
            self._num_gathers += 1
            self._gathered_rows += len(numbers)
        return result if out is None else checked_out(out, rows, self.width, self.dtype).copy_(result)

    def load_records(self, start: int, stop: int) -> Tensor:
        """See `RecordTable.load_records`.

        Raises:
            ConfigError: The table below keeps no records.
        """
        if not isinstance(self.table, RecordTable):
            raise ConfigError(f"a {type(self.table).__name__} keeps rows, not records; gather them")
        return self.table.load_records(start, stop)

    def _staged(self, numbers: np.ndarray) -> Tensor:
        """Rows ``[n, width]``, from batches where they have them."""
        chosen = self._choose(numbers)
        if not chosen:
            return self.table.gather(torch.from_numpy(numbers))
        if len(chosen) == 1 and chosen[0][1] is None:
            batch, _, places = chosen[0]
            result = self._wait(batch).index_select(0, torch.from_numpy(places))
            self._used(batch, places)
            return result
        result = torch.empty(len(numbers), self.width, dtype=self.dtype)
        rest = np.ones(len(numbers), dtype=bool)
        for batch, found, places in chosen:
            where = np.arange(len(numbers)) if found is None else np.flatnonzero(found)
            places = places if found is None else places[where]
            result[torch.from_numpy(where)] = self._wait(batch)[torch.from_numpy(places)]
            self._used(batch, places)
            rest[where] = False
        if rest.any():
            where = np.flatnonzero(rest)
            result[torch.from_numpy(where)] = self.table.gather(torch.from_numpy(numbers[where]))
        return result

    def _choose(self, numbers: np.ndarray) -> list[tuple[_Batch, np.ndarray | None, np.ndarray]]:
        """The batches that serve a request: each with which numbers it has (None for all of them), and where."""
        if not len(numbers):
            return []
        with self._lock:
            batches = list(self._batches)
        partly: list[tuple[_Batch, np.ndarray | None, np.ndarray]] = []
        missing = np.ones(len(numbers), dtype=bool)
        for batch in batches:
            found, places = batch.find(numbers)
            if found.all():
                # Its own batch, most likely; rows that others happen to share with it are left to those others.
                partly = [(batch, None, places)]
                break
            if (found & missing).any():
                partly.append((batch, found & missing, places))
                missing &= ~found
        with self._lock:
            chosen = [batch for batch, _, _ in partly]
            for batch in batches:
                batch.passed_over += batch not in chosen
                # Not while it is being read: its bytes are only then given back.
                if batch.passed_over > _PATIENCE and batch.values.done():
                    self._drop(batch)
        return partly

    def _wait(self, batch: _Batch) -> Tensor:
        try:
            return batch.values.result()
        except (CancelledError, TableClosedError):
            self._refuse_closed(True)
            raise
        except Exception:
            with self._lock:
                if self._drop(batch):
                    self._failed += 1
            raise

    def _used(self, batch: _Batch, places: np.ndarray) -> None:
        with self._lock:
            batch.used[places] = True
            if batch.used.all():
                self._drop(batch)

    def _drop(self, batch: _Batch) -> bool:
        """Forget a batch and count its rows; whether it was there. The caller holds the lock."""
        if batch not in self._batches:
            return False
        self._batches.remove(batch)
        batch.values.cancel()
        self._held_bytes -= batch.num_bytes
        self._used_rows += (used := int(batch.used.sum()))
        self._wasted_rows += len(batch.used) - used
        return True

    def stats(self) -> dict[str, Any]:
        """Statistics of the table below, and of reading ahead.

        ``staged_rows`` were asked for ahead; of these ``used_rows`` were gathered, ``wasted_rows`` were not before they
        were dropped, and the others are still waiting. ``skipped`` prefetches went beyond the bound,
        ``failed_prefetches`` raised at gather.
        """
        with self._lock:
            waiting = sum(int(batch.used.sum()) for batch in self._batches)
            return {
                **self.table.stats(),
                "num_gathers": self._num_gathers,
                "gathered_rows": self._gathered_rows,
                "staged_rows": self._staged_rows,
                "used_rows": self._used_rows + waiting,
                "wasted_rows": self._wasted_rows,
                "skipped": self._skipped,
                "failed_prefetches": self._failed,
                "held_bytes": self._held_bytes,
                "max_bytes": self.max_bytes,
            }

    def close(self) -> None:
        """Cancel what has not begun, wait for what has, and close the table below."""
        with self._lock:
            self._closed = True
            batches = list(self._batches)
            for batch in batches:
                self._drop(batch)
        self._threads.shutdown(wait=True, cancel_futures=True)
        self.table.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by opening the table below again, with nothing staged."""
        options = {"max_bytes": self.max_bytes, "num_threads": self.num_threads}
        return functools.partial(ReadAheadTable, **options), (self.table,)  # type: ignore[arg-type]
