"""The tables of a checkpoint, found by the names of its tensors, without loading or copying them."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.files import user_path
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
        "table_shard_scale": "ple.ple_embedding.ngram_embedding.shard_{}.weight_scale",
    },
    "deepseek_v41": {"table": "engram.embed.weight", "table_scale": "engram.embed.scale"},
}
"""What published checkpoints call the tensors of a table, behind ``PREFIXlayers.BLOCK.``."""

SCALE_NAMES = ("weight_scale", "weight_scale_inv", "scale", "scales")
"""What checkpoints call the scales of 8-bit weights, behind the name that ends in ``weight`` without them; each is a
factor, also the one that is called an inverse."""

_NUMBER = "0|[1-9][0-9]{0,8}"
_LAYER = rf"(?P<prefix>(?:.*\.)?)layers\.(?P<key>{_NUMBER})\."
# What quantizers put beside or in place of the numbers of a table.
_PART = r"\.(?P<part>q?(?:weight|scale|zero|bias)\w*)"

_KINDS = {
    kind: re.compile(stem + _PART, re.DOTALL)
    for kind, stem in {
        "own": r"(?P<prefix>(?:.*\.)?)memory_tables\.(?P<key>[^.]+)",
        "deepseek_v41": rf"{_LAYER}engram\.embed",
        "qwen_ple": rf"{_LAYER}ple\.ple_embedding\.ngram_embedding(?:\.shard_(?P<shard>{_NUMBER}))?",
    }.items()
}
"""Whose table it is → which names its tensors have, with the groups ``prefix``, ``key``, ``part`` and ``shard``."""


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
        path = user_path(source)
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
    names = [name for name in tensors.names if name.startswith(stem) and _KINDS[kind].fullmatch(name)]
    if not names:
        raise CheckpointError(
            f"the tensor {stem}{TABLE_NAMES[kind]['table']} is missing from {tensors.name}, and so is every other of "
            "its table; download it again"
        )
    return _layout(tensors, kind, names)


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
        for kind, pattern in _KINDS.items():
            if match := pattern.fullmatch(name):
                number = re.fullmatch(_NUMBER, match["key"])
                found.setdefault((int(match["key"]) if number else match["key"], kind), []).append(name)
    layouts: dict[int | str, RowLayout] = {}
    for (key, kind), names in found.items():
        if key in layouts:
            raise CheckpointError(f"{tensors.name} holds several tables of layer {key}, of different kinds; keep one")
        layouts[key] = _layout(tensors, kind, names)
    if not layouts:
        raise CheckpointError(
            f"{tensors.name} holds no memory table: no tensor is named [...]memory_tables.NAME.weight, "
            "[...]layers.L.engram.embed.weight or [...]layers.L.ple.ple_embedding.ngram_embedding[.shard_I].weight"
        )
    return _ordered(layouts)


def _layout(tensors: TensorFolder, kind: str, names: list[str]) -> RowLayout:
    """Put a table together from its tensors: its numbers, in one tensor or in shards, and their scales."""
    matches = [match for name in sorted(names) if (match := _KINDS[kind].fullmatch(name))]
    if len({match["prefix"] for match in matches}) != 1:
        raise CheckpointError(
            f"{tensors.name} holds the same table several times, as {', '.join(sorted(names))}; keep one"
        )
    for match in matches:
        if match["part"] not in ("weight", *SCALE_NAMES):
            raise CheckpointError(
                f"{tensors.find(match[0])}: engram-lm does not read tables that are stored in this way; it reads "
                f"numbers called weight, with scales called {', '.join(SCALE_NAMES)}"
            )
    # By number, so that 10 comes after 9; None for the table as a whole.
    shard_of = {match[0]: int(shard) if (shard := match.groupdict().get("shard")) else None for match in matches}
    values = {shard_of[match[0]]: match[0] for match in matches if match["part"] == "weight"}
    scales: dict[int | None, str] = {}
    for match in matches:
        if match["part"] != "weight" and scales.setdefault(shard_of[match[0]], match[0]) != match[0]:
            raise CheckpointError(f"{tensors.name} holds {match[0]} and {scales[shard_of[match[0]]]}; keep one")
    stem = matches[0][0].removesuffix("." + matches[0]["part"]).partition(".shard_")[0]
    if not values:
        raise CheckpointError(
            f"{tensors.name} holds {', '.join(scales.values())} and lacks {stem}.weight, without which it means "
            "nothing; download it again"
        )
    if None in values and len(values) > 1:
        raise CheckpointError(
            f"{tensors.name} holds the table of {stem} both in one tensor and in shards; remove one of them"
        )
    parts: list[int | None] = [None] if None in values else list(range(len(values)))
    if missing := [part for part in parts if part not in values]:
        highest = max(part for part in values if part is not None)
        raise CheckpointError(
            f"{tensors.name} lacks {stem}.shard_{missing[0]}.weight, of {highest + 1} or more shards; download it again"
        )
    rows = [tensors.find(values[part]) for part in parts]
    if rows[0].torch_dtype.itemsize > 1:
        if scales:
            found = ", ".join(scales.values())
            raise CheckpointError(f"{found} is there, and {rows[0]} is not of 8 bits and has no scale; remove it")
        return tensor_layout(rows)
    if not scales:
        raise CheckpointError(
            f"{rows[0]} has no scale that engram-lm finds: expected {stem}.{' or '.join(SCALE_NAMES)} beside it, "
            "without which its numbers are wrong by orders of magnitude"
        )
    if None in scales and len(scales) > 1:
        raise CheckpointError(f"{tensors.name} holds scales of {stem} both for all rows and for shards; remove one")
    if None in scales:
        scale = tensors.find(scales[None])
        if math.prod(scale.shape) == 1 and scale.torch_dtype.is_floating_point:
            return tensor_layout(rows, scales=tensors.load(scale.name).float().item())
        return tensor_layout(rows, scales=[scale])
    if missing := [part for part in parts if part not in scales]:
        raise CheckpointError(
            f"{tensors.name} holds scales of other shards of {stem} and lacks that of shard {missing[0]}, without "
            "which its numbers mean nothing; download it again"
        )
    return tensor_layout(rows, scales=[tensors.find(scales[part]) for part in parts])
