"""Rows that could not be read: which requests needed them, from the forward pass to the scheduler that ends those.

vLLM ends the engine, and with it everybody's requests, when a forward pass raises. So a memory layer goes on with zeros
in place of the rows and notes whose they were; the worker takes the note along with what the forward pass gave, and the
scheduler ends these requests with the reason, gives none of their tokens, and forgets the blocks of the cache that hold
what was computed without the rows.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from engram_lm.errors import EngramError, RemoteError
from engram_lm.memory.layer import EngramLayer

_LOG = logging.getLogger(__name__)

# Dimension key: T tokens of all requests side by side, H heads of all orders, M memory width.


LOST = "engram_lost_rows"
"""Attribute of vLLM's ``ModelRunnerOutput`` with its `LostRows`; absent where all rows were read."""


@dataclasses.dataclass(eq=False)
class LostRows:
    """What one forward pass could not read. It is pickled on the way from a worker to the scheduler."""

    requests: set[int] = dataclasses.field(default_factory=set)
    """Places of the requests in the batch."""
    slots: dict[str, set[int]] = dataclasses.field(default_factory=dict)
    """Name of a layer with a cache to its slots that hold what was computed without rows."""
    reason: str = ""
    """The first error."""
    out_of_reach: bool = False
    """Whether a store does not answer: the rest of the forward pass asks it nothing, since each try may take long."""

    def merge(self, other: "LostRows") -> None:
        """Add what another rank could not read."""
        self.requests |= other.requests
        for layer, slots in other.slots.items():
            self.slots.setdefault(layer, set()).update(slots)
        self.reason = self.reason or other.reason


@dataclasses.dataclass(frozen=True, eq=False)
class Owners:
    """Whose the tokens of a forward pass are, and where what is computed of them is kept."""

    layer: str
    """Name of a layer with a cache."""
    ends: Tensor
    """Where each request ends among the tokens, ``[requests]``; empty while vLLM measures memory."""
    slots: Tensor
    """Slot of each token in the cache of the layer, ``[T]``; fewer where a GPU pads the tokens."""


_COLLECTED: ContextVar[LostRows | None] = ContextVar("engram_lost_rows", default=None)


@contextlib.contextmanager
def collecting() -> Iterator[LostRows]:
    """Note what the forward passes inside could not read; outside of it, a memory layer raises."""
    lost = LostRows()
    token = _COLLECTED.set(lost)
    try:
        yield lost
    finally:
        _COLLECTED.reset(token)


def read_or_note(layer: EngramLayer, rows: Tensor, owners: Owners) -> Tensor:
    """Read the rows of a forward pass; those that cannot be read are zeros, and noted.

    Args:
        layer: The memory layer that reads.
        rows: Row numbers, int64 ``[T, 1, H]``.
        owners: Whose they are.

    Returns:
        Memory vectors, ``[T, 1, M]``.

    Raises:
        EngramError: A row cannot be read, and nobody takes note.
        OSError: Likewise.
    """
    lost = _COLLECTED.get()
    try:
        if lost is None or not lost.out_of_reach:
            return layer.read(rows)
    except (EngramError, OSError) as error:
        if lost is None:
            raise
        _note(lost, error)
    assert lost is not None and layer.table is not None
    vectors = torch.zeros(len(rows), 1, layer.config.memory_dim, dtype=layer.table.dtype, device=rows.device)
    start = 0
    for request, stop in enumerate(owners.ends.tolist()):
        try:
            if not lost.out_of_reach:
                # Alone, because the others may have all their rows.
                vectors[start:stop] = layer.read(rows[start:stop])
                start = stop
                continue
        except (EngramError, OSError) as error:
            _note(lost, error)
        lost.requests.add(request)
        lost.slots.setdefault(owners.layer, set()).update(owners.slots[start:stop].tolist())
        start = stop
    return vectors


def _note(lost: LostRows, error: Exception) -> None:
    reason = f"{type(error).__name__}: {error}"
    if not lost.reason:
        _LOG.error("rows of memory cannot be read: %s", reason)
        lost.reason = reason
    lost.out_of_reach |= isinstance(error, RemoteError)
