"""The memory part of published checkpoints: opened where it lies, and written so that their readers open it."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engram_lm.errors import CheckpointError, ConfigError, MismatchError
from engram_lm.files import new_folder, read_json, user_path
from engram_lm.hashing import HashSpec
from engram_lm.memory.config import EngramConfig
from engram_lm.memory.formats.deepseek_v41 import DeepSeekV41
from engram_lm.memory.formats.family import Family, gather
from engram_lm.memory.formats.qwen_ple import QwenPle
from engram_lm.memory.layer import EngramLayer
from engram_lm.tables.files.safetensors_file import INDEX_NAME, TensorFolder
from engram_lm.tables.files.safetensors_writer import TensorWriter
from engram_lm.tables.files.sources import PublishedKind, published_layout
from engram_lm.tables.layout import RowLayout
from engram_lm.tables.table import Table
from engram_lm.tables.tiers.mapped import MappedTable

FAMILIES: dict[str, Family] = {family.variant: family for family in (QwenPle(), DeepSeekV41())}
"""The families of checkpoints whose memory can be read and written, by what `HashSpec.variant` calls them."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# What decides which row a token reads, as far as a config says it; the token map itself is the tokenizer's.
_HASH_FIELDS = (
    "layers", "layer_base", "orders", "num_heads", "primes", "multipliers", "vocab_size", "num_tokens", "pad_token_id",
    "segments", "padded_rows", "shared_table",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class PublishedMemory:
    """The memory of one model: which rows its tokens read, and the layers that use them."""

    variant: PublishedKind
    """Whose format it is."""
    config: EngramConfig
    """Geometry and options, the same in all layers."""
    spec: HashSpec
    """Tokens → row numbers. Unbound for DeepSeek-V4.1 without its tokenizer: see `HashSpec.bind`."""
    layers: Mapping[int, EngramLayer]
    """Block number, from 0 → its layer, with its table."""

    def close(self) -> None:
        """Close the tables of all layers."""
        for layer in self.layers.values():
            if layer.table is not None:
                layer.table.close()


def read_memory(
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    *,
    token_map_digest: str | None = None,
) -> PublishedMemory:
    """Open the memory part of a published checkpoint.

    Every tensor is found, and its place, type and shape are checked against the config, before the first weight is
    loaded. Tables are never loaded: rows are read out of the files they came in. The rest of the model need not be
    there: with an index, only the files that hold the memory are looked at.

    Args:
        folder: A folder with ``config.json`` and ``*.safetensors``, of Qwen3.8-Flash-Next (transformers ``qwen4_exp``,
            its table in one tensor or in shards, in 16 or 8 bits) or of DeepSeek-V4.1.
        tokenizer: The model's tokenizer, as for `HashSpec.from_config`. Qwen needs none; without it DeepSeek's spec
            hashes nothing until `HashSpec.bind`.
        dtype: Type of all the layers' weights, and of the rows that the tables return. None: each keeps the type it is
            stored in, so norms may be wider than projections; 8-bit floats become bfloat16, integers float32; a key
            and a value projection of different types, which become one matrix, take the type that holds both.
        token_map_digest: The digest of the token map that is expected, as for `HashSpec.from_config`.

    Returns:
        The layers, on the CPU, each with a `MappedTable` on the files.

    Raises:
        ConfigError: ``config.json`` is missing, of another format, or lacks a key; or ``dtype`` is not a floating type
            of 16 bits or more.
        CheckpointError: A tensor is missing, or of another type or shape than the config says; a file is missing,
            truncated or malformed.
        MismatchError: The checkpoint's hash constants are not those of its config, or another digest is expected.
        TokenMapError: The tokenizer gives another canonical vocabulary than the config promises.
    """
    folder = user_path(folder)
    spec = HashSpec.from_config(folder, tokenizer, token_map_digest=token_map_digest)
    family = FAMILIES.get(spec.variant)
    if family is None:
        raise ConfigError(f"{folder} is a {spec.variant} model; memory is read of {' and '.join(FAMILIES)}")
    config = family.read_config(read_json(folder / "config.json"), spec)
    tensors = TensorFolder(folder)
    prefix = _find_prefix(tensors, family, spec.blocks)
    stems = {block: f"{prefix}layers.{block}." for block in spec.blocks}
    found = {
        block: (
            family.locate(tensors, stem, config, spec, index),
            _find_table(tensors, family, stem, config, spec, index),
        )
        for index, (block, stem) in enumerate(stems.items())
    }
    tables = {block: MappedTable(layout, dtype) for block, (_, layout) in found.items()}
    layers = {}
    for block, (stored, _) in found.items():
        with torch.device("meta"):
            layers[block] = EngramLayer(config, tables[block])
        layers[block].load_state_dict(family.load(stored, config, dtype), assign=True)
    return PublishedMemory(family.variant, config, spec, layers)


def write_memory(
    folder: str | os.PathLike[str],
    memory: PublishedMemory,
    *,
    variant: PublishedKind | None = None,
    num_shards: int | None = None,
) -> None:
    """Write memory as a checkpoint folder: a ``config.json``, the weights, and an index over them.

    The folder is written aside and appears when it is whole. Tables are copied in pieces: they may be larger than
    memory, and lie on any tier. 8-bit tables that are already in the target's layout are copied byte for byte.

    Args:
        folder: The folder to create; it must not exist, or be empty.
        memory: What `read_memory` returned, or your own memory in the same dataclass.
        variant: The format; the memory's own where None. ``qwen_ple`` keeps the types of weights and rows.
            ``deepseek_v41`` rounds projections and rows to 8-bit floats (exact for what was read from that format) and
            keeps the types of the norms.
        num_shards: Tensors that each Qwen table is split into (``split_ngram_parts``), at most its rows; as it is now
            where None.

    Raises:
        ConfigError: The format cannot hold an option, a type or this hash, or something is on the meta device; nothing
            is written.
        MismatchError: Layers, tables and spec do not belong together; nothing is written.
        CheckpointError: Weights to be rounded to 8 bits are infinite or NaN.
        TableClosedError: A table has been closed; nothing is written.
        FileExistsError: There is something in the folder already.
        OSError: The folder cannot be written.
    """
    variant = memory.variant if variant is None else variant
    family = FAMILIES.get(variant) if isinstance(variant, str) else None
    if family is None:
        raise ConfigError(f"memory is written as {' or '.join(FAMILIES)}, not as {variant!r}")
    if num_shards is not None and (type(num_shards) is not int or num_shards < 1 or not family.splits_tables):
        raise ConfigError(f"num_shards is a positive integer, for qwen_ple only, got {num_shards!r}")
    tables = _check_parts(memory)
    family.check_options(memory.config)
    if num_shards is None:
        layouts = [getattr(table, "layout", None) for table in tables.values()]
        num_shards = max(1 if layout is None else len(layout.tensors) or 1 for layout in layouts)
    fewest_rows = min(table.num_rows for table in tables.values())
    if num_shards > fewest_rows:
        raise ConfigError(f"a table of {fewest_rows} rows cannot be split into num_shards={num_shards}")
    config = family.write_config(memory.config, memory.spec, num_shards)
    _check_hash(config, memory.spec, variant)

    num_files = 1 + len(tables)
    places: dict[str, str] = {}
    num_bytes = 0
    with new_folder(folder) as aside:
        dense: dict[str, Tensor] = {}
        for index, (block, table) in enumerate(tables.items()):
            names = {name: f"{family.prefix}layers.{block}.{published}" for name, published in family.names.items()}
            weights = family.weights(memory.layers[block], names, memory.spec, index)
            dense.update({names[name]: weight for name, weight in weights.items()})
            plan = family.plan_table(table, names, num_shards)
            file = f"model-{index + 2:05d}-of-{num_files:05d}.safetensors"
            with TensorWriter(aside / file, plan) as writer:
                family.write_table(writer, table, names, num_shards)
            places.update(dict.fromkeys(plan, file))
            num_bytes += writer.num_bytes
        file = f"model-{1:05d}-of-{num_files:05d}.safetensors"
        with TensorWriter(aside / file, {name: (w.dtype, tuple(w.shape)) for name, w in dense.items()}) as writer:
            for name, weight in dense.items():
                writer.append(name, weight)
        places.update(dict.fromkeys(dense, file))
        index_text = {
            "metadata": {"total_size": num_bytes + writer.num_bytes},
            "weight_map": dict(sorted(places.items())),
        }
        for name, values in ((INDEX_NAME, index_text), ("config.json", config)):
            (aside / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _find_prefix(tensors: TensorFolder, family: Family, blocks: Sequence[int]) -> str:
    """Find what stands before ``layers.``: a release, its text model alone and a converter name it differently."""
    names = "|".join(re.escape(name).replace(r"\{\}", r"\d+") for name in family.names.values())
    pattern = re.compile(rf"((?:.*\.)?)layers\.({'|'.join(map(str, blocks))})\.(?:{names})", re.DOTALL)
    matches = (pattern.fullmatch(name) for name in tensors.names)
    prefixes = sorted({match[1] for match in matches if match})
    if not prefixes:
        raise CheckpointError(
            f"{tensors.name} holds no memory of block {blocks[0]}: no tensor is named "
            f"[...]layers.{blocks[0]}.{family.names['query_norm']}"
        )
    if len(prefixes) > 1:
        raise CheckpointError(
            f"{tensors.name} holds several memories, under the prefixes {', '.join(map(repr, prefixes))}; keep one"
        )
    return prefixes[0]


def _find_table(
    tensors: TensorFolder, family: Family, stem: str, config: EngramConfig, spec: HashSpec, index: int
) -> RowLayout:
    """Find the table of a layer, and hold its size against the config."""
    layout = published_layout(tensors, family.variant, stem)
    found, expected = [layout.num_rows, layout.codec.width], [spec.padded_rows[index], config.head_dim]
    if found != expected:
        more = f" and {len(layout.tensors) - 1} more shards" if len(layout.tensors) > 1 else ""
        raise CheckpointError(
            f"{layout.tensors[0]}{more}: found {found} rows and width in all, expected {expected} from config.json; "
            "the folder holds weights of another geometry"
        )
    return layout


def _check_parts(memory: PublishedMemory) -> dict[int, Table]:
    """Check that spec, config, layers and tables belong together, and return the tables by block."""
    spec, config = memory.spec, memory.config
    for name, ours, theirs in (
        ("blocks", config.layers, spec.blocks),
        ("orders", config.orders, spec.orders),
        ("heads", config.num_heads, spec.num_heads),
        ("layers", tuple(sorted(memory.layers)), tuple(sorted(spec.blocks))),
    ):
        if ours != theirs:
            raise MismatchError(f"the memory has the {name} {ours}, its hash has {theirs}")
    if config.occupancy != "none":
        raise ConfigError(
            "published formats cannot say that rows of zeros were never written (occupancy); save the memory as an "
            "adapter or a model of this project"
        )
    tables = {}
    for published, block in zip(spec.layers, spec.blocks, strict=True):
        layer = memory.layers[block]
        if layer.config != config:
            raise MismatchError(f"the layer of block {block} was built for another EngramConfig than the memory's")
        table, num_rows = layer.table, spec.num_rows(published)
        if table is None:
            raise MismatchError(f"the layer of block {block} has no table to write")
        if table.num_rows != num_rows:
            raise MismatchError(f"the table of block {block} has {table.num_rows} rows, its hash asks for {num_rows}")
        weights = dict(layer.named_parameters())
        dtypes = {f"weights {name}": weight.dtype for name, weight in weights.items()} | {"rows": table.dtype}
        for what, dtype in dtypes.items():
            if dtype not in _DTYPES:
                raise ConfigError(f"the {what} of block {block} are {dtype}; the formats hold floats of 16 or 32 bits")
        if any(weight.is_meta for weight in weights.values()) or _is_meta(table):
            raise ConfigError(f"block {block} has weights or rows on the meta device; bring it to a device first")
        tables[block] = table
    return tables


def _is_meta(table: Table) -> bool:
    """Whether a table has no numbers: nothing can be copied out of one."""
    try:
        gather(table, 0, 1)
    except NotImplementedError:
        return True
    return False


def _check_hash(config: Mapping[str, Any], spec: HashSpec, variant: str) -> None:
    """Refuse a hash that a reader of this config would not get back."""
    try:
        back = HashSpec.from_config(config, spec.token_map)
    except ValueError as error:
        raise ConfigError(f"{variant} cannot hold this hash: its config would be refused ({error})") from error
    # Without the token map the canonical id of the pad token is unknown.
    for name in (*_HASH_FIELDS, "fill") if spec.token_map is not None else _HASH_FIELDS:
        if getattr(back, name) != getattr(spec, name):
            raise ConfigError(
                f"{variant} cannot hold this hash: {name} is {getattr(spec, name)!r:.200}, from a {variant} config "
                f"it would be read as {getattr(back, name)!r:.200}"
            )
