"""Reading an adapter from its files: the small ones are checked before the large ones are fetched."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engram_lm.adapt.decoder import Decoder
from engram_lm.adapt.folder import (
    CONFIG,
    LAYERS,
    TABLE_PREFIX,
    TABLES,
    TOKEN_MAP,
    AdapterFiles,
    BaseModel,
    check_adapter,
)
from engram_lm.errors import CheckpointError, ConfigError, EngramError, MismatchError
from engram_lm.hashing import HashSpec, TokenMap
from engram_lm.memory.config import EngramConfig
from engram_lm.memory.registry import build_layer
from engram_lm.model.table_place import Located, TablePlace, WantedTable
from engram_lm.tables import ParameterTable, StoredTensor, Table, tensor_layout
from engram_lm.tables.files.safetensors_file import LONGEST_HEADER_BYTES, read_header

__all__ = ["StoredAdapter", "check_vocabulary", "read_adapter"]

# Of the widest type that safetensors has.
_BYTES_PER_NUMBER = 8
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


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

    def open_tables(self, place: TablePlace, dtype: torch.dtype | None) -> dict[str, Table]:
        """Load the tables as parameters, or open them where they lie. See `MemoryAdapter.from_pretrained`.

        Raises:
            CheckpointError: A table is missing or malformed.
            ConfigError: The tier or source is impossible.
            MismatchError: A table is not the one that the hash addresses.
            RemoteError: The tables' source does not answer.
        """
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


def read_adapter(files: AdapterFiles, decoder: Decoder) -> StoredAdapter:
    """Read and check an adapter without its tables. Large files are fetched only when the small ones are right.

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
        _check_sizes(files.name, base, values["memory"]["hidden_size"], values["hash_spec"]["num_tokens"], decoder)
        config, spec = EngramConfig.from_dict(values["memory"]), HashSpec.from_dict(values["hash_spec"])
    except MismatchError:
        raise
    except (EngramError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where} does not describe an adapter ({error!s:.300}); download it again") from error
    geometry = (config.layers, config.orders, config.num_heads, config.tables == "shared", config.num_streams)
    if geometry != (spec.blocks, spec.orders, spec.num_heads, spec.shared_table, 1) or not all(
        block < len(decoder.layers) for block in spec.blocks
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
    with torch.device("meta"):
        expected = nn.ModuleDict({str(block): build_layer(config) for block in spec.blocks}).state_dict()
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
    return StoredAdapter(files, config, spec.bind(token_map), base, layers)


def _check_sizes(name: str, base: BaseModel, hidden_size: Any, num_tokens: Any, decoder: Decoder) -> None:
    if type(num_tokens) is not int:
        raise ConfigError(f"num_tokens is {num_tokens!r:.100}, expected a whole number")
    for what, theirs, ours in (
        ("hidden size", hidden_size, decoder.hidden_size),
        ("number of decoder layers", base.num_layers, len(decoder.layers)),
    ):
        if theirs != ours:
            raise MismatchError(
                f"the adapter in {name} was made for a {what} of {theirs!r:.40} ({base.name or base.model_type:.100}), "
                f"this model has {ours}; attach it to the model it was made for"
            )
    check_vocabulary(num_tokens, decoder)


def check_vocabulary(num_tokens: int, decoder: Decoder) -> None:
    """Refuse a tokenizer with tokens for which the model has no embedding.

    Raises:
        MismatchError: There are such tokens; the message has both numbers.
    """
    if num_tokens > decoder.vocab_size:
        raise MismatchError(
            f"the tokenizer has {num_tokens} tokens, the model embeds {decoder.vocab_size}; pass the tokenizer "
            "that belongs to the model, or resize its embedding first"
        )


def _check_names(path: Path, found: Mapping[str, Any], expected: Any) -> None:
    missing, unknown = sorted(set(expected) - found.keys()), sorted(found.keys() - set(expected))
    if missing or unknown:
        raise CheckpointError(
            f"{path} holds other tensors than its configuration describes: missing {missing[:8]}, unknown "
            f"{unknown[:8]}; download the adapter again"
        )
