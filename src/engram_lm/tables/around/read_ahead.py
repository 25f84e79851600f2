"""Rows read in the background before they are needed, for any table.

All row numbers of a forward pass are known before it starts, so the rows of a later block can be read while earlier
blocks compute, which hides what a slow tier costs.
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
from engram_lm.tables.tiers.record_table import RecordTable, checked_out, renew_when_forked

_PATIENCE = 64
"""Gathers that pass over a batch before it is dropped. Its rows were asked for and never gathered, as by a forward pass
that was interrupted; it must not hold bytes, or be searched, for ever."""


@dataclasses.dataclass(eq=False)
class _Batch:
    """Rows that are being read in the background or have been."""

    rows: np.ndarray
    """Distinct row numbers in increasing order, int64 ``[n]``."""
    values: "Future[Tensor]"
    """``[n, width]``, or why they could not be read."""
    num_bytes: int
    used: np.ndarray
    """Which of them were gathered, bool ``[n]``."""
    passed_over: int = 0
    """Gathers that took none of its rows since it was asked for."""

    def find(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whether the batch has each number, bool, and where, int64."""
        places = np.searchsorted(self.rows, numbers)
        places[places == len(self.rows)] = 0
        return self.rows[places] == numbers, places


class ReadAheadTable(Table):
    """A table whose `prefetch` reads in the background. Never changes what is returned.

    ``prefetch(rows)`` returns at once; ``gather(rows)`` takes the rows that were staged, waits for those that are still
    being read, and reads the rest itself. Staged rows are dropped when all rows of their batch have been gathered once.
    A read that failed in the background raises at the gather that wants its rows.

    Args:
        table: Any table. It belongs to this one from now on, which closes it.
        max_bytes: Most bytes of rows, as they are returned, that are staged or being read. A prefetch beyond it is
            skipped and counted; gather then reads these rows itself.
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
        """Forget the reads of another process's threads, see `renew_when_forked`."""
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(self.num_threads, thread_name_prefix="engram-read-ahead")
        self._batches, self._held_bytes = [], 0

    @property
    def dtype(self) -> torch.dtype:
        """Type of the numbers that `gather` returns."""
        return self.table.dtype

    def prefetch(self, rows: Tensor) -> Ticket:
        """Begin to read rows. See `Table.prefetch`; numbers outside the table are left for `gather` to refuse."""
        self._refuse_closed(self._closed)
        numbers = np.unique(rows.detach().cpu().numpy())
        if numbers.dtype != np.int64:
            numbers = np.empty(0, dtype=np.int64)
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
        """See `Table.gather`. Raises what reading below raised, here or ahead. Rows come on the CPU, or in ``out``."""
        self._refuse_closed(self._closed)
        self._check_rows(rows)
        numbers = rows.detach().cpu().reshape(-1).numpy()
        result = self._staged(numbers).view(*rows.shape, self.width)
        with self._lock:
            self._num_gathers += 1
            self._gathered_rows += len(numbers)
        return result if out is None else checked_out(out, rows, self.width, self.dtype).copy_(result)

    def load_records(self, start: int, stop: int) -> Tensor:
        """See `RecordTable.load_records`; a `ConfigError` where the table below keeps no records."""
        if not isinstance(self.table, RecordTable):
            raise ConfigError(f"a {type(self.table).__name__} keeps rows, not records; gather them")
        return self.table.load_records(start, stop)

    def _staged(self, numbers: np.ndarray) -> Tensor:
        """Rows ``[n, width]``, from batches where these have them."""
        chosen = self._choose(numbers)
        if not chosen:
            return self.table.gather(torch.from_numpy(numbers))
        batch, found, places = chosen[0]
        if len(chosen) == 1 and found.all():
            result = self._wait(batch).index_select(0, torch.from_numpy(places))
            self._used(batch, places)
            return result
        result, rest = torch.empty(len(numbers), self.width, dtype=self.dtype), np.ones(len(numbers), dtype=bool)
        for batch, found, places in chosen:
            where = np.flatnonzero(found)
            result[torch.from_numpy(where)] = self._wait(batch)[torch.from_numpy(places[where])]
            self._used(batch, places[where])
            rest[where] = False
        where = np.flatnonzero(rest)
        if len(where):
            result[torch.from_numpy(where)] = self.table.gather(torch.from_numpy(numbers[where]))
        return result

    def _choose(self, numbers: np.ndarray) -> list[tuple[_Batch, np.ndarray, np.ndarray]]:
        """The batches that serve a request; of each the numbers that it serves, bool, and where it has them, int64."""
        with self._lock:
            batches = list(self._batches)
        chosen: list[tuple[_Batch, np.ndarray, np.ndarray]] = []
        missing = np.ones(len(numbers), dtype=bool)
        for batch in batches if len(numbers) else ():
            found, places = batch.find(numbers)
            if found.all():
                # Its own batch, most likely; rows that it shares with others are left to those others.
                chosen = [(batch, found, places)]
                break
            if (found & missing).any():
                chosen.append((batch, found & missing, places))
                missing &= ~found
        with self._lock:
            taken = [batch for batch, _, _ in chosen]
            for batch in batches if len(numbers) else ():
                batch.passed_over += batch not in taken
                # Not while it is being read: its bytes are given back only then.
                if batch.passed_over > _PATIENCE and batch.values.done():
                    self._drop(batch)
        return chosen

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
        """Forget a batch and count its rows; returns whether it was there. The caller holds the lock."""
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

        ``staged_rows`` were asked for ahead; of these ``used_rows`` were gathered, ``wasted_rows`` were dropped before
        anybody gathered them, and the others are still waiting. ``skipped`` prefetches went beyond the bound, and
        ``failed_prefetches`` raised an error at gather.
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
        """Cancel the reads that have not begun, wait for those that have, and close the table below."""
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
