"""Where tensors lie in safetensors files: headers checked against their files, names found in a folder.

Nothing here believes a file: every number of a header is compared with the bytes that are there, so that a file cut
short by a broken download is refused when it is opened, and never read past its end later.
"""

import collections
import dataclasses
import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import torch
from torch import Tensor

from engram_lm.errors import CheckpointError

__all__ = ["DTYPES", "INDEX_NAME", "StoredTensor", "TensorFolder", "parse_header", "parse_index", "read_header"]

INDEX_NAME = "model.safetensors.index.json"
"""The file that says which tensor lies in which of several files."""

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's type names that can be read and written here. Tensors of other types may lie beside them."""

# The format's own limit; a longer header is a broken or hostile file.
LONGEST_HEADER_BYTES = 100_000_000
_HIGHEST_RANK = 16
_LONGEST_FILE_NAME = 1000


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor in one file: where its bytes are, not the bytes."""

    name: str
    """Its name in the file."""
    path: Path
    """The file."""
    dtype: str
    """Its type as the format spells it, such as ``"BF16"``; a key of `DTYPES` where it can be read."""
    shape: tuple[int, ...]
    """Its shape."""
    start_bytes: int
    """First byte, from the beginning of the file."""
    num_bytes: int
    """How many bytes it takes."""

    def __str__(self) -> str:
        """Name, type, shape and file, for messages."""
        return f"{self.name} ({self.dtype} {list(self.shape)}, in {self.path})"

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its type in torch.

        Raises:
            CheckpointError: The type is unknown here.
        """
        if self.dtype not in DTYPES:
            raise CheckpointError(f"{self} has a type that cannot be read; known are {', '.join(DTYPES)}")
        return DTYPES[self.dtype]

    def load(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Read the tensor, or a part of it along the first dimension, into memory.

        Args:
            start: First index along the first dimension.
            stop: One past the last; the end where None.

        Returns:
            Its own copy in `torch_dtype`, ``[stop - start, *shape[1:]]`` (a scalar stays a scalar).

        Raises:
            CheckpointError: The file is gone or has been cut since its header was read, or the type is unknown.
        """
        dtype = self.torch_dtype
        if not self.shape:
            shape, skipped = self.shape, 0
        else:
            stop = self.shape[0] if stop is None else stop
            if not 0 <= start <= stop <= self.shape[0]:
                raise IndexError(f"{self} has no part from {start} to {stop}")
            shape = (stop - start, *self.shape[1:])
            skipped = start * math.prod(self.shape[1:]) * dtype.itemsize
        data = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start_bytes + skipped)
                found = file.readinto(data.numpy().data)
        except OSError as error:
            raise CheckpointError(f"cannot read {self}: {error.strerror}") from error
        if found != data.numel():
            raise CheckpointError(
                f"{self.path} was cut after it was opened: {data.numel()} bytes of {self.name} were expected from byte "
                f"{self.start_bytes + skipped}, {found} were there"
            )
        return data.view(dtype).reshape(shape)


def read_header(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """Read which tensors a safetensors file holds, and check that all of their bytes are there.

    Costs the header only, whatever the size of the file.

    Args:
        path: A ``.safetensors`` file.

    Returns:
        Name to place, in the order of the file.

    Raises:
        CheckpointError: The file is missing, truncated or longer than its header says, or the header is malformed:
            too long, not JSON, a name twice, impossible shapes, offsets that overlap, leave gaps or leave the file.

    Source: huggingface/safetensors ``README.md``, “Format”.
    """
    path = Path(path)
    try:
        # Looked at before it is opened: opening a pipe would wait for somebody to write to it.
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a file; name a checkpoint folder, or a .safetensors file of one")
        size = status.st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER_BYTES):
                raise CheckpointError(
                    f"{path} is truncated or not a safetensors file: it begins with a header length of {length} bytes, "
                    f"found {size} bytes in all (at most {LONGEST_HEADER_BYTES} are allowed); download it again"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    return parse_header(text, path, size)


def parse_header(text: bytes, path: Path, size: int) -> dict[str, StoredTensor]:
    """Check the header of a safetensors file against the size of the file.

    Args:
        text: The header, without the eight bytes of its length.
        path: What messages and the returned tensors call the file.
        size: Bytes of the whole file.

    Returns:
        Name to place, in the order of the file.

    Raises:
        CheckpointError: What `read_header` says of headers.
    """
    header = _parse_json(text, path)
    header.pop("__metadata__", None)
    data_start = 8 + len(text)
    tensors = {name: _entry(name, entry, path, data_start) for name, entry in header.items()}
    expected = max((tensor.start_bytes + tensor.num_bytes for tensor in tensors.values()), default=data_start)
    if size != expected:
        raise CheckpointError(
            f"{path} is {'truncated' if size < expected else 'longer than its header says'}: expected {expected} "
            f"bytes, found {size}; download it again"
        )
    end = data_start
    # Tensors without bytes lie anywhere between the others, so they sort before what starts at the same byte.
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start_bytes, tensor.num_bytes)):
        if tensor.start_bytes != end:
            what = "overlaps the tensor before it" if tensor.start_bytes < end else "leaves a gap before it"
            raise CheckpointError(
                f"{tensor} {what}: it starts at byte {tensor.start_bytes}, expected {end}; download the file again, or "
                "write it again with another tool"
            )
        end += tensor.num_bytes
    return tensors


class TensorFolder:
    """The tensors of a checkpoint folder by name, through its index or, without one, the headers of all its files.

    With an index only the files that are asked for need to be there, so a part of a large release can be opened.

    Args:
        folder: A folder with ``*.safetensors`` files.

    Raises:
        CheckpointError: No safetensors files, an index that is malformed or points out of the folder, a tensor in two
            files, or (without an index) what `read_header` refuses.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._headers: dict[Path, dict[str, StoredTensor]] = {}
        self._paths: dict[str, Path] = {}
        index = self.folder / INDEX_NAME
        if index.is_file():
            self._paths = _read_index(index)
            return
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{self.folder} holds neither {INDEX_NAME} nor any *.safetensors file; name a "
                "checkpoint folder, or download it again"
            )
        for path in files:
            for name in self._header(path):
                if name in self._paths:
                    raise CheckpointError(f"{name} is in both {self._paths[name]} and {path}; remove one of the files")
                self._paths[name] = path

    @property
    def names(self) -> Iterable[str]:
        """Names of all tensors that the folder promises."""
        return self._paths.keys()

    def __contains__(self, name: str) -> bool:
        """Whether the folder promises a tensor of that name."""
        return name in self._paths

    def find(self, name: str) -> StoredTensor:
        """Return where a tensor lies.

        Raises:
            CheckpointError: There is no such tensor, the file that the index names for it is missing or lacks it, or
                that file is malformed or truncated.
        """
        if name not in self._paths:
            raise CheckpointError(f"the tensor {name} is missing from {self.folder}")
        path = self._paths[name]
        if not os.path.exists(path):  # unlike `Path.exists`, says no to a name that the file system cannot have
            raise CheckpointError(
                f"{path} is missing: {INDEX_NAME} says that it holds {name}; download it into {self.folder}"
            )
        header = self._header(path)
        if name not in header:
            raise CheckpointError(f"{path} does not hold {name}, although {INDEX_NAME} says so; download both again")
        return header[name]

    def _header(self, path: Path) -> dict[str, StoredTensor]:
        if path not in self._headers:
            self._headers[path] = read_header(path)
        return self._headers[path]


def _entry(name: str, entry: Any, path: Path, data_start: int) -> StoredTensor:
    """Check one entry of a header by itself."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("dtype"), str):
        raise CheckpointError(
            f"{path}: the header's entry for {name} has no type: {entry!r:.200}; download the file again"
        )
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not _are_sizes(shape) or len(shape) > _HIGHEST_RANK:
        raise CheckpointError(f"{path}: {name} has the impossible shape {shape!r:.200}; download the file again")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{path}: {name} has the impossible data_offsets {offsets!r:.200}; download the file again"
        )
    tensor = StoredTensor(name, path, entry["dtype"], tuple(shape), data_start + offsets[0], offsets[1] - offsets[0])
    if tensor.dtype in DTYPES and tensor.num_bytes != math.prod(shape) * tensor.torch_dtype.itemsize:
        raise CheckpointError(
            f"{tensor} takes {math.prod(shape) * tensor.torch_dtype.itemsize} bytes, its data_offsets hold "
            f"{tensor.num_bytes}; download the file again"
        )
    return tensor


def _are_sizes(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _read_index(index: Path) -> dict[str, Path]:
    try:
        text = index.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {index}: {error.strerror}") from error
    return parse_index(text, index)


def parse_index(text: bytes, index: Path) -> dict[str, Path]:
    """Read an index: the names of tensors → the paths of their files, all inside the index's folder.

    Raises:
        CheckpointError: It is malformed, or names a file outside the folder.
    """
    places = _parse_json(text, index).get("weight_map")
    if not isinstance(places, Mapping):
        raise CheckpointError(f"{index} has no 'weight_map' from tensor names to file names; download it again")
    for name, file in places.items():
        # Only the text is judged: links inside a download cache may well lead to other folders.
        parts = PurePosixPath(file).parts if isinstance(file, str) else ()
        absurd = not parts or len(file) > _LONGEST_FILE_NAME or "\\" in file or "\0" in file
        if absurd or file.startswith("/") or ".." in parts:
            raise CheckpointError(
                f"{index} places {name} at {file!r:.200}, which is not a file inside the folder; download it again"
            )
    return {name: index.parent / file for name, file in places.items()}


def _parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """Read a JSON object that has no name twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            twice, _ = collections.Counter(name for name, _ in pairs).most_common(1)[0]
            raise CheckpointError(f"{path} names {twice!r:.200} twice; download it again")
        return values

    try:
        values = json.loads(text, object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} has no readable JSON where some was expected ({error!s:.200}); download it again"
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path} has a JSON {type(values).__name__} where an object was expected; download it again"
        )
    return values
