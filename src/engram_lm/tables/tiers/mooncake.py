"""Tables on Mooncake Store, in the memory of other machines: published once, read by row.

A row per key would cost a question to the master and a transfer for each. So rows lie in blocks, a key each, and a
request asks for all of its blocks at once and for the bytes of its rows within them:

- ``engram/<name>/<block>``: the records of rows ``block * block_rows`` and following, one after another;
- ``engram/<name>/checksums``: CRC-32 of every block, 4 bytes each, little endian;
- ``engram/<name>/manifest``: JSON, written last; a table without it is not there.
"""

import dataclasses
import itertools
import json
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_lm.errors import ConfigError, MismatchError, RemoteError, TableClosedError
from engram_lm.tables.codec import RowCodec
from engram_lm.tables.layout import RowLayout
from engram_lm.tables.tiers.mooncake_client import LEASE_EXPIRED, MISSING, MooncakeClient
from engram_lm.tables.tiers.record_table import RecordTable

__all__ = ["Manifest", "MooncakeTable", "publish_to_mooncake"]

_FORMAT = "engram-mooncake-1"
_BLOCK_BYTES = 256 << 10
_LARGEST_BLOCK_BYTES = 16 << 20
_LARGEST_MANIFEST_BYTES = 1 << 16
_BATCH_BYTES = 16 << 20
_GAP_BYTES = 32 << 10
"""Rows of a block this near each other are read as one range: on loopback a range costs
about as much as these bytes."""
_MOST_RANGES = 4096


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What the store says of a published table."""

    identity: str
    """`RowLayout.identity` of what was published."""
    codec: RowCodec
    """What a record means."""
    num_rows: int
    """Rows in the table."""
    block_rows: int
    """Rows in a block; the last may have fewer."""
    spec_digest: str | None = None
    """Digest of the HashSpec that addresses the rows, where the source said it."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the table."""
        return -(-self.num_rows // self.block_rows)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, the last one left aside."""
        return self.block_rows * self.codec.record_bytes

    def size(self, block: int) -> int:
        """Bytes of one block."""
        return min(self.block_rows, self.num_rows - block * self.block_rows) * self.codec.record_bytes

    def to_bytes(self) -> bytes:
        """The manifest as it is stored."""
        values = {
            "format": _FORMAT,
            "identity": self.identity,
            "codec": self.codec.to_dict(),
            "num_rows": self.num_rows,
            "block_rows": self.block_rows,
            "spec_digest": self.spec_digest,
        }
        return json.dumps(values).encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Manifest":
        """Read a manifest and believe nothing of it.

        Raises:
            RemoteError: It is not one.
        """
        try:
            values = json.loads(data)
            if values["format"] != _FORMAT:
                raise ValueError(f"the format is {values['format']!r:.100}, expected {_FORMAT!r}")
            codec, digest = RowCodec.from_dict(values["codec"]), values["spec_digest"]
            if not isinstance(values["identity"], str):
                raise ValueError("its identity is no text")
            numbers = [values["num_rows"], values["block_rows"]]
            if not all(type(number) is int and 0 < number < 2**53 for number in numbers):
                raise ValueError(f"its sizes are {numbers}")
            if not (digest is None or isinstance(digest, str)):
                raise ValueError("its spec_digest is no text")
            manifest = cls(values["identity"], codec, values["num_rows"], values["block_rows"], digest)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise RemoteError(
                f"{where} is not a manifest of a table ({error!r:.300}); publish the table again"
            ) from error
        if manifest.block_bytes > _LARGEST_BLOCK_BYTES:
            raise RemoteError(
                f"{where} has blocks of {manifest.block_bytes} bytes; at most {_LARGEST_BLOCK_BYTES} are read"
            )
        return manifest


def publish_to_mooncake(
    layout: RowLayout,
    address: str,
    *,
    name: str | None = None,
    block_rows: int | None = None,
    timeout_seconds: float = 60.0,
    metadata: str = "P2PHANDSHAKE",
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Copy a table into a Mooncake Store, whose storage processes keep it until they end.

    May be repeated, and resumed after it was killed: blocks that are there are read back, and kept where they are
    right. Blocks are pinned: the master does not evict them.

    Args:
        layout: Where the rows lie.
        address: The master, ``"mooncake://host:port"``.
        name: What readers call it; the layout's identity where None.
        block_rows: Rows in a block; as many as take 256 KiB where None.
        timeout_seconds: Deadline for each batch of blocks, of which there is one for every 16 MiB.
        metadata: See `MooncakeClient`.
        progress: Called with the bytes that are there so far and in all.

    Returns:
        The name to open it by.

    Raises:
        RemoteError: Nobody answers, the store has no room, or it stopped answering.
        MismatchError: Another table has this name.
        CheckpointError: A file of the layout is missing or cut.
        ConfigError: An impossible name, address or block.
        MissingExtraError: Mooncake is not installed.
    """
    record_bytes = layout.codec.record_bytes
    block_rows = max(1, _BLOCK_BYTES // record_bytes) if block_rows is None else block_rows
    if not 1 <= block_rows <= max(1, _LARGEST_BLOCK_BYTES // record_bytes):
        raise ConfigError(f"blocks of {block_rows} rows; 1 to {_LARGEST_BLOCK_BYTES // record_bytes} are possible here")
    manifest = Manifest(layout.identity, layout.codec, layout.num_rows, block_rows, layout.spec_digest)
    name = layout.identity if name is None else name
    buffer_bytes = _BATCH_BYTES + manifest.block_bytes
    client = MooncakeClient(address, timeout_seconds=timeout_seconds, buffer_bytes=buffer_bytes, metadata=metadata)
    try:
        there = _load_manifest(client, name)
        if there is not None and there != manifest:
            raise MismatchError(
                f"{client.master} has another table of the name {name!r}: found {there}, expected {manifest}; publish "
                "under another name"
            )
        checksums, done_rows = np.empty(manifest.num_blocks, dtype="<u4"), 0
        step = max(1, _BATCH_BYTES // manifest.block_bytes)
        for first in range(0, manifest.num_blocks, step):
            blocks = range(first, min(first + step, manifest.num_blocks))
            stop = min(blocks.stop * block_rows, layout.num_rows)
            data = layout.load_records(done_rows, stop).numpy().reshape(-1)
            pieces = [data[start : start + manifest.block_bytes] for start in range(0, len(data), manifest.block_bytes)]
            checksums[first : blocks.stop] = [zlib.crc32(piece.data) for piece in pieces]
            _publish(client, [_key(name, block) for block in blocks], pieces)
            done_rows = stop
            if progress is not None:
                progress(done_rows * record_bytes, layout.stored_bytes)
        for start in range(0, checksums.nbytes, _BATCH_BYTES):
            piece = checksums.view(np.uint8)[start : start + _BATCH_BYTES]
            _publish(client, [_checksum_key(name, start)], [piece])
        _publish(client, [_key(name, "manifest")], [np.frombuffer(manifest.to_bytes(), np.uint8)])
    finally:
        client.close()
    return name


class MooncakeTable(RecordTable):
    """Rows read from a Mooncake Store.

    A request reads each of its rows once, whatever its repeats; rows near each other come as one range. All waits end
    at their deadline, and what the store sends is checked for its length.

    Args:
        address: The master, ``"mooncake://host:port"``.
        name: What `publish_to_mooncake` returned.
        dtype: Type of the rows that `gather` returns; the stored one where None, bfloat16 for 8-bit rows.
        timeout_seconds: Deadline of a `gather`.
        verify: Read whole blocks and compare their checksums: for doubtful memory and for tests, at the price of
            reading a block for every row.
        buffer_bytes: Bound of what is in flight, 1 MiB and at least a block.
        metadata: See `MooncakeClient`.

    Raises:
        RemoteError: Nobody answers, or there is no table of this name.
        ConfigError: An impossible address, name or ``dtype``.
        MissingExtraError: Mooncake is not installed.
    """

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
        self._opened = (address, name, dtype, timeout_seconds, verify, buffer_bytes, metadata)
        self.name, self.verify = name, verify
        self._client: MooncakeClient | None = None
        if not 1 << 20 <= buffer_bytes <= 1 << 30:
            raise ConfigError(f"buffer_bytes is {buffer_bytes}, expected 1 MiB to 1 GiB")
        client = MooncakeClient(address, timeout_seconds=timeout_seconds, buffer_bytes=buffer_bytes, metadata=metadata)
        try:
            manifest = _load_manifest(client, name)
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
            self._checksums = self._load_checksums(client) if verify else None
        except BaseException:
            client.close()
            raise
        self._client = client
        self._most_bytes = buffer_bytes
        self._requests = self._ranges = self._received_bytes = 0

    @property
    def _closed(self) -> bool:
        return self._client is None

    def _read(self, numbers: np.ndarray) -> Tensor:
        wanted, positions = np.unique(numbers, return_inverse=True)
        found = np.empty((len(wanted), self.codec.record_bytes), dtype=np.uint8)
        client = self._client
        self._refuse_closed(client is None)
        assert client is not None
        deadline = time.monotonic() + client.timeout_seconds
        pending = [self._ranges_of(wanted)]
        while pending:
            ranges = pending.pop()
            for batch in self._batches(ranges):
                with client.lock:
                    if self._closed:
                        raise TableClosedError("this table was closed while it was read")
                    if self._fetch(client, batch, wanted, found, deadline):
                        continue
                # It outlived the master's lease: read in halves, which take half the time.
                half = len(batch) // 2
                pending += [batch[:half], batch[half:]] if half else [batch]
        return torch.from_numpy(found[positions])

    def _ranges_of(self, wanted: np.ndarray) -> np.ndarray:
        """Runs of rows of one block each that hold the sorted rows ``wanted``.

        Returns:
            int64 ``[n, 4]``: first and last + 1 position in ``wanted``, first and last + 1 row.
        """
        blocks = wanted // self.manifest.block_rows
        new = np.ones(len(wanted), dtype=bool)
        gap_rows = 1 + (0 if self.verify else _GAP_BYTES // self.codec.record_bytes)
        new[1:] = blocks[1:] != blocks[:-1]
        if not self.verify:
            new[1:] |= np.diff(wanted) > gap_rows
        firsts = np.flatnonzero(new)
        lasts = np.append(firsts[1:], len(wanted))
        rows, ends = wanted[firsts], wanted[lasts - 1] + 1
        if self.verify:
            rows = blocks[firsts] * self.manifest.block_rows
            ends = np.minimum(rows + self.manifest.block_rows, self.num_rows)
        return np.stack([firsts, lasts, rows, ends], axis=1)

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
        keys = [_key(self.name, block) for block in blocks[firsts].tolist()]
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
            for key, (block, start, size) in zip(
                keys, zip(blocks.tolist(), starts.tolist(), sizes.tolist(), strict=True), strict=True
            ):
                if zlib.crc32(client.buffer[start : start + size].data) != self._checksums[block]:
                    raise RemoteError(
                        f"{key} is not what was published: its checksum differs; remove and publish it again"
                    )
        # The buffer is full of whole records: how far each wanted one is from its number is the same within a range.
        first, last = int(ranges[0, 0]), int(ranges[-1, 1])
        shift = np.repeat(starts // record_bytes - ranges[:, 2], ranges[:, 1] - ranges[:, 0])
        arrived = client.buffer[: int(starts[-1] + sizes[-1])].reshape(-1, record_bytes)
        arrived.take(wanted[first:last] + shift, axis=0, out=found[first:last], mode="clip")
        return True

    def _load_checksums(self, client: MooncakeClient) -> np.ndarray:
        num_bytes, pieces = 4 * self.manifest.num_blocks, []
        for start in range(0, num_bytes, _BATCH_BYTES):
            key, size = _checksum_key(self.name, start), min(_BATCH_BYTES, num_bytes - start)
            if size > client.buffer.nbytes:
                raise ConfigError(f"buffer_bytes is {client.buffer.nbytes}, verifying needs {size}")
            with client.lock:
                code = client.call("get", keys=[key], starts=[0], sizes=[size])[0]
                if code < 0:
                    raise client.explain(key, code)
                pieces.append(client.buffer[:size].copy())
        return np.concatenate(pieces).view("<u4")

    def stats(self) -> dict[str, Any]:
        """See `Table.stats`; adds the requests and ranges asked for and the bytes that came."""
        return {
            **super().stats(),
            "tier": "remote",
            "requests": self._requests,
            "ranges": self._ranges,
            "received_bytes": self._received_bytes,
        }

    def close(self) -> None:
        """End the client, after the request that is under way; what a gather of another thread still wants fails."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by connecting anew."""
        return _open, self._opened


def _open(
    address: str, name: str, dtype: torch.dtype | None, timeout: float, verify: bool, size: int, metadata: str
) -> MooncakeTable:
    return MooncakeTable(
        address, name, dtype, timeout_seconds=timeout, verify=verify, buffer_bytes=size, metadata=metadata
    )


def _key(name: str, what: int | str) -> str:
    return f"engram/{name}/{what}"


def _checksum_key(name: str, start_bytes: int) -> str:
    return _key(name, "checksums" if start_bytes == 0 else f"checksums-{start_bytes // _BATCH_BYTES}")


def _load_manifest(client: MooncakeClient, name: str) -> Manifest | None:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,200}", name):
        raise ConfigError(f"a table's name has letters, digits, '.', '_' and '-', not {name!r:.200}")
    key = _key(name, "manifest")
    size = client.call("sizes", keys=[key])[0]
    if size == MISSING:
        return None
    if size < 0:
        raise client.explain(key, size)
    if not 0 < size <= _LARGEST_MANIFEST_BYTES:
        raise RemoteError(f"{key} has {size} bytes, which is no manifest")
    with client.lock:
        code = client.call("get", keys=[key], starts=[0], sizes=[size])[0]
        if code < 0:
            raise client.explain(key, code)
        return Manifest.from_bytes(client.buffer[:size].tobytes(), key)


def _publish(client: MooncakeClient, keys: Sequence[str], pieces: Sequence[np.ndarray]) -> None:
    """Have the store hold these values: keep what is right, replace what is wrong, put what is missing."""
    deadline = time.monotonic() + client.timeout_seconds
    missing = _differing(client, keys, pieces, deadline)
    while missing:
        sizes = [len(pieces[at]) for at in missing]
        starts = (np.cumsum(sizes) - sizes).tolist()
        for at, start in zip(missing, starts, strict=True):
            client.buffer[start : start + len(pieces[at])] = pieces[at]
        names = [keys[at] for at in missing]
        codes = client.call("put", deadline=deadline, keys=names, starts=starts, sizes=sizes)
        for key, code in zip(names, codes, strict=True):
            if code < 0:
                raise client.explain(key, code)
        # A put whose client was killed leaves a key that cannot be read and that another put takes for its own, until
        # the master gives it up (half a minute). So what was put is asked for.
        there = client.call("exist", deadline=deadline, keys=names)
        missing = [at for at, found in zip(missing, there, strict=True) if found != 1]
        if missing:
            if time.monotonic() + 1 > deadline:
                raise RemoteError(
                    f"{keys[missing[0]]} at {client.master} cannot be read after it was put; another process may be "
                    "publishing it, or was killed while it did: try again in a minute"
                )
            time.sleep(0.5)


def _differing(client: MooncakeClient, keys: Sequence[str], pieces: Sequence[np.ndarray], deadline: float) -> list[int]:
    """Which of these values the store does not hold; wrong ones are removed from it."""
    exist = client.call("exist", deadline=deadline, keys=list(keys))
    there = [at for at, found in enumerate(exist) if found == 1]
    if there:
        names, sizes = [keys[at] for at in there], [len(pieces[at]) for at in there]
        starts = (np.cumsum(sizes) - sizes).tolist()
        right = [
            found == size
            for found, size in zip(client.call("sizes", deadline=deadline, keys=names), sizes, strict=True)
        ]
        # One at a time, for the master's lease: this is for resuming, not for speed.
        for index, (name, start, size) in enumerate(zip(names, starts, sizes, strict=True)):
            if right[index]:
                code = client.call("get", deadline=deadline, keys=[name], starts=[start], sizes=[size])[0]
                piece = pieces[there[index]]
                right[index] = code == size and bool((client.buffer[start : start + size] == piece).all())
        wrong = [name for name, fine in zip(names, right, strict=True) if not fine]
        if wrong:
            client.call("remove", deadline=deadline, keys=wrong)
        exist = [1 if at in {t for t, fine in zip(there, right, strict=True) if fine} else 0 for at in range(len(keys))]
    return [at for at, found in enumerate(exist) if found != 1]
