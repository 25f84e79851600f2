"""The memory part of published checkpoints, opened where it lies: Qwen's PLE and DeepSeek-V4.1's Engram.

Every tensor is found and its place, type and shape are checked against the config before the first weight is loaded.
Tables are never loaded: rows are read out of the files they came in.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engram_lm.errors import CheckpointError, ConfigError, MismatchError
from engram_lm.files import read_json
from engram_lm.hashing import HashSpec
from engram_lm.memory.config import EngramConfig
from engram_lm.memory.layer import EngramLayer
from engram_lm.tables.block_float8 import dequantize, num_blocks
from engram_lm.tables.files.safetensors_file import StoredTensor, TensorFolder
from engram_lm.tables.files.sources import TABLE_NAMES, PublishedKind, published_layout
from engram_lm.tables.layout import RowLayout
from engram_lm.tables.tiers.mapped import MappedTable

__all__ = ["NAMES", "PublishedMemory", "PublishedVariant", "read_memory"]

PublishedVariant = PublishedKind

NAMES: dict[PublishedVariant, dict[str, str]] = {
    "qwen_ple": {
        "multipliers": "ple.ple_embedding.layer_multipliers",
        "primes": "ple.ple_embedding.ngram_heads_vocab_sizes",
        "offsets": "ple.ple_embedding.ngram_heads_offsets",
        **TABLE_NAMES["qwen_ple"],
        "key": "ple.key_proj.weight",
        "value": "ple.value_proj.weight",
        "key_norm": "ple.norm_key.weight",
        "query_norm": "ple.norm_query.weight",
        "conv_norm": "ple.norm_conv.weight",
        "conv": "ple.conv1d.weight",
    },
    "deepseek_v41": {
        **TABLE_NAMES["deepseek_v41"],
        "key_value": "engram.wkv.weight",
        "key_value_scale": "engram.wkv.scale",
        "query_norm": "engram.q_weight",
        "key_norm": "engram.k_weight",
    },
}
"""What we call a tensor → what the checkpoints call it, behind ``PREFIXlayers.BLOCK.``."""

_FLOATS = ("BF16", "F16", "F32")


@dataclasses.dataclass(frozen=True, eq=False)
class PublishedMemory:
    """The memory of one model: which rows its tokens read, and the layers that use them."""

    variant: PublishedVariant
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


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where one layer lies, everything checked."""

    layout: RowLayout
    dense: dict[str, StoredTensor]


def read_memory(
    folder: str | os.PathLike[str], tokenizer: Any = None, dtype: torch.dtype | None = None
) -> PublishedMemory:
    """Open the memory part of a published checkpoint.

    The rest of the model need not be there: with an index, only the files that hold the memory are looked at.

    Args:
        folder: A folder with ``config.json`` and ``*.safetensors``, of Qwen3.8-Flash-Next (transformers ``qwen4_exp``,
            its table in one tensor or in shards, in 16 or 8 bits) or of DeepSeek-V4.1.
        tokenizer: The model's tokenizer, as for `HashSpec.from_config`. Qwen needs none; without it DeepSeek's spec
            hashes nothing until `HashSpec.bind`.
        dtype: Type of all the layers' weights, and of the rows that the tables return. None: each keeps the type it is
            stored in, so norms may be wider than projections; what is stored in 8 bits becomes bfloat16; a key and a
            value projection of different types, which become one matrix, take the type that holds both.

    Returns:
        The layers, on the CPU, each with a `MappedTable` on the files.

    Raises:
        ConfigError: ``config.json`` is missing, of another format, or lacks a key; or ``dtype`` is not a floating type
            of 16 bits or more.
        CheckpointError: A tensor is missing, or of another type or shape than the config says; a file is missing,
            truncated or malformed.
        MismatchError: The checkpoint's hash constants are not those of its config.
        TokenMapError: The tokenizer gives another canonical vocabulary than the config promises.

    Source: names and shapes of deepseek-ai/DeepSeek-V4.1-Flash ``inference/model.py`` and transformers
    ``models/qwen4_exp/modeling_qwen4_exp.py``, ``conversion_mapping.py``.
    """
    folder = Path(folder)
    spec = HashSpec.from_config(folder, tokenizer)
    keys = read_json(folder / "config.json")
    variant: PublishedVariant
    if spec.variant == "qwen_ple":
        variant = "qwen_ple"
        config, locate, load = _qwen_config(keys, spec), _locate_qwen, _load_qwen
    elif spec.variant == "deepseek_v41":
        variant = "deepseek_v41"
        config, locate, load = _deepseek_config(keys, spec), _locate_deepseek, _load_deepseek
    else:
        raise ConfigError(f"{folder} is a {spec.variant} model; memory is read of {' and '.join(NAMES)}")
    tensors = TensorFolder(folder)
    prefix = _find_prefix(tensors, variant, spec.blocks)
    places = {
        block: locate(tensors, f"{prefix}layers.{block}.", config, spec, index)
        for index, block in enumerate(spec.blocks)
    }
    tables = {block: MappedTable(place.layout, dtype) for block, place in places.items()}
    layers = {}
    for block, place in places.items():
        with torch.device("meta"):
            layers[block] = EngramLayer(config, tables[block])
        layers[block].load_state_dict(load(place.dense, config, dtype), assign=True)
    return PublishedMemory(variant, config, spec, layers)


def _qwen_config(keys: Mapping[str, Any], spec: HashSpec) -> EngramConfig:
    # transformers saves no key that has the class's default: hence these defaults, its own.
    hidden = _get(keys, "hidden_size", default=2048)
    return EngramConfig(
        hidden_size=hidden,
        layers=spec.blocks,
        num_streams=_get(keys, "hc_count", default=4),
        orders=spec.orders,
        num_heads=spec.num_heads,
        memory_dim=_get(keys, "ple_embed_dim", default=hidden),
        rows_per_head=_get(keys, "ngram_vocab_size_base", default=20_000_000),
        kernel_size=_get(keys, "ple_conv_kernel_size", default=4),
        norm_eps=_get(keys, "rms_norm_eps", default=1e-6),
        norm_weight="zero_centered",
        seed=spec.seed,
    )


def _deepseek_config(keys: Mapping[str, Any], spec: HashSpec) -> EngramConfig:
    width = _get(keys, "engram_head_dim")
    if type(width) is not int:
        raise ConfigError(f"'engram_head_dim' is an integer, got {width!r}")
    return EngramConfig(
        # The second names are those of the release's own inference code.
        hidden_size=_get(keys, "hidden_size", "dim"),
        layers=spec.blocks,
        num_streams=_get(keys, "hc_mult"),
        orders=spec.orders,
        num_heads=spec.num_heads,
        memory_dim=width * spec.num_heads_total,
        rows_per_head=_get(keys, "engram_vocab_size"),
        kernel_size=0,
        norm_eps=_get(keys, "rms_norm_eps", "norm_eps"),
        seed=spec.seed,
    )


def _get(keys: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    """Look a key up under ``text_config``, then at the top."""
    text = keys.get("text_config")
    for place in (text if isinstance(text, Mapping) else {}, keys):
        for name in names:
            if place.get(name) is not None:
                return place[name]
    if default is None:
        raise ConfigError(f"config.json: the key {' or '.join(map(repr, names))} is missing")
    return default


def _find_prefix(tensors: TensorFolder, variant: PublishedVariant, blocks: Sequence[int]) -> str:
    """Find what stands before ``layers.``: a release, its text model alone and a converter name it differently."""
    names = "|".join(re.escape(name).replace(r"\{\}", r"\d+") for name in NAMES[variant].values())
    pattern = re.compile(rf"((?:.*\.)?)layers\.({'|'.join(map(str, blocks))})\.(?:{names})", re.DOTALL)
    matches = (pattern.fullmatch(name) for name in tensors.names)
    prefixes = sorted({match[1] for match in matches if match})
    if not prefixes:
        raise CheckpointError(
            f"{tensors.name} holds no memory of block {blocks[0]}: no tensor is named "
            f"[...]layers.{blocks[0]}.{NAMES[variant]['query_norm']}"
        )
    if len(prefixes) > 1:
        raise CheckpointError(
            f"{tensors.name} holds several memories, under the prefixes {', '.join(map(repr, prefixes))}; keep one"
        )
    return prefixes[0]


def _locate_qwen(tensors: TensorFolder, stem: str, config: EngramConfig, spec: HashSpec, index: int) -> _Place:
    names = {name: stem + published for name, published in NAMES["qwen_ple"].items()}
    wide = config.num_streams * config.hidden_size
    shapes = {
        "key": (wide, config.memory_dim),
        "value": (config.hidden_size, config.memory_dim),
        "key_norm": (wide,),
        "query_norm": (wide,),
        "conv_norm": (wide,),
        "conv": (wide, 1, config.kernel_size),
    }
    dense = {name: _expect(tensors.find(names[name]), shape, _FLOATS) for name, shape in shapes.items()}
    constants = {
        "multipliers": spec.multipliers[index],
        "primes": spec.primes[index],
        "offsets": spec.offsets_at(index),
    }
    for name, expected in constants.items():
        stored = _expect(tensors.find(names[name]), (len(expected),), ("I64",))
        if stored.load().tolist() != list(expected):
            raise MismatchError(
                f"{stored} holds {stored.load().tolist()}, the config gives {list(expected)}; they belong to different "
                "models"
            )
    return _Place(_table(tensors, "qwen_ple", stem, config, spec, index), dense)


def _locate_deepseek(tensors: TensorFolder, stem: str, config: EngramConfig, spec: HashSpec, index: int) -> _Place:
    names = {name: stem + published for name, published in NAMES["deepseek_v41"].items()}
    projected = (config.num_streams + 1) * config.hidden_size
    norm = ((config.num_streams, config.hidden_size), _FLOATS)
    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
        "key_value": ((projected, config.memory_dim), ("F8_E4M3",)),
        "key_value_scale": ((num_blocks(projected), num_blocks(config.memory_dim)), ("F8_E8M0",)),
        "query_norm": norm,
        "key_norm": norm,
    }
    dense = {name: _expect(tensors.find(names[name]), shape, types) for name, (shape, types) in expected.items()}
    return _Place(_table(tensors, "deepseek_v41", stem, config, spec, index), dense)


def _table(
    tensors: TensorFolder, variant: PublishedVariant, stem: str, config: EngramConfig, spec: HashSpec, index: int
) -> RowLayout:
    """Find the table of a layer, and hold its size against the config."""
    layout = published_layout(tensors, variant, stem)
    found, expected = [layout.num_rows, layout.codec.width], [spec.padded_rows[index], config.head_dim]
    if found != expected:
        more = f" and {len(layout.tensors) - 1} more shards" if len(layout.tensors) > 1 else ""
        raise CheckpointError(
            f"{layout.tensors[0]}{more}: found {found} rows and width in all, expected {expected} from config.json; "
            "the folder holds weights of another geometry"
        )
    return layout


def _expect(tensor: StoredTensor, shape: tuple[int, ...], types: tuple[str, ...]) -> StoredTensor:
    """Refuse a tensor of another shape or type than the config asks for."""
    if tensor.shape != shape or tensor.dtype not in types:
        raise CheckpointError(
            f"{tensor}: expected {' or '.join(types)} {list(shape)} from config.json; the folder holds weights of "
            "another geometry"
        )
    return tensor


def _load_qwen(dense: Mapping[str, StoredTensor], config: EngramConfig, dtype: torch.dtype | None) -> dict[str, Tensor]:
    loaded = {name: stored.load().to(dtype or stored.torch_dtype) for name, stored in dense.items()}
    streams = (config.num_streams, config.hidden_size)
    return {
        # Of two types, `cat` takes the one that holds both.
        "key_value.weight": torch.cat([loaded["key"], loaded["value"]]),
        "query_norm": loaded["query_norm"].view(streams),
        "key_norm": loaded["key_norm"].view(streams),
        "conv_norm": loaded["conv_norm"].view(streams),
        "conv_weight": loaded["conv"][:, 0],
    }


def _load_deepseek(
    dense: Mapping[str, StoredTensor], config: EngramConfig, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    weight, scale = dense["key_value"].load(), dense["key_value_scale"].load()
    return {
        "key_value.weight": dequantize(weight, scale, dtype or torch.bfloat16, square=True),
        "query_norm": dense["query_norm"].load().to(dtype or dense["query_norm"].torch_dtype),
        "key_norm": dense["key_norm"].load().to(dtype or dense["key_norm"].torch_dtype),
    }
