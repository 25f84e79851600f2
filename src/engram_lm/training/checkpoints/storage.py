"""Writes and reads one checkpoint: a safetensors file per rank, then ``state.json``.

`StateWriter` and `StateReader` are the storage of ``torch.distributed.checkpoint`` (DCP): DCP plans who writes and
reads what, they decide where. DCP's own storages keep their metadata as a pickle, which can run code when it is loaded,
or keep none, so that the loss of a file goes unnoticed; they also build a rank's file in memory and verify no bytes.
Here tensors of any size are written in pieces of `PIECE_BYTES`, types and shapes are in JSON, and a CRC-32 covers every
byte (1.65 GiB/s on one core, where SHA-256 reaches 0.74).
"""

import contextlib
import dataclasses
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import Metadata, StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.files import flush, write_atomically
from engram_lm.tables.files.safetensors_file import read_header
from engram_lm.tables.files.safetensors_writer import TensorWriter
from engram_lm.tables.stored_tensor import DTYPES, StoredTensor
from engram_lm.training.checkpoints.saved_state import (
    FOLDER_NAME,
    REPLACED,
    STATE_NAME,
    Chunk,
    SavedState,
    SavedTensor,
    complete_checkpoints,
    plain_json,
    step_folder,
)

PARTIAL = ".partial"
"""Suffix of a folder that is being written or removed."""
PIECE_BYTES = 8 * 2**20
"""Bytes of a tensor that are read or written at a time."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class StateWriter(StorageWriter):
    """Writes one checkpoint into a temporary folder, which gets its final name when all ranks are done.

    Rank 0 alone makes, renames and removes folders: DCP calls `prepare_global_plan` and `finish` there only, the first
    before any rank writes and the second after all have written. Only one run at a time may save into a folder.

    With ``staging``, tensors are copied into it and written from there, and later saves use it again. ``on_staged`` is
    called when the tensors are no longer needed. Up to this step, ``keep_last`` complete checkpoints stay.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        facts: Mapping[str, Any],
        keep_last: int,
        staging: dict[Any, Tensor] | None = None,
        on_staged: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.step, self.facts, self.keep_last = folder, step, facts, keep_last
        self.final = step_folder(folder, step)
        self.partial = self.final.with_name(self.final.name + PARTIAL)
        self._staging, self._on_staged = staging, on_staged
        self.is_planned = False
        """Whether all ranks have agreed on who writes what, and this one has begun to write."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a writer is made for one checkpoint."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this could be a checkpoint: any path."""
        return True

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: everything needed is known."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Check what this rank is going to write, here, where DCP passes on an error of one rank to all."""
        self.facts = plain_json(self.facts)
        for item in plan.items:
            if item.tensor_data is None:
                raise ConfigError(f"{item.index.fqn} is not a tensor; what is not goes into the facts of a checkpoint")
            dtype = item.tensor_data.properties.dtype
            if dtype not in _DTYPE_NAMES:
                raise ConfigError(f"{item.index.fqn} is of {dtype}, which cannot be saved; use {', '.join(DTYPES)}")
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Remove what a killed save left behind, make the folder and name each rank's file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f"*{PARTIAL}"):
            if FOLDER_NAME.fullmatch(left.name.removesuffix(PARTIAL)):
                shutil.rmtree(left)
        self.partial.mkdir()
        return [
            dataclasses.replace(plan, storage_data=f"rank-{rank:05d}.safetensors") for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Copy this rank's part if there is staging, then write it to its file and flush it."""
        self.is_planned = True
        chunks: dict[str, tuple[MetadataIndex, Tensor]] = {}
        for item in plan.items:
            assert item.tensor_data is not None
            whole, box = tuple(item.tensor_data.size), item.tensor_data.chunk
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            if tensor.shape != box.sizes:
                raise ConfigError(
                    f"{item.index.fqn} has {list(tensor.shape)} on this rank, its placement gives {list(box.sizes)}"
                )
            if not tensor.numel():
                continue
            if tensor.is_meta:
                raise ConfigError(f"{item.index.fqn} is on the meta device, so it has no numbers to save")
            chunk = Chunk("", tuple(box.offsets), tuple(box.sizes), 0)
            key = SavedTensor("", whole, ()).key(item.index.fqn, chunk)
            if key in chunks:
                raise ConfigError(f"two tensors of this checkpoint would both be called {key}; rename one")
            chunks[key] = item.index, self._stage(key, tensor.detach())
        self._on_staged()
        results = []
        if chunks:
            path = self.partial / plan.storage_data
            checksums = dict.fromkeys(chunks, 0)
            with TensorWriter(path, {key: (t.dtype, tuple(t.shape)) for key, (_, t) in chunks.items()}) as writer:
                for key, (_, tensor) in chunks.items():
                    for piece in tensor.reshape(-1).split(max(1, PIECE_BYTES // tensor.itemsize)):
                        piece = piece.cpu()
                        writer.append(key, piece)
                        checksums[key] = zlib.crc32(_bytes(piece), checksums[key])
            flush(path)
            size = path.stat().st_size
            for key, (index, tensor) in chunks.items():
                chunk = Chunk(path.name, tuple(index.offset or ()), tuple(tensor.shape), checksums[key])
                results.append(WriteResult(index, tensor.nbytes, (chunk, size)))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write ``state.json``, give the folder its name, then remove older checkpoints beyond ``keep_last``."""
        chunks: dict[str, list[Chunk]] = {name: [] for name in metadata.state_dict_metadata}
        files: dict[str, int] = {}
        for result in (result for of_rank in results for result in of_rank):
            chunk, files[chunk.file] = result.storage_data
            chunks[result.index.fqn].append(chunk)
        tensors = {}
        for name, saved in metadata.state_dict_metadata.items():
            assert isinstance(saved, TensorStorageMetadata)
            boxes = tuple(sorted(chunks[name], key=lambda chunk: chunk.offsets))
            tensors[name] = SavedTensor(_DTYPE_NAMES[saved.properties.dtype], tuple(saved.size), boxes)
        state = SavedState(self.step, dict(self.facts), dict(sorted(files.items())), tensors)
        write_atomically(self.partial / STATE_NAME, state.to_json())
        replaced = self.final.with_name(self.final.name + REPLACED)
        if self.final.exists():
            # Two renames, but at every moment one of the two folders has a name that counts as a checkpoint.
            if replaced.exists():
                self._remove(replaced)
            self.final.rename(replaced)
        self.partial.rename(self.final)
        with contextlib.suppress(OSError):
            flush(self.folder)  # some file systems cannot; the rename is still atomic there
        self._remove_earlier(replaced)

    def _stage(self, key: str, tensor: Tensor) -> Tensor:
        if self._staging is None:
            return tensor
        copy = self._staging.get(key)
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._staging[key] = copy
        return copy.copy_(tensor)

    def _remove_earlier(self, replaced: Path) -> None:
        try:
            if replaced.exists():
                self._remove(replaced)
            up_to_here = [path for step, path in complete_checkpoints(self.folder) if step <= self.step]
            for path in up_to_here[self.keep_last :]:
                self._remove(path)
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint {self.final} is complete, but an earlier one cannot be removed: {error}"
            ) from error

    def _remove(self, path: Path) -> None:
        # Renamed first, or a kill would leave an incomplete folder under the name of a complete one.
        aside = path.with_name(path.name + PARTIAL)
        path.rename(aside)
        shutil.rmtree(aside)


class StateReader(StorageReader):
    """Reads parts of a checkpoint, by ordinary reads of bounded size."""

    def __init__(self, folder: Path, state: SavedState) -> None:
        self.folder, self.state = folder, state
        self._headers: dict[str, dict[str, StoredTensor]] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a reader is made for one checkpoint."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this could be a checkpoint: a folder."""
        return Path(checkpoint_id).is_dir()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Describe the checkpoint in DCP's terms."""
        tensors: dict[str, Any] = {}
        chunks: dict[MetadataIndex, Chunk] = {}
        for name, tensor in self.state.tensors.items():
            boxes = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.shape)) for c in tensor.chunks]
            properties = TensorProperties(dtype=DTYPES[tensor.dtype])
            tensors[name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), boxes)
            chunks |= {MetadataIndex(name, chunk.offsets): chunk for chunk in tensor.chunks}
        return Metadata(tensors, storage_data=chunks)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Remember where the chunks are."""
        self._chunks: dict[MetadataIndex, Chunk] = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Change nothing."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Change nothing."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every requested part into its place."""
        for item in plan.items:
            target = planner.resolve_tensor(item).detach()
            name, first = item.storage_index.fqn, item.storage_offsets
            stop = first[0] + item.lengths[0] if first else None
            inside = tuple(slice(a, a + n) for a, n in zip(first[1:], item.lengths[1:], strict=True))
            stored = self.stored(name, self._chunks[item.storage_index])
            for row, piece in _pieces(stored, first[0] if first else 0, stop):
                if first:
                    row -= first[0]
                    target[row : row + len(piece)].copy_(piece[(slice(None), *inside)])
                else:
                    target.copy_(piece)
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def stored(self, name: str, chunk: Chunk) -> StoredTensor:
        """Find a chunk's bytes, and check that the file's own header agrees with ``state.json``."""
        if chunk.file not in self._headers:
            self._headers[chunk.file] = read_header(self.folder / chunk.file)
        tensor = self.state.tensors[name]
        stored = self._headers[chunk.file].get(tensor.key(name, chunk))
        if stored is None or stored.shape != chunk.shape or stored.dtype != tensor.dtype:
            raise CheckpointError(
                f"{self.folder / chunk.file} does not hold {name} as {tensor.dtype} {list(chunk.shape)}, although "
                f"{STATE_NAME} says so; the checkpoint is damaged, resume from an earlier one"
            )
        return stored

    def pieces(self, name: str, chunk: Chunk) -> Iterator[Tensor]:
        """Yield a chunk in row-major order, in pieces of whole rows."""
        for _, piece in _pieces(self.stored(name, chunk)):
            yield piece

    def verify(self, share: int = 0, num_shares: int = 1) -> None:
        """Compare every ``num_shares``-th chunk with its checksum. Reads those chunks once, at up to 1.65 GiB/s."""
        chunks = [(name, chunk) for name, tensor in self.state.tensors.items() for chunk in tensor.chunks]
        for name, chunk in chunks[share::num_shares]:
            checksum = 0
            for piece in self.pieces(name, chunk):
                checksum = zlib.crc32(_bytes(piece), checksum)
            if checksum != chunk.crc32:
                raise CheckpointError(
                    f"{name} in {self.folder / chunk.file} is damaged: CRC-32 {checksum:08x}, expected "
                    f"{chunk.crc32:08x}; copy the checkpoint again or resume from an earlier one"
                )


def _pieces(stored: StoredTensor, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """Yield parts along the first dimension, each with its first row; a scalar in one piece."""
    if not stored.shape:
        yield 0, stored.load()
        return
    stop = stored.shape[0] if stop is None else stop
    row_bytes = stored.num_bytes // max(1, stored.shape[0])
    num_rows = max(1, PIECE_BYTES // max(1, row_bytes))
    for row in range(start, stop, num_rows):
        yield row, stored.load(row, min(stop, row + num_rows))


def _bytes(piece: Tensor) -> memoryview:
    data: memoryview = piece.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data
