"""What a row patch is made of: new numbers for rows of a table, the facts that they were fitted to, and their file.

The file is one small safetensors file. For each table it holds ``NAME.rows`` (int64 ``[N]``), ``NAME.before`` and
``NAME.after`` (``[N, width]``, of the table's type), where NAME is ``shared`` or a block number. The metadata holds the
format, the digest of the hash, the title and the facts. Equal patches make equal files. Nothing in a file is taken on
trust: see `read_patch`.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.files import replacing, user_path
from engram_lm.tables.files.safetensors_file import local_header
from engram_lm.tables.files.safetensors_writer import TensorWriter
from engram_lm.tables.stored_tensor import StoredTensor

_FORMAT = "engram.row_patch.1"
_PARTS = ("rows", "before", "after")
_NUMBER, _TOKENS = (int, float), (list,)
_FACT: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("prompt", "target"), ((str,), "a text")),
    **dict.fromkeys(("prompt_tokens", "target_tokens"), (_TOKENS, "a list of tokens")),
    **dict.fromkeys(("loss_before", "loss_after"), (_NUMBER, "a finite number")),
    "is_greedy": ((bool,), "true or false"),
}
# The types that the numbers of a trainable table can have.
_ROW_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True, eq=False)
class RowChange:
    """Rows of one table, before and after.

    Raises:
        ConfigError: A tensor has another shape or type, the rows do not ascend, or a number is not finite.
    """

    rows: Tensor
    """Row numbers, different and ascending, int64 ``[N]`` on the host."""
    before: Tensor
    """The old numbers of the rows, in the table's type, ``[N, E]`` on the host."""
    after: Tensor
    """Their new numbers, of the same type and shape."""

    def __post_init__(self) -> None:
        rows, before, after = self.rows, self.before, self.after
        if rows.dtype != torch.int64 or rows.dim() != 1 or not len(rows):
            raise ConfigError(f"row numbers are int64 [num_rows], at least one, got {rows.dtype} {list(rows.shape)}")
        if int(rows[0]) < 0 or not bool((rows[1:] > rows[:-1]).all()):
            raise ConfigError("row numbers start from 0, ascend and differ; sort them and name each once")
        for what, values in (("before", before), ("after", after)):
            if values.dtype not in _ROW_DTYPES or values.dim() != 2 or not values.shape[1] or len(values) != len(rows):
                raise ConfigError(
                    f"the rows {what} are floating numbers [{len(rows)}, width], got {values.dtype} "
                    f"{list(values.shape)}"
                )
            if not bool(values.isfinite().all()):
                raise ConfigError(f"the rows {what} hold numbers that are not finite")
        if (before.dtype, before.shape) != (after.dtype, after.shape):
            raise ConfigError(
                f"the rows are {before.dtype} {list(before.shape)} before and {after.dtype} {list(after.shape)} after; "
                "a patch changes neither type nor width"
            )

    @property
    def num_rows(self) -> int:
        """Number of rows that are changed."""
        return len(self.rows)

    @property
    def num_bytes(self) -> int:
        """Bytes of the row numbers and of the rows before and after."""
        return sum(tensor.numel() * tensor.itemsize for tensor in (self.rows, self.before, self.after))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fact:
    """A continuation that rows were fitted to. It records the fit; applying a patch does not read it."""

    prompt: str
    """The text before."""
    target: str
    """The text that should follow."""
    prompt_tokens: tuple[int, ...]
    """The prompt as raw tokens, with the tokens that the tokenizer puts in front of every text."""
    target_tokens: tuple[int, ...]
    """The target as raw tokens."""
    loss_before: float = math.nan
    """Mean loss of the target's tokens before the fit, in nats per token; NaN until it is known."""
    loss_after: float = math.nan
    """The same with the fitted rows."""
    is_greedy: bool = False
    """Whether each of the target's tokens is the most likely one, with the fitted rows."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and target, raw tokens."""
        return self.prompt_tokens + self.target_tokens


def bits(values: Tensor) -> Tensor:
    """View numbers ``[N, E]`` as their bytes: compared this way, 0 and -0 differ and a NaN equals itself."""
    return values.contiguous().view(torch.uint8)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Tell whether two tensors have the same type and shape and hold the same bits."""
    return (first.dtype, first.shape) == (second.dtype, second.shape) and torch.equal(bits(first), bits(second))


def write_patch(
    path: str | os.PathLike[str],
    *,
    spec_digest: str,
    tables: Mapping[str, RowChange],
    title: str,
    facts: tuple[Fact, ...],
) -> None:
    """Write a patch's file, atomically."""
    values = [dataclasses.asdict(fact) for fact in facts]
    metadata = {"format": _FORMAT, "hash_spec_digest": spec_digest, "title": title, "facts": json.dumps(values)}
    tensors = {f"{name}.{part}": getattr(change, part) for name, change in tables.items() for part in _PARTS}
    promised = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with replacing(path) as aside, TensorWriter(aside, promised, metadata=metadata) as writer:
        for name, tensor in tensors.items():
            writer.append(name, tensor)


def read_patch(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a patch's file, check everything in it, and return the fields of a `RowPatch`, as `RowPatch.load` says."""
    path = user_path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}; a row patch is a file as RowPatch.save writes it")
    whole = local_header(path)
    metadata, header = whole.metadata, whole.tensors
    if (found := metadata.get("format")) != _FORMAT:
        raise CheckpointError(
            f"{path} is not a row patch: expected format {_FORMAT!r}, found {found!r:.100}; name a file that "
            "RowPatch.save wrote"
        )
    digest = metadata.get("hash_spec_digest")
    if digest is None or len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise CheckpointError(f"{path} names no hash: hash_spec_digest is {digest!r:.100}; download it again")
    tables = {}
    for name in _table_names(path, header):
        try:
            tables[name] = RowChange(*(header[f"{name}.{part}"].load() for part in _PARTS))
        except ConfigError as error:
            raise CheckpointError(f"{path}, table {name}: {error}; download it again") from error
    return {
        "spec_digest": digest,
        "tables": tables,
        "title": metadata.get("title", ""),
        "facts": _read_facts(path, metadata.get("facts", "[]")),
    }


def _table_names(path: Path, header: Mapping[str, StoredTensor]) -> list[str]:
    names = sorted({name.rpartition(".")[0] for name in header})
    expected = {f"{name}.{part}" for name in names for part in _PARTS}
    wrong = [name for name in names if name != "shared" and not (name.isascii() and name.isdecimal() and len(name) < 7)]
    if not names or wrong or expected != header.keys() or ("shared" in names and len(names) > 1):
        raise CheckpointError(
            f"{path} does not hold rows, before and after for each table (a block number, or shared); found "
            f"{sorted(header)[:8]!s:.400}; download it again"
        )
    return names


def _read_facts(path: Path, text: str) -> tuple[Fact, ...]:
    try:
        values = json.loads(text)
        if not isinstance(values, list):
            raise ValueError("not a list of facts")
        return tuple(_fact(value) for value in values)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the facts cannot be read ({error!s:.200}); download it again") from error


def _fact(value: Any) -> Fact:
    if not isinstance(value, dict) or value.keys() != _FACT.keys():
        raise ValueError(f"a fact has the keys {sorted(_FACT)}")
    for name, (kind, what) in _FACT.items():
        found = value[name]
        good = type(found) in kind
        if good and kind == _TOKENS:
            good = len(found) > 0 and all(type(token) is int and 0 <= token < 2**31 for token in found)
            value[name] = tuple(found)
        if not good or (kind == _NUMBER and not math.isfinite(found)):
            raise ValueError(f"{name} is {found!r:.100}, expected {what}")
    return Fact(**value)
