"""What the ``state.json`` of a checkpoint says, and which folders are complete checkpoints."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from engram_lm.errors import CheckpointError, ConfigError

STATE_NAME = "state.json"
"""The file that is written last: a folder without it is not a checkpoint."""
REPLACED = ".replaced"
"""Suffix of a checkpoint whose step is being saved again."""
FOLDER_NAME = re.compile(r"step-([0-9]{8,18})(\.replaced)?")
"""Names of folders that may be checkpoints."""

_FORMAT = "engram-checkpoint-1"
_FILE_NAME = re.compile(r"rank-[0-9]{5,9}\.safetensors")


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A box-shaped part of a tensor, in one file."""

    file: str
    """Name of the file, in the checkpoint's folder."""
    offsets: tuple[int, ...]
    """First index along every dimension."""
    shape: tuple[int, ...]
    """Size along every dimension; never 0."""
    crc32: int
    """CRC-32 of its bytes in row-major order."""


@dataclasses.dataclass(frozen=True)
class SavedTensor:
    """A tensor of a checkpoint. Its chunks do not overlap and together make up the whole."""

    dtype: str
    """Type, as safetensors spells it."""
    shape: tuple[int, ...]
    """Shape of the whole."""
    chunks: tuple[Chunk, ...]
    """The parts, by offset; empty where the tensor has no elements."""

    def key(self, name: str, chunk: Chunk) -> str:
        """Name a chunk of this tensor in its file; the tensor's own name if the chunk is the whole tensor."""
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
        """SHA-256 of the contents, as written in the file."""
        return hashlib.sha256(_canonical(self._values()).encode()).hexdigest()

    def to_json(self) -> str:
        """Make the contents of ``state.json``."""
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
        """Read ``state.json`` and compare the sizes of the files with it; `CheckpointError` where they differ.

        Reads no tensors.
        """
        path = folder / STATE_NAME
        try:
            text = path.read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{folder} is not a complete checkpoint: cannot read {STATE_NAME} ({error.strerror}); "
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
        files = {str(name): int(num_bytes) for name, num_bytes in values["files"]}
        for name in files:
            if not _FILE_NAME.fullmatch(name):
                raise ValueError(f"impossible file {name!r:.100}")
        names = list(files)
        tensors = {
            name: SavedTensor(
                dtype,
                tuple(shape),
                tuple(
                    Chunk(names[file], tuple(offsets), tuple(sizes), crc32) for file, offsets, sizes, crc32 in chunks
                ),
            )
            for name, (dtype, shape, chunks) in values["tensors"].items()
        }
        return cls(int(values["step"]), dict(values["facts"]), files, tensors)


def step_folder(folder: Path, step: int) -> Path:
    """Find the folder of a step's checkpoint."""
    return folder / f"step-{step:08d}"


def complete_checkpoints(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield the step and the folder of every checkpoint whose files have the right sizes, the newest first.

    If a step was saved again and its old folder is still there, the new one comes first.
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


def _canonical(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def plain_json(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Turn facts into what JSON gives back: tuples become lists and keys become text."""
    try:
        plain: dict[str, Any] = json.loads(_canonical(dict(facts)).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the facts of a checkpoint are JSON, these are not: {error!s:.200}") from error
    return plain
