"""Where the tables of a checkpoint meet the hash that addresses them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engram_lm.errors import CheckpointError, EngramError
from engram_lm.hashing import HashSpec
from engram_lm.tables import RowLayout

__all__ = ["checked_spec"]


def checked_spec(source: str | os.PathLike[str], layouts: Mapping[int | str, RowLayout]) -> dict[str, Any]:
    """Compare the tables of a checkpoint with the hash in its ``config.json``, if it has one that can be read.

    Returns what the header of a packed copy says of the hash: ``spec_digest`` and ``hash_spec``; empty without one.

    Raises:
        CheckpointError: A table of a layer that the configuration does not name, or one of another number of rows than the
            hash addresses.
    """
    path = Path(source)
    try:
        spec = HashSpec.from_config(path if path.is_dir() else path.parent)
    except (EngramError, OSError):
        return {}
    expected: dict[int | str, int] = dict(zip(spec.blocks, spec.padded_rows, strict=True))
    if spec.shared_table:
        expected = {"shared": spec.padded_rows[0]}
    for key, layout in layouts.items():
        if key not in expected:
            raise CheckpointError(
                f"{source} holds a table of layer {key}, config.json describes those of {sorted(map(str, expected))}; "
                "the folder holds weights of another model"
            )
        if layout.num_rows != expected[key]:
            raise CheckpointError(
                f"{source}: the table of layer {key} has {layout.num_rows} rows, the hash in config.json addresses "
                f"{expected[key]}; the folder holds weights of another geometry"
            )
    return {"spec_digest": spec.digest, "hash_spec": spec.to_dict()}
