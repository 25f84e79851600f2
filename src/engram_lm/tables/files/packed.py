"""The packed table: a safetensors file in which the whole record of a row lies in one place, with checksums.

``docs/format.md`` specifies it and gives the reason for every rule. This file says what the bytes mean and opens them;
``packed_writer.py`` writes them.
"""

import dataclasses
import json
import os
import re
import zlib
from collections.abc import Mapping
from typing import Any

import torch

from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.files import parse_json
from engram_lm.tables.codec import RowCodec
from engram_lm.tables.files.byte_source import LocalFile
from engram_lm.tables.files.safetensors_file import PACKED_FAMILY, TensorHeader, local_header
from engram_lm.tables.files.safetensors_writer import encode_header
from engram_lm.tables.layout import Extent, Part, RowLayout

PACKED_FORMAT = f"{PACKED_FAMILY}1"
"""What the metadata of a packed table says under ``format``."""

_ALIGNMENT = 4096  # what operating systems and drives read at once
_CHUNK_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedHeader:
    """What a packed table says of itself, and where its rows and checksums lie."""

    file: str
    """Path or address of the file."""
    codec: RowCodec
    """What a record means."""
    num_rows: int
    """Rows in the table, at least 1."""
    spec_digest: str | None = None
    """Digest of the HashSpec that addresses the rows, where it is known."""
    hash_spec: Mapping[str, Any] | None = None
    """The HashSpec itself, as ``HashSpec.to_dict`` gives it, where it is known."""
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Where the rows came from, as JSON values. For people: no reader depends on it."""
    records_start: int = 0
    """First byte of the first record in the file."""
    checksums_start: int = 0
    """First byte of the checksums in the file."""
    checksums_crc: int = 0
    """CRC-32 of the checksums."""

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise ConfigError(f"a table has at least one row, not {self.num_rows}")

    @property
    def chunk_rows(self) -> int:
        """Rows under one checksum in every chunk but the last: as many as fit 4 MiB, at least one."""
        return max(1, _CHUNK_BYTES // self.codec.record_bytes)

    @property
    def num_chunks(self) -> int:
        """Number of chunks, each with its checksum."""
        return -(-self.num_rows // self.chunk_rows)

    def chunk(self, index: int) -> tuple[int, int]:
        """First row of a chunk, and one past its last."""
        return index * self.chunk_rows, min((index + 1) * self.chunk_rows, self.num_rows)

    def chunk_bytes(self, index: int) -> tuple[int, int]:
        """First byte of a chunk in the file, and one past its last."""
        first, last = self.chunk(index)
        return self.records_start + first * self.codec.record_bytes, self.records_start + last * self.codec.record_bytes

    @property
    def records_bytes(self) -> int:
        """Bytes of all records."""
        return self.num_rows * self.codec.record_bytes

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file, in which the records come last."""
        return self.records_start + self.records_bytes

    @property
    def layout(self) -> RowLayout:
        """The table, as tiers open it."""
        extent = Extent(self.file, self.records_start, self.num_rows, self.codec.record_bytes)
        return RowLayout(self.codec, (Part(self.codec.record_bytes, (extent,)),), spec_digest=self.spec_digest)

    def describe(self) -> dict[str, Any]:
        """Return sizes, codec, digest, HashSpec and provenance as JSON values."""
        return {
            "path": self.file,
            "num_rows": self.num_rows,
            "width": self.codec.width,
            "codec": self.codec.to_dict(),
            "record_bytes": self.codec.record_bytes,
            "bytes_per_number": self.codec.record_bytes / self.codec.width,
            "file_bytes": self.file_bytes,
            "chunk_rows": self.chunk_rows,
            "num_chunks": self.num_chunks,
            "spec_digest": self.spec_digest,
            "hash_spec": self.hash_spec,
            "provenance": self.provenance,
        }

    def placed(self) -> "PackedHeader":
        """Return the header with the places that a new file gives its rows and checksums."""
        _, places = self._encode()
        return dataclasses.replace(self, records_start=places["records"][0], checksums_start=places["crc32"][0])

    def encode(self) -> bytes:
        """Return what stands before the checksums; it has the same length for every ``checksums_crc``."""
        data, _ = self._encode()
        return data.replace(_stated(0), _stated(zlib.crc32(data[8:])), 1)

    def _encode(self) -> tuple[bytes, dict[str, tuple[int, int]]]:
        metadata = {
            "format": PACKED_FORMAT,
            "header_crc32": f"{0:08x}",
            "checksums_crc32": f"{self.checksums_crc:08x}",
            **self._sizes(),
            "codec": json.dumps(self.codec.to_dict()),
            "provenance": json.dumps(self.provenance),
        }
        if self.spec_digest is not None:
            metadata["spec_digest"] = self.spec_digest
        if self.hash_spec is not None:
            metadata["hash_spec"] = json.dumps(self.hash_spec)
        tensors = {
            "crc32": (torch.uint32, (self.num_chunks,)),
            "records": (torch.uint8, (self.num_rows, self.codec.record_bytes)),
        }
        return encode_header(tensors, metadata, aligned="records", alignment=_ALIGNMENT)

    def _sizes(self) -> dict[str, str]:
        sizes = {"num_rows": self.num_rows, "record_bytes": self.codec.record_bytes, "chunk_rows": self.chunk_rows}
        return {name: str(size) for name, size in sizes.items()}


def read_packed_header(path: str | os.PathLike[str]) -> PackedHeader:
    """Read what a packed table on this machine says of itself, and check every number of it against the file.

    It costs the header only. A `CheckpointError` says that the file is missing, cut, no packed table, or damaged in its
    header; the rows are checked by `verify_packed`.
    """
    return parse_packed_header(local_header(path), str(path))


def packed_layout(path: str | os.PathLike[str]) -> RowLayout:
    """Describe the table of a packed file; see `read_packed_header`."""
    return read_packed_header(path).layout


def parse_packed_header(header: TensorHeader, file: str) -> PackedHeader:
    """Check the header of a packed table, which stands at the path or address ``file``; see `read_packed_header`."""
    metadata, found = header.metadata, header.metadata.get("format")
    if not header.is_packed:
        raise CheckpointError(
            f"{file} is not a packed table: its format is {found!r:.100}, expected {PACKED_FORMAT!r}; "
            "`engram-lm table convert` makes packed tables of checkpoints"
        )
    if found != PACKED_FORMAT:
        raise CheckpointError(
            f"{file} has the format {found!r:.100}, known is {PACKED_FORMAT!r}; it was written by another version of "
            "engram-lm"
        )
    crcs = []
    for name in ("header_crc32", "checksums_crc32"):
        if not re.fullmatch("[0-9a-f]{8}", text := metadata.get(name, "")):
            raise CheckpointError(f"{file}: {name} is {text!r:.100}, expected eight hexadecimal digits; copy it again")
        crcs.append(int(text, 16))
    header_crc, checksums_crc = crcs
    if zlib.crc32(header.text.replace(_stated(header_crc), _stated(0), 1)) != header_crc:
        raise CheckpointError(
            f"{file}: the header is damaged: its checksum is not the one that it states; copy the file again, or "
            "convert its source again"
        )
    try:
        return _parse(header, file, checksums_crc)
    except ConfigError as error:
        raise CheckpointError(f"{file}: the header of this packed table cannot be right: {error!s:.400}") from error


def _parse(header: TensorHeader, file: str, checksums_crc: int) -> PackedHeader:
    metadata, tensors = header.metadata, header.tensors
    if missing := {"codec", "provenance"} - metadata.keys():
        raise ConfigError(f"its metadata lacks {sorted(missing)}")
    objects = {
        name: parse_json(metadata[name], f"{name} of {file}", advice="copy the file again")
        for name in ("codec", "provenance", "hash_spec")
        if name in metadata
    }
    if tensors.keys() != {"records", "crc32"}:
        raise ConfigError(f"it holds the tensors {sorted(tensors)!s:.200}, expected crc32 and records")
    records, checksums = tensors["records"], tensors["crc32"]
    codec = RowCodec.from_dict(objects["codec"])
    if records.dtype != "U8" or len(records.shape) != 2 or records.shape[1] != codec.record_bytes:
        raise ConfigError(f"{records}: expected U8 [rows, {codec.record_bytes}] for records of {codec}")
    packed = PackedHeader(
        file=file,
        codec=codec,
        num_rows=records.shape[0],
        spec_digest=metadata.get("spec_digest"),
        hash_spec=objects.get("hash_spec"),
        provenance=objects["provenance"],
        records_start=records.start_bytes,
        checksums_start=checksums.start_bytes,
        checksums_crc=checksums_crc,
    )
    for name, expected in packed._sizes().items():
        if metadata.get(name) != expected:
            raise ConfigError(f"{name} is {metadata.get(name)!r:.100}, its tensors and codec give {expected}")
    if (checksums.dtype, checksums.shape) != ("U32", (packed.num_chunks,)):
        raise ConfigError(f"{checksums}: expected U32 [{packed.num_chunks}], a checksum for each chunk")
    return packed


def read_checksums(header: PackedHeader) -> list[int]:
    """Read the CRC-32 of every chunk; a `CheckpointError` where they are damaged or cannot be read."""
    size = 4 * header.num_chunks
    try:
        data = LocalFile(header.file).read(header.checksums_start, header.checksums_start + size)
    except OSError as error:
        raise CheckpointError(f"cannot read {header.file}: {error.strerror}") from error
    if len(data) != size or zlib.crc32(data) != header.checksums_crc:
        raise CheckpointError(
            f"{header.file}: the checksums at byte {header.checksums_start} are damaged; copy the file again"
        )
    return [int.from_bytes(data[at : at + 4], "little") for at in range(0, size, 4)]


def _stated(crc: int) -> bytes:
    """How a header states its own checksum; it is computed over a header that states 0."""
    return f'"header_crc32":"{crc:08x}"'.encode()
