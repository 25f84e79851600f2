"""The folder an adapter is shared as: a configuration, the small parts, and the tables.

``config.json`` holds the memory's configuration, the HashSpec with the digest of its token map, and what the base model
is. ``adapter.safetensors`` holds the layers and the token map, ``tables.safetensors`` the tables, by the names that
`table_layouts` finds, so that the folder is also a source of tables for every tier.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engram.adapt.decoder import Decoder
from engram.errors import CheckpointError, ConfigError, EngramError, MismatchError
from engram.files import new_folder
from engram.hashing import HashSpec, TokenMap
from engram.memory.config import EngramConfig
from engram.memory.layer import EngramLayer
from engram.model.table_place import Located, TablePlace, TableSource, WantedTable
from engram.tables import HttpTable, MooncakeTable, ParameterTable, StoredTensor, Table, tensor_layout
from engram.tables.safetensors_file import read_header
from engram.tables.safetensors_writer import TensorWriter

__all__ = ["BaseModel", "StoredAdapter", "read_adapter", "write_adapter"]

_FORMAT = "engram.adapter.1"
_CONFIG, _LAYERS, _TABLES = "config.json", "adapter.safetensors", "tables.safetensors"
_TOKEN_MAP = "token_map"
_TABLE_PREFIX = "memory_tables."
# Rows of a table that are copied at a time.
_PIECE_BYTES = 16 << 20
# A spec lists its primes and multipliers; the largest that can be built takes a few megabytes.
_LONGEST_CONFIG_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseModel:
    """What an adapter's folder says of the model it was made for."""

    model_type: str
    """As in the model's ``config.json``."""
    name: str
    """Repository or folder the model was loaded from, for the reader; may be empty."""
    hidden_size: int
    """Width of its hidden states."""
    num_layers: int
    """Decoder layers."""
    vocab_size: int
    """Rows of its token embedding."""

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


@dataclasses.dataclass(frozen=True, eq=False)
class StoredAdapter:
    """An adapter's folder, read and checked; its tables are not loaded yet."""

    folder: Path
    """The folder."""
    config: EngramConfig
    """Geometry and options."""
    spec: HashSpec
    """The hash, with its token map."""
    base: BaseModel
    """The model it was made for."""
    layers: dict[str, Tensor]
    """State dict of the layers."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the layers' numbers."""
        return next(iter(self.layers.values())).dtype

    def open_tables(
        self, *, tier: str | None, source: TableSource | None, dtype: torch.dtype | None, device: torch.device
    ) -> dict[str, Table]:
        """Load the tables as parameters, or open them where they lie. See `MemoryAdapter.from_pretrained`.

        Raises:
            CheckpointError: A table is missing or malformed.
            ConfigError: An impossible tier or source.
            MismatchError: A table is not the one that the hash addresses.
        """
        place = TablePlace(
            tier=tier or ("device" if source is None else "auto"), read_ahead=True, source=source, device=device
        )
        wanted = self._wanted()
        located: dict[str, Located | StoredTensor] = dict(place.locate(wanted))
        if wanted.keys() - located.keys():
            located = {**self._stored(wanted), **located}
        tables: dict[str, Table] = {}
        try:
            for name, where in located.items():
                tables[name] = self._open(place, where, wanted[name], dtype)
        except BaseException:
            for table in tables.values():
                table.close()
            raise
        return tables

    def _open(self, place: TablePlace, where: Any, wanted: WantedTable, dtype: torch.dtype | None) -> Table:
        if place.tier != "device":
            return place.open(where, wanted, dtype)
        stored = where.torch_dtype if isinstance(where, StoredTensor) else self.dtype
        layout = tensor_layout([where]) if isinstance(where, StoredTensor) else where
        table = ParameterTable(
            wanted.num_rows, wanted.width, gradient=self.config.table_gradient, std=self.config.table_std, device="meta"
        )
        table.weight = nn.Parameter(place.load(layout, wanted, dtype or stored))
        return table

    def _wanted(self) -> dict[str, WantedTable]:
        spec, wanted = self.spec, {}
        for block, layer in zip(spec.blocks, spec.layers, strict=True):
            name = "shared" if spec.shared_table else str(block)
            blocks = spec.blocks if spec.shared_table else (block,)
            wanted[name] = WantedTable(name, blocks, spec.num_rows(layer), self.config.head_dim, spec.digest)
        return wanted

    def _stored(self, wanted: Mapping[str, WantedTable]) -> dict[str, StoredTensor]:
        path = self.folder / _TABLES
        if not path.is_file():
            raise CheckpointError(
                f"{self.folder} holds no {_TABLES}: the adapter was saved without its tables; say with table_source= "
                "where they lie"
            )
        header = read_header(path)
        expected = {f"{_TABLE_PREFIX}{name}.weight": name for name in wanted}
        _check_names(path, header, expected)
        for full, name in expected.items():
            wanted[name].check(str(header[full]), header[full].shape)
        return {name: header[full] for full, name in expected.items()}


def write_adapter(
    folder: str | os.PathLike[str],
    *,
    config: EngramConfig,
    spec: HashSpec,
    base: BaseModel,
    layers: Mapping[str, Tensor],
    tables: Mapping[str, Table],
) -> None:
    """Write an adapter's folder; it appears whole or not at all.

    Args:
        folder: A new or empty folder.
        config: Geometry and options.
        spec: The hash, with its token map.
        base: The model it was made for.
        layers: State dict of the layers.
        tables: The tables to write, none where they stay elsewhere.

    Raises:
        ConfigError: A table is on another machine.
        FileExistsError: There is something in the folder.
        OSError: The folder cannot be written.
    """
    for name, table in tables.items():
        if isinstance(_innermost(table), HttpTable | MooncakeTable):
            raise ConfigError(
                f"the table {name} is read from another machine and is not copied from there; save with tables=False "
                "and load with the same table_source, or load the adapter with another table_tier first"
            )
    assert spec.token_map is not None
    values = {
        "format": _FORMAT,
        "base_model": dataclasses.asdict(base),
        "memory": config.to_dict(),
        "hash_spec": spec.to_dict(),
    }
    with new_folder(folder) as aside:
        small = {name: tensor.detach().cpu().contiguous() for name, tensor in layers.items()}
        small[_TOKEN_MAP] = torch.tensor(spec.token_map.canonical, dtype=torch.int32)
        save_file(small, aside / _LAYERS, metadata={"format": "pt"})
        if tables:
            _write_tables(aside / _TABLES, tables)
        (aside / _CONFIG).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def read_adapter(folder: str | os.PathLike[str], *, hidden_size: int, num_layers: int) -> StoredAdapter:
    """Read and check an adapter's folder, all but its tables.

    Args:
        folder: What `write_adapter` wrote.
        hidden_size: Of the model it shall be attached to.
        num_layers: Of that model.

    Raises:
        CheckpointError: A file is missing or malformed, or its tensors are not those that the configuration describes.
        MismatchError: The adapter is for a model of another size.
    """
    folder = Path(folder)
    values = _read_config(folder / _CONFIG)
    try:
        base = BaseModel(**values["base_model"])
        config, spec = EngramConfig.from_dict(values["memory"]), HashSpec.from_dict(values["hash_spec"])
    except (EngramError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / _CONFIG} describes no adapter ({error}); download it again") from error
    for what, theirs, ours in (
        ("hidden size", config.hidden_size, hidden_size),
        ("number of decoder layers", base.num_layers, num_layers),
    ):
        if theirs != ours:
            raise MismatchError(
                f"the adapter in {folder} was made for a {what} of {theirs} ({base.name or base.model_type}), this "
                f"model has {ours}; attach it to the model it was made for"
            )
    geometry = (config.layers, config.orders, config.num_heads, config.tables == "shared")
    if geometry != (spec.blocks, spec.orders, spec.num_heads, spec.shared_table) or max(spec.blocks) >= num_layers:
        raise CheckpointError(
            f"{folder / _CONFIG}: 'memory' and 'hash_spec' describe different layers, orders or heads; download it "
            "again"
        )
    path = folder / _LAYERS
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; download the adapter again")
    header = read_header(path)
    with torch.device("meta"):
        expected = nn.ModuleDict({str(block): EngramLayer(config) for block in spec.blocks}).state_dict()
    _check_names(path, header, {*expected, _TOKEN_MAP})
    for name, tensor in expected.items():
        if header[name].shape != tuple(tensor.shape) or not header[name].torch_dtype.is_floating_point:
            raise CheckpointError(f"{header[name]}: expected floating numbers {list(tensor.shape)}; download it again")
    token_map = TokenMap(header[_TOKEN_MAP].load().numpy(), spec.vocabulary_digest)
    layers = {name: header[name].load() for name in expected}
    return StoredAdapter(folder, config, spec.bind(token_map), base, layers)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(
            f"there is no {path}; an adapter is a folder on this machine as MemoryAdapter.save_pretrained writes it"
        )
    try:
        with open(path, "rb") as file:
            text = file.read(_LONGEST_CONFIG_BYTES + 1)
        values = json.loads(text) if len(text) <= _LONGEST_CONFIG_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error!s:.200}); download it again") from error
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise CheckpointError(f"{path} is of no memory adapter: expected format {_FORMAT!r}, found {found!r:.100}")
    return values


def _check_names(path: Path, found: Mapping[str, Any], expected: Any) -> None:
    missing, unknown = sorted(set(expected) - found.keys()), sorted(found.keys() - set(expected))
    if missing or unknown:
        raise CheckpointError(
            f"{path} holds other tensors than its configuration describes: missing {missing[:8]}, unknown "
            f"{unknown[:8]}; download the adapter again"
        )


def _write_tables(path: Path, tables: Mapping[str, Table]) -> None:
    promised = {
        f"{_TABLE_PREFIX}{name}.weight": (table.dtype, (table.num_rows, table.width)) for name, table in tables.items()
    }
    with TensorWriter(path, promised) as writer, torch.no_grad():
        for name, table in tables.items():
            step = max(1, _PIECE_BYTES // table.row_bytes)
            for start in range(0, table.num_rows, step):
                rows = torch.arange(start, min(start + step, table.num_rows))
                writer.append(f"{_TABLE_PREFIX}{name}.weight", table.gather(rows))


def _innermost(table: Table) -> Table:
    """The table behind caches and read-ahead."""
    while isinstance(inner := getattr(table, "table", None), Table):
        table = inner
    return table
