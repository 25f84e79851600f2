"""Where a served model reads its tables from: chosen by ``--additional-config``, opened when the weights are loaded."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engram_lm.errors import CheckpointError, ConfigError, suggestion
from engram_lm.model.table_place import TABLES, TablePlace, WantedTable, stored_table
from engram_lm.tables import StoredTensor, Table, TensorFolder

OPTION = "engram_tables"
"""Key in vLLM's ``additional_config`` whose dictionary says where tables are read from."""

_FIELDS = sorted({field.name for field in dataclasses.fields(TablePlace)} - {"device"})


def table_place(additional_config: Mapping[str, Any], device: torch.device | str = "cpu") -> TablePlace:
    """Read where tables are to be read from.

    Args:
        additional_config: As vLLM was given it. Under `OPTION` it may hold the fields of `TablePlace` but ``device``:
            ``tier`` (``"auto"`` where left out), ``source`` (the checkpoint), ``cache_bytes`` (0), ``cache_policy``,
            ``pinned`` and ``read_ahead`` (true).
        device: Where tables of the tier ``"device"`` are put.

    Raises:
        ConfigError: An unknown field, or an impossible value.
    """
    given = additional_config.get(OPTION, {})
    if not isinstance(given, Mapping):
        raise ConfigError(f"{OPTION} in the additional configuration is a dictionary, not {given!r}")
    for name in given:
        if name not in _FIELDS:
            raise ConfigError(f"{OPTION} has no field {name!r}; {suggestion(str(name), _FIELDS)}")
    tier = given.get("tier", "auto")
    # What is on the device already cannot be read ahead.
    usual = {"tier": tier, "read_ahead": tier != "device"}
    return TablePlace(**{**usual, **given, "device": device})


def open_tables(
    place: TablePlace, folder: Path, wanted: Mapping[str, WantedTable], dtype: torch.dtype
) -> dict[str, Table]:
    """Open all tables of a model, by name; rows are given as ``dtype``.

    Args:
        place: Where they are read from.
        folder: The checkpoint.
        wanted: The tables, as from `wanted_tables`.
        dtype: Type of the rows.

    Raises:
        CheckpointError: A table is found nowhere.
        EngramError: What `TablePlace.locate` and `TablePlace.open` raise.
    """
    elsewhere = place.locate(wanted)
    stored: Mapping[str, StoredTensor] = {}
    if wanted.keys() - elsewhere.keys():
        tensors = TensorFolder(folder)
        stored = {name: tensors.find(name) for name in tensors.names if TABLES in name.split(".")}
    tables: dict[str, Table] = {}
    try:
        for name, table in wanted.items():
            located: Any = elsewhere.get(name) or stored_table(stored, name)
            if located is None:
                raise CheckpointError(
                    f"{folder} holds no table {name}; name where it lies: "
                    f"""--additional-config '{{"{OPTION}": {{"source": "..."}}}}'"""
                )
            if isinstance(located, StoredTensor):
                table.check(str(located), located.shape)
            tables[name] = place.open(located, table, dtype)
    except BaseException:
        for opened in tables.values():
            opened.close()
        raise
    return tables
