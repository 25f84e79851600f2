"""The tables of a checkpoint, found by the names of its tensors; nothing is loaded and nothing copied."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeGuard

from torch import Tensor

from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.tables.block_float8 import num_blocks
from engram_lm.tables.files.packed import packed_layout
from engram_lm.tables.files.safetensors_file import StoredTensor, TensorFolder, read_header
from engram_lm.tables.layout import RowLayout, tensor_layout
from engram_lm.tables.tiers.http import RemoteFolder, is_address

__all__ = ["PACKED_SUFFIX", "TABLE_NAMES", "PublishedKind", "choose_layout", "published_layout", "table_layouts"]

PACKED_SUFFIX = ".engram"
"""How the files of the library's own packed format end."""

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
_OWN = re.compile(r"(?:.*\.)?memory_tables\.(?P<key>[^.]+)\.weight", re.DOTALL)


def _pattern(kind: PublishedKind) -> re.Pattern[str]:
    """What matches names of a kind's tables; groups ``prefix``, ``key``, and ``shard`` or ``scale`` where it is one."""
    names = {name: re.escape(text) for name, text in TABLE_NAMES[kind].items()}
    shard = names.get("table_shard", "(?!)").replace(r"\{\}", "(?P<shard>0|[1-9][0-9]{0,8})")
    return re.compile(f"{_LAYER}(?:{names['table']}|{shard}|(?P<scale>{names['table_scale']}))", re.DOTALL)


_DEEPSEEK, _QWEN = _pattern("deepseek_v41"), _pattern("qwen_ple")
_FLOATS = ("BF16", "F16", "F32")
_MOST_HEADS = 10_000


def table_layouts(source: str | os.PathLike[str], **options: Any) -> dict[int | str, RowLayout]:
    """Find the tables of a checkpoint: the library's own, DeepSeek-V4.1's, Qwen's (``qwen4_exp``), or a packed file.

    Args:
        source: A folder with ``*.safetensors`` files, one such file, one packed file (``*.engram``), a folder of packed
            files and no others, or the http(s) address of a checkpoint folder, of a ``.safetensors`` file or of a
            packed file.
        options: Fields of `HttpOptions`, for addresses.

    Returns:
        Block number (from 0), or the table's name where it is none → where the rows lie, in ascending order.

    Raises:
        CheckpointError: No table, scales without their numbers or the other way round, a missing shard, tensors of
            unexpected types or shapes, row counts that ``config.json`` contradicts, malformed or truncated files.
        ConfigError: Options without an address.
        RemoteError: Nobody answers at the address, or not with ranges.

    Source: names and shapes of deepseek-ai/DeepSeek-V4.1-Flash ``inference/model.py`` and transformers
    ``models/qwen4_exp/modeling_qwen4_exp.py``.
    """
    if is_address(source):
        folder = RemoteFolder(str(source), **options)
        try:
            if folder.packed is not None:
                return {_packed_key(folder.packed): folder.place(folder.read_packed().layout)}
            found = _find(folder, str(source), _parse_config(folder.read_small("config.json"), str(source)))
            return {key: folder.place(layout) for key, layout in found.items()}
        finally:
            folder.close()
    if options:
        raise ConfigError(f"the options {', '.join(sorted(options))} are for addresses, {source} is none")
    path = Path(source)
    if path.suffix == PACKED_SUFFIX and not path.is_dir():
        return _packed([path])
    if path.is_dir():
        packed = sorted(path.glob(f"*{PACKED_SUFFIX}"))
        if packed and not any(path.glob("*.safetensors")):
            return _packed(packed)
        return _find(TensorFolder(path), str(path), _read_config(path))
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; a table is a checkpoint folder, a file of one, or an address")
    return _find(_OneFile(path), str(path), _read_config(path.parent))


def choose_layout(layouts: Mapping[int | str, RowLayout], layer: int | str | None, source: str) -> RowLayout:
    """Pick one table.

    Args:
        layouts: What `table_layouts` found.
        layer: Its key, a number also as text; None where there is one table only.
        source: What messages call the source.

    Raises:
        ConfigError: There is no such table, or none was chosen among several.
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
    """Find one table of a published checkpoint, for a reader that knows where to look.

    Args:
        tensors: The checkpoint's tensors.
        kind: Whose checkpoint it is.
        stem: What stands before `TABLE_NAMES`: ``PREFIXlayers.BLOCK.``.

    Raises:
        CheckpointError: What `table_layouts` refuses of a table, row counts excepted: those are the reader's to check.
    """
    pattern, read = (_QWEN, _qwen_layout) if kind == "qwen_ple" else (_DEEPSEEK, _deepseek_layout)
    names = [name for name in tensors.names if name.startswith(stem) and pattern.fullmatch(name)]
    if not names:
        raise CheckpointError(
            f"the tensor {stem}{TABLE_NAMES[kind]['table']} is missing from {tensors.folder}, and so is every other of "
            "its table; download it again"
        )
    return read(tensors, names, str(tensors.folder))


class _OneFile(TensorFolder):
    """The tensors of one file, whatever lies beside it."""

    def __init__(self, path: Path) -> None:
        self.folder, self._headers = path, {path: read_header(path)}
        self._paths = dict.fromkeys(self._headers[path], path)


def _packed(paths: Sequence[Path]) -> dict[int | str, RowLayout]:
    # A folder's files are told apart by their names: layer-1.engram is the table of layer 1.
    found: dict[int | str, RowLayout] = {}
    for path in paths:
        key = _packed_key(path)
        if key in found:
            raise CheckpointError(f"{path} and another file are both the table of layer {key}; open one of them")
        found[key] = packed_layout(path)
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def _packed_key(path: Path) -> int | str:
    number = re.search(r"(?:^|\D)(0|[1-9][0-9]{0,8})$", path.stem)
    return int(number[1]) if number else path.stem


def _order(key: int | str) -> tuple[bool, int, str]:
    return (isinstance(key, str), key if isinstance(key, int) else 0, str(key))


def _find(tensors: TensorFolder, source: str, config: Mapping[str, Any]) -> dict[int | str, RowLayout]:
    """Find all tables by name, check their rows against the config."""
    own: dict[int | str, list[str]] = {}
    deepseek: dict[int | str, list[str]] = {}
    qwen: dict[int | str, list[str]] = {}
    for name in tensors.names:
        for pattern, found in ((_OWN, own), (_DEEPSEEK, deepseek), (_QWEN, qwen)):
            match = pattern.fullmatch(name)
            if match:
                key = match["key"]
                number = pattern is not _OWN or re.fullmatch("0|[1-9][0-9]{0,8}", key)
                found.setdefault(int(key) if number else key, []).append(name)
                break
    layouts: dict[int | str, RowLayout] = {}
    for kind, read in ((own, _own_layout), (deepseek, _deepseek_layout), (qwen, _qwen_layout)):
        for key, names in kind.items():
            if key in layouts:
                raise CheckpointError(f"{source} holds several tables of layer {key}, of different kinds; keep one")
            layouts[key] = read(tensors, names, source)
    if not layouts:
        raise CheckpointError(
            f"{source} holds no memory table: no tensor is named [...]memory_tables.NAME.weight, "
            "[...]layers.L.engram.embed.weight or [...]layers.L.ple.ple_embedding.ngram_embedding[.shard_I].weight"
        )
    _check_own_rows(config, {key: layouts[key].num_rows for key in own}, source)
    _check_deepseek_rows(config, {key: layouts[key].num_rows for key in deepseek}, source)
    for key, names in qwen.items():
        _check_qwen_rows(tensors, names[0], layouts[key].num_rows, config, source)
    return dict(sorted(layouts.items(), key=lambda item: _order(item[0])))


def _own_layout(tensors: TensorFolder, names: list[str], source: str) -> RowLayout:
    if len(names) != 1:
        raise CheckpointError(f"{source} holds the same table several times, as {', '.join(names)}; keep one")
    return tensor_layout([tensors.find(names[0])])


def _deepseek_layout(tensors: TensorFolder, names: list[str], source: str) -> RowLayout:
    stems = sorted({name.rpartition(".")[0] for name in names})
    if len(stems) != 1:
        raise CheckpointError(f"{source} holds the same table several times, as {', '.join(stems)}; keep one")
    weight_name, scale_name = f"{stems[0]}.weight", f"{stems[0]}.scale"
    for missing, present in ((weight_name, scale_name), (scale_name, weight_name)):
        if missing not in tensors:
            # Without its scales a table reads without an error and is wrong by orders of magnitude.
            raise CheckpointError(
                f"{source} holds {present} and lacks {missing}, without which it means nothing; download it again"
            )
    weight, scale = tensors.find(weight_name), tensors.find(scale_name)
    if weight.dtype != "F8_E4M3" or len(weight.shape) != 2:
        raise CheckpointError(f"{weight}: expected F8_E4M3 [rows, width]")
    expected = (weight.shape[0], num_blocks(weight.shape[1]))
    if (scale.dtype, scale.shape) != ("F8_E8M0", expected):
        raise CheckpointError(f"{scale}: expected F8_E8M0 {list(expected)}, for {weight}")
    return tensor_layout([weight], scales=[scale])


def _qwen_layout(tensors: TensorFolder, names: list[str], source: str) -> RowLayout:
    matches = [match for name in names if (match := _QWEN.fullmatch(name))]
    if len({match["prefix"] for match in matches}) != 1:
        raise CheckpointError(f"{source} holds the same table several times, as {', '.join(sorted(names))}; keep one")
    scales = [match[0] for match in matches if match["scale"]]
    shards = {int(match["shard"]): match[0] for match in matches if match["shard"]}
    whole = [match[0] for match in matches if not match["scale"] and not match["shard"]]
    if bool(whole) == bool(shards):
        what = "both in one tensor and in shards; remove one of them" if whole else "without its numbers; download them"
        raise CheckpointError(f"{source} holds the table of {sorted(names)[0]} {what}")
    # By number, so that 10 comes after 9.
    missing = [number for number in range(len(shards)) if number not in shards]
    if missing:
        stem = shards[min(shards)].rpartition(".shard_")[0]
        raise CheckpointError(
            f"{source} lacks {stem}.shard_{missing[0]}.weight, of {max(shards) + 1} or more shards; download it again"
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
    return tensor_layout(rows, scales=_load(tensors, scale).float().item())


def _load(tensors: TensorFolder, tensor: StoredTensor) -> Tensor:
    return tensors.load(tensor) if isinstance(tensors, RemoteFolder) else tensor.load()


def _read_config(folder: Path) -> Mapping[str, Any]:
    try:
        text = (folder / "config.json").read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"cannot read {folder / 'config.json'}: {error.strerror}") from error
    return _parse_config(text, str(folder))


def _parse_config(text: bytes | None, source: str) -> Mapping[str, Any]:
    """The config's text model, or the config itself; empty without one."""
    if text is None:
        return {}
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: config.json is no readable JSON ({error!s:.200})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{source}: config.json is a JSON {type(config).__name__}, expected an object")
    inside = config.get("text_config")
    return {**config, **inside} if isinstance(inside, dict) else config


def _check_own_rows(config: Mapping[str, Any], found: Mapping[int | str, int], source: str) -> None:
    """Hold row counts against the hash that our own config says its tables are addressed with."""
    spec = config.get("hash_spec")
    if not isinstance(spec, dict):
        return
    layers, base, rows = spec.get("layers"), spec.get("layer_base"), spec.get("padded_rows")
    if not (_are_integers(layers) and _are_integers(rows) and len(layers) == len(rows) > 0 and type(base) is int):
        return
    names = ["shared"] * len(layers) if spec.get("shared_table") is True else [layer - base for layer in layers]
    expected = dict(zip(names, rows, strict=True))
    for key, num_rows in found.items():
        if num_rows != expected.get(key, num_rows):
            raise CheckpointError(
                f"{source}: the table {key} has {num_rows} rows, the primes of 'hash_spec' in config.json make "
                f"{expected[key]}; the folder holds weights of another geometry"
            )


def _check_deepseek_rows(config: Mapping[str, Any], found: Mapping[int | str, int], source: str) -> None:
    """Hold row counts against what the config says of them."""
    layers, counts = config.get("engram_layer_ids"), config.get("engram_num_embeddings")
    if not (_are_integers(layers) and _are_integers(counts) and len(layers) == len(counts)):
        return
    expected = dict(zip(layers, counts, strict=True))
    for layer, num_rows in found.items():
        if layer not in expected:
            raise CheckpointError(f"{source} holds a table of layer {layer}, config.json has {sorted(expected)}")
        if num_rows != expected[layer]:
            raise CheckpointError(
                f"{source}: the table of layer {layer} has {num_rows} rows, 'engram_num_embeddings' in config.json "
                f"says {expected[layer]}; the folder holds weights of another geometry"
            )


def _check_qwen_rows(tensors: TensorFolder, name: str, found: int, config: Mapping[str, Any], source: str) -> None:
    """Hold a row count against the primes that the checkpoint itself states, rounded up as its config says."""
    primes_name = name.partition(".ngram_embedding.")[0] + ".ngram_heads_vocab_sizes"
    multiple = config.get("make_ngram_vocab_size_divisible_by", 128)
    if primes_name not in tensors or type(multiple) is not int or multiple < 1:
        return
    stored = tensors.find(primes_name)
    if stored.dtype != "I64" or len(stored.shape) != 1 or stored.shape[0] > _MOST_HEADS:
        raise CheckpointError(f"{stored}: expected I64 [heads], at most {_MOST_HEADS}")
    total = sum(_load(tensors, stored).tolist())
    expected = -(-total // multiple) * multiple
    if found != expected:
        raise CheckpointError(
            f"{source}: the table of {name} has {found} rows, its heads have {total}, which is {expected} as a "
            f"multiple of {multiple}; the folder holds weights of another geometry"
        )


def _are_integers(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int for value in values)
