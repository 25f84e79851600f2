"""The packed file: one table, the whole record of a row in one place, pages that no row straddles, checksums.

``docs/format.md`` specifies it and gives the reason for every rule. This file holds what the bytes mean and how they
are opened; ``packed_writer.py`` writes them.
"""

import dataclasses
import json
import os
import struct
import zlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NoReturn

import torch

from engram_lm.errors import CheckpointError, ConfigError, EngramError
from engram_lm.tables.codec import RowCodec
from engram_lm.tables.files.byte_source import ByteSource, LocalFile
from engram_lm.tables.layout import Extent, Part, RowLayout

__all__ = [
    "PREFIX_BYTES",
    "SUFFIX",
    "PackedGeometry",
    "PackedHeader",
    "packed_layout",
    "parse_packed_prefix",
    "read_packed_header",
]

SUFFIX = ".engram"
"""What names of packed files end with."""

MAGIC = b"\x89ENGRAM\n"
"""First bytes: not text, and broken by whatever changes line ends or clears the eighth bit."""
VERSION = 1
"""The one version there is."""
PAGE_BYTES = 4096
"""What operating systems and drives read at once."""
CHUNK_BYTES = 1024 * PAGE_BYTES
"""Bytes under one checksum, at most (a chunk holds whole pages, and one row at least)."""

# Magic, version, a reserved 0, bytes of the header, CRC-32 of the header, CRC-32 of the prefix up to here.
_PREFIX = struct.Struct("<8sIIQII")
PREFIX_BYTES = _PREFIX.size
"""Bytes that stand before the header."""
_CRC = struct.Struct("<I")
_LONGEST_HEADER_BYTES = 2**20
_EXACT = 2**53

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8)
} | {"int4": RowCodec.named("int4", 1).stored_dtype}


@dataclasses.dataclass(frozen=True)
class PackedGeometry:
    """Where rows and chunks lie in a packed file. Everything follows from the codec and the number of rows."""

    codec: RowCodec
    """What a record means."""
    num_rows: int
    """Rows in the table."""

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise ConfigError(f"a table has at least one row, not {self.num_rows}")

    @property
    def stride_bytes(self) -> int:
        """From one record to the next on the same page: nothing lies between them."""
        return self.codec.record_bytes

    @property
    def rows_per_page(self) -> int:
        """Rows on a page; 0 where a record is longer than one, and records follow each other without pages."""
        return PAGE_BYTES // self.codec.record_bytes

    @property
    def chunk_rows(self) -> int:
        """Rows of every chunk but the last."""
        if self.rows_per_page:
            return CHUNK_BYTES // PAGE_BYTES * self.rows_per_page
        return max(1, CHUNK_BYTES // self.codec.record_bytes)

    @property
    def num_chunks(self) -> int:
        """Chunks, each with its checksum."""
        return -(-self.num_rows // self.chunk_rows)

    @property
    def data_bytes(self) -> int:
        """Bytes of all chunks."""
        return self._bytes_before(self.num_rows)

    def chunk(self, index: int) -> tuple[int, int]:
        """First row of a chunk, and one past its last."""
        return index * self.chunk_rows, min((index + 1) * self.chunk_rows, self.num_rows)

    def chunk_bytes(self, index: int) -> tuple[int, int]:
        """First byte of a chunk, counted from the first row, and one past its last."""
        first, last = self.chunk(index)
        return self._bytes_before(first), self._bytes_before(last)

    def _bytes_before(self, row: int) -> int:
        if self.rows_per_page:
            return -(-row // self.rows_per_page) * PAGE_BYTES
        return row * self.stride_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return the part of the header that says how rows lie, as JSON values."""
        codec = self.codec
        return {
            "num_rows": self.num_rows,
            "width": codec.width,
            "codec": {
                "numbers": str(codec.stored_dtype).removeprefix("torch."),
                "scale": codec.scale,
                "table_scale": codec.table_scale,
            },
            "record_bytes": codec.record_bytes,
            "stride_bytes": self.stride_bytes,
            "page_bytes": PAGE_BYTES,
            "rows_per_page": self.rows_per_page,
            "data_bytes": self.data_bytes,
            "chunk_rows": self.chunk_rows,
            "num_chunks": self.num_chunks,
        }


@dataclasses.dataclass(frozen=True)
class PackedHeader:
    """What a packed file says of itself, checked against its size."""

    path: str
    """Path or address of the file."""
    geometry: PackedGeometry
    """How rows lie."""
    data_start: int
    """First byte of the first row."""
    checksums_crc: int
    """CRC-32 of the table of checksums."""
    spec_digest: str | None
    """Digest of the HashSpec that addresses the rows, where it is known."""
    hash_spec: Mapping[str, Any] | None
    """The HashSpec itself, as ``HashSpec.to_dict`` gives it, where it is known."""
    provenance: Mapping[str, Any]
    """Where the rows came from."""

    @property
    def checksums_start(self) -> int:
        """First byte of the table of checksums, behind the rows."""
        return self.data_start + self.geometry.data_bytes

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file."""
        return self.checksums_start + _CRC.size * self.geometry.num_chunks

    @cached_property
    def layout(self) -> RowLayout:
        """The table, as tiers open it."""
        geometry = self.geometry
        # Pages that are full to the last byte need no arithmetic: there rows follow each other.
        paged = geometry.rows_per_page * geometry.stride_bytes not in (0, PAGE_BYTES)
        extent = Extent(
            self.path,
            self.data_start,
            geometry.num_rows,
            geometry.stride_bytes,
            geometry.rows_per_page if paged else 0,
            PAGE_BYTES if paged else 0,
        )
        part = Part(geometry.codec.record_bytes, (extent,))
        return RowLayout(geometry.codec, (part,), spec_digest=self.spec_digest)


def read_packed_header(source: str | os.PathLike[str] | ByteSource) -> PackedHeader:
    """Read what a packed file says of itself, and check every number of it against the file.

    Costs the header only, whatever the size of the file; the rows are checked by `verify_packed`.

    Raises:
        CheckpointError: The file is missing, not a packed table, of another version, shorter or longer than its header
            says, or its header is damaged or contradicts itself.
        RemoteError: The file lies on a server that does not answer.
    """
    try:
        file = LocalFile(source) if isinstance(source, str | os.PathLike) else source
        prefix = file.read(0, min(PREFIX_BYTES, file.size)) if file.size else b""
        length = parse_packed_prefix(prefix, file.name, file.size)
        text = file.read(PREFIX_BYTES, PREFIX_BYTES + length) if length else b""
    except EngramError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {source}: {error.strerror}") from error
    _, _, _, _, expected, _ = _PREFIX.unpack(prefix)
    if len(text) != length or zlib.crc32(text) != expected:
        raise CheckpointError(
            f"{file.name}: the header is damaged: its checksum is not the one the file promises; copy the file "
            "again or convert its source again"
        )
    header = _parse(text, file.name, PREFIX_BYTES + length)
    if file.size != header.file_bytes:
        raise CheckpointError(
            f"{file.name} is {'truncated' if file.size < header.file_bytes else 'longer than its header says'}: "
            f"expected {header.file_bytes} bytes, found {file.size}; copy the file again"
        )
    return header


def packed_layout(path: str | os.PathLike[str]) -> RowLayout:
    """Describe the table of a packed file.

    Raises:
        CheckpointError: As `read_packed_header`.
    """
    return read_packed_header(path).layout


def encode_header(
    geometry: PackedGeometry,
    checksums_crc: int,
    *,
    spec_digest: str | None,
    hash_spec: Mapping[str, Any] | None,
    provenance: Mapping[str, Any],
) -> bytes:
    """Return everything that stands before the rows: a multiple of `PAGE_BYTES`, as long for any ``checksums_crc``.

    Raises:
        ConfigError: The header would be longer than is allowed.
    """
    values = {
        "format": "engram-table",
        **geometry.to_dict(),
        # Of a fixed length: the header is written last, into room that was left for it.
        "checksums": {"algorithm": "crc32", "crc32": f"{checksums_crc:08x}"},
        "spec_digest": spec_digest,
        "hash_spec": hash_spec,
        "provenance": provenance,
    }
    text = json.dumps(_exact(values), separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-(_PREFIX.size + len(text)) % PAGE_BYTES)
    if len(text) > _LONGEST_HEADER_BYTES:
        raise ConfigError(
            f"the header of a packed table takes {len(text)} bytes, allowed are {_LONGEST_HEADER_BYTES}; shorten its "
            "provenance"
        )
    prefix = _PREFIX.pack(MAGIC, VERSION, 0, len(text), zlib.crc32(text), 0)[: -_CRC.size]
    return prefix + _CRC.pack(zlib.crc32(prefix)) + text


def read_checksums(header: PackedHeader) -> list[int]:
    """Read the CRC-32 of every chunk.

    Raises:
        CheckpointError: The table of checksums is damaged or gone.
    """
    size = _CRC.size * header.geometry.num_chunks
    try:
        with open(header.path, "rb") as file:
            file.seek(header.checksums_start)
            data = file.read(size)
    except OSError as error:
        raise CheckpointError(f"cannot read {header.path}: {error.strerror}") from error
    if len(data) != size or zlib.crc32(data) != header.checksums_crc:
        raise CheckpointError(
            f"{header.path}: the table of checksums at byte {header.checksums_start} is damaged; copy the file again"
        )
    return [crc for (crc,) in _CRC.iter_unpack(data)]


def encode_checksums(checksums: list[int]) -> bytes:
    """Return the table of checksums."""
    return b"".join(map(_CRC.pack, checksums))


def parse_packed_prefix(prefix: bytes, path: str, size: int) -> int:
    """Check the first `PREFIX_BYTES` of a packed file and return the length of the header that follows them.

    Args:
        prefix: These bytes, or fewer where the file has no more.
        path: What messages call the file.
        size: Bytes of the whole file.

    Raises:
        CheckpointError: Not a packed file, of another version, damaged or truncated.
    """
    if prefix[: len(MAGIC)] != MAGIC:
        raise CheckpointError(
            f"{path} is not a packed table: it begins with {prefix[:8]!r}, expected {MAGIC!r}; "
            "`engram-lm table convert` makes packed tables of checkpoints"
        )
    if len(prefix) < PREFIX_BYTES:
        raise CheckpointError(
            f"{path} is truncated: expected {PREFIX_BYTES} bytes and a header, found {len(prefix)} bytes; copy the "
            "file again"
        )
    _, version, reserved, length, _, crc = _PREFIX.unpack(prefix)
    if zlib.crc32(prefix[: -_CRC.size]) != crc:
        raise CheckpointError(f"{path}: the first {_PREFIX.size} bytes are damaged; copy the file again")
    if version != VERSION or reserved:
        raise CheckpointError(
            f"{path} has version {version} of the format, known is {VERSION}; it was written by a newer engram-lm"
        )
    if length > min(_LONGEST_HEADER_BYTES, size - _PREFIX.size) or (_PREFIX.size + length) % PAGE_BYTES:
        raise CheckpointError(
            f"{path} is truncated or damaged: its header takes {length} bytes, found {size} bytes in all (at most "
            f"{_LONGEST_HEADER_BYTES} are allowed); copy the file again"
        )
    return length


def _parse(text: bytes, path: str, data_start: int) -> PackedHeader:
    """Check the header by itself."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("a key stands twice")
        return values

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number")

    try:
        values = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
        if not isinstance(values, dict) or values.get("format") != "engram-table":
            raise ValueError("it is not that of a packed table")
        geometry = _geometry(values)
        for name, expected in geometry.to_dict().items():
            if _number(values.get(name)) != expected:
                raise ValueError(f"{name} is {values.get(name)!r:.100}, its geometry gives {expected}")
        checksums = _object(values, "checksums")
        if checksums.get("algorithm") != "crc32":
            raise ValueError(f"checksums by {checksums.get('algorithm')!r:.100} are unknown, known is crc32")
        crc = checksums.get("crc32")
        if not isinstance(crc, str) or len(crc) != 8:
            raise ValueError(f"the checksum {crc!r:.100} is not eight hexadecimal digits")
        digest = values.get("spec_digest")
        if digest is not None and not isinstance(digest, str):
            raise ValueError(f"spec_digest is {digest!r:.100}")
        spec = None if values.get("hash_spec") is None else _object(values, "hash_spec")
        provenance = _object(values, "provenance")
        return PackedHeader(path, geometry, data_start, int(crc, 16), digest, spec, provenance)
    except (ValueError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{path}: the header cannot be read: {error!s:.300}") from error


def _geometry(values: dict[str, Any]) -> PackedGeometry:
    num_rows, width, codec = _number(values.get("num_rows")), _number(values.get("width")), _object(values, "codec")
    # The bound is larger than any file.
    if not isinstance(num_rows, int) or not isinstance(width, int) or not (0 < num_rows < 2**48 and 0 < width < 2**48):
        raise ValueError(f"num_rows is {num_rows!r:.100} and width {width!r:.100}")
    numbers, scale, table_scale = codec.get("numbers"), codec.get("scale"), codec.get("table_scale")
    if numbers not in tuple(_DTYPES):
        raise ValueError(f"numbers of type {numbers!r:.100} are unknown, known are {', '.join(_DTYPES)}")
    if scale not in ("none", "table", "blocks") or not isinstance(table_scale, int | float):
        raise ValueError(f"scale {scale!r:.100} with table_scale {table_scale!r:.100}")
    return PackedGeometry(RowCodec(width, _DTYPES[numbers], scale, float(table_scale)), num_rows)


def _object(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name)
    if not isinstance(found, dict):
        raise ValueError(f"{name} is {found!r:.100}, expected an object")
    return found


def _number(value: object) -> object:
    """Undo `_exact` for one number."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        return int(value)
    # bool is an int to Python: a row count of true is none.
    return None if isinstance(value, bool) else value


def _exact(value: Any) -> Any:
    """Replace integers that doubles cannot hold by strings, as many readers of JSON know nothing but doubles."""
    if isinstance(value, Mapping):
        return {str(name): _exact(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_exact(item) for item in value]
    return str(value) if isinstance(value, int) and abs(value) >= _EXACT else value
