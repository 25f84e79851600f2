"""What is on disk before a model is loaded from it: files that are whole, tensors that are there.

transformers loads what it finds: a missing tensor becomes random numbers and a warning. Here it is an error.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engram_lm.errors import CheckpointError
from engram_lm.tables import StoredTensor, TensorFolder
from engram_lm.tables.files.safetensors_file import INDEX_NAME, read_header

__all__ = ["TABLES", "check_files", "check_index", "check_missing"]

TABLES = "memory_tables"
"""Name of the model's module that holds the tables."""

_NAMES_SHOWN = 8


def check_index(folder: Path) -> None:
    """Refuse the index of a local checkpoint that cannot be read or points out of its folder.

    Raises:
        CheckpointError: The index is malformed, or names files outside the folder. A folder needs no index.
    """
    if (folder / INDEX_NAME).is_file() and not (folder / "model.safetensors").is_file():
        TensorFolder(folder)


def check_files(files: Sequence[str] | None, metadata: Mapping[str, Any] | None) -> dict[str, StoredTensor]:
    """Read the headers of a checkpoint's files and compare them with the files' sizes and with the index.

    Args:
        files: The files, as transformers found or downloaded them. Only safetensors files are looked into.
        metadata: What transformers keeps of the index; None where there is one file.

    Returns:
        Tensor name to place; empty for checkpoints of other formats.

    Raises:
        CheckpointError: A file is missing, truncated, longer than it says or malformed, or lacks a tensor that the
            index says it has.
    """
    paths = [Path(file) for file in files or () if str(file).endswith(".safetensors")]
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        if not path.exists():
            raise CheckpointError(
                f"{path} is missing: the checkpoint's {INDEX_NAME} names {len(paths)} files; download it again"
            )
        tensors |= read_header(path)
    for name, file in ((metadata or {}).get("weight_map") or {}).items():
        if paths and (name not in tensors or Path(tensors[name].file).name != Path(file).name):
            raise CheckpointError(f"{file} does not hold {name}, although {INDEX_NAME} says so; download both again")
    return tensors


def check_missing(missing: Iterable[str], tied: Mapping[str, str], prefix: str, present: Iterable[str]) -> None:
    """Refuse a checkpoint that lacks weights of the model.

    Args:
        missing: Names that the model has and the checkpoint has not.
        tied: Name to the name that it shares its weight with; only the latter is stored.
        prefix: What names of the base model begin with, as ``"model."``; empty for the base model itself.
        present: Names that the checkpoint has.

    Raises:
        CheckpointError: With the names. What stands on a base model may be missing where the checkpoint is one.
    """
    missing = set(missing)
    missing = {name for name in missing if tied.get(name, name) in missing}
    if prefix and not any(name.startswith(prefix) for name in present):
        missing = {name for name in missing if name.startswith(prefix)}
    if missing:
        names = sorted(missing)
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        elsewhere = any(TABLES in name.split(".") for name in names)
        raise CheckpointError(
            f"the checkpoint lacks {len(names)} tensors of the model that its configuration describes: "
            f"{', '.join(names[:_NAMES_SHOWN])}{more}. Download it again, or "
            f"{'say with table_source= where its tables lie, or ' if elsewhere else ''}pass "
            "ignore_mismatched_sizes=True to begin with random ones instead"
        )
