"""A table on a server, read by ranges through fsspec: nothing is downloaded before it is read."""

import urllib.parse
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_lm.errors import RemoteError
from engram_lm.tables.layout import VERSION_MARK, RowLayout
from engram_lm.tables.tiers.record_table import RecordTable
from engram_lm.tables.tiers.remote_files import RemoteFile, RemoteFiles, RemoteOptions


class RemoteTable(RecordTable):
    """Rows read from files at addresses that fsspec opens: https, s3, gs, hf and others.

    Rows that lie near each other come in one request, and several requests are under way at once. A file that changes
    after its header was read gives an error: over http whenever its version changes, elsewhere when the table is opened
    or the file has become too short.

    Args:
        layout: Where the rows lie; the files of its extents are addresses, as `table_layouts` gives them.
        dtype: Type of the rows that `gather` returns. None: as stored, 8-bit floats as bfloat16, integers as float32.
        options: Fields of `RemoteOptions`.

    Raises:
        RemoteError: Nobody answers, a file is missing, changed or shorter than the layout says, or the server does not
            answer ranges.
        ConfigError: An impossible option or ``dtype``.
        MissingExtraError: fsspec, or its package for this kind of address, is not installed.
    """

    tier = "remote"

    def __init__(self, layout: RowLayout, dtype: torch.dtype | None = None, **options: Any) -> None:
        super().__init__(layout.codec, layout.num_rows, dtype)
        self.layout, self.options = layout, RemoteOptions.named(options)
        files = RemoteFiles(self.options)
        self._held: RemoteFiles | None = files
        self._remade_from = (layout,), options
        self._num_requests = self._num_bytes = 0
        self._found = {file: files.look(file.partition(VERSION_MARK)[0]) for file in layout.files}
        for part in layout.parts:
            for extent in part.extents:
                _check(self._found[extent.file], extent.file, extent.end_bytes)

    def _read_from(self, held: RemoteFiles, numbers: np.ndarray) -> Tensor:
        # Each row is read once, however often it is asked for.
        unique, inverse = np.unique(numbers, return_inverse=True)
        data, column = np.empty((len(unique), self.codec.record_bytes), np.uint8), 0
        wanted: list[tuple[RemoteFile, int, int]] = []
        targets: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for part in self.layout.parts:
            out = data[:, column : column + part.row_bytes]
            for extent, where, offsets in part.divide(unique):
                places = np.arange(len(unique)) if isinstance(where, slice) else where
                for run in self._runs(offsets, part.row_bytes):
                    start, stop = int(offsets[run.start]), int(offsets[run.stop - 1]) + part.row_bytes
                    wanted.append((self._found[extent.file], start, stop))
                    targets.append((out, places[run], offsets[run] - start))
            column += part.row_bytes

        for (out, places, offsets), found in zip(targets, held.read(wanted), strict=True):
            body, size = np.frombuffer(found, np.uint8), out.shape[1]
            windows = np.lib.stride_tricks.as_strided(body, (len(body) - size + 1, size), (1, 1), writeable=False)
            out[places] = windows[offsets]
        with self._count_lock:
            self._num_requests += len(wanted)
            self._num_bytes += sum(stop - start for _, start, stop in wanted)
        is_ordered = len(unique) == len(numbers) and bool((np.diff(inverse) == 1).all())
        return torch.from_numpy(data if is_ordered else data[inverse])

    def _runs(self, offsets: np.ndarray, row_bytes: int) -> Iterator[slice]:
        """Cut rows, sorted by their place, into those that are asked for together."""
        first = 0
        gaps = np.flatnonzero(np.diff(offsets) > row_bytes + self.options.gap_bytes) + 1
        for last in [*gaps.tolist(), len(offsets)]:
            while first < last:
                limit = offsets[first] + max(self.options.longest_range_bytes, row_bytes) - row_bytes
                end = first + int(np.searchsorted(offsets[first:last], limit, side="right"))
                yield slice(first, end)
                first = end

    def stats(self) -> dict[str, Any]:
        """See `Table.stats`; adds what rows took from the server, without what the opening took."""
        return {
            **super().stats(),
            "num_files": len(self.layout.files),
            "num_requests": self._num_requests,
            "received_bytes": self._num_bytes,
        }


def _check(found: RemoteFile, file: str, end: int) -> None:
    """Check a file against what its layout says of it."""
    _, marked, quoted = file.partition(VERSION_MARK)
    version = urllib.parse.unquote(quoted)
    if marked and version != (found.version or ""):
        raise RemoteError(
            f"{found.url} has changed since its header was read: expected version {version}, found {found.version}; "
            "make the layout again"
        )
    if found.num_bytes < end:
        raise RemoteError(f"{found.url} is too short: expected at least {end} bytes, found {found.num_bytes}")
