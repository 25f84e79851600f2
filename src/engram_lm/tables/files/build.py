"""One packed table: made from a table of a checkpoint, or of random rows."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.tables.codec import RowCodec
from engram_lm.tables.files.packed import PackedHeader
from engram_lm.tables.files.packed_writer import write_packed
from engram_lm.tables.files.verify import checked_records
from engram_lm.tables.layout import RowLayout

__all__ = ["build_packed", "build_random", "provenance_of"]


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
