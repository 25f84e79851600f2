"""The folder that an adapter is shared as: a configuration, the small parts, and the tables.

``config.json`` holds the memory's configuration, the HashSpec with the digest of its token map, and a description of
the base model. ``adapter.safetensors`` holds the layers and the token map, ``tables.safetensors`` the tables under the
names by which every tier finds them, so that the folder is also a source of tables. ``README.md`` is for people.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engram_lm.adapt.decoder import Decoder
from engram_lm.adapt.model_card import model_card
from engram_lm.adapt.patch_folder import PATCHES
from engram_lm.errors import CheckpointError, ConfigError, EngramError, MismatchError
from engram_lm.files import read_json, replacing_folder
from engram_lm.hashing import HashSpec, TokenMap
from engram_lm.memory.config import EngramConfig
from engram_lm.memory.interface import build_layer
from engram_lm.model.plain_weights import plain_weights, refuse_unknown
from engram_lm.model.table_place import Located, TablePlace, WantedTable, wanted_tables
from engram_lm.tables import (
    MooncakeTable,
    OverlayTable,
    ParameterTable,
    RemoteTable,
    StoredTensor,
    Table,
    tensor_layout,
)
from engram_lm.tables.files.safetensors_file import LONGEST_HEADER_BYTES, read_header
from engram_lm.tables.files.safetensors_writer import TensorWriter

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
# Of the widest type that safetensors has.
_BYTES_PER_NUMBER = 8
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


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

    def fetch_folder(self, name: str, most_bytes: int) -> Path:
        """Bring the safetensors of a folder inside to this machine, and return the path that the folder lies in.

        Errors as for `fetch`; where there is no such folder, there is none in the path either.
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

    def fetch_folder(self, name: str, most_bytes: int) -> Path:
        """Return the folder; see `AdapterFiles.fetch_folder`."""
        return self.folder


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
    layers: nn.ModuleDict,
    tables: Mapping[str, Table],
    tables_inside: bool,
    license: str | None = None,
    extra: str = "",
) -> None:
    """Write an adapter's folder, which appears whole or not at all and replaces an earlier one.

    The arguments and errors are those of `MemoryAdapter.save_pretrained`; ``base`` is the model that the adapter was
    made for. Only what `read_adapter` expects is written, and all of it.
    """
    found = plain_weights(layers, layer_weights(config, spec))
    refuse_unknown("the memory", found.unknown)
    for name, table in tables.items():
        if not isinstance(table, Table):
            raise ConfigError(
                f"a {type(table).__name__} has taken the place of the table {name}; the memory does not read it, and "
                "it could not be loaded again: keep other libraries from wrapping the memory's tables"
            )
        if tables_inside and isinstance(_innermost(table), RemoteTable | MooncakeTable):
            raise ConfigError(
                f"the table {name} is read from another machine and is not copied from there; save with tables=False "
                "and load with the same table_source, or load the adapter with another table_tier first"
            )
        if not tables_inside and _has_changed_rows(table):
            raise ConfigError(
                f"row patches change rows of the table {name}, and saving with tables=False would leave them out; save "
                "with the tables, or revert the patches first and add them to the new folder with `engram-lm patch "
                "apply`"
            )
    assert spec.token_map is not None
    values = {
        "format": _FORMAT,
        "base_model": dataclasses.asdict(base),
        "memory": config.to_dict(),
        "hash_spec": spec.to_dict(),
    }
    card = functools.partial(
        model_card,
        config=config,
        spec=spec,
        base_name=base.name,
        model_type=base.model_type,
        tables=tables,
        tables_inside=tables_inside,
        license=license,
        extra=extra,
    )
    card()  # refuses an impossible license before anything is written
    with replacing_folder(folder, lambda there: _check_replaceable(there, tables_inside)) as aside:
        small = {name: tensor.cpu().contiguous() for name, tensor in found.weights.items()}
        small[TOKEN_MAP] = torch.tensor(spec.token_map.made.canonical, dtype=torch.int32)
        save_file(small, aside / LAYERS, metadata={"format": "pt"})
        num_written = _write_tables(aside / TABLES, tables) if tables_inside else None
        (aside / CONFIG).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        (aside / _CARD).write_text(card(num_written=num_written), encoding="utf-8")


def layer_weights(config: EngramConfig, spec: HashSpec) -> dict[str, Tensor]:
    """Name the weights of an adapter's layers, with a tensor of the right shape and without numbers for each."""
    with torch.device("meta"):
        return nn.ModuleDict({str(block): build_layer(config) for block in spec.blocks}).state_dict()


def check_adapter(files: AdapterFiles) -> dict[str, Any]:
    """Read ``config.json``, and refuse it with a `CheckpointError` if it does not describe an adapter."""
    path = files.fetch(CONFIG, _LONGEST_CONFIG_BYTES)
    if path is None:
        raise CheckpointError(
            f"there is no {files.name}/{CONFIG}; an adapter is a folder as MemoryAdapter.save_pretrained writes it, "
            "or a repository of the Hugging Face Hub as push_to_hub writes it; the adapter of a trainer's checkpoint "
            "lies in its engram_adapters/NAME"
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
    if others := sorted(names - {*FILES, PATCHES}):
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
    if PATCHES in names and not tables_inside:
        raise FileExistsError(
            f"{folder} holds row patches, which saving with tables=False in its place would delete; name another folder"
        )


def _write_tables(path: Path, tables: Mapping[str, Table]) -> dict[str, int]:
    """Write the tables, and count the rows of each that are not zeros."""
    promised = {
        f"{TABLE_PREFIX}{name}.weight": (table.dtype, (table.num_rows, table.width)) for name, table in tables.items()
    }
    num_written = dict.fromkeys(tables, 0)
    with TensorWriter(path, promised) as writer, torch.no_grad():
        for name, table in tables.items():
            step = max(1, _PIECE_BYTES // table.row_bytes)
            for start in range(0, table.num_rows, step):
                rows = torch.arange(start, min(start + step, table.num_rows))
                values = table.stored(rows)
                num_written[name] += int((values != 0).any(-1).sum())
                writer.append(f"{TABLE_PREFIX}{name}.weight", values)
    return num_written


def _innermost(table: Table) -> Table:
    """Return the table behind caches and read-ahead."""
    while isinstance(inner := getattr(table, "table", None), Table):
        table = inner
    return table


def _has_changed_rows(table: Table) -> bool:
    """Whether patches lie over a table or over one behind it, or were written into one that is a parameter."""
    if (isinstance(table, OverlayTable) and len(table.rows)) or (
        isinstance(table, ParameterTable) and table.num_patches
    ):
        return True
    inner = getattr(table, "table", None)
    return isinstance(inner, Table) and _has_changed_rows(inner)


@dataclasses.dataclass(frozen=True, eq=False)
class StoredAdapter:
    """An adapter's folder after reading and checking, but without its tables."""

    files: AdapterFiles
    """Where its files come from."""
    config: EngramConfig
    """Geometry and options."""
    spec: HashSpec
    """The hash, with its token map."""
    base: BaseModel
    """The model that it was made for."""
    layers: dict[str, Tensor]
    """State dict of the layers."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the layers' numbers."""
        return next(iter(self.layers.values())).dtype

    @property
    def digest(self) -> str:
        """SHA-256 of the hash and of the layers' numbers, which tells trained adapters apart."""
        found = hashlib.sha256(self.spec.digest.encode())
        for name, tensor in sorted(self.layers.items()):
            found.update(name.encode())
            found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def open_tables(self, place: TablePlace, dtype: torch.dtype | None) -> dict[str, Table]:
        """Load the tables as parameters, or open them where they lie; errors as for `MemoryAdapter.from_pretrained`."""
        wanted = wanted_tables(self.spec, self.config.head_dim)
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
        table = wanted.new(self.config, "meta")
        table.take(place.load(layout, wanted, dtype or stored))
        return table

    def _stored(self, wanted: Mapping[str, WantedTable]) -> dict[str, StoredTensor]:
        numbers = sum(table.num_rows * table.width for table in wanted.values())
        path = self.files.fetch(TABLES, numbers * _BYTES_PER_NUMBER + LONGEST_HEADER_BYTES)
        if path is None:
            raise CheckpointError(
                f"{self.files.name} holds no {TABLES}: the adapter was saved without its tables; say with "
                "table_source= where they lie"
            )
        header = read_header(path)
        expected = {f"{TABLE_PREFIX}{name}.weight": name for name in wanted}
        _check_names(path, header, expected)
        for full, name in expected.items():
            wanted[name].check(str(header[full]), header[full].shape)
        return {name: header[full] for full, name in expected.items()}


def read_adapter(files: AdapterFiles, model: BaseModel) -> StoredAdapter:
    """Read and check an adapter of a model, without its tables.

    Large files are fetched only when the small ones are right.

    Raises:
        CheckpointError: A file is missing or malformed, or its tensors are not those that the configuration describes.
        MismatchError: The adapter is for a model of another size, or has more tokens than this one.
        RemoteError: The files cannot be reached.
    """
    where = f"{files.name}/{CONFIG}"
    values = check_adapter(files)
    try:
        base = BaseModel(**values["base_model"])
        # First, because a hash over raw ids builds its token map, however many tokens the file claims.
        _check_sizes(files.name, base, values["memory"]["hidden_size"], values["hash_spec"]["num_tokens"], model)
        config, spec = EngramConfig.from_dict(values["memory"]), HashSpec.from_dict(values["hash_spec"])
    except MismatchError:
        raise
    except (EngramError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where} does not describe an adapter ({error!s:.300}); download it again") from error
    geometry = (config.layers, config.orders, config.num_heads, config.tables == "shared", config.num_streams)
    if geometry != (spec.blocks, spec.orders, spec.num_heads, spec.shared_table, 1) or not all(
        block < model.num_layers for block in spec.blocks
    ):
        raise CheckpointError(
            f"{where}: 'memory' and 'hash_spec' describe different layers, orders or heads; download it again"
        )
    numbers = len(spec.blocks) * config.layer_parameters() + spec.num_tokens
    path = files.fetch(LAYERS, numbers * _BYTES_PER_NUMBER + LONGEST_HEADER_BYTES)
    if path is None:
        raise CheckpointError(f"{files.name}/{LAYERS} is missing; download the adapter again")
    if path.stat().st_size < numbers:  # checked before layers of the claimed size are built
        raise CheckpointError(
            f"{path} has {path.stat().st_size} bytes, but its configuration describes {numbers} numbers; download it "
            "again"
        )
    header = read_header(path)
    expected = layer_weights(config, spec)
    _check_names(path, header, {*expected, TOKEN_MAP})
    for name, tensor in expected.items():
        if header[name].shape != tuple(tensor.shape) or header[name].torch_dtype not in _FLOATS:
            raise CheckpointError(
                f"{header[name]}: expected {list(tensor.shape)} of F64, F32, F16 or BF16; download it again"
            )
    if header[TOKEN_MAP].torch_dtype not in _INTEGERS:  # NumPy does not have some of the others
        raise CheckpointError(f"{header[TOKEN_MAP]}: expected integers; download it again")
    token_map = TokenMap(header[TOKEN_MAP].load().numpy(), spec.vocabulary_digest)
    layers = {name: header[name].load() for name in expected}
    return StoredAdapter(files, config, spec.bind(token_map).covering(model.vocab_size), base, layers)


def _check_sizes(name: str, base: BaseModel, hidden_size: Any, num_tokens: Any, model: BaseModel) -> None:
    if type(num_tokens) is not int:
        raise ConfigError(f"num_tokens is {num_tokens!r:.100}, expected a whole number")
    for what, theirs, ours in (
        ("hidden size", hidden_size, model.hidden_size),
        ("number of decoder layers", base.num_layers, model.num_layers),
    ):
        if theirs != ours:
            raise MismatchError(
                f"the adapter in {name} was made for a {what} of {theirs!r:.40} ({base.name or base.model_type:.100}), "
                f"this model has {ours}; attach it to the model it was made for"
            )
    check_vocabulary(num_tokens, model.vocab_size)


def check_vocabulary(num_tokens: int, vocab_size: int) -> None:
    """Refuse, with a `MismatchError`, a tokenizer of which the model embeds less than half.

    Some tokens may lie beyond the embedding, such as placeholders of images that a text model shares a tokenizer with.
    """
    if num_tokens > 2 * vocab_size:
        raise MismatchError(
            f"the tokenizer has {num_tokens} tokens, the model embeds {vocab_size}; pass the tokenizer "
            "that belongs to the model, or resize its embedding first"
        )


def _check_names(path: Path, found: Mapping[str, Any], expected: Any) -> None:
    missing, unknown = sorted(set(expected) - found.keys()), sorted(found.keys() - set(expected))
    if missing or unknown:
        raise CheckpointError(
            f"{path} holds other tensors than its configuration describes: missing {missing[:8]}, unknown "
            f"{unknown[:8]}; download the adapter again"
        )
