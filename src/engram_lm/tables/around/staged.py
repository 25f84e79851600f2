"""Rows of a table off the GPU, brought to fixed addresses on it before they are needed."""

import functools
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from engram_lm.errors import ConfigError
from engram_lm.tables.table import Table, Ticket, version_of
from engram_lm.tables.tiers.record_table import checked_out


class StagedTable(Table):
    """A table on the host or beyond, whose rows travel to a GPU while it computes.

    ``prefetch(rows)`` starts a thread that gathers the rows into pinned memory and copies them to the GPU on a stream
    of its own; ``gather(rows)`` of the same tensor makes the current stream wait for that copy, and the host only for
    the read. Both buffers are made once, so a captured CUDA graph may hold their addresses: inside a capture ``gather``
    only says where the rows will be, and before each replay ``prefetch`` and `wait` put the rows there. A disk is never
    read inside a graph, which would read it once and replay stale rows.

    Requests that were not asked for ahead, or are larger than ``max_rows``, go to the table below and travel then.

    Args:
        table: Any table whose rows are off the GPU. It belongs to this one from now on, which closes it.
        device: The GPU.
        max_rows: Rows of the largest request to stage, repeats counted.

    Raises:
        ConfigError: Another device than a CUDA GPU, or no rows.

    Source: pinned staging at fixed addresses, filled on a side stream and waited for by events before a graph is
    replayed, is what vLLM and SGLang do for DeepSeek-V4.1 (vllm-project/vllm #56512).
    """

    def __init__(self, table: Table, device: torch.device | str | int, *, max_rows: int) -> None:
        device = torch.device(device)
        if device.type != "cuda" or max_rows < 1:
            raise ConfigError(f"rows are staged for a CUDA device, at least one of them, not {max_rows} for {device}")
        self.table, self.device, self.max_rows = table, device, max_rows
        self.num_rows, self.width = table.num_rows, table.width
        self._host = torch.empty(max_rows, self.width, dtype=table.dtype, pin_memory=True)
        self._here = torch.empty(max_rows, self.width, dtype=table.dtype, device=device)
        self._stream, self._copied = torch.cuda.Stream(device), torch.cuda.Event()
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="engram-staging")
        self._lock = threading.Lock()
        self._asked: Tensor | None = None
        self._version: int | None = None
        self._future: Future[None] | None = None
        self._closed = False
        self._staged = self._direct = 0

    @property
    def dtype(self) -> torch.dtype:
        """Type of the numbers that `gather` returns."""
        return self.table.dtype

    def prefetch(self, rows: Tensor) -> Ticket:
        """Begin to bring rows to the GPU, over those that were brought before. See `Table.prefetch`.

        Waits for the row numbers, where these are on the GPU.
        """
        self._refuse_closed(self._closed)
        num_rows = rows.numel()
        if rows.is_cuda and torch.cuda.is_current_stream_capturing():
            return Ticket(num_rows=num_rows, num_bytes=num_rows * self.row_bytes)  # asked for before each replay
        if rows.dtype != torch.int64 or not 0 < num_rows <= self.max_rows:
            with self._lock:
                self._asked = None
            return self.table.prefetch(rows)
        numbers = rows.detach().cpu().reshape(-1)
        consumer = torch.cuda.current_stream(self.device)
        with self._lock:
            if self._future is not None:
                self._future.exception()  # one at a time: the pinned buffer is being written
            # Work with the previous rows that the GPU has still to do is in this stream already.
            self._stream.wait_stream(consumer)
            self._asked, self._version = rows, version_of(rows)
            self._future = self._threads.submit(self._bring, numbers)
        return Ticket(num_rows=num_rows, num_bytes=num_rows * self.row_bytes)

    def _bring(self, numbers: Tensor) -> None:
        self._copied.synchronize()  # the pinned buffer may still be on its way
        host = self._host[: len(numbers)]
        self.table.gather(numbers, out=host)
        with torch.no_grad(), torch.cuda.stream(self._stream):
            self._here[: len(numbers)].copy_(host, non_blocking=True)
            self._copied.record(self._stream)

    def wait(self) -> None:
        """Make the current stream wait for the rows asked for last; the host waits only for the read."""
        future = self._future
        if future is not None:
            future.result()
            torch.cuda.current_stream(self.device).wait_event(self._copied)

    def gather(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Table.gather`. Rows are returned on the device of their numbers.

        Rows that were staged are valid until the next ``prefetch``; where gradients are recorded they are copied.
        """
        self._refuse_closed(self._closed)
        shape = (*rows.shape, self.width)
        if rows.is_cuda and torch.cuda.is_current_stream_capturing():
            if rows.numel() > self.max_rows:
                raise ConfigError(f"a graph reads {rows.numel()} rows at once, {self.max_rows} are staged")
            result = self._here[: rows.numel()].view(shape)
        elif rows is self._asked and version_of(rows) == self._version:
            self.wait()
            self._staged += rows.numel()
            result = self._here[: rows.numel()].view(shape)
            result = result.clone() if torch.is_grad_enabled() else result
        else:
            self._direct += rows.numel()
            result = self.table.gather(rows).to(rows.device)
        return result if out is None else checked_out(out, rows, self.width, self.dtype).copy_(result)

    def stats(self) -> dict[str, Any]:
        """Statistics of the table below, and how many rows were staged for the GPU and how many went directly."""
        return {
            **self.table.stats(),
            "gpu_staged_rows": self._staged,
            "gpu_direct_rows": self._direct,
            "staging_bytes": 2 * self.max_rows * self.row_bytes,
        }

    def close(self) -> None:
        """Wait for the read that is under way, and close the table below."""
        self._closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)
        self.table.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by opening the table below again, with buffers of its own."""
        return functools.partial(StagedTable, max_rows=self.max_rows), (self.table, self.device)
