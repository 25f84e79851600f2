"""Saves checkpoints of training, also in the background, and loads them on any number of ranks."""

import contextlib
import datetime
import json
import shutil
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from engram_lm.errors import CheckpointError, ConfigError, EngramError, MismatchError
from engram_lm.tables.stored_tensor import DTYPES
from engram_lm.training.checkpoints.saved_state import SavedState, complete_checkpoints
from engram_lm.training.checkpoints.storage import StateReader, StateWriter
from engram_lm.training.distribution import Ranks, agree

# A rank that has finished waits this long for the slowest one; a rank that dies is noticed at once.
_LONGEST_WRITE = datetime.timedelta(hours=4)
_NAMES_SHOWN = 8


def latest_checkpoint(folder: Path) -> Path | None:
    """Find the newest complete checkpoint below a folder, without any communication; None where there is none.

    A checkpoint is complete if ``state.json`` is undamaged and every file that it names exists and has the right size.
    Checksums are compared on loading.
    """
    return next((path for _, path in complete_checkpoints(Path(folder))), None)


def read_facts(path: Path) -> dict[str, Any]:
    """Read the facts of a checkpoint's folder, from which the model can be built; raises as `SavedState.read`."""
    return SavedState.read(Path(path)).facts


class Checkpoints:
    """The checkpoints of a run: ``folder/step-00000100/`` with a safetensors file per rank and ``state.json``.

    A checkpoint is written under a name that ends in ``.partial``, flushed, and renamed by rank 0 once every rank has
    finished. A kill at any moment leaves all earlier checkpoints intact; the next save removes what it left behind. An
    error on one rank (a full disk) raises the same error on all of them and removes what was written.

    Each rank writes the parts that it alone holds and its share of those that all hold, and reads what it needs: a
    checkpoint of 2 ranks loads on 1 or 3. Tensors that are divided over ranks are ``DTensor``; a plain tensor either
    is the same on all ranks, or has a name that only one rank uses (such as ``rng/rank0/cpu``).

    All ranks call the constructor and every method but `latest` together. The constructor makes a process group of its
    own (gloo), so that writing in the background does not mix with what training communicates. Only one run at a time
    may save into a folder, which all ranks see and the first save makes. An asynchronous save keeps one copy of what
    this rank writes in host memory, pinned if it comes from a GPU.

    Of the checkpoints up to the newest, ``keep_last`` (at least 1) are kept. Those of later steps, left by a run that
    was then resumed from an earlier step, are not touched.
    """

    def __init__(self, folder: Path, keep_last: int = 2) -> None:
        if keep_last < 1:
            raise ConfigError(f"keep_last must be at least 1, not {keep_last}: the newest checkpoint always stays")
        self.folder, self.keep_last = Path(folder), keep_last
        self._group: Any = None
        self._ranks = Ranks()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=_LONGEST_WRITE)
            self._ranks = Ranks(dist.get_rank(), dist.get_world_size(), group=self._group)
        self._staging: dict[Any, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], *, asynchronous: bool = False
    ) -> None:
        """Write a checkpoint; it replaces an earlier one of the same step once it is complete.

        Args:
            step: Optimizer steps done.
            tensors: By name; see `engram_lm.training.checkpoints.training_state.training_tensors`.
            facts: JSON that is written beside the tensors; rank 0's counts.
            asynchronous: Return as soon as the tensors are copied to host memory, so that they may change, and write in
                the background. At most one save runs at a time: the next one waits for it. An error in the background
                is raised by the next `save`, `load` or `wait`, on all ranks.

        Raises:
            CheckpointError: This save, or the one before it that ran in the background, failed; earlier checkpoints
                are unchanged.
            ConfigError: A tensor or the facts cannot be saved.
        """
        self.wait()
        staging, staged = (self._staging, threading.Event()) if asynchronous else (None, threading.Event())
        writer = StateWriter(self.folder, step, facts, self.keep_last, staging, staged.set)
        with _quiet():
            if not asynchronous:
                self._write(writer, tensors)
            else:
                if any(isinstance(tensor, Tensor) and tensor.is_cuda for tensor in tensors.values()):
                    torch.cuda.synchronize()  # another thread makes the copies, on another stream

                def write() -> None:
                    self._write(writer, tensors)
                    staged.set()  # it may have failed before

                # No daemon: a process that ends waits for its last checkpoint.
                self._thread = threading.Thread(target=write, name=f"checkpoint-{step}")
                self._thread.start()
                staged.wait()
        # Later failures reach the ranks at different moments, so all of them raise them at the next call.
        if not asynchronous or not writer.is_planned:
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being written, and raise the error of a save in the background."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def latest(self) -> Path | None:
        """Find the newest complete checkpoint, without any communication."""
        return latest_checkpoint(self.folder)

    def load(
        self,
        path: Path,
        tensors: Mapping[str, Tensor],
        *,
        optional: Sequence[str] = ("rng/",),
        expected: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint into existing tensors, whatever the number of ranks that wrote it.

        Everything is checked before the first number changes: names, types, shapes, sizes of files and every byte's
        checksum (each rank checks a share of the files).

        Args:
            path: The folder of one checkpoint; the same on all ranks.
            tensors: What to fill, by name, in place.
            optional: Prefixes of names that may be missing on either side; such a tensor is left as it is. Random
                states of ranks are optional, as there may now be more or fewer ranks.
            expected: Facts that the checkpoint must have, such as ``{"spec_digest": ...}``.

        Returns:
            The facts.

        Raises:
            CheckpointError: A file is missing, cut or damaged; ranks were given different checkpoints.
            ConfigError: A tensor to fill is on the meta device.
            MismatchError: The checkpoint is of another model: its facts, names, types or shapes differ.
        """
        self.wait()
        path = Path(path)
        with agree(self._ranks):
            state = SavedState.read(path)
        digests = [state.digest]
        if self._group is not None:
            digests = [""] * self._ranks.world_size
            dist.all_gather_object(digests, state.digest, group=self._group)
        with agree(self._ranks):
            wanted = _matching(path, state, digests, tensors, optional, expected or {})
        reader = StateReader(path, state)
        with agree(self._ranks):
            reader.verify(self._ranks.rank, self._ranks.world_size)
        try:
            with _quiet():
                dcp.load(
                    wanted,
                    storage_reader=reader,
                    planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                    process_group=self._group,
                    no_dist=self._group is None,
                )
        except (dcp.CheckpointException, Exception) as error:
            raise _explained(error, f"{path} was read in part only; load a checkpoint again before going on") from error
        return state.facts

    def _write(self, writer: StateWriter, tensors: Mapping[str, Tensor]) -> None:
        """Write, and keep an error for `wait`."""
        try:
            dcp.save(
                dict(tensors),
                storage_writer=writer,
                planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                process_group=self._group,
                no_dist=self._group is None,
            )
        except BaseException as error:
            earlier = f"earlier checkpoints in {self.folder} are as they were"
            self._error = _explained(error, f"the checkpoint of step {writer.step} was not saved, {earlier}")
            if self._ranks.is_first:
                shutil.rmtree(writer.partial, ignore_errors=True)


def _matching(
    path: Path,
    state: SavedState,
    digests: Sequence[str],
    tensors: Mapping[str, Tensor],
    optional: Sequence[str],
    expected: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Check that a checkpoint matches these tensors, and return those that it holds."""
    if len(set(digests)) > 1:
        raise CheckpointError(f"ranks were told to load different checkpoints, here {path}; name one for all")
    for name, value in expected.items():
        if state.facts.get(name) != value:
            raise MismatchError(
                f"{path} was saved with {name} {_short(state.facts.get(name))}, expected {_short(value)}; load it into "
                "the model it was made with, or start a new run"
            )
    beginnings = tuple(optional)
    wanted = {name: tensor for name, tensor in tensors.items() if name in state.tensors}
    lacking = [name for name in tensors if name not in wanted and not name.startswith(beginnings)]
    more = [name for name in state.tensors if name not in wanted and not name.startswith(beginnings)]
    if lacking or more:
        parts = [f"it lacks {_listed(lacking)}"] * bool(lacking) + [f"it has besides {_listed(more)}"] * bool(more)
        raise MismatchError(
            f"{path} is of another model or optimizer: {', and '.join(parts)}. Use the recipe it was saved with"
        )
    other = []
    for name, tensor in wanted.items():
        saved = state.tensors[name]
        if tensor.is_meta:
            raise ConfigError(f"{name} is on the meta device; allocate it before it is loaded")
        if DTYPES[saved.dtype] != tensor.dtype or saved.shape != tuple(tensor.shape):
            there = f"{DTYPES[saved.dtype]} {list(saved.shape)}".removeprefix("torch.")
            other.append(f"{name} is {there}, expected {tensor.dtype} {list(tensor.shape)}".replace("torch.", ""))
    if other:
        raise MismatchError(f"{path} is of another geometry: {_listed(other, '; ')}. Use the recipe it was saved with")
    return wanted


def _explained(error: BaseException, what: str) -> BaseException:
    """Turn what DCP raises, the same on all ranks, into one of our errors; keep the words of those that are ours."""
    where = ""
    if isinstance(error, dcp.CheckpointException):
        rank, (error, _) = min(error.failures.items(), key=lambda failure: failure[0])
        where = f"rank {rank}: "
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return error
    if isinstance(error, EngramError):
        return type(error)(f"{where}{error}")
    todo = ". Make room, or name a folder that all ranks can write" if isinstance(error, OSError) else ""
    return CheckpointError(f"{what}: {where}{error}{todo}")


def _listed(names: Sequence[str], separator: str = ", ") -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return separator.join(names[:_NAMES_SHOWN]) + more


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:97] + "..."


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence DCP's warning about a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
