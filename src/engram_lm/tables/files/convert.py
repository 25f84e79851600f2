"""The tables of a checkpoint become packed files: copied as they are, or rounded to another type."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.tables.codec import RowCodec
from engram_lm.tables.files.build import build_packed, provenance_of
from engram_lm.tables.files.packed import PackedHeader, read_packed_header
from engram_lm.tables.files.row_error import RowError, measure_row_error
from engram_lm.tables.files.safetensors_file import local_header
from engram_lm.tables.files.sources import choose_layout, find_tables
from engram_lm.tables.layout import RowLayout

__all__ = ["Converted", "Progress", "convert", "packed_name"]

Progress = Callable[[int | str, int, int], None]
"""Called with the layer, bytes written so far and bytes in all."""

ERROR_ROWS = 2**17
"""Rows that the error of a conversion is measured on by default."""


@dataclasses.dataclass(frozen=True)
class Converted:
    """One table that has been converted."""

    layer: int | str
    """Block number, or the table's name."""
    path: Path
    """The packed file."""
    source: RowLayout
    """The table it was made from."""
    header: PackedHeader
    """The packed table."""
    kept: bool
    """Whether the file was there already, made from the same source, and was left alone."""
    error: RowError | None
    """What rounding cost; None where rows were copied as they are."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values, with the bytes of all records before (``source_bytes``) and now."""
        before, now = self.source.stored_bytes, self.header.records_bytes
        return {
            "layer": self.layer,
            "path": str(self.path),
            "num_rows": self.header.num_rows,
            "width": self.header.codec.width,
            "source_codec": str(self.source.codec),
            "codec": str(self.header.codec),
            "source_bytes": before,
            "stored_bytes": now,
            "bytes_saved": before - now,
            "file_bytes": self.header.file_bytes,
            "kept": self.kept,
            "error": None if self.error is None else dataclasses.asdict(self.error),
        }


def convert(
    source: str | os.PathLike[str],
    target_folder: str | os.PathLike[str],
    *,
    layer: int | str | None = None,
    dtype: str | None = None,
    resume: bool = True,
    progress: Progress = lambda layer, done, total: None,
    error_rows: int | None = ERROR_ROWS,
    spec_digest: str | None = None,
    hash_spec: Mapping[str, Any] | None = None,
) -> list[Converted]:
    """Write each table of a checkpoint as a packed file, ``layer-L.safetensors``, in bounded memory.

    Without ``dtype`` every record is copied as it is: the 8-bit floats and scales of a DeepSeek-V4.1 table come to lie
    side by side and keep every bit. An interrupted call leaves nothing under the final names; the next one continues
    where it stopped, if source and target are still the same.

    Args:
        source: What `find_tables` opens, on this machine.
        target_folder: The folder for the packed files, which may hold other packed tables.
        layer: The one table to convert; all where None.
        dtype: One of `CODEC_NAMES`; as stored where None.
        resume: Whether to continue the work of an interrupted call, and to leave finished files alone.
        progress: Called whenever some bytes are done.
        error_rows: Rows to measure the error of rounding on, drawn evenly; all (2 ** 24 at most) where None.
        spec_digest: Digest of the HashSpec that addresses the rows; the source's own where None.
        hash_spec: That HashSpec, as JSON values.

    Raises:
        CheckpointError: The source is damaged (a packed one is compared with its checksums) or holds no table, a number
            does not fit the type, or another process is writing the same file.
        ConfigError: No such layer or type, a source on a server, or a target folder that holds a checkpoint.
        OSError: The folder cannot be written, or the disk is full.
    """
    layouts = find_tables(source)
    if layer is not None:
        chosen = choose_layout(layouts, layer, str(source))
        layouts = {key: layout for key, layout in layouts.items() if layout is chosen}
    if error_rows is not None and error_rows < 1:
        raise ConfigError(f"the error is measured on at least 1 row, not {error_rows}")
    folder = Path(target_folder)
    # Before the first is written: a wrong type should not be noticed after hours.
    codecs = {
        key: layout.codec if dtype is None else RowCodec.named(dtype, layout.codec.width)
        for key, layout in layouts.items()
    }
    _check_target(folder, layouts)
    results = []
    for key, layout in layouts.items():
        codec, path = codecs[key], folder / packed_name(key)
        about = {
            "spec_digest": spec_digest or layout.spec_digest,
            "hash_spec": hash_spec,
            "provenance": provenance_of(layout, source, "convert", layer=key),
        }
        header = _finished(path, codec, about) if resume else None
        kept = header is not None
        if header is None:
            try:
                header = build_packed(
                    path,
                    layout,
                    codec=codec,
                    resume_key=layout.identity if resume else None,
                    on_progress=functools.partial(progress, key, total=layout.num_rows * codec.record_bytes),
                    **about,
                )
            except CheckpointError as error:
                raise CheckpointError(f"layer {key}, {error}") from error
        rounded = codec != layout.codec
        rounding = measure_row_error(layout, header.layout, sample=error_rows) if rounded else None
        results.append(Converted(key, path, layout, header, kept, rounding))
    return results


def packed_name(key: int | str) -> str:
    """Name of the packed file of a table, as `find_tables` understands it."""
    return f"layer-{key}.safetensors" if isinstance(key, int) else f"{key}.safetensors"


def _check_target(folder: Path, layouts: Mapping[int | str, RowLayout]) -> None:
    """Refuse a folder whose own files would be replaced, or could not be told from packed tables afterwards."""
    for key, layout in layouts.items():
        if any(os.path.realpath(file) == os.path.realpath(folder / packed_name(key)) for file in layout.files):
            raise ConfigError(f"{folder / packed_name(key)} is the source itself; name another folder")
    targets = {packed_name(key) for key in layouts}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in targets and not local_header(path).is_packed:
            raise ConfigError(f"{folder} holds a checkpoint ({path.name}); name a folder for packed tables alone")


def _finished(path: Path, codec: RowCodec, about: Mapping[str, Any]) -> PackedHeader | None:
    """The header of the file, if it is what this conversion would write."""
    try:
        header = read_packed_header(path)
    except CheckpointError:
        return None
    return header if header.codec == codec and all(getattr(header, name) == about[name] for name in about) else None
