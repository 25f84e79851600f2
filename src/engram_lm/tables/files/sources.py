"""The tables of a checkpoint, found by the names of its tensors, without loading or copying them."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.tables.files.byte_source import FileFolder, LocalFolder, is_address
from engram_lm.tables.files.packed import parse_packed_header
from engram_lm.tables.files.safetensors_file import TensorFolder
from engram_lm.tables.layout import RowLayout, tensor_layout

PublishedKind = Literal["qwen_ple", "deepseek_v41"]
"""Whose checkpoint it is: transformers ``qwen4_exp``, or DeepSeek-V4.1."""

TABLE_NAMES: dict[PublishedKind, dict[str, str]] = {
    "qwen_ple": {
        "table": "ple.ple_embedding.ngram_embedding.weight",
        "table_shard": "ple.ple_embedding.ngram_embedding.shard_{}.weight",
        "table_scale": "ple.ple_embedding.ngram_embedding.weight_scale",
    },
    "deepseek_v41": {"table": "engram.embed.weight", "table_scale": "engram.embed.scale"},
}
"""What published checkpoints call the tensors of a table, behind ``PREFIXlayers.BLOCK.``."""

_LAYER = r"(?P<prefix>(?:.*\.)?)layers\.(?P<key>0|[1-9][0-9]{0,8})\."


def _pattern(kind: PublishedKind) -> re.Pattern[str]:
    """Match the tensors of a kind's tables, with the groups ``prefix``, ``key``, ``shard`` and ``scale``."""
    names = {name: re.escape(text) for name, text in TABLE_NAMES[kind].items()}
    shard = names.get("table_shard", "(?!)").replace(r"\{\}", "(?P<shard>0|[1-9][0-9]{0,8})")
    return re.compile(f"{_LAYER}(?:{names['table']}|{shard}|(?P<scale>{names['table_scale']}))", re.DOTALL)


_FLOATS = ("BF16", "F16", "F32")


def find_tables(source: str | os.PathLike[str] | FileFolder, file: str | None = None) -> dict[int | str, RowLayout]:
    """Find the tables of a checkpoint: the library's own, DeepSeek-V4.1's, Qwen's (``qwen4_exp``), or packed tables.

    Only names, types and shapes are checked here. Whether a table has the rows that a hash addresses is checked where
    the hash is known.

    Args:
        source: A folder with ``*.safetensors`` files, of a checkpoint or of packed tables, or one such file. A path of
            this machine, or a folder that lies elsewhere.
        file: The one file of a folder that is looked at, whatever lies beside it.

    Returns:
        Block number, from 0, or the table's name → where its rows lie, in ascending order.

    Raises:
        CheckpointError: No table, scales without their numbers or the other way round, a missing shard, tensors of
            unexpected types or shapes, malformed or truncated files.
        ConfigError: The source is an address; `engram_lm.tables.table_layouts` finds the tables there.
        RemoteError: The folder lies on a server that does not answer.

    Source: names and shapes of deepseek-ai/DeepSeek-V4.1-Flash ``inference/model.py`` and transformers
    ``models/qwen4_exp/modeling_qwen4_exp.py``.
    """
    if isinstance(source, str | os.PathLike):
        if is_address(source):
            raise ConfigError(f"{source} is on a server, and tables are copied from files; download it first")
        path = Path(source)
        if not path.exists():
            raise CheckpointError(
                f"{path} does not exist; a table is a checkpoint folder, a file of one, or an address"
            )
        source, file = (LocalFolder(path), None) if path.is_dir() else (LocalFolder(path.parent), path.name)
    tensors = TensorFolder(source, file)
    if not tensors.packed:
        return _find(tensors)
    found: dict[int | str, RowLayout] = {}
    for name, (place, header) in tensors.packed.items():
        key = _packed_key(name)
        if key in found:
            raise CheckpointError(f"{place} and another file are both the table of layer {key}; open one of them")
        found[key] = parse_packed_header(header, place).layout
    return _ordered(found)


def choose_layout(layouts: Mapping[int | str, RowLayout], layer: int | str | None, source: str) -> RowLayout:
    """Pick one of the tables that `find_tables` returned by its key, where a number may also be text.

    ``layer`` may be None where there is one table only. A `ConfigError` names the tables of ``source`` otherwise.
    """
    keys = ", ".join(map(str, layouts))
    if layer is None:
        if len(layouts) != 1:
            raise ConfigError(f"{source} holds the tables of layers {keys}; choose one with layer=")
        return next(iter(layouts.values()))
    for key, layout in layouts.items():
        if str(key) == str(layer):
            return layout
    raise ConfigError(f"{source} holds no table of layer {layer!r}; there are those of {keys}")


def published_layout(tensors: TensorFolder, kind: PublishedKind, stem: str) -> RowLayout:
    """Find one table of a published checkpoint, for a reader that knows the ``PREFIXlayers.BLOCK.`` before its names.

    The errors are those of `find_tables`. The number of rows is not checked: the reader knows what it must be.
    """
    pattern, read = _KINDS[kind]
    names = [name for name in tensors.names if name.startswith(stem) and pattern.fullmatch(name)]
    if not names:
        raise CheckpointError(
            f"the tensor {stem}{TABLE_NAMES[kind]['table']} is missing from {tensors.name}, and so is every other of "
            "its table; download it again"
        )
    return read(tensors, names)


def _packed_key(file: str) -> int | str:
    """Which table a packed file is, by its name: ``layer-1.safetensors`` is that of layer 1."""
    stem = Path(file).stem
    number = re.search(r"(?:^|\D)(0|[1-9][0-9]{0,8})$", stem)
    return int(number[1]) if number else stem


def _ordered(layouts: Mapping[int | str, RowLayout]) -> dict[int | str, RowLayout]:
    """Sort tables: first by number, then by name."""
    return dict(sorted(layouts.items(), key=lambda item: (isinstance(item[0], str), item[0])))


def _find(tensors: TensorFolder) -> dict[int | str, RowLayout]:
    """Find all tables by the names of their tensors."""
    found: dict[tuple[int | str, str], list[str]] = {}
    for name in tensors.names:
        for kind, (pattern, _) in _KINDS.items():
            if match := pattern.fullmatch(name):
                number = re.fullmatch("0|[1-9][0-9]{0,8}", match["key"])
                found.setdefault((int(match["key"]) if number else match["key"], kind), []).append(name)
    layouts: dict[int | str, RowLayout] = {}
    for (key, kind), names in found.items():
        if key in layouts:
            raise CheckpointError(f"{tensors.name} holds several tables of layer {key}, of different kinds; keep one")
        layouts[key] = _KINDS[kind][1](tensors, names)
    if not layouts:
        raise CheckpointError(
            f"{tensors.name} holds no memory table: no tensor is named [...]memory_tables.NAME.weight, "
            "[...]layers.L.engram.embed.weight or [...]layers.L.ple.ple_embedding.ngram_embedding[.shard_I].weight"
        )
    return _ordered(layouts)


def _own_layout(tensors: TensorFolder, names: list[str]) -> RowLayout:
    if len(names) != 1:
        raise CheckpointError(f"{tensors.name} holds the same table several times, as {', '.join(names)}; keep one")
    return tensor_layout([tensors.find(names[0])])


def _deepseek_layout(tensors: TensorFolder, names: list[str]) -> RowLayout:
    stems = sorted({name.rpartition(".")[0] for name in names})
    if len(stems) != 1:
        raise CheckpointError(f"{tensors.name} holds the same table several times, as {', '.join(stems)}; keep one")
    weight_name, scale_name = f"{stems[0]}.weight", f"{stems[0]}.scale"
    for missing, present in ((weight_name, scale_name), (scale_name, weight_name)):
        if missing not in tensors:
            # Without its scales a table reads without an error and is wrong by orders of magnitude.
            raise CheckpointError(
                f"{tensors.name} holds {present} and lacks {missing}, without which it means nothing; download it again"
            )
    weight, scale = tensors.find(weight_name), tensors.find(scale_name)
    if weight.dtype != "F8_E4M3" or len(weight.shape) != 2:
        raise CheckpointError(f"{weight}: expected F8_E4M3 [rows, width]")
    return tensor_layout([weight], scales=[scale])


def _qwen_layout(tensors: TensorFolder, names: list[str]) -> RowLayout:
    matches = [match for name in names if (match := _KINDS["qwen_ple"][0].fullmatch(name))]
    if len({match["prefix"] for match in matches}) != 1:
        raise CheckpointError(
            f"{tensors.name} holds the same table several times, as {', '.join(sorted(names))}; keep one"
        )
    scales = [match[0] for match in matches if match["scale"]]
    shards = {int(match["shard"]): match[0] for match in matches if match["shard"]}
    whole = [match[0] for match in matches if not match["scale"] and not match["shard"]]
    if bool(whole) == bool(shards):
        what = "both in one tensor and in shards; remove one of them" if whole else "without its numbers; download them"
        raise CheckpointError(f"{tensors.name} holds the table of {sorted(names)[0]} {what}")
    # By number, so that 10 comes after 9.
    missing = [number for number in range(len(shards)) if number not in shards]
    if missing:
        stem = shards[min(shards)].rpartition(".shard_")[0]
        raise CheckpointError(
            f"{tensors.name} lacks {stem}.shard_{missing[0]}.weight, of {max(shards) + 1} or more shards; download "
            "it again"
        )
    rows = [tensors.find(name) for name in (whole or [shards[number] for number in range(len(shards))])]
    if rows[0].dtype != "F8_E4M3":
        if scales:
            raise CheckpointError(f"{scales[0]} is there, and {rows[0]} is not of 8 bits and has no scale; remove it")
        return tensor_layout(rows)
    if not scales:
        raise CheckpointError(
            f"{rows[0]} has no scale: expected {names[0].partition('.ngram_embedding.')[0]}.ngram_embedding."
            "weight_scale beside it, without which it means nothing; download it again"
        )
    scale = tensors.find(scales[0])
    if scale.shape not in ((), (1,)) or scale.dtype not in _FLOATS:
        raise CheckpointError(f"{scale}: expected one number of {', '.join(_FLOATS)}")
    return tensor_layout(rows, scales=tensors.load(scales[0]).float().item())


_KINDS: dict[str, tuple[re.Pattern[str], Callable[[TensorFolder, list[str]], RowLayout]]] = {
    "own": (re.compile(r"(?:.*\.)?memory_tables\.(?P<key>[^.]+)\.weight", re.DOTALL), _own_layout),
    "deepseek_v41": (_pattern("deepseek_v41"), _deepseek_layout),
    "qwen_ple": (_pattern("qwen_ple"), _qwen_layout),
}
"""Whose table it is → which names its tensors have, and how they make a layout."""
