"""Where tensors lie in safetensors files: headers checked against their files, names found in a folder.

Every number of a header is compared with the bytes that are there. So a file that a broken download cut short is
refused when it is opened, and never read past its end later.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, TypeGuard

import torch
from torch import Tensor

from engram_lm.errors import CheckpointError, EngramError
from engram_lm.files import parse_json
from engram_lm.tables.files.byte_source import ByteSource, FileFolder, LocalFile, LocalFolder
from engram_lm.tables.stored_tensor import DTYPES, StoredTensor

INDEX_NAME = "model.safetensors.index.json"
"""Name of the file that says which of several files holds which tensor."""

PACKED_FAMILY = "engram.packed_table."
"""What the metadata's ``format`` of packed tables begins with, see ``packed.py``; the version follows."""

# The format's own limit; a longer header is a broken or hostile file.
LONGEST_HEADER_BYTES = 100_000_000
_HIGHEST_RANK = 16
# What packed tables began with before they were safetensors files.
_OLD_PACKED = b"\x89ENGRAM\n"
# What files of other kinds begin with, and what they are.
_OTHERS = {
    b"GGUF": "a GGUF file; engram-lm reads safetensors",
    b"PK\x03\x04": "a zip archive, as torch.save writes them; engram-lm reads safetensors",
    b"version ": "a Git LFS pointer and not the file itself; fetch that with git lfs pull",
}
_LONGEST_FILE_NAME = 1000


@dataclasses.dataclass(frozen=True)
class TensorHeader:
    """What a safetensors file says at its beginning, checked against the size of the file."""

    tensors: dict[str, StoredTensor]
    """Name to place, in the order of the file."""
    metadata: dict[str, str]
    """The texts under ``__metadata__``; empty where there are none."""
    text: bytes
    """The header itself: JSON, without the eight bytes of its length."""

    @property
    def is_packed(self) -> bool:
        """Whether the file is a packed table, whatever its version, rather than a part of a checkpoint."""
        return self.metadata.get("format", "").startswith(PACKED_FAMILY)


def read_header(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """Read which tensors a safetensors file of this machine holds; the errors are those of `local_header`."""
    return local_header(path).tensors


def local_header(path: str | os.PathLike[str]) -> TensorHeader:
    """Read the header of a safetensors file of this machine; a `CheckpointError` also where the file is missing."""
    with _reading(path):
        return parse_header(LocalFile(path))


def parse_header(source: ByteSource) -> TensorHeader:
    """Read and check the header of a safetensors file, wherever the file lies.

    Costs the header only, whatever the size of the file.

    Raises:
        CheckpointError: The file is truncated or longer than its header says, or the header is malformed: too long, not
            JSON, a name twice, impossible shapes, offsets that overlap, leave gaps or leave the file.
        OSError: The file cannot be read.

    Source: huggingface/safetensors ``README.md``, “Format”.
    """
    start = source.read(0, min(8, source.size)) if source.size else b""
    if start == _OLD_PACKED:
        raise CheckpointError(
            f"{source.name} is a packed table of a format that is no longer read (.engram); convert its source again "
            "with `engram-lm table convert`"
        )
    for mark, what in _OTHERS.items():
        if start.startswith(mark):
            raise CheckpointError(f"{source.name} is {what}")
    length = int.from_bytes(start, "little")
    if source.size < 8 or length > min(source.size - 8, LONGEST_HEADER_BYTES):
        raise CheckpointError(
            f"{source.name} is truncated or not a safetensors file: it begins with a header length of {length} bytes, "
            f"found {source.size} bytes in all (at most {LONGEST_HEADER_BYTES} are allowed); download it again"
        )
    text = source.read(8, 8 + length) if length else b""
    header = parse_json(text, source.name, advice="download it again")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{source.name}: the header's metadata holds values that are not text; download it again")
    data_start = 8 + length
    tensors = {name: _entry(name, entry, source.name, data_start) for name, entry in header.items()}
    expected = max((tensor.start_bytes + tensor.num_bytes for tensor in tensors.values()), default=data_start)
    if source.size != expected:
        raise CheckpointError(
            f"{source.name} is {'truncated' if source.size < expected else 'longer than its header says'}: expected "
            f"{expected} bytes, found {source.size}; download it again"
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
    return TensorHeader(tensors, metadata, text)


class TensorFolder:
    """The tensors of a checkpoint folder by name, through its index or, without one, the headers of all its files.

    With an index only the files that are asked for need to be there, so a part of a large release can be opened.

    Args:
        folder: A folder with ``*.safetensors`` files; a path, or one that lies elsewhere.
        file: The one file of the folder that is looked at, whatever lies beside it; all where None.

    Raises:
        CheckpointError: No safetensors files, an index that is malformed or points out of the folder, a tensor in two
            files, packed tables beside others, or (without an index) what `parse_header` refuses.
        RemoteError: The folder lies on a server that does not answer.
    """

    def __init__(self, folder: str | os.PathLike[str] | FileFolder, file: str | None = None) -> None:
        self._folder = LocalFolder(folder) if isinstance(folder, str | os.PathLike) else folder
        self.name = self._folder.name
        self._sources: dict[str, ByteSource] = {}
        self._headers: dict[str, TensorHeader] = {}
        self._files: dict[str, str] = {}
        self.packed: dict[str, tuple[str, TensorHeader]] = {}
        """Name of each file that is a packed table, where the folder holds those alone → path or address, header."""
        with _reading(f"{self.name}/{INDEX_NAME}"):
            index = self._folder.read(INDEX_NAME) if file is None else None
        if index is not None:
            self._files = _parse_index(index, f"{self.name}/{INDEX_NAME}")
            return
        files = self._folder.tensor_files() if file is None else [file]
        if not files:
            raise CheckpointError(
                f"{self.name} holds neither {INDEX_NAME} nor any *.safetensors file; name a checkpoint folder, or "
                "download it again"
            )
        for each in files:
            if self._header(each).is_packed:
                self.packed[each] = self._sources[each].name, self._headers[each]
                continue
            for name in self._headers[each].tensors:
                if name in self._files:
                    first, second = self._sources[self._files[name]].name, self._sources[each].name
                    raise CheckpointError(f"{name} is in both {first} and {second}; remove one of the files")
                self._files[name] = each
        if self.packed and self._files:
            raise CheckpointError(
                f"{self.name} holds a checkpoint and packed tables ({', '.join(self.packed)}); move these into a "
                "folder of their own"
            )

    @property
    def names(self) -> Iterable[str]:
        """Names of all tensors in the folder, as its index or its headers say."""
        return self._files.keys()

    def __contains__(self, name: str) -> bool:
        """Whether the folder has a tensor of that name, as its index or its headers say."""
        return name in self._files

    def find(self, name: str) -> StoredTensor:
        """Return where a tensor lies; a `CheckpointError` where it, or the file that should hold it, is missing."""
        if name not in self._files:
            raise CheckpointError(f"the tensor {name} is missing from {self.name}")
        file = self._files[name]
        try:
            tensors = self._header(file).tensors
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{error}: {INDEX_NAME} says that it holds {name}; download it into {self.name}"
            ) from error
        if name not in tensors:
            raise CheckpointError(
                f"{self._sources[file].name} does not hold {name}, although {INDEX_NAME} says so; download both again"
            )
        return tensors[name]

    def load(self, name: str) -> Tensor:
        """Read a whole small tensor; a large one of this machine is read faster by `StoredTensor.load`."""
        tensor = self.find(name)
        dtype, stop = tensor.torch_dtype, tensor.start_bytes + tensor.num_bytes
        if not tensor.num_bytes:
            return torch.empty(tensor.shape, dtype=dtype)
        with _reading(tensor.file):
            data = bytearray(self._sources[self._files[name]].read(tensor.start_bytes, stop))
        if len(data) != tensor.num_bytes:
            raise CheckpointError(f"{tensor.file} was cut after it was opened: {tensor} is not whole any more")
        return torch.frombuffer(data, dtype=dtype).reshape(tensor.shape)

    def _header(self, file: str) -> TensorHeader:
        if file not in self._headers:
            self._sources[file] = self._folder.open(file)
            with _reading(self._sources[file].name):
                self._headers[file] = parse_header(self._sources[file])
        return self._headers[file]


@contextlib.contextmanager
def _reading(name: object) -> Iterator[None]:
    """Turn errors of the operating system into ours; errors of ours pass, such as those of a server."""
    try:
        yield
    except EngramError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {name}: {error.strerror}") from error


def _entry(name: str, entry: Any, file: str, data_start: int) -> StoredTensor:
    """Check one entry of a header by itself."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("dtype"), str):
        raise CheckpointError(
            f"{file}: the header's entry for {name} has no type: {entry!r:.200}; download the file again"
        )
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not _are_sizes(shape) or len(shape) > _HIGHEST_RANK:
        raise CheckpointError(f"{file}: {name} has the impossible shape {shape!r:.200}; download the file again")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{file}: {name} has the impossible data_offsets {offsets!r:.200}; download the file again"
        )
    tensor = StoredTensor(name, file, entry["dtype"], tuple(shape), data_start + offsets[0], offsets[1] - offsets[0])
    if tensor.dtype in DTYPES and tensor.num_bytes != math.prod(shape) * tensor.torch_dtype.itemsize:
        raise CheckpointError(
            f"{tensor} takes {math.prod(shape) * tensor.torch_dtype.itemsize} bytes, its data_offsets hold "
            f"{tensor.num_bytes}; download the file again"
        )
    return tensor


def _are_sizes(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _parse_index(text: bytes, index: str) -> dict[str, str]:
    """Read an index: the names of tensors → the names of their files, all inside the index's folder."""
    places = parse_json(text, index, advice="download it again").get("weight_map")
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
    return dict(places)
