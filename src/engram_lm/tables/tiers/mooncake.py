"""A table on Mooncake Store, in the memory of other machines, read by row; see ``mooncake_store.py``."""

import itertools
import time
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_lm.errors import ConfigError, RemoteError, TableClosedError
from engram_lm.tables.tiers.mooncake_client import LEASE_EXPIRED, MooncakeClient
from engram_lm.tables.tiers.mooncake_store import checksum_keys, key_of, load_manifest
from engram_lm.tables.tiers.record_table import RecordTable

_GAP_BYTES = 32 << 10
"""Rows of a block this near each other are read as one range, which costs about as much as these bytes on loopback."""
_MOST_RANGES = 4096


class MooncakeTable(RecordTable):
    """Rows read from a Mooncake Store.

    A request reads each of its rows once, however often it repeats them; rows near each other come as one range. Every
    wait ends at its deadline, and what the store sends is checked for its length, or with ``verify`` for its checksum.

    Args:
        address: The master, ``"mooncake://host:port"``.
        name: What `publish_to_mooncake` returned.
        dtype: Type of the rows that `gather` returns. None: as stored, 8-bit floats as bfloat16, integers as float32.
        timeout_seconds: Deadline of a `gather`.
        verify: Whether to read whole blocks and compare their checksums, for memory that may change bits; this reads a
            block for every row.
        buffer_bytes: Most bytes under way at a time, from 1 MiB to 1 GiB and at least a block.
        metadata: See `MooncakeClient`.

    Raises:
        RemoteError: Nobody answers, or there is no table of this name.
        ConfigError: An impossible address, name or ``dtype``.
        MissingExtraError: Mooncake is not installed.
    """

    tier = "remote"

    def __init__(
        self,
        address: str,
        name: str,
        dtype: torch.dtype | None = None,
        *,
        timeout_seconds: float = 10.0,
        verify: bool = False,
        buffer_bytes: int = 32 << 20,
        metadata: str = "P2PHANDSHAKE",
    ) -> None:
        options = {"timeout_seconds": timeout_seconds, "buffer_bytes": buffer_bytes, "metadata": metadata}
        self._remade_from = (address, name), {**options, "verify": verify}
        self.name = name
        if not 1 << 20 <= buffer_bytes <= 1 << 30:
            raise ConfigError(f"buffer_bytes is {buffer_bytes}, expected 1 MiB to 1 GiB")
        client = MooncakeClient(address, timeout_seconds=timeout_seconds, buffer_bytes=buffer_bytes, metadata=metadata)
        try:
            manifest = load_manifest(client, name)
            if manifest is None:
                raise RemoteError(
                    f"{client.master} has no table of the name {name!r}, or not the whole of it; publish it with "
                    "publish_to_mooncake, whose answer is its name"
                )
            if manifest.block_bytes > buffer_bytes:
                raise ConfigError(
                    f"buffer_bytes is {buffer_bytes}, a block of {name!r} has {manifest.block_bytes}; give it more"
                )
            super().__init__(manifest.codec, manifest.num_rows, dtype)
            self.manifest = manifest
            self._checksums: np.ndarray | None = None
            if verify:
                parts = [client.get(key, 4 * len(blocks)) for key, blocks in checksum_keys(name, manifest.num_blocks)]
                self._checksums = np.frombuffer(b"".join(parts), "<u4")
        except BaseException:
            client.close()
            raise
        self._held: MooncakeClient | None = client
        self._most_bytes = buffer_bytes
        self._requests = self._ranges = self._received_bytes = 0

    def _read_from(self, held: MooncakeClient, numbers: np.ndarray) -> Tensor:
        wanted, positions = np.unique(numbers, return_inverse=True)
        found = np.empty((len(wanted), self.codec.record_bytes), dtype=np.uint8)
        deadline = time.monotonic() + held.timeout_seconds
        pending = [self._ranges_of(wanted)]
        while pending:
            ranges = pending.pop()
            for batch in self._batches(ranges):
                with held.lock:
                    if self._closed:
                        raise TableClosedError("this table was closed while it was read")
                    if self._fetch(held, batch, wanted, found, deadline):
                        continue
                # The read outlived the master's lease: read in halves, which take half the time.
                half = len(batch) // 2
                pending += [batch[:half], batch[half:]] if half else [batch]
        return torch.from_numpy(found[positions])

    def _ranges_of(self, wanted: np.ndarray) -> np.ndarray:
        """Runs of rows, within one block each, that hold the sorted rows ``wanted``.

        Returns int64 ``[n, 4]``: first and last + 1 position in ``wanted``, first and last + 1 row.
        """
        blocks = wanted // self.manifest.block_rows
        new = np.ones(len(wanted), dtype=bool)
        new[1:] = np.diff(blocks) > 0
        if self._checksums is None:
            new[1:] |= np.diff(wanted) > 1 + _GAP_BYTES // self.codec.record_bytes
        firsts = np.flatnonzero(new)
        lasts = np.append(firsts[1:], len(wanted))
        if self._checksums is not None:  # which are those of whole blocks
            rows = blocks[firsts] * self.manifest.block_rows
            return np.stack([firsts, lasts, rows, np.minimum(rows + self.manifest.block_rows, self.num_rows)], axis=1)
        return np.stack([firsts, lasts, wanted[firsts], wanted[lasts - 1] + 1], axis=1)

    def _batches(self, ranges: np.ndarray) -> Iterator[np.ndarray]:
        """Divide ranges so that each part fits into the buffer."""
        sizes = (ranges[:, 3] - ranges[:, 2]) * self.codec.record_bytes
        most_bytes, start = self._most_bytes, 0
        while start < len(ranges):
            ends = np.cumsum(sizes[start : start + _MOST_RANGES])
            stop = start + max(1, int(np.searchsorted(ends, most_bytes, side="right")))
            yield ranges[start:stop]
            start = stop

    def _fetch(
        self, client: MooncakeClient, ranges: np.ndarray, wanted: np.ndarray, found: np.ndarray, deadline: float
    ) -> bool:
        """Read ranges into ``found``; False where they took longer than the master's lease and time is left."""
        record_bytes, block_rows = self.codec.record_bytes, self.manifest.block_rows
        sizes = (ranges[:, 3] - ranges[:, 2]) * record_bytes
        starts = np.cumsum(sizes) - sizes
        blocks, offsets = np.divmod(ranges[:, 2], block_rows)
        # Ranges are sorted, so that those of a block, which is a key, follow each other.
        firsts = np.flatnonzero(np.diff(blocks, prepend=-1))
        bounds = [*firsts.tolist(), len(ranges)]
        columns = [column.tolist() for column in (starts, sizes, offsets * record_bytes)]
        start_lists, size_lists, offset_lists = (
            [column[low:high] for low, high in itertools.pairwise(bounds)] for column in columns
        )
        keys = [key_of(self.name, block) for block in blocks[firsts].tolist()]
        codes = client.call(
            "get_ranges",
            deadline=deadline,
            keys=keys,
            starts=start_lists,
            sizes=size_lists,
            offsets=offset_lists,
        )
        self._requests += 1
        self._ranges += len(ranges)
        if LEASE_EXPIRED in codes and time.monotonic() < deadline:
            self._most_bytes = max(self.manifest.block_bytes, self._most_bytes // 2)
            return False
        for key, asked, code in zip(keys, size_lists, codes, strict=True):
            if code < 0:
                raise client.explain(key, code)
            if code != sum(asked):
                raise RemoteError(f"{key} gave {code} bytes, expected {sum(asked)}; publish it again")
            self._received_bytes += code
        if self._checksums is not None:
            for key, block, start, size in zip(keys, blocks.tolist(), starts.tolist(), sizes.tolist(), strict=True):
                if zlib.crc32(client.buffer[start : start + size].data) != self._checksums[block]:
                    raise RemoteError(
                        f"{key} is not what was published: its checksum differs; remove and publish it again"
                    )
        # The buffer holds whole records, and the distance from a row's number to its place is the same within a range.
        first, last = int(ranges[0, 0]), int(ranges[-1, 1])
        shift = np.repeat(starts // record_bytes - ranges[:, 2], ranges[:, 1] - ranges[:, 0])
        arrived = client.buffer[: int(starts[-1] + sizes[-1])].reshape(-1, record_bytes)
        arrived.take(wanted[first:last] + shift, axis=0, out=found[first:last], mode="clip")
        return True

    def stats(self) -> dict[str, Any]:
        """See `Table.stats`; adds the requests and ranges asked for and the bytes that came."""
        return {
            **super().stats(),
            "requests": self._requests,
            "ranges": self._ranges,
            "received_bytes": self._received_bytes,
        }

    def close(self) -> None:
        """End the client after the request that is under way; a gather of another thread fails at its next one."""
        client, self._held = self._held, None
        if client is not None:
            client.close()
