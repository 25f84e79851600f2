"""Writing memory in the formats of published checkpoints, so that their readers open it."""

import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engram_lm.errors import CheckpointError, ConfigError, MismatchError
from engram_lm.files import new_folder
from engram_lm.hashing import HashSpec
from engram_lm.memory.config import EngramConfig
from engram_lm.memory.formats.published import NAMES, PublishedMemory, PublishedVariant
from engram_lm.memory.layer import EngramLayer
from engram_lm.tables.block_float8 import BLOCK, num_blocks, quantize
from engram_lm.tables.files.safetensors_file import INDEX_NAME
from engram_lm.tables.files.safetensors_writer import TensorWriter
from engram_lm.tables.table import Table
from engram_lm.tables.tiers.record_table import RecordTable

__all__ = ["write_memory"]

# Rows copied at a time. Memory stays at a few times this, whatever the table's size.
_PIECE_BYTES = 2**24

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_PREFIXES: dict[PublishedVariant, str] = {"qwen_ple": "model.language_model.", "deepseek_v41": ""}

# Option → what the format has, and why it has nothing else.
_HELD: dict[PublishedVariant, dict[str, tuple[Any, str]]] = {
    "qwen_ple": {
        "bias": (False, "its projections have no bias"),
        "signs": ("none", "it adds rows without signs"),
        "gate": ("signed_sqrt", "its gate always takes the signed square root"),
        "tables": ("per_layer", "each of its layers has its own table"),
        "norm_weight": ("zero_centered", "its norms multiply by 1 + weight"),
    },
    "deepseek_v41": {
        "bias": (False, "its projections have no bias"),
        "signs": ("none", "it adds rows without signs"),
        "gate": ("signed_sqrt", "its gate always takes the signed square root"),
        "tables": ("per_layer", "each of its layers has its own table"),
        "norm_weight": ("plain", "its norms multiply by their weight"),
        "kernel_size": (0, "it has no convolution"),
    },
}

# What decides which row a token reads, as far as a config says it; the token map itself is the tokenizer's.
_HASH_FIELDS = (
    "layers", "layer_base", "orders", "num_heads", "primes", "multipliers", "vocab_size", "num_tokens", "pad_token_id",
    "segments", "padded_rows", "shared_table",
)  # fmt: skip

_Plan = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def write_memory(
    folder: str | os.PathLike[str],
    memory: PublishedMemory,
    *,
    variant: PublishedVariant | None = None,
    num_shards: int | None = None,
) -> None:
    """Write memory as a checkpoint folder: a ``config.json``, the weights, and an index over them.

    The folder is written aside and appears when it is whole. Tables are copied in pieces: they may be larger than
    memory, and lie on any tier. 8-bit tables that are already in the target's layout are copied byte for byte.

    Args:
        folder: The folder to create; it must not exist, or be empty.
        memory: What `read_memory` returned, or a memory of one's own in the same dataclass.
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

    Source: the formats named at `read_memory`.
    """
    variant = memory.variant if variant is None else variant
    if variant not in tuple(NAMES):  # compared, not looked up: it may be anything
        raise ConfigError(f"memory is written as {' or '.join(NAMES)}, not as {variant!r}")
    if num_shards is not None and (type(num_shards) is not int or num_shards < 1 or variant != "qwen_ple"):
        raise ConfigError(f"num_shards is a positive integer, for qwen_ple only, got {num_shards!r}")
    tables = _check_parts(memory)
    _check_options(memory.config, variant)
    if num_shards is None:
        layouts = [getattr(table, "layout", None) for table in tables.values()]
        num_shards = max(1 if layout is None else len(layout.tensors) or 1 for layout in layouts)
    fewest_rows = min(table.num_rows for table in tables.values())
    if num_shards > fewest_rows:
        raise ConfigError(f"a table of {fewest_rows} rows cannot be split into num_shards={num_shards}")
    config = _qwen_keys(memory, num_shards) if variant == "qwen_ple" else _deepseek_keys(memory)
    _check_hash(config, memory.spec, variant)

    num_files = 1 + len(tables)
    places: dict[str, str] = {}
    num_bytes = 0
    with new_folder(folder) as aside:
        dense: dict[str, Tensor] = {}
        for index, (block, table) in enumerate(tables.items()):
            stem = f"{_PREFIXES[variant]}layers.{block}."
            names = {name: stem + published for name, published in NAMES[variant].items()}
            layer = memory.layers[block]
            if variant == "qwen_ple":
                weights, plan = _qwen_weights(layer, memory.spec, index), _qwen_plan(table, names, num_shards)
            else:
                weights, plan = _deepseek_weights(layer, names), _deepseek_plan(table, names)
            dense.update({names[name]: weight for name, weight in weights.items()})
            file = f"model-{index + 2:05d}-of-{num_files:05d}.safetensors"
            with TensorWriter(aside / file, plan) as writer:
                if variant == "qwen_ple":
                    _write_qwen_table(writer, table, names, num_shards)
                else:
                    _write_deepseek_table(writer, table, names)
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
        _write_json(aside / INDEX_NAME, index_text)
        _write_json(aside / "config.json", config)


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
        _gather(table, 0, 1)
    except NotImplementedError:
        return True
    return False


def _check_options(config: EngramConfig, variant: PublishedVariant) -> None:
    """Refuse what the format has no place for."""
    for name, (held, why) in _HELD[variant].items():
        if getattr(config, name) != held:
            raise ConfigError(f"{variant} cannot hold {name}={getattr(config, name)!r}, only {held!r}: {why}")
    if config.orders != tuple(range(2, config.orders[-1] + 1)):
        raise ConfigError(f"{variant} cannot hold orders={config.orders}: it has all orders from 2 to the highest")
    if variant == "qwen_ple":
        if not config.kernel_size:
            raise ConfigError("qwen_ple cannot hold kernel_size=0: it always has a convolution")
        if config.conv_dilation != config.orders[-1]:
            raise ConfigError(
                f"qwen_ple cannot hold dilation={config.conv_dilation}: its convolution's is the highest order, "
                f"{config.orders[-1]}"
            )


def _qwen_keys(memory: PublishedMemory, num_shards: int) -> dict[str, Any]:
    config, spec = memory.config, memory.spec
    text = {
        "model_type": "qwen4_exp_text",
        "ple_layer_ids": list(spec.layers),
        "ple_embed_dim": config.memory_dim,
        "ple_conv_kernel_size": config.kernel_size,
        "ngram_size": spec.orders[-1],
        "heads_per_ngram": spec.num_heads,
        "ngram_vocab_size_base": config.rows_per_head,
        "make_ngram_vocab_size_divisible_by": _divisor(spec),
        "split_ngram_parts": num_shards,
        "seed": spec.seed,
        "vocab_size": spec.vocab_size,
        "eos_token_id": spec.pad_token_id,
        "hidden_size": config.hidden_size,
        "hc_count": config.num_streams,
        "rms_norm_eps": config.norm_eps,
    }
    return {"architectures": ["Qwen4ExpForConditionalGeneration"], "model_type": "qwen4_exp", "text_config": text}


def _divisor(spec: HashSpec) -> int:
    """Find what the rows of all tables were padded to a multiple of; the published one where it fits."""
    rows = [(sum(primes), padded) for primes, padded in zip(spec.primes, spec.padded_rows, strict=True)]

    def fits(divisor: int) -> bool:
        return all(-(-needed // divisor) * divisor == padded for needed, padded in rows)

    # A divisor may be as large as a table, but padding to more than this is nobody's.
    divisor = next(filter(fits, (128, *range(1, 2**16))), None)
    if divisor is None:
        raise ConfigError(f"qwen_ple cannot hold tables of {spec.padded_rows} rows for primes adding up to {rows}")
    return divisor


def _deepseek_keys(memory: PublishedMemory) -> dict[str, Any]:
    config, spec = memory.config, memory.spec
    text = {
        "model_type": "deepseek_v41_text",
        "engram_layer_ids": list(spec.layers),
        "engram_num_embeddings": list(spec.padded_rows),
        "engram_max_ngram_size": spec.orders[-1],
        "engram_vocab_size": config.rows_per_head,
        "engram_n_heads": spec.num_heads,
        "engram_head_dim": config.head_dim,
        "engram_pad_token_id": spec.pad_token_id,
        "engram_compressed_vocab_size": spec.vocab_size,
        "hidden_size": config.hidden_size,
        "hc_mult": config.num_streams,
        "rms_norm_eps": config.norm_eps,
        "vocab_size": spec.num_tokens,
    }
    dead = spec.segments.dead_tokens
    return {
        "architectures": ["DeepseekV41ForCausalLM"],
        "model_type": "deepseek_v41",
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": [32, 32],
            "scale_fmt": "ue8m0",
            "activation_scheme": "dynamic",
        },
        **({"image_token_id": dead[0]} if dead else {}),
        "text_config": text,
    }


def _check_hash(config: Mapping[str, Any], spec: HashSpec, variant: PublishedVariant) -> None:
    """Refuse a hash that a reader of this config would not get back."""
    try:
        back = HashSpec.from_config(config, spec.token_map)
    except ValueError as error:
        raise ConfigError(f"{variant} cannot hold this hash: its config would be refused ({error})") from error
    # Without the token map nobody knows the canonical id of the pad token.
    for name in (*_HASH_FIELDS, "fill") if spec.token_map is not None else _HASH_FIELDS:
        if getattr(back, name) != getattr(spec, name):
            raise ConfigError(
                f"{variant} cannot hold this hash: {name} is {getattr(spec, name)!r:.200}, from a {variant} config "
                f"it would be read as {getattr(back, name)!r:.200}"
            )


def _qwen_weights(layer: EngramLayer, spec: HashSpec, index: int) -> dict[str, Tensor]:
    """Return everything but the table, by our names of `NAMES`."""
    wide = layer.config.num_streams * layer.config.hidden_size
    key, value = layer.key_value.weight.detach().split([wide, layer.config.hidden_size])
    return {
        "key": key,
        "value": value,
        "key_norm": layer.key_norm.detach().flatten(),
        "query_norm": layer.query_norm.detach().flatten(),
        "conv_norm": layer.conv_norm.detach().flatten(),
        "conv": layer.conv_weight.detach().unsqueeze(1),
        "multipliers": torch.tensor(spec.multipliers[index]),
        "primes": torch.tensor(spec.primes[index]),
        "offsets": torch.tensor(spec.offsets_at(index)),
    }


def _deepseek_weights(layer: EngramLayer, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return everything but the table, by our names of `NAMES`."""
    # In parts of whole blocks: rounding takes several times the memory of what it rounds.
    parts = layer.key_value.weight.detach().split(32 * BLOCK)
    rounded = [_quantize(part.cpu(), names["key_value"], square=True) for part in parts]
    return {
        "key_value": torch.cat([values for values, _ in rounded]),
        "key_value_scale": torch.cat([scales for _, scales in rounded]),
        # As the format has them, whatever type they were trained in; nothing is lost of those that came from it.
        "query_norm": layer.query_norm.detach().to(torch.bfloat16),
        "key_norm": layer.key_norm.detach().to(torch.bfloat16),
    }


def _quantize(values: Tensor, name: str, *, square: bool = False) -> tuple[Tensor, Tensor]:
    """Round to 8 bits, and name the tensor that cannot be."""
    try:
        return quantize(values, square=square)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _qwen_plan(table: Table, names: Mapping[str, str], num_shards: int) -> _Plan:
    stored = _stored_as_qwen(table)
    dtype = table.dtype if stored is None else stored.codec.stored_dtype
    shards = _qwen_shards(table, names, num_shards)
    plan: _Plan = {name: (dtype, (stop - start, table.width)) for name, start, stop in shards}
    if stored is not None and stored.codec.scale == "table":
        plan[names["table_scale"]] = (torch.float32, ())
    return plan


def _qwen_shards(table: Table, names: Mapping[str, str], num_shards: int) -> Iterator[tuple[str, int, int]]:
    """Name, first row and end of every shard: equal, to one row."""
    if num_shards == 1:
        yield names["table"], 0, table.num_rows
        return
    bounds = [table.num_rows * number // num_shards for number in range(num_shards + 1)]
    for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
        yield names["table_shard"].format(number), start, stop


def _write_qwen_table(writer: TensorWriter, table: Table, names: Mapping[str, str], num_shards: int) -> None:
    stored = _stored_as_qwen(table)
    for name, first, end in _qwen_shards(table, names, num_shards):
        for start, stop in _pieces(table, first, end):
            rows = _gather(table, start, stop) if stored is None else stored.load_records(start, stop)
            writer.append(name, rows if stored is None else rows.view(stored.codec.stored_dtype))
    if stored is not None and stored.codec.scale == "table":
        writer.append(names["table_scale"], torch.tensor(stored.codec.table_scale, dtype=torch.float32))


def _stored_as_qwen(table: Table) -> RecordTable | None:
    """Return a table whose records are already what Qwen's format holds: plain, or 8 bits with one scale."""
    return table if isinstance(table, RecordTable) and table.codec.scale != "blocks" else None


def _deepseek_plan(table: Table, names: Mapping[str, str]) -> _Plan:
    return {
        names["table"]: (torch.float8_e4m3fn, (table.num_rows, table.width)),
        names["table_scale"]: (torch.float8_e8m0fnu, (table.num_rows, num_blocks(table.width))),
    }


def _write_deepseek_table(writer: TensorWriter, table: Table, names: Mapping[str, str]) -> None:
    for start, stop in _pieces(table, 0, table.num_rows):
        if isinstance(table, RecordTable) and table.codec.scale == "blocks":
            records = table.load_records(start, stop)
            rows, scales = records.split([table.codec.value_bytes, table.codec.scale_bytes], dim=1)
            rows = rows.contiguous().view(torch.float8_e4m3fn)
            scales = scales.contiguous().view(torch.float8_e8m0fnu)
        else:
            rows, scales = _quantize(_gather(table, start, stop), f"rows {start} to {stop - 1} of {names['table']}")
        writer.append(names["table"], rows)
        writer.append(names["table_scale"], scales)


def _pieces(table: Table, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut a run of rows into runs of about `_PIECE_BYTES`."""
    size = max(1, _PIECE_BYTES // table.row_bytes)
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


@torch.no_grad()
def _gather(table: Table, start: int, stop: int) -> Tensor:
    # A trainable table reads where its parameter is.
    weight = getattr(table, "weight", None)
    device = weight.device if isinstance(weight, Tensor) else None
    return table.gather(torch.arange(start, stop, device=device)).cpu()


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
