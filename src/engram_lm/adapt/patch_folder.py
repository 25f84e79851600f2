"""Row patches that belong to a folder of a memory: ``patches/0001.safetensors`` and so on, beside its tables.

They are applied in the order of their names whenever the folder is loaded, over tables of any tier; the tables' files
are never written to. Each patch is written, replaced or removed in one step, so a process that is killed leaves it as
it was or as it should be. Commands that change several patches (``revert --all``, and ``--fact`` with facts of several)
may then leave some changed and others not.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from engram_lm.adapt.joint_edit import JointEdit
from engram_lm.adapt.row_change import Fact, RowChange, bits, same_bits
from engram_lm.adapt.row_patch_file import read_patch, write_patch
from engram_lm.errors import CheckpointError, ConfigError, MismatchError
from engram_lm.files import read_json, replacing_folder, user_path
from engram_lm.hashing import HashSpec
from engram_lm.model.table_place import TABLES, wanted_tables
from engram_lm.tables import OverlayTable, ParameterTable, Table, open_table
from engram_lm.tables.files.safetensors_file import INDEX_NAME, read_header

PATCHES = "patches"
"""Name of the folder in the folder."""


def patch_files(folder: Path) -> list[Path]:
    """List the patches of a memory's folder, in the order in which they are applied."""
    return sorted(path for path in (folder / PATCHES).glob("*.safetensors") if not path.name.startswith("."))


def with_patches(tables: dict[str, Table], folder: Path, spec: HashSpec) -> dict[str, Table]:
    """Put a folder's patches over its tables, or into those that are parameters, and return the tables.

    Raises:
        CheckpointError: A patch is malformed.
        MismatchError: A patch is for another hash, or for rows of another type or with other numbers.
    """
    for path in patch_files(folder):
        patch = read_patch(path)
        if patch["spec_digest"] != spec.digest:
            raise MismatchError(
                f"{path} was made for the hash {patch['spec_digest']}, this memory has {spec.digest}; remove the file"
            )
        for name, change in patch["tables"].items():
            if name not in tables:
                raise MismatchError(f"{path} changes table {name}, and this memory has {', '.join(tables)}")
            table = tables[name]
            _check(path, name, change, table)
            if isinstance(table, ParameterTable):
                table.store(change.rows, change.after)
                table.num_patches += 1
            elif isinstance(table, OverlayTable):
                table.replace(change.rows, change.after)
            else:
                tables[name] = OverlayTable(table, change.rows, change.after)
    return tables


def _check(path: Path, name: str, change: RowChange, table: Table) -> None:
    if int(change.rows[-1]) >= table.num_rows or (table.dtype, table.width) != (
        change.before.dtype,
        change.before.shape[1],
    ):
        raise MismatchError(
            f"{path} changes rows up to {int(change.rows[-1])} of {change.before.shape[1]} {change.before.dtype} "
            f"numbers, table {name} is read as {table.num_rows} rows of {table.width} {table.dtype} numbers; load the "
            "memory in the type that the patch was fitted in"
        )
    if not same_bits(table.stored(change.rows).cpu(), change.before):
        raise MismatchError(
            f"{path} expects other rows in table {name} than it has, also with the patches before it; take the patch "
            "out with `engram-lm patch revert`, and fit it again"
        )


def add_patch(
    folder: str | os.PathLike[str],
    *,
    spec: HashSpec,
    spec_digest: str,
    tables: Mapping[str, RowChange],
    title: str,
    facts: tuple[Fact, ...],
    edit: JointEdit | None,
) -> Path:
    """Add a patch to a folder with a memory, so that it is applied when the folder is loaded; returns its file.

    A patch that holds all the facts of one that is there takes its place.

    Raises:
        CheckpointError: A patch that is there is malformed.
        ConfigError: It changes rows that another patch changes, with facts of its own.
        MismatchError: It is for another memory, or expects other rows than the folder has.
        OSError: The folder cannot be written.
    """
    folder = user_path(folder)
    if spec_digest != spec.digest:
        raise MismatchError(f"the patch was made for the hash {spec_digest}, {folder} has {spec.digest}")
    own = set() if edit is None else {fact.prompt for fact in edit.facts}
    present = patch_files(folder)
    place = None
    for path in present:
        other = read_patch(path)
        theirs = set() if other["edit"] is None else {fact.prompt for fact in other["edit"].facts}
        if theirs and theirs <= own:
            if place is not None:
                raise ConfigError(
                    f"the patch holds the facts of {place.name} and of {path.name}; revert one of them first"
                )
            place = path
        elif any(
            name in other["tables"] and bool(torch.isin(change.rows, other["tables"][name].rows).any())
            for name, change in tables.items()
        ):
            raise ConfigError(
                f"the patch changes rows that {path} changes too; fit its facts with --earlier {path}, or revert that "
                "patch first"
            )
    # A model's numbers are read in the type that its configuration names, an adapter's as they are stored.
    loaded_as = read_json(folder / "config.json").get("dtype")
    for name, change in tables.items():
        if (stored := _stored_table(folder, name, spec)) is not None:
            try:
                if stored.dtype == change.before.dtype:
                    _check(folder / PATCHES, name, change, stored)
                elif str(change.before.dtype) != f"torch.{loaded_as or str(stored.dtype).removeprefix('torch.')}":
                    raise MismatchError(
                        f"the patch changes rows of {change.before.dtype} numbers, and table {name} of {folder} is "
                        f"stored in {stored.dtype}, so the folder could not be loaded with it; use the patch with "
                        "--patch, or fit it again with the memory in the type in which it is stored"
                    )
            finally:
                stored.close()
    if place is None:
        number = 1 + max((int(path.stem) for path in present if path.stem.isdecimal()), default=0)
        place = folder / PATCHES / f"{number:04d}.safetensors"
    write_patch(place, spec_digest=spec_digest, tables=tables, title=title, facts=facts, edit=edit)
    return place


def refuse_patches(folder: str | os.PathLike[str], what: str) -> None:
    """Refuse, by a `ConfigError`, to let something read a folder's tables that would not apply its patches."""
    if files := patch_files(user_path(folder)):
        raise ConfigError(
            f"{files[0]} and {len(files) - 1} more patches belong to {folder}, and {what} reads its tables alone; "
            f"write the patches into the tables first: engram-lm patch merge {folder} --fold"
        )


def fold_patches(folder: str | os.PathLike[str]) -> int:
    """Write a folder's patches into its tables for good: a folder with new table files takes its place in one step.

    A process that is killed leaves the folder as it was, or the new one. Files without patched rows are links to the
    same data where the file system has links, and copies elsewhere.

    Returns:
        The number of rows that were written.

    Raises:
        CheckpointError: A file is malformed.
        ConfigError: There are no patches, or a table is not stored as plain numbers of their type (packed, elsewhere).
        MismatchError: A patch expects other rows than the tables have.
        OSError: The folder cannot be written.
    """
    folder = user_path(folder).resolve()
    patches = [(path, read_patch(path)["tables"]) for path in patch_files(folder)]
    if not patches:
        raise ConfigError(f"there are no patches in {folder / PATCHES}")
    headers = {path: read_header(path) for path in sorted(folder.glob("*.safetensors"))}
    places = {name: (path, stored) for path, header in headers.items() for name, stored in header.items()}
    found = {}
    for name in {name for _, tables in patches for name in tables}:
        own = [full for full in places if full.endswith(f"{TABLES}.{name}.weight")]
        if len(own) != 1:
            raise ConfigError(
                f"{folder} does not hold table {name} as plain numbers; patches are folded into an adapter's or a "
                "model's own tables, not into packed ones or those of another place"
            )
        found[name] = places[own[0]]
    written = {path for path, _ in found.values()}
    num_rows = 0
    with replacing_folder(folder, lambda there: None) as aside:
        for path in folder.rglob("*"):
            if not path.is_file() or path.is_relative_to(folder / PATCHES):
                continue
            target = aside / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path in written:
                shutil.copyfile(path, target)
            else:
                try:
                    os.link(path, target)
                except OSError:
                    shutil.copyfile(path, target)
        for file, tables in patches:
            for name, change in tables.items():
                path, stored = found[name]
                if stored.torch_dtype != change.before.dtype or stored.shape[1] != change.before.shape[1]:
                    raise ConfigError(
                        f"{file} holds rows of {change.before.dtype}, {path} those of {stored.torch_dtype}; the "
                        "rows of a patch are folded into a table of their own type"
                    )
                row_bytes = stored.shape[1] * change.before.itemsize
                with (aside / path.name).open("r+b") as open_file:
                    for row, was, now in zip(change.rows.tolist(), change.before, change.after, strict=True):
                        open_file.seek(stored.start_bytes + row * row_bytes)
                        if row >= stored.shape[0] or open_file.read(row_bytes) != bits(was[None]).numpy().tobytes():
                            raise MismatchError(
                                f"row {row} of table {name} is not as {file} expects it; take the patch out with "
                                "`engram-lm patch revert`"
                            )
                        open_file.seek(stored.start_bytes + row * row_bytes)
                        open_file.write(bits(now[None]).numpy().tobytes())
                num_rows += change.num_rows
    return num_rows


def _stored_table(folder: Path, name: str, spec: HashSpec) -> Table | None:
    """Open a table of the folder where it lies; None where it is elsewhere."""
    if not any((folder / file).exists() for file in ("tables.safetensors", "model.safetensors", INDEX_NAME)):
        return None
    try:
        table = open_table(folder, layer=None if name == "shared" else int(name), tier="mmap")
    except (CheckpointError, ConfigError):
        return None
    if table.num_rows != wanted_tables(spec, table.width)[name].num_rows:
        table.close()
        return None
    return table
