"""Models to be timed: random weights of a named shape, tables of any size, and the twin without memory."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from engram_lm.errors import ConfigError, suggestion
from engram_lm.memory.config import EngramConfig
from engram_lm.model.config import EngramLMConfig
from engram_lm.model.modeling import EngramForCausalLM
from engram_lm.model.presets import NAMES, preset_fields
from engram_lm.model.table_place import TABLES, wanted_tables
from engram_lm.tables import StoredTensor, TensorFolder
from engram_lm.tables.files.safetensors_file import INDEX_NAME
from engram_lm.tables.files.safetensors_writer import TensorWriter, encode_header
from engram_lm.tables.tiers.page_cache import drop_from_memory
from engram_lm.training.data.tokenizer import train_tokenizer

_BENCH_DENSE: tuple[dict[str, Any], dict[str, Any]] = (
    {
        "vocab_size": 8192,
        "num_hidden_layers": 8,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "q_lora_rank": None,
        "kv_lora_rank": 256,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32,
        "v_head_dim": 64,
        "intermediate_size": 2048,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    {"layers": (1, 4), "memory_dim": 256, "rows_per_head": 50_000},
)
_SHORT = {"bench-moe": "engram-tiny", "nano": "engram-nano", "tiny": "engram-tiny", "small": "engram-small"}

SHAPES = ("bench-dense", *_SHORT, *(name for name in NAMES if name.startswith("engram-")))
"""Names of shapes: one dense backbone of 8 blocks of width 512 with two memory layers, and the presets with memory."""

_BUILT_ROWS_PER_HEAD = 1000
_BLOCK_NUMBERS = 16 << 20
_PIECE_BYTES = 16 << 20


def shape_fields(shape: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Look a shape up: fields of `EngramLMConfig` and of `engram_lm.EngramConfig`.

    Raises:
        ConfigError: There is no such shape.
    """
    if shape not in SHAPES:
        raise ConfigError(
            f"there is no shape {shape!r}; {suggestion(shape, SHAPES)}; a checkpoint is named by its path"
        )
    backbone, memory = _BENCH_DENSE if shape == "bench-dense" else preset_fields(_SHORT.get(shape, shape))
    assert memory is not None  # all of these have one
    return {"num_streams": 1, **backbone}, memory


def shape_memory(shape: str, table_bytes: int | None, dtype: torch.dtype) -> EngramConfig:
    """Describe the memory of a shape, with `table_bytes` bytes of tables in all (None: as many as the shape has)."""
    backbone, fields = shape_fields(shape)
    memory = EngramConfig(hidden_size=backbone["hidden_size"], num_streams=backbone["num_streams"], **fields)
    if table_bytes is None:
        return memory
    bytes_per_row_of_all_heads = memory.memory_dim * dtype.itemsize * len(memory.layers)
    rows = max(1, round(table_bytes / bytes_per_row_of_all_heads))
    return EngramConfig.from_dict({**memory.to_dict(), "rows_per_head": rows})


def make_model(
    shape: str,
    folder: Path,
    texts: Iterable[str],
    *,
    tokenizer: Any = None,
    table_bytes: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    holes: bool = False,
    seed: int = 0,
) -> None:
    """Write a checkpoint of random weights, whose tables are never held in memory, and its tokenizer.

    Args:
        shape: One of `SHAPES`.
        folder: Where; made here.
        texts: What a tokenizer of the shape's vocabulary is trained on where none is given.
        tokenizer: A tokenizer of transformers.
        table_bytes: Bytes of all tables; those of the shape where None.
        dtype: Type of the weights and the tables.
        holes: Write no rows: the files then are holes, which take no room on the disk and are read as zeros without
            reading the disk.
        seed: Of the weights.
    """
    backbone, _ = shape_fields(shape)
    memory = shape_memory(shape, table_bytes, dtype)
    tokenizer = tokenizer or train_tokenizer(texts, backbone["vocab_size"])
    special = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
    backbone = {name: value for name, value in backbone.items() if name not in special}
    config = EngramLMConfig.for_tokenizer(tokenizer, memory, **backbone)
    few_rows = EngramConfig.from_dict({**memory.to_dict(), "rows_per_head": _BUILT_ROWS_PER_HEAD})
    torch.manual_seed(seed)
    model = EngramForCausalLM(EngramLMConfig.for_tokenizer(tokenizer, few_rows, **backbone)).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    config.dtype = dtype
    config.architectures = [EngramForCausalLM.__name__]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if TABLES not in name.split(".") and not (config.tie_word_embeddings and name == "lm_head.weight")
    }
    index = dict.fromkeys(weights, "weights.safetensors")
    with TensorWriter(
        folder / "weights.safetensors", {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}
    ) as writer:
        for name, tensor in weights.items():
            writer.append(name, tensor)
    assert config.spec is not None
    for table in wanted_tables(config.spec, memory.head_dim).values():
        tensor_name, file = f"model.{TABLES}.{table.name}.weight", f"table-{table.name}.safetensors"
        index[tensor_name] = file
        write_table(folder / file, tensor_name, (table.num_rows, table.width), dtype, holes=holes)
    _write_index(folder, index)


def write_table(path: Path, name: str, shape: tuple[int, int], dtype: torch.dtype, *, holes: bool) -> None:
    """Write a safetensors file of one tensor: the same random numbers again and again, or none at all."""
    if holes:
        header, places = encode_header({name: (dtype, shape)}, {"format": "pt"})
        with open(path, "wb") as file:
            file.write(header)
            file.truncate(places[name][1])
        return
    numbers = torch.randn(min(_BLOCK_NUMBERS, shape[0] * shape[1])).to(dtype)
    with TensorWriter(path, {name: (dtype, shape)}) as writer:
        left = shape[0] * shape[1]
        while left:
            writer.append(name, numbers[:left])
            left -= min(left, len(numbers))
    # Nobody needs all of it, and pages that were written lie in large pieces that are kept or dropped whole.
    drop_from_memory(path)


def copy_without_memory(model: Path, folder: Path) -> None:
    """Write the twin of a checkpoint without memory: the same weights of the backbone."""
    tensors = TensorFolder(model)
    values = read_config(model).to_dict()
    for name in ("model_type", "layer_types", "transformers_version"):
        values.pop(name, None)
    folder.mkdir(parents=True, exist_ok=True)
    EngramLMConfig(**{**values, "memory": None, "hash_spec": None}).save_pretrained(folder)
    kept = {name: tensors.find(name) for name in tensors.names if not _is_of_memory(name)}
    file = folder / "model.safetensors"
    with TensorWriter(file, {name: (stored.torch_dtype, stored.shape) for name, stored in kept.items()}) as writer:
        for name, stored in kept.items():
            writer.append(name, stored.load())
    _link_others(model, folder, {"config.json", INDEX_NAME})


def copy_tables(model: Path, folder: Path) -> None:
    """Write a checkpoint of the same model with files of its own for the tables; everything else is linked."""
    tables = {Path(stored.file).name for stored in stored_tables(model)}
    folder.mkdir(parents=True, exist_ok=True)
    for name in tables:
        _copy_with_holes(model / name, folder / name)
        drop_from_memory(folder / name)
    for path in model.iterdir():
        if path.name not in tables and path.is_file():
            (folder / path.name).symlink_to(path.resolve())


def read_config(model: Path) -> EngramLMConfig:
    """Read the configuration of an engram-lm checkpoint.

    Raises:
        ConfigError: It is not one, or it has no memory.
    """
    try:
        config = EngramLMConfig.from_pretrained(model)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{model} cannot be read as a model of engram-lm: {str(error).splitlines()[0]}") from error
    if config.model_type != EngramLMConfig.model_type or config.memory is None:
        raise ConfigError(f"{model} is not an engram-lm model with memory, so there is nothing to compare")
    return config


def stored_tables(model: Path) -> list[StoredTensor]:
    """Find the tables of a checkpoint in its files."""
    tensors = TensorFolder(model)
    return [tensors.find(name) for name in tensors.names if TABLES in name.split(".")]


def disk_bytes(path: Path) -> int:
    """Bytes that a file takes on the disk, which for a file with holes are fewer than it has."""
    return os.stat(path).st_blocks * 512


def _is_of_memory(name: str) -> bool:
    parts = name.split(".")
    return TABLES in parts or "memory" in parts or parts[-1] == "token_map"


def _write_index(folder: Path, files: dict[str, str]) -> None:
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")


def _link_others(model: Path, folder: Path, left_out: set[str]) -> None:
    """Link the small files beside the weights, such as the tokenizer's."""
    for path in model.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in left_out:
            (folder / path.name).symlink_to(path.resolve())


def _copy_with_holes(source: Path, target: Path) -> None:
    """Copy a file without filling its holes."""
    with open(source, "rb") as reading, open(target, "wb") as writing:
        size, place = os.fstat(reading.fileno()).st_size, 0
        writing.truncate(size)
        while place < size:
            try:
                start = os.lseek(reading.fileno(), place, os.SEEK_DATA)
            except OSError:  # nothing but a hole is left
                return
            place = os.lseek(reading.fileno(), start, os.SEEK_HOLE)
            while start < place:
                start += os.pwrite(
                    writing.fileno(), os.pread(reading.fileno(), min(place - start, 1 << 24), start), start
                )
