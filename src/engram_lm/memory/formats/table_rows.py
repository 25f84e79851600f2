"""Where the tables of a checkpoint meet the hash that addresses them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engram_lm.errors import CheckpointError, EngramError
from engram_lm.hashing import HashSpec
from engram_lm.tables import RowLayout

__all__ = ["check_table_rows", "checked_spec", "spec_beside"]


def spec_beside(source: str | os.PathLike[str]) -> HashSpec | None:
    """Read the HashSpec of the ``config.json`` in a checkpoint folder; None where there is none that can be read.

    Args:
        source: What holds the tables: a folder, or a file in one.
    """
    path = Path(source)
    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file():
        return None
    try:
        return HashSpec.from_config(folder)
    except (EngramError, OSError):
        return None


def check_table_rows(layouts: Mapping[int | str, RowLayout], spec: HashSpec, source: object) -> None:
    """Refuse tables that have other rows than their hash addresses.

    Args:
        layouts: Block number, or name, to table; see `engram_lm.tables.table_layouts`.
        spec: The hash that the checkpoint's configuration describes.
        source: What messages call the checkpoint.

    Raises:
        CheckpointError: A table of a layer that the configuration does not name, or one of another number of rows.
    """
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


def checked_spec(source: str | os.PathLike[str], layouts: Mapping[int | str, RowLayout]) -> dict[str, Any]:
    """Check the tables of a checkpoint, and return what the headers of packed copies say of their hash.

    Args:
        source: The checkpoint, see `spec_beside`.
        layouts: All of its tables.

    Returns:
        ``spec_digest`` and ``hash_spec``; empty where no HashSpec is known.

    Raises:
        CheckpointError: As `check_table_rows`.
    """
    spec = spec_beside(source)
    if spec is None:
        return {}
    check_table_rows(layouts, spec, source)
    return {"spec_digest": spec.digest, "hash_spec": spec.to_dict()}
