"""The folder that an adapter is shared as: a configuration, the small parts, and the tables.

``config.json`` holds the memory's configuration, the HashSpec with the digest of its token map, and a description of
the base model. ``adapter.safetensors`` holds the layers and the token map, ``tables.safetensors`` the tables under the
names by which every tier finds them, so that the folder is also a source of tables. ``README.md`` is for people.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from engram_lm.adapt.decoder import Decoder
from engram_lm.adapt.model_card import check_license, model_card
from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.files import read_json, replacing_folder
from engram_lm.hashing import HashSpec
from engram_lm.memory.config import EngramConfig
from engram_lm.tables import MooncakeTable, RemoteTable, Table
from engram_lm.tables.files.safetensors_writer import TensorWriter

__all__ = [
    "CONFIG",
    "FILES",
    "LAYERS",
    "TABLES",
    "TABLE_PREFIX",
    "TOKEN_MAP",
    "AdapterFiles",
    "BaseModel",
    "LocalFiles",
    "check_adapter",
    "write_adapter",
]

_FORMAT = "engram.adapter.1"
CONFIG, LAYERS, TABLES, _CARD = "config.json", "adapter.safetensors", "tables.safetensors", "README.md"
FILES = (CONFIG, LAYERS, TABLES, _CARD)
"""Names of all files that an adapter's folder can hold."""
TOKEN_MAP = "token_map"
TABLE_PREFIX = "memory_tables."
# Bytes of a table that are copied at a time.
_PIECE_BYTES = 16 << 20
# A spec lists its primes and multipliers; the largest that can be built takes a few megabytes.
_LONGEST_CONFIG_BYTES = 64 << 20


class AdapterFiles(Protocol):
    """A source of an adapter's files, which are fetched one by one when they are needed."""

    @property
    def name(self) -> str:
        """What messages call it."""

    def fetch(self, name: str, most_bytes: int) -> Path | None:
        """Bring a file to this machine and return its path there, or None if there is no such file.

        Raises:
            CheckpointError: The file lies elsewhere and has more than ``most_bytes``, or there is no such adapter.
            RemoteError: The source cannot be reached.
        """


@dataclasses.dataclass(frozen=True)
class LocalFiles:
    """Files of a folder on this machine."""

    folder: Path
    """The folder."""

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.folder)

    def fetch(self, name: str, most_bytes: int) -> Path | None:
        """Return a file's path, or None if there is no such file."""
        path = self.folder / name
        return path if path.is_file() else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseModel:
    """What an adapter's folder says about the model that it was made for."""

    model_type: str
    """The model's architecture, as in its ``config.json``."""
    name: str
    """Repository or folder that the model was loaded from, for the reader; may be empty."""
    hidden_size: int
    """Width of its hidden states."""
    num_layers: int
    """Number of decoder layers."""
    vocab_size: int
    """Rows of its token embedding."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not field.type:
                raise ConfigError(f"base_model: {field.name} is {value!r:.100}, expected {field.type}")

    @classmethod
    def of(cls, model: Any, decoder: Decoder) -> Self:
        """Describe a model."""
        return cls(
            model_type=str(getattr(model.config, "model_type", "")),
            name=str(getattr(model.config, "name_or_path", "") or ""),
            hidden_size=decoder.hidden_size,
            num_layers=len(decoder.layers),
            vocab_size=decoder.vocab_size,
        )


def write_adapter(
    folder: str | os.PathLike[str],
    *,
    config: EngramConfig,
    spec: HashSpec,
    base: BaseModel,
    layers: Mapping[str, Tensor],
    tables: Mapping[str, Table],
    tables_inside: bool,
    license: str | None = None,
    extra: str = "",
) -> None:
    """Write an adapter's folder, which appears whole or not at all and replaces an earlier one.

    The arguments are those of `MemoryAdapter.save_pretrained`; ``base`` is the model that the adapter was made for,
    ``layers`` the state dict of its layers, ``extra`` Markdown for the end of the card.

    Raises:
        ConfigError: A table is on another machine, or the license is not an identifier.
        FileExistsError: The folder holds something else, or tables that would be lost.
        OSError: The folder cannot be written.
    """
    for name, table in tables.items():
        if tables_inside and isinstance(_innermost(table), RemoteTable | MooncakeTable):
            raise ConfigError(
                f"the table {name} is read from another machine and is not copied from there; save with tables=False "
                "and load with the same table_source, or load the adapter with another table_tier first"
            )
    check_license(license)
    assert spec.token_map is not None
    values = {
        "format": _FORMAT,
        "base_model": dataclasses.asdict(base),
        "memory": config.to_dict(),
        "hash_spec": spec.to_dict(),
    }
    card = model_card(
        config=config,
        spec=spec,
        base_name=base.name,
        model_type=base.model_type,
        tables=tables,
        tables_inside=tables_inside,
        license=license,
        extra=extra,
    )
    with replacing_folder(folder, lambda there: _check_replaceable(there, tables_inside)) as aside:
        small = {name: tensor.detach().cpu().contiguous() for name, tensor in layers.items()}
        small[TOKEN_MAP] = torch.tensor(spec.token_map.canonical, dtype=torch.int32)
        save_file(small, aside / LAYERS, metadata={"format": "pt"})
        if tables_inside:
            _write_tables(aside / TABLES, tables)
        (aside / CONFIG).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        (aside / _CARD).write_text(card, encoding="utf-8")


def check_adapter(files: AdapterFiles) -> dict[str, Any]:
    """Read ``config.json``, and refuse it if it does not describe an adapter.

    Raises:
        CheckpointError: It is missing, not readable JSON, or not an adapter's.
        RemoteError: It cannot be reached.
    """
    path = files.fetch(CONFIG, _LONGEST_CONFIG_BYTES)
    if path is None:
        raise CheckpointError(
            f"there is no {files.name}/{CONFIG}; an adapter is a folder as MemoryAdapter.save_pretrained writes it, "
            "or a repository of the Hugging Face Hub as push_to_hub writes it"
        )
    values = read_json(path, advice="download it again")
    if (found := values.get("format")) != _FORMAT:
        raise CheckpointError(
            f"{path} does not describe a memory adapter: expected format {_FORMAT!r}, found {found!r:.100}"
        )
    return values


def _check_replaceable(folder: Path, tables_inside: bool) -> None:
    """Refuse to replace anything but an adapter, and tables that would be lost."""
    names = {path.name for path in folder.iterdir()}
    if others := sorted(names - set(FILES)):
        raise FileExistsError(
            f"{folder} exists and holds {', '.join(others[:5])}, which an adapter does not have, so it is left alone; "
            "name another folder"
        )
    try:
        check_adapter(LocalFiles(folder))
    except CheckpointError as error:
        raise FileExistsError(
            f"{folder} exists, is not empty and holds no adapter, so it is left alone ({error}); name another folder"
        ) from error
    if TABLES in names and not tables_inside:
        raise FileExistsError(
            f"{folder} holds tables, which saving with tables=False in its place would delete; name another folder"
        )


def _write_tables(path: Path, tables: Mapping[str, Table]) -> None:
    promised = {
        f"{TABLE_PREFIX}{name}.weight": (table.dtype, (table.num_rows, table.width)) for name, table in tables.items()
    }
    with TensorWriter(path, promised) as writer, torch.no_grad():
        for name, table in tables.items():
            step = max(1, _PIECE_BYTES // table.row_bytes)
            for start in range(0, table.num_rows, step):
                rows = torch.arange(start, min(start + step, table.num_rows))
                writer.append(f"{TABLE_PREFIX}{name}.weight", table.gather(rows))


def _innermost(table: Table) -> Table:
    """Return the table behind caches and read-ahead."""
    while isinstance(inner := getattr(table, "table", None), Table):
        table = inner
    return table
