"""Packed tables made from those of a checkpoint, copied as they are or rounded to another type, or of random rows."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.files import user_path
from engram_lm.tables.codec import RowCodec
from engram_lm.tables.files.packed import PackedHeader, read_packed_header
from engram_lm.tables.files.packed_writer import write_packed
from engram_lm.tables.files.row_error import RowError, measure_row_error
from engram_lm.tables.files.safetensors_file import local_header
from engram_lm.tables.files.sources import choose_layout, find_tables
from engram_lm.tables.files.verify import checked_records
from engram_lm.tables.layout import RowLayout

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
    """Write each table of a checkpoint, or that of ``layer``, as a packed file, ``layer-L.safetensors``.

    Without ``dtype``, one of `CODEC_NAMES`, every record is copied as it is: the 8-bit floats and scales of a
    DeepSeek-V4.1 table come to lie side by side and keep every bit. An interrupted call leaves nothing under the final
    names; the next one continues where it stopped and leaves finished files alone, if source and target are still the
    same and it may ``resume``. The error of rounding is measured on ``error_rows`` drawn evenly; on all (2 ** 24 at
    most) where None.

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
    folder = user_path(target_folder)
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
                    on_progress=lambda done, key=key, total=layout.num_rows * codec.record_bytes: progress(
                        key, done, total
                    ),
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


def build_packed(
    path: str | os.PathLike[str], layout: RowLayout, *, codec: RowCodec | None = None, **options: Any
) -> PackedHeader:
    """Write one table as a packed file, with rows of ``codec`` (as they are where None); options are `write_packed`'s.

    Raises:
        CheckpointError: The source is damaged, or holds a number that the codec cannot store.
        ConfigError: A codec of another width than the rows have.
        OSError: The folder cannot be written or the disk is full; nothing new stands under ``path`` then.
    """
    target = layout.codec if codec is None else codec
    if target.width != layout.codec.width:
        raise ConfigError(f"the rows have {layout.codec.width} numbers, the codec {target.width}")
    load = checked_records(layout)

    def records(start: int, stop: int) -> Tensor:
        try:
            return target.reencode(load(start, stop), layout.codec)
        except CheckpointError as error:
            raise CheckpointError(f"rows {start} to {stop - 1}: {error}") from error

    return write_packed(path, records, target, layout.num_rows, **options)


def provenance_of(layout: RowLayout, source: object, verb: str, **more: Any) -> dict[str, Any]:
    """Return what the header of a packed table that a verb of ``engram-lm table`` makes says of its origin."""
    return {
        "made_by": f"engram-lm table {verb}",
        "source": str(source),
        "source_identity": layout.identity,
        "source_codec": str(layout.codec),
        **more,
    }


def build_random(
    path: str | os.PathLike[str],
    num_rows: int,
    codec: RowCodec,
    *,
    std: float = 1.0,
    seed: int = 0,
    spec_digest: str | None = None,
    hash_spec: Mapping[str, Any] | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> PackedHeader:
    """Write a table of normally distributed rows, the same for the same seed; the last options are `write_packed`'s.

    Raises:
        ConfigError: An impossible number of rows, seed or deviation (above 0: keys made from rows are normalized).
        CheckpointError: The codec cannot hold numbers of that size.
        OSError: The folder cannot be written or the disk is full; nothing new stands under ``path`` then.
    """
    if not 0 < std < float("inf"):
        raise ConfigError(f"the standard deviation is a number above 0, not {std}")
    if seed < 0:
        raise ConfigError(f"the seed is 0 or more, not {seed}")

    def records(start: int, stop: int) -> Tensor:
        # Each chunk, which is what is asked for, has a generator of its own.
        state = np.random.SeedSequence([seed, start]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state) >> 1)
        return codec.encode(torch.randn(stop - start, codec.width, generator=generator) * std)

    # As a string where readers of JSON that know only doubles would round it.
    told = seed if seed < 2**53 else str(seed)
    provenance = {"made_by": "engram-lm table build", "distribution": "normal", "std": std, "seed": told}
    return write_packed(
        path,
        records,
        codec,
        num_rows,
        spec_digest=spec_digest,
        hash_spec=hash_spec,
        provenance=provenance,
        on_progress=on_progress,
    )
