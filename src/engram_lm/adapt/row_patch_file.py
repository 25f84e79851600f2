"""The file of a row patch: one small safetensors file.

For each table it holds ``NAME.rows`` (int64 ``[N]``), ``NAME.before`` and ``NAME.after`` (``[N, width]``, of the
table's type), where NAME is ``shared`` or a block number. A joint edit adds what its facts want: ``edit.fact``,
``edit.rows``, ``edit.penalty`` and ``edit.shifts``, as `JointEdit` has them, so that a fact can be taken out later. The
metadata holds the format, the digest of the hash, the title and the facts. Equal patches make equal files. Nothing in a
file is taken on trust: see `read_patch`.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from engram_lm.adapt.fact_edit import FactEdit
from engram_lm.adapt.joint_edit import JointEdit
from engram_lm.adapt.row_change import Fact, RowChange
from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.files import replacing, user_path
from engram_lm.tables.files.safetensors_file import local_header
from engram_lm.tables.files.safetensors_writer import TensorWriter
from engram_lm.tables.stored_tensor import StoredTensor

_FORMAT = "engram.row_patch.1"
_PARTS = ("rows", "before", "after")
_EDIT_PARTS = ("fact", "rows", "penalty", "shifts")
_EDIT = "edit"
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
    edit: JointEdit | None,
) -> None:
    """Write a patch's file, atomically."""
    values = [dataclasses.asdict(fact) for fact in facts]
    metadata = {"format": _FORMAT, "hash_spec_digest": spec_digest, "title": title, "facts": json.dumps(values)}
    tensors = {f"{name}.{part}": getattr(change, part) for name, change in tables.items() for part in _PARTS}
    if edit is not None:
        metadata["edit"] = json.dumps({"tables": edit.tables, "facts": [fact.to_dict() for fact in edit.facts]})
        tensors |= {f"{_EDIT}.{part}": getattr(edit, part) for part in _EDIT_PARTS}
    promised = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with replacing(path) as aside, TensorWriter(aside, promised, metadata=metadata) as writer:
        for name, tensor in tensors.items():
            writer.append(name, tensor)


def read_patch(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a patch's file, check everything in it, and return the fields of a `RowPatch`, as `RowPatch.load` says."""
    path = user_path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}; a row patch is a file as RowPatch.save writes it")
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
    edit = _read_edit(path, metadata.get("edit"), header)
    tables = {}
    for name in _table_names(path, [name for name in header if not name.startswith(f"{_EDIT}.")]):
        try:
            tables[name] = RowChange(*(header[f"{name}.{part}"].load() for part in _PARTS))
        except ConfigError as error:
            raise CheckpointError(f"{path}, table {name}: {error}; download it again") from error
    if edit is not None:
        _check_edit(path, edit, tables)
    return {
        "spec_digest": digest,
        "tables": tables,
        "title": metadata.get("title", ""),
        "facts": _read_facts(path, metadata.get("facts", "[]")),
        "edit": edit,
    }


def _read_edit(path: Path, text: str | None, header: Mapping[str, StoredTensor]) -> JointEdit | None:
    """Read what the facts of a joint edit want; None where the patch is no joint edit."""
    names = {f"{_EDIT}.{part}" for part in _EDIT_PARTS}
    if text is None and not names & header.keys():
        return None
    try:
        if text is None or not names <= header.keys():
            raise ValueError(f"it does not have all of {sorted(names)} and their facts")
        values = json.loads(text)
        if (
            not isinstance(values, dict)
            or values.keys() != {"tables", "facts"}
            or not isinstance(values["facts"], list)
        ):
            raise ValueError("it has other keys than tables and facts")
        if not isinstance(values["tables"], list) or not all(isinstance(name, str) for name in values["tables"]):
            raise ValueError("its tables are no list of names")
        return JointEdit(
            facts=tuple(FactEdit.from_dict(fact) for fact in values["facts"]),
            tables=tuple(values["tables"]),
            **{part: header[f"{_EDIT}.{part}"].load() for part in _EDIT_PARTS},
        )
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: the edit cannot be read ({error!s:.300}); download it again") from error


def _check_edit(path: Path, edit: JointEdit, tables: Mapping[str, RowChange]) -> None:
    """Refuse an edit that uses rows or widths that the patch does not have."""
    # Before the loop, which takes time for every name: a hostile file could name a great many.
    if unknown := set(edit.tables) - tables.keys():
        raise CheckpointError(f"{path}: the edit is of table {min(unknown)!r:.50}, which the patch does not have")
    for name in dict.fromkeys(edit.tables):
        used = edit.uses(name)[2]
        if not len(used):
            continue
        fits = tables[name].before.shape[1] == edit.shifts.shape[2]
        if not fits or not bool(torch.isin(used, tables[name].rows).all()):
            raise CheckpointError(f"{path}: the edit uses rows of table {name!r:.50} that the patch does not have")


def _table_names(path: Path, header: Sequence[str]) -> list[str]:
    names = sorted({name.rpartition(".")[0] for name in header})
    expected = {f"{name}.{part}" for name in names for part in _PARTS}
    wrong = [name for name in names if name != "shared" and not (name.isascii() and name.isdecimal() and len(name) < 7)]
    if not names or wrong or expected != set(header) or ("shared" in names and len(names) > 1):
        raise CheckpointError(
            f"{path} does not hold rows, before and after for each table (a block number, or shared); found "
            f"{sorted(header)[:8]!s:.400}; download it again"
        )
    return names


def _read_facts(path: Path, text: str) -> tuple[Fact, ...]:
    try:
        values = json.loads(text)
        if not isinstance(values, list):
            raise ValueError("not a list of facts")
        return tuple(_fact(value) for value in values)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: the facts cannot be read ({error!s:.200}); download it again") from error


def _fact(value: Any) -> Fact:
    if not isinstance(value, dict) or value.keys() != _FACT.keys():
        raise ValueError(f"a fact has the keys {sorted(_FACT)}")
    for name, (kind, what) in _FACT.items():
        found = value[name]
        good = type(found) in kind
        if good and kind == _TOKENS:
            good = len(found) > 0 and all(type(token) is int and 0 <= token < 2**31 for token in found)
            value[name] = tuple(found)
        if not good or (kind == _NUMBER and not math.isfinite(found)):
            raise ValueError(f"{name} is {found!r:.100}, expected {what}")
    return Fact(**value)
