"""The file of a row patch: one small safetensors file that says what changes, and whose rows the patch is for.

For each table it holds ``NAME.rows`` (int64 ``[N]``), ``NAME.before`` and ``NAME.after`` (``[N, width]``, of the
table's type), where NAME is ``shared`` or a block number. The metadata holds the format, the digest of the hash, the
title and the facts. Equal patches make equal files. Nothing in a file is taken on trust: see `read_patch`.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engram_lm.adapt.row_change import Fact, RowChange
from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.files import replacing
from engram_lm.tables.files.safetensors_file import StoredTensor, local_header
from engram_lm.tables.files.safetensors_writer import TensorWriter

__all__ = ["read_patch", "write_patch"]

_FORMAT = "engram.row_patch.1"
_PARTS = ("rows", "before", "after")
# A patch takes kilobytes. A larger file is of another kind, and is refused before it is read.
_LARGEST_FILE_BYTES = 1 << 30
_MOST_FACTS, _MOST_TOKENS = 10_000, 1_000_000
_NUMBER, _TOKENS = (int, float), (list,)
_FACT: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("prompt", "target"), ((str,), "a text")),
    **dict.fromkeys(("prompt_tokens", "target_tokens"), (_TOKENS, "a list of tokens")),
    **dict.fromkeys(("loss_before", "loss_after"), (_NUMBER, "a finite number")),
    "is_greedy": ((bool,), "true or false"),
}


def write_patch(
    path: str | os.PathLike[str],
    *,
    spec_digest: str,
    tables: Mapping[str, RowChange],
    title: str,
    facts: tuple[Fact, ...],
) -> None:
    """Write a patch's file, atomically.

    Raises:
        OSError: The file cannot be written.
    """
    values = [dataclasses.asdict(fact) for fact in facts]
    metadata = {"format": _FORMAT, "hash_spec_digest": spec_digest, "title": title, "facts": json.dumps(values)}
    tensors = {f"{name}.{part}": getattr(change, part) for name, change in tables.items() for part in _PARTS}
    promised = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with replacing(path) as aside, TensorWriter(aside, promised, metadata=metadata) as writer:
        for name, tensor in tensors.items():
            writer.append(name, tensor)


def read_patch(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a patch's file, check everything in it, and return the fields of a `RowPatch`.

    Raises:
        CheckpointError: The file is missing, larger than a patch may be, malformed, truncated or of another format; or
            its tensors have names, types or shapes that a patch does not have, rows out of order, or numbers that are
            not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}; a row patch is a file as RowPatch.save writes it")
    if (size := path.stat().st_size) > _LARGEST_FILE_BYTES:
        raise CheckpointError(
            f"{path} has {size} bytes, a row patch has at most {_LARGEST_FILE_BYTES}; name the file that RowPatch.save "
            "wrote"
        )
    whole = local_header(path)
    metadata, header = whole.metadata, whole.tensors
    if (found := metadata.get("format")) != _FORMAT:
        raise CheckpointError(
            f"{path} is not a row patch: expected format {_FORMAT!r}, found {found!r:.100}; name a file that "
            "RowPatch.save wrote"
        )
    digest = metadata.get("hash_spec_digest")
    if digest is None or len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise CheckpointError(f"{path} names no hash: hash_spec_digest is {digest!r:.100}; download it again")
    return {
        "spec_digest": digest,
        "tables": {name: _read_change(path, name, header) for name in _table_names(path, header)},
        "title": metadata.get("title", ""),
        "facts": _read_facts(path, metadata.get("facts", "[]")),
    }


def _table_names(path: Path, header: Mapping[str, StoredTensor]) -> list[str]:
    names = sorted({name.rpartition(".")[0] for name in header})
    expected = {f"{name}.{part}" for name in names for part in _PARTS}
    wrong = [name for name in names if name != "shared" and not (name.isascii() and name.isdecimal() and len(name) < 7)]
    if not names or wrong or expected != header.keys() or ("shared" in names and len(names) > 1):
        raise CheckpointError(
            f"{path} does not hold rows, before and after for each table (a block number, or shared); found "
            f"{sorted(header)[:8]!s:.400}; download it again"
        )
    return names


def _read_change(path: Path, name: str, header: Mapping[str, StoredTensor]) -> RowChange:
    try:
        return RowChange(*(header[f"{name}.{part}"].load() for part in _PARTS))
    except ConfigError as error:
        raise CheckpointError(f"{path}, table {name}: {error}; download it again") from error


def _read_facts(path: Path, text: str) -> tuple[Fact, ...]:
    try:
        values = json.loads(text)
        if not isinstance(values, list) or len(values) > _MOST_FACTS:
            raise ValueError("not a list of facts")
        return tuple(_fact(value) for value in values)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the facts cannot be read ({error!s:.200}); download it again") from error


def _fact(value: Any) -> Fact:
    if not isinstance(value, dict) or value.keys() != _FACT.keys():
        raise ValueError(f"a fact has the keys {sorted(_FACT)}")
    for name, (kind, what) in _FACT.items():
        found = value[name]
        good = type(found) in kind
        if good and kind == _TOKENS:
            good = 0 < len(found) <= _MOST_TOKENS and all(type(token) is int and 0 <= token < 2**31 for token in found)
            value[name] = tuple(found)
        if not good or (kind == _NUMBER and not math.isfinite(found)):
            raise ValueError(f"{name} is {found!r:.100}, expected {what}")
    return Fact(**value)
