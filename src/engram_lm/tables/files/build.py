"""Packed tables made without a conversion: of one table of a checkpoint, or of random rows."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_lm.errors import ConfigError
from engram_lm.tables.codec import RowCodec
from engram_lm.tables.files.packed import PackedGeometry, PackedHeader
from engram_lm.tables.files.packed_writer import write_packed
from engram_lm.tables.files.verify import checked_records
from engram_lm.tables.layout import RowLayout

__all__ = ["build_packed", "build_random"]


def build_packed(
    path: str | os.PathLike[str],
    layout: RowLayout,
    *,
    codec: RowCodec | None = None,
    on_progress: Callable[[int], None] = lambda num_bytes: None,
    **about: Any,
) -> PackedHeader:
    """Write one table as a packed file of any name; what `convert` does for a whole checkpoint, in one go.

    Args:
        path: The file to create or replace.
        layout: The table.
        codec: How to store its rows; as they are where None.
        on_progress: Called with the bytes just written.
        **about: ``spec_digest``, ``hash_spec`` and ``provenance``, see `write_packed`.

    Raises:
        CheckpointError: The source is damaged, or holds a number that the codec cannot.
        OSError: The folder cannot be written or the disk is full; nothing new stands under ``path`` then.
    """
    target = layout.codec if codec is None else codec
    if target.width != layout.codec.width:
        raise ConfigError(f"the rows have {layout.codec.width} numbers, the codec {target.width}")
    load = checked_records(layout)
    return write_packed(
        path,
        lambda start, stop: target.reencode(load(start, stop), layout.codec),
        target,
        layout.num_rows,
        on_progress=on_progress,
        **about,
    )


def build_random(
    path: str | os.PathLike[str],
    num_rows: int,
    codec: RowCodec,
    *,
    std: float = 1.0,
    seed: int = 0,
    spec_digest: str | None = None,
    hash_spec: Mapping[str, Any] | None = None,
    on_progress: Callable[[int], None] = lambda num_bytes: None,
) -> PackedHeader:
    """Write a table of normally distributed rows, the same ones for the same seed.

    Args:
        path: The file to create or replace.
        num_rows: Rows.
        codec: How they are stored.
        std: Standard deviation; not 0, as keys made of rows are normalized.
        seed: Of the draw.
        spec_digest: Digest of the HashSpec that addresses the rows.
        hash_spec: That HashSpec, as JSON values.
        on_progress: Called with the bytes just written.

    Raises:
        ConfigError: An impossible number of rows, deviation or seed.
        CheckpointError: The codec cannot hold numbers of that size.
        OSError: The folder cannot be written or the disk is full; nothing new stands under ``path`` then.
    """
    if not 0 < std < float("inf"):
        raise ConfigError(f"the standard deviation is a number above 0, not {std}")
    if seed < 0:
        raise ConfigError(f"the seed is a number from 0 on, not {seed}")
    geometry = PackedGeometry(codec, num_rows)

    drawn: dict[int, Tensor] = {}  # the chunk that was last drawn

    def records(start: int, stop: int) -> Tensor:
        # Each chunk has its own generator, so that rows do not depend on how many are asked for at once.
        pieces = []
        for index in range(start // geometry.chunk_rows, -(-stop // geometry.chunk_rows)):
            first, last = geometry.chunk(index)
            if index not in drawn:
                state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]
                generator = torch.Generator().manual_seed(int(state) >> 1)
                drawn.clear()
                drawn[index] = codec.encode(torch.randn(last - first, codec.width, generator=generator) * std)
            pieces.append(drawn[index][max(start - first, 0) : stop - first])
        return torch.cat(pieces)

    provenance = {"made_by": "engram-lm table build", "distribution": "normal", "std": std, "seed": seed}
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
