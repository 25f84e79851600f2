"""How a table lies in a Mooncake Store, and how it gets there.

A key for each row would cost a question to the master and a transfer for each. So rows lie in blocks, one key each, and
a request asks for all of its blocks at once, and for the bytes of its rows within them:

- ``engram/<name>/<block>``: the records of rows ``block * block_rows`` and following, one after another;
- ``engram/<name>/checksums``: CRC-32 of every block, 4 bytes each, little endian;
- ``engram/<name>/manifest``: JSON, written last; without it there is no table.
"""

import dataclasses
import json
import re
import time
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from engram_lm.errors import ConfigError, MismatchError, RemoteError
from engram_lm.tables.codec import RowCodec
from engram_lm.tables.layout import RowLayout
from engram_lm.tables.tiers.mooncake_client import MISSING, MooncakeClient

_BATCH_BYTES = 16 << 20
"""Bytes that are put or compared at a time."""
_CHECKSUMS = 1 << 18
"""Most checksums under one key; they fit into every buffer."""
_FORMAT = "engram-mooncake-1"
_BLOCK_BYTES = 256 << 10
_LARGEST_BLOCK_BYTES = 16 << 20
_LARGEST_MANIFEST_BYTES = 1 << 16


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
        """Read a manifest and believe nothing of it; a `RemoteError` where it is not one."""
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
        there = load_manifest(client, name)
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
            _publish(client, [key_of(name, block) for block in blocks], pieces)
            done_rows = stop
            if progress is not None:
                progress(done_rows * record_bytes, layout.stored_bytes)
        for key, blocks in checksum_keys(name, manifest.num_blocks):
            _publish(client, [key], [checksums[blocks.start : blocks.stop].view(np.uint8)])
        _publish(client, [key_of(name, "manifest")], [np.frombuffer(manifest.to_bytes(), np.uint8)])
    finally:
        client.close()
    return name


def key_of(name: str, what: int | str) -> str:
    """The key of a block, by its number, or of another part of a table."""
    return f"engram/{name}/{what}"


def checksum_keys(name: str, num_blocks: int) -> Iterator[tuple[str, range]]:
    """Yield the keys of a table's checksums, each with the blocks whose checksums it holds."""
    for number, first in enumerate(range(0, num_blocks, _CHECKSUMS)):
        what = f"checksums-{number}" if number else "checksums"
        yield key_of(name, what), range(first, min(first + _CHECKSUMS, num_blocks))


def load_manifest(client: MooncakeClient, name: str) -> Manifest | None:
    """Read what the store says of a table; None where it has no such table, or not the whole of it."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,200}", name):
        raise ConfigError(f"a table's name has letters, digits, '.', '_' and '-', not {name!r:.200}")
    key = key_of(name, "manifest")
    size = client.call("sizes", keys=[key])[0]
    if size == MISSING:
        return None
    if size < 0:
        raise client.explain(key, size)
    if not 0 < size <= _LARGEST_MANIFEST_BYTES:
        raise RemoteError(f"{key} has {size} bytes, which is no manifest")
    return Manifest.from_bytes(client.get(key, size), key)


def _publish(client: MooncakeClient, keys: Sequence[str], pieces: Sequence[np.ndarray]) -> None:
    """Have the store hold these values: keep what is right, replace what is wrong, put what is missing."""
    deadline = time.monotonic() + client.timeout_seconds
    exist = client.call("exist", deadline=deadline, keys=list(keys))
    # Compared one at a time, for the master's lease: this is for resuming, not for speed.
    right = [
        found == 1 and _holds(client, key, piece, deadline)
        for key, piece, found in zip(keys, pieces, exist, strict=True)
    ]
    wrong = [key for key, found, fine in zip(keys, exist, right, strict=True) if found == 1 and not fine]
    if wrong:
        client.call("remove", deadline=deadline, keys=wrong)
    missing = [at for at, fine in enumerate(right) if not fine]
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
        # A put whose client was killed leaves a key that cannot be read, and that another put takes for its own until
        # the master gives it up after half a minute. So the store is asked for what was put.
        there = client.call("exist", deadline=deadline, keys=names)
        missing = [at for at, found in zip(missing, there, strict=True) if found != 1]
        if missing:
            if time.monotonic() + 1 > deadline:
                raise RemoteError(
                    f"{keys[missing[0]]} at {client.master} cannot be read after it was put; another process may be "
                    "publishing it, or was killed while it did: try again in a minute"
                )
            time.sleep(0.5)


def _holds(client: MooncakeClient, key: str, piece: np.ndarray, deadline: float) -> bool:
    """Whether the store holds these bytes under a key that exists."""
    size = len(piece)
    if client.call("sizes", deadline=deadline, keys=[key]) != [size]:
        return False
    found = client.call("get", deadline=deadline, keys=[key], starts=[0], sizes=[size]) == [size]
    return found and bool((client.buffer[:size] == piece).all())
