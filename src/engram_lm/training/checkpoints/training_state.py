"""Names the tensors that training changes, and exports them as a model."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn

from engram_lm.errors import CheckpointError, ConfigError, EngramError, MismatchError
from engram_lm.files import new_folder, write_atomically
from engram_lm.model import EngramForCausalLM, EngramLMConfig
from engram_lm.model.table_place import TABLES, wanted_tables
from engram_lm.tables.files.safetensors_file import INDEX_NAME
from engram_lm.tables.files.safetensors_writer import TensorWriter
from engram_lm.tables.occupancy import FirstRows
from engram_lm.tables.stored_tensor import DTYPES
from engram_lm.tables.tiers.sharded import ShardedTable
from engram_lm.training.checkpoints.saved_state import SavedState, SavedTensor
from engram_lm.training.checkpoints.storage import StateReader
from engram_lm.training.optimizers import CombinedOptimizer, plain_name

MODEL_CONFIG = "model_config"
"""The fact that holds a model's ``config.json``, from which `export_model` makes the model's folder."""
SPEC_DIGEST = "spec_digest"
"""The fact that holds the digest of a model's HashSpec, None without memory; `Checkpoints.load` can expect it."""

_MODEL, _OPTIMIZER = "model/", "optimizer/"
_LARGEST_FILE_BYTES = 5 * 10**9
"""Size at which transformers splits its files."""


def model_facts(model: Any) -> dict[str, Any]:
    """Collect facts from which an `EngramForCausalLM` can be built and exported again: configuration and digest."""
    spec = model.config.spec
    config = json.loads(model.config.to_json_string(use_diff=False))
    return {MODEL_CONFIG: config, SPEC_DIGEST: None if spec is None else spec.digest}


def training_tensors(
    model: nn.Module, optimizer: CombinedOptimizer | None = None, *, only_trained: bool = False
) -> dict[str, Tensor]:
    """Name every tensor that training changes, for `Checkpoints`, which reads them and fills them in place.

    Names are the same for any number of ranks. Tables that are divided over ranks, and what the optimizer keeps for
    their rows, appear as whole tensors, as does what FSDP2 has divided. The optimizer's state is allocated where there
    is none yet.

    Args:
        model: The model itself, without the wrappers of DDP or a loss module (FSDP2 has none).
        optimizer: The optimizer of this model, made with the parameters' names; None for weights alone.
        only_trained: Whether to leave out whatever requires no gradient, buffers included, as with a frozen base.

    Returns:
        ``model/NAME`` for parameters and persistent buffers, tied ones once, under their first name;
        ``optimizer/PARAMETER/STATE`` for the optimizer's state. They share memory with what they name.

    Raises:
        ConfigError: The optimizer belongs to another model, or the state of a divided table is not by row.
    """
    tensors: dict[str, Tensor] = {}
    tables = {id(module.weight): module for module in model.modules() if isinstance(module, ShardedTable)}
    # All names of a tied weight: an optimizer may use another one than the first.
    parameters = list(model.named_parameters(remove_duplicate=False))
    by_name = {plain_name(name): tables.get(id(parameter)) for name, parameter in parameters}
    seen: set[int] = set()
    persistent = model.state_dict(keep_vars=True).keys()
    for name, tensor in [*parameters, *model.named_buffers(remove_duplicate=False)]:
        if name in persistent and id(tensor) not in seen and (tensor.requires_grad or not only_trained):
            seen.add(id(tensor))
            table = tables.get(id(tensor))
            tensors[_MODEL + plain_name(name)] = (
                tensor.detach() if table is None else table.distributed(tensor.detach())
            )
    if optimizer is None:
        return tensors
    optimizer.allocate_state()
    for key, tensor in optimizer.named_state().items():
        parameter = key.partition("/")[0]
        if parameter not in by_name:
            raise ConfigError(f"the optimizer keeps {key}, but the model has no parameter {parameter}; make it of this")
        table = by_name[parameter]
        if table is not None and tensor.dim():
            try:
                tensor = table.distributed(tensor)
            except MismatchError as error:
                raise ConfigError(f"the optimizer's {key} cannot be divided as its table is: {error}") from error
        tensors[_OPTIMIZER + key] = tensor.detach()
    return tensors


def export_model(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> Path:
    """Write a checkpoint's model as a Hugging Face folder, which ``EngramForCausalLM.from_pretrained`` loads.

    Tensors are read and written in pieces, so tables may be larger than memory. The checksums of the model's tensors
    are compared first. The folder appears only when it is complete.

    Args:
        checkpoint: The folder of one checkpoint, with the facts of `model_facts`.
        out: The folder to make.
        tokenizer: The tokenizer to save beside the model, which its memory was made with, or a folder to load it from.
        dtype: Type of floating-point weights, except those that the model keeps in float32; as trained where None.

    Returns:
        ``out``.

    Raises:
        CheckpointError: The checkpoint is incomplete or damaged, or has no model.
        MismatchError: The tokenizer is not the model's, or the tensors do not fit the configuration.
        ConfigError: The type is unknown.
        FileExistsError: ``out`` exists already.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    types = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in types:
        raise ConfigError(f"dtype is one of float32, bfloat16 and float16, not {dtype!r}")
    state = SavedState.read(checkpoint)
    config = _config_of(checkpoint, state)
    if isinstance(tokenizer, str | os.PathLike):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    if tokenizer is not None and config.spec is not None:
        config.spec.bind(tokenizer)
    saved = _model_tensors(checkpoint, state, config)
    kept = tuple(EngramForCausalLM._keep_in_fp32_modules_strict or ())
    target: dict[str, torch.dtype] = {}
    for name, tensor in saved.items():
        own, wanted = DTYPES[tensor.dtype], types[dtype]
        fixed = not own.is_floating_point or any(part in name for part in kept)
        target[name] = own if wanted is None or fixed else wanted
    trained = {
        kind for name, kind in target.items() if kind.is_floating_point and not any(part in name for part in kept)
    }
    config.dtype = max(trained, key=lambda kind: kind.itemsize) if trained else None
    config.architectures = [EngramForCausalLM.__name__]
    named = {_MODEL + name: tensor for name, tensor in saved.items()}
    reader = StateReader(checkpoint, SavedState(state.step, {}, state.files, named))
    reader.verify()
    first_rows = _first_rows(config)
    with new_folder(out) as aside:
        empty = {name: torch.empty(saved[name].shape, dtype=target[name], device="meta") for name in saved}
        files = split_torch_state_dict_into_shards(empty, max_shard_size=_LARGEST_FILE_BYTES)
        for file, names in files.filename_to_tensors.items():
            with TensorWriter(aside / file, {name: (target[name], saved[name].shape) for name in names}) as writer:
                for name in names:
                    row = 0
                    for piece in _whole(reader, _MODEL + name, saved[name]):
                        if (first := first_rows.get(name)) is not None:
                            piece = first.silenced(torch.arange(row, row + len(piece)), piece)
                            row += len(piece)
                        writer.append(name, piece.to(target[name]))
        if files.is_sharded:
            index = {"metadata": files.metadata, "weight_map": files.tensor_to_filename}
            write_atomically(aside / INDEX_NAME, json.dumps(index, indent=2) + "\n")
        config.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
    return out


def _first_rows(config: EngramLMConfig) -> dict[str, FirstRows]:
    """What unwritten rows of each table hold in a checkpoint, by the table's name in the model; files have zeros."""
    memory, spec = config.memory_config, config.spec
    if memory is None or spec is None:
        return {}
    found = {name: table.first_rows(memory) for name, table in wanted_tables(spec, memory.head_dim).items()}
    return {f"model.{TABLES}.{name}.weight": first for name, first in found.items() if first is not None}


def _config_of(checkpoint: Path, state: SavedState) -> EngramLMConfig:
    values = state.facts.get(MODEL_CONFIG)
    if not isinstance(values, dict):
        raise CheckpointError(f"{checkpoint} has no {MODEL_CONFIG} among its facts, so its model is not known")
    try:
        config = EngramLMConfig.from_dict(values)
    except EngramError:
        raise
    except Exception as error:  # the configuration's own checks raise what they like
        raise CheckpointError(f"the {MODEL_CONFIG} of {checkpoint} is not a configuration: {error!s:.300}") from error
    assert isinstance(config, EngramLMConfig)
    return config


def _model_tensors(checkpoint: Path, state: SavedState, config: EngramLMConfig) -> dict[str, SavedTensor]:
    """The model's tensors by their own names, checked against what the configuration describes."""
    found = {name.removeprefix(_MODEL): tensor for name, tensor in state.tensors.items() if name.startswith(_MODEL)}
    with torch.device("meta"):
        described = training_tensors(EngramForCausalLM(config))
    expected = {name.removeprefix(_MODEL): tuple(tensor.shape) for name, tensor in described.items()}
    shapes = {name: tensor.shape for name, tensor in found.items()}
    if shapes != expected:
        name = min(name for name in expected | shapes if expected.get(name) != shapes.get(name))
        raise MismatchError(
            f"{checkpoint} is not of the model that its {MODEL_CONFIG} describes: {name} has the shape "
            f"{shapes.get(name, 'of nothing (it is missing)')}, expected {expected.get(name, 'no such tensor')}"
        )
    return found


def _whole(reader: StateReader, name: str, tensor: SavedTensor) -> Iterator[Tensor]:
    """Yield a tensor in row-major order; it is held in memory only if it was divided along columns."""
    if all(chunk.shape[1:] == tensor.shape[1:] for chunk in tensor.chunks):
        for chunk in tensor.chunks:
            yield from reader.pieces(name, chunk)
        return
    whole = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
    for chunk in tensor.chunks:
        box = tuple(slice(offset, offset + size) for offset, size in zip(chunk.offsets, chunk.shape, strict=True))
        whole[box] = torch.cat(list(reader.pieces(name, chunk)))
    yield whole
