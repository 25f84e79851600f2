"""What ``state.json`` of a checkpoint says, and which folders are checkpoints because of it."""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.tables.files.safetensors_file import DTYPES

__all__ = [
    "FOLDER_NAME",
    "REPLACED",
    "STATE_NAME",
    "Chunk",
    "SavedState",
    "SavedTensor",
    "check_cover",
    "complete_checkpoints",
    "plain_json",
    "step_folder",
]

STATE_NAME = "state.json"
"""The file that is written last: a folder without it is no checkpoint."""
REPLACED = ".replaced"
"""How the name of a checkpoint ends whose step is being saved again."""
FOLDER_NAME = re.compile(r"step-([0-9]{8,18})(\.replaced)?")
"""Names of folders that may be checkpoints."""

_FORMAT = "engram-checkpoint-1"
_FILE_NAME = re.compile(r"rank-[0-9]{5,9}\.safetensors")


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A box of a tensor that lies in one file."""

    file: str
    """Name of the file, in the checkpoint's folder."""
    offsets: tuple[int, ...]
    """Its first index along every dimension."""
    shape: tuple[int, ...]
    """Its size along every dimension; never 0."""
    crc32: int
    """CRC-32 of its bytes in row-major order."""


@dataclasses.dataclass(frozen=True)
class SavedTensor:
    """A tensor of a checkpoint: the boxes together are the whole, and none overlap."""

    dtype: str
    """Its type as safetensors spells it."""
    shape: tuple[int, ...]
    """Shape of the whole."""
    chunks: tuple[Chunk, ...]
    """The boxes, by offset. None where the tensor has no numbers."""

    def key(self, name: str, chunk: Chunk) -> str:
        """What a chunk of this tensor is called in its file: the tensor's name where it is all of it."""
        return name if chunk.shape == self.shape else f"{name}@{','.join(map(str, chunk.offsets))}"


@dataclasses.dataclass(frozen=True)
class SavedState:
    """What ``state.json`` says."""

    step: int
    """Optimizer steps done."""
    facts: dict[str, Any]
    """What the caller wrote beside the tensors; JSON."""
    files: dict[str, int]
    """The files and their bytes."""
    tensors: dict[str, SavedTensor]
    """Name to tensor."""

    @property
    def digest(self) -> str:
        """SHA-256 of all of it, as it is in the file."""
        return hashlib.sha256(_canonical(self._values()).encode()).hexdigest()

    def to_json(self) -> str:
        """The contents of ``state.json``."""
        return _canonical({"format": _FORMAT, "sha256": self.digest, "state": self._values()})

    def _values(self) -> dict[str, Any]:
        # Lists rather than names in every chunk: with thousands of ranks there are millions of chunks.
        index = {file: number for number, file in enumerate(self.files)}
        tensors = {
            name: [
                tensor.dtype,
                list(tensor.shape),
                [[index[chunk.file], list(chunk.offsets), list(chunk.shape), chunk.crc32] for chunk in tensor.chunks],
            ]
            for name, tensor in self.tensors.items()
        }
        files = [[name, num_bytes] for name, num_bytes in self.files.items()]
        return {"step": self.step, "facts": self.facts, "files": files, "tensors": tensors}

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read ``state.json`` and compare the sizes of the files with it. Reads no tensors.

        Raises:
            CheckpointError: There is none, it is damaged, or a file is missing or of another size.
        """
        path = folder / STATE_NAME
        try:
            text = path.read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{folder} is no complete checkpoint: cannot read {STATE_NAME} ({error.strerror}); "
                "name a folder step-… of a run, or resume from an earlier one"
            ) from error
        try:
            values = json.loads(text)
            state = cls._from_values(values["state"])
            good = values["format"] == _FORMAT and values["sha256"] == state.digest
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError) as error:
            raise CheckpointError(f"{path} is damaged: {error!r:.200}; resume from an earlier checkpoint") from error
        if not good:
            raise CheckpointError(
                f"{path} is damaged or not of the format {_FORMAT}: its digest is not that of its contents; "
                "resume from an earlier checkpoint"
            )
        for name, num_bytes in state.files.items():
            file = folder / name
            found = file.stat().st_size if file.is_file() else None
            if found != num_bytes:
                raise CheckpointError(
                    f"{file} {'is missing' if found is None else f'has {found:,} bytes'}, expected {num_bytes:,} "
                    "bytes: the checkpoint was cut or copied in part; copy it again or resume from an earlier one"
                )
        return state

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> Self:
        step, facts, file_list = values["step"], values["facts"], values["files"]
        if type(step) is not int or step < 0 or not isinstance(facts, dict):
            raise ValueError("no step, or no facts")
        for name, num_bytes in file_list:
            if type(num_bytes) is not int or not _FILE_NAME.fullmatch(name):
                raise ValueError(f"impossible file {name!r:.100}")
        files = dict(file_list)
        names = list(files)
        tensors: dict[str, SavedTensor] = {}
        for name, (dtype, shape, chunk_list) in values["tensors"].items():
            chunks = []
            for file, offsets, sizes, crc32 in chunk_list:
                numbers = [file, crc32, *offsets, *sizes]
                if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
                    raise ValueError(f"impossible chunk of {name!r:.100}")
                chunks.append(Chunk(names[file], tuple(offsets), tuple(sizes), crc32))
            if dtype not in DTYPES or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
                raise ValueError(f"impossible type or shape of {name!r:.100}")
            tensors[name] = SavedTensor(dtype, tuple(shape), tuple(chunks))
            check_cover(name, tensors[name])
        return cls(step, facts, files, tensors)


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step-{step:08d}"


def complete_checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield the step and the folder of every checkpoint that is whole by its files' sizes, the newest first.

    Of a step that was saved twice and whose first folder is still there, the second comes first.
    """
    names = os.listdir(folder) if folder.is_dir() else []
    matches = [match for match in map(FOLDER_NAME.fullmatch, names) if match]
    found = [(int(match[1]), match[2] is None, folder / match[0]) for match in matches]
    for step, _, path in sorted(found, reverse=True):
        try:
            SavedState.read(path)
        except CheckpointError:
            continue
        yield step, path


def check_cover(name: str, tensor: SavedTensor) -> None:
    """Refuse chunks that leave the tensor, overlap or leave holes: what is not written over would keep old numbers.

    Raises:
        ValueError: As said.
    """
    chunks = sorted(tensor.chunks, key=lambda chunk: chunk.offsets)
    active: list[Chunk] = []
    for chunk in chunks:
        box = list(zip(chunk.offsets, chunk.shape, tensor.shape, strict=True))
        if any(size < 1 or offset + size > whole for offset, size, whole in box):
            raise ValueError(f"a part of {name!r:.100} is empty or leaves it")
        # Those that still reach this one along the first dimension; rows divided over ranks leave none.
        active = [other for other in active if chunk.offsets and other.offsets[0] + other.shape[0] > chunk.offsets[0]]
        if any(_overlap(chunk, other) for other in active):
            raise ValueError(f"parts of {name!r:.100} overlap")
        active.append(chunk)
    if sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(tensor.shape):
        raise ValueError(f"parts of {name!r:.100} are not the whole")


def _overlap(one: Chunk, other: Chunk) -> bool:
    return all(
        a < b + m and b < a + n for a, n, b, m in zip(one.offsets, one.shape, other.offsets, other.shape, strict=True)
    )


def _canonical(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def plain_json(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What is read back from JSON: tuples are lists and keys are text, now and later."""
    try:
        plain = json.loads(_canonical(facts))
        _canonical(plain).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the facts of a checkpoint are JSON, these are not: {error!s:.200}") from error
    if not isinstance(plain, dict):
        raise ConfigError(f"the facts of a checkpoint are an object, not {type(facts).__name__}")
    return plain
