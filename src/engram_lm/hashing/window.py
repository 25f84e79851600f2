"""The last positions of a stream, per sequence of a batch: what decoding one token at a time has to remember."""

# Dimension key: B batch, L length of a chunk, W width.

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engram_lm.errors import ConfigError, HistoryError

__all__ = ["RollingWindow"]

Counts = int | Sequence[int] | Tensor


class RollingWindow:
    """The last ``width`` items of each sequence, changed in place.

    Two kinds, chosen by ``max_rollback``:

    * a number: storage of fixed shape and address, ``width + max_rollback`` items per sequence, so `advance` can be
      compiled and captured in a CUDA graph; that many items can be taken back.
    * None: everything since the start is kept, so any number of items can be taken back; memory grows.

    Args:
        batch_size: Number of sequences.
        width: Items to remember per sequence; may be 0.
        item_shape: Shape of one item.
        fill: What stands for items before the start.
        dtype: Of the items.
        device: Of the storage.
        max_rollback: How many items `rollback` can take back; None for all.

    Raises:
        ConfigError: A size is negative.
    """

    def __init__(
        self,
        batch_size: int,
        width: int,
        *,
        item_shape: Sequence[int] = (),
        fill: float,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        max_rollback: int | None = 0,
    ):
        for name, size in (("batch_size", batch_size), ("width", width), ("max_rollback", max_rollback or 0)):
            if size < 0:
                raise ConfigError(f"{name} is a number from 0, got {size}")
        self.width = width
        self.item_shape = tuple(item_shape)
        self.fill = fill
        self.dtype = dtype
        self.max_rollback = max_rollback
        kind: type[_Storage] = _Growing if max_rollback is None else _Fixed
        self._storage = kind(batch_size, width, max_rollback or 0, self.item_shape, fill, dtype, torch.device(device))

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return self._storage.buffer.shape[0]

    @property
    def device(self) -> torch.device:
        """Device of the storage."""
        return self._storage.buffer.device

    @property
    def values(self) -> Tensor:
        """The last items, oldest first, [B, W, *item_shape], the fill where nothing was yet; valid until it changes."""
        return self._storage.values()

    @torch.no_grad()
    def advance(self, items: Tensor, lengths: Sequence[int] | Tensor | None = None) -> "RollingWindow":
        """Append a chunk to every sequence, in place.

        Args:
            items: [B, L, *item_shape]; converted to the window's dtype, cut off from autograd.
            lengths: How many of the L items count, per sequence, for chunks padded on the right. None: all of them,
                and nothing waits for the host.

        Returns:
            The window itself.

        Raises:
            HistoryError: The items have another batch size or shape, or a length is outside [0, L].
        """
        expected = (self.batch_size, *self.item_shape)
        if items.ndim != 2 + len(self.item_shape) or (items.shape[0], *items.shape[2:]) != expected:
            raise HistoryError(
                f"this window holds {self.batch_size} sequences of items {list(self.item_shape)}, "
                f"got a chunk of shape {list(items.shape)}; expected [batch, length, *item]"
            )
        counts = None
        if lengths is not None:
            counts = self._counts(lengths, "lengths")
            if any(not 0 <= count <= items.shape[1] for count in counts):
                raise HistoryError(f"lengths lie in 0..{items.shape[1]}, the length of the chunk, got {counts}")
        self._storage.advance(items.detach().to(dtype=self.dtype, device=self.device), counts)
        return self

    @torch.no_grad()
    def rollback(self, n: Counts) -> "RollingWindow":
        """Take the last items back, in place, as if they had never come.

        Args:
            n: How many, for all sequences or one number per sequence.

        Returns:
            The window itself.

        Raises:
            HistoryError: Fewer items are held than should be taken back. Nothing has changed then.
        """
        counts = self._counts(n, "n")
        held = self._storage.held_counts()
        for sequence, (count, available) in enumerate(zip(counts, held, strict=True)):
            if count < 0:
                raise HistoryError(f"rollback takes a number from 0, got {count} for sequence {sequence}")
            if count > available:
                raise HistoryError(
                    f"rollback of {count} items of sequence {sequence}: {available} are held "
                    f"(max_rollback={self.max_rollback}); make the window with a larger max_rollback, or None for all"
                )
        self._storage.rollback(counts)
        return self

    @torch.no_grad()
    def reorder(self, indices: Sequence[int] | Tensor) -> "RollingWindow":
        """Replace every sequence by the one at its index, in place (beam search); the batch size stays.

        Raises:
            HistoryError: There are more or fewer indices than sequences, or one is out of range.
        """
        index = self._index(indices)
        if len(index) != self.batch_size:
            raise HistoryError(
                f"reorder takes one index per sequence ({self.batch_size}), got {len(index)}; "
                "use select to change the batch size"
            )
        self._storage.reorder(index)
        return self

    @torch.no_grad()
    def select(self, indices: Sequence[int] | Tensor) -> "RollingWindow":
        """Keep the sequences at the indices, in place; the batch size becomes their number, the storage is new.

        Raises:
            HistoryError: An index is out of range.
        """
        self._storage.select(self._index(indices))
        return self

    @torch.no_grad()
    def fork(self, repeats: int = 1) -> "RollingWindow":
        """Return an independent copy in which every sequence stands ``repeats`` times in a row.

        Raises:
            HistoryError: ``repeats`` is below 1.
        """
        if repeats < 1:
            raise HistoryError(f"fork takes repeats from 1, got {repeats}")
        copy = RollingWindow(
            0,
            self.width,
            item_shape=self.item_shape,
            fill=self.fill,
            dtype=self.dtype,
            device=self.device,
            max_rollback=self.max_rollback,
        )
        copy.restore(self.snapshot(), resize=True)
        if repeats > 1:
            copy._storage.select(torch.arange(self.batch_size, device=self.device).repeat_interleave(repeats))
        return copy

    @torch.no_grad()
    def record(self) -> "RollingWindow":
        """Keep everything from here on, in place, so that `rollback` can take it back (``max_rollback`` None)."""
        if self.max_rollback is not None:
            self.max_rollback = None
            self._storage = self._growing_from(self.values)
        return self

    @torch.no_grad()
    def trim(self) -> "RollingWindow":
        """Give up what only `rollback` would need, in place, where everything is kept; the next step sees no change."""
        if self.max_rollback is None:
            self._storage = self._growing_from(self.values)
        return self

    def _growing_from(self, values: Tensor) -> "_Growing":
        storage = _Growing(0, self.width, 0, self.item_shape, self.fill, self.dtype, self.device)
        storage.buffer, storage.held = values.clone(), [0] * values.shape[0]
        return storage

    @torch.no_grad()
    def reset(self) -> "RollingWindow":
        """Forget everything, in place."""
        self._storage.reset()
        return self

    @torch.no_grad()
    def snapshot(self) -> dict[str, Any]:
        """Return a copy of the state: tensors and integers, safe to save and to restore any number of times."""
        return {"width": self.width, "max_rollback": self.max_rollback, **self._storage.snapshot()}

    @torch.no_grad()
    def restore(self, snapshot: Mapping[str, Any], *, resize: bool = False) -> "RollingWindow":
        """Return, in place, to what `snapshot` saw.

        Args:
            snapshot: Of this window or of one with the same width, items and ``max_rollback``.
            resize: Also take the snapshot's batch size. Otherwise it must be this window's.

        Returns:
            The window itself.

        Raises:
            HistoryError: The snapshot is of another kind of window.
        """
        ours = (self.width, self.max_rollback, self.item_shape)
        buffer = snapshot.get("buffer")
        if not isinstance(buffer, Tensor) or "held" not in snapshot:
            raise HistoryError(f"this is no snapshot of a window: it holds {sorted(snapshot)}")
        theirs = (snapshot.get("width"), snapshot.get("max_rollback"), tuple(buffer.shape[2:]))
        if ours != theirs:
            raise HistoryError(f"the snapshot has (width, max_rollback, item shape) {theirs}, this window {ours}")
        if not resize and buffer.shape[0] != self.batch_size:
            raise HistoryError(f"the snapshot holds {buffer.shape[0]} sequences, this window {self.batch_size}")
        self._storage.restore(snapshot)
        return self

    def _counts(self, n: Counts, name: str) -> list[int]:
        if isinstance(n, Tensor):
            n = n.tolist()
        counts = [n] * self.batch_size if isinstance(n, int) else [int(count) for count in n]
        if len(counts) != self.batch_size:
            raise HistoryError(f"{name} has {len(counts)} numbers, the window {self.batch_size} sequences")
        return counts

    def _index(self, indices: Sequence[int] | Tensor) -> Tensor:
        # Indices on an accelerator come from beam search and are checked by the gather there, without waiting.
        if not isinstance(indices, Tensor) or indices.device.type == "cpu":
            wrong = [i for i in torch.as_tensor(indices).flatten().tolist() if not 0 <= i < self.batch_size]
            if wrong:
                raise HistoryError(f"sequence {wrong[0]} is not in this batch of {self.batch_size}")
        return torch.as_tensor(indices, dtype=torch.int64, device=self.device)


class _Storage(abc.ABC):
    """Items of each sequence, and how many of them can be taken back."""

    buffer: Tensor

    @abc.abstractmethod
    def __init__(
        self,
        batch_size: int,
        width: int,
        max_rollback: int,
        item_shape: tuple[int, ...],
        fill: float,
        dtype: torch.dtype,
        device: torch.device,
    ): ...

    @abc.abstractmethod
    def values(self) -> Tensor: ...

    @abc.abstractmethod
    def held_counts(self) -> list[int]: ...

    @abc.abstractmethod
    def advance(self, items: Tensor, counts: list[int] | None) -> None: ...

    @abc.abstractmethod
    def rollback(self, counts: list[int]) -> None: ...

    @abc.abstractmethod
    def reorder(self, index: Tensor) -> None: ...

    @abc.abstractmethod
    def select(self, index: Tensor) -> None: ...

    @abc.abstractmethod
    def reset(self) -> None: ...

    @abc.abstractmethod
    def snapshot(self) -> dict[str, Any]: ...

    @abc.abstractmethod
    def restore(self, snapshot: Mapping[str, Any]) -> None: ...


class _Fixed(_Storage):
    """The newest items at the right end of ``width + max_rollback`` places.

    The count of what can be taken back is a tensor beside them: Python does not run when a CUDA graph is replayed.
    """

    def __init__(
        self,
        batch_size: int,
        width: int,
        max_rollback: int,
        item_shape: tuple[int, ...],
        fill: float,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.width, self.max_rollback, self.fill = width, max_rollback, fill
        self.buffer = torch.full((batch_size, width + max_rollback, *item_shape), fill, dtype=dtype, device=device)
        self.held = torch.zeros(batch_size, dtype=torch.int64, device=device)

    def values(self) -> Tensor:
        return self.buffer[:, self.max_rollback :]

    def held_counts(self) -> list[int]:
        return self.held.tolist()

    def advance(self, items: Tensor, counts: list[int] | None) -> None:
        joined = torch.cat([self.buffer, items], dim=1)
        if counts is None:
            self.buffer.copy_(joined[:, items.shape[1] :])
            self.held.add_(items.shape[1]).clamp_(max=self.max_rollback)
            return
        shift = torch.tensor(counts, dtype=torch.int64, device=self.buffer.device)
        self.buffer.copy_(self._shifted(joined, shift))
        self.held.add_(shift).clamp_(max=self.max_rollback)

    def rollback(self, counts: list[int]) -> None:
        shift = torch.tensor(counts, dtype=torch.int64, device=self.buffer.device)
        padding = torch.full_like(self.buffer[:, : self.max_rollback], self.fill)
        self.buffer.copy_(self._shifted(torch.cat([padding, self.buffer], dim=1), self.max_rollback - shift))
        self.held.sub_(shift)

    def _shifted(self, items: Tensor, shift: Tensor) -> Tensor:
        """Take a buffer's width of items from each sequence, starting at its shift."""
        places = torch.arange(self.buffer.shape[1], device=shift.device) + shift[:, None]
        return items[torch.arange(len(shift), device=shift.device)[:, None], places]

    def reorder(self, index: Tensor) -> None:
        self.buffer.copy_(self.buffer.index_select(0, index))
        self.held.copy_(self.held.index_select(0, index))

    def select(self, index: Tensor) -> None:
        self.buffer, self.held = self.buffer.index_select(0, index), self.held.index_select(0, index)

    def reset(self) -> None:
        self.buffer.fill_(self.fill)
        self.held.zero_()

    def snapshot(self) -> dict[str, Any]:
        return {"buffer": self.buffer.clone(), "held": self.held.clone()}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        buffer, held = snapshot["buffer"], snapshot["held"]
        if buffer.shape != self.buffer.shape:
            self.buffer, self.held = self.buffer.new_empty(buffer.shape), self.held.new_empty(held.shape)
        self.buffer.copy_(buffer)
        self.held.copy_(held)


class _Growing(_Storage):
    """Everything since the start: ``width`` fills, then the items; the storage doubles when it is full."""

    def __init__(
        self,
        batch_size: int,
        width: int,
        max_rollback: int,
        item_shape: tuple[int, ...],
        fill: float,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.width, self.fill = width, fill
        self.buffer = torch.full((batch_size, width, *item_shape), fill, dtype=dtype, device=device)
        self.held = [0] * batch_size

    def values(self) -> Tensor:
        starts = set(self.held)
        if len(starts) <= 1:
            start = starts.pop() if starts else 0
            return self.buffer[:, start : start + self.width]
        return self.buffer[self._sequences(), self._places(self.width)]

    def held_counts(self) -> list[int]:
        return self.held

    def advance(self, items: Tensor, counts: list[int] | None) -> None:
        length = items.shape[1]
        needed = self.width + max(self.held, default=0) + length
        if needed > self.buffer.shape[1]:
            larger = self.buffer.new_full(
                (len(self.held), max(needed, 2 * self.buffer.shape[1]), *items.shape[2:]), self.fill
            )
            larger[:, : self.buffer.shape[1]] = self.buffer
            self.buffer = larger
        # What is written beyond a sequence's own length lies after its end and is overwritten by its next items.
        if len(set(self.held)) == 1:
            start = self.width + self.held[0]
            self.buffer[:, start : start + length] = items
        elif self.held:
            self.buffer[self._sequences(), self._places(length, self.width)] = items
        self.held = [held + count for held, count in zip(self.held, counts or [length] * len(self.held), strict=True)]

    def _sequences(self) -> Tensor:
        return torch.arange(len(self.held), device=self.buffer.device)[:, None]

    def _places(self, count: int, after: int = 0) -> Tensor:
        device = self.buffer.device
        return torch.tensor(self.held, device=device)[:, None] + after + torch.arange(count, device=device)

    def rollback(self, counts: list[int]) -> None:
        self.held = [held - count for held, count in zip(self.held, counts, strict=True)]

    def reorder(self, index: Tensor) -> None:
        self.select(index)

    def select(self, index: Tensor) -> None:
        self.buffer = self.buffer.index_select(0, index)
        self.held = [self.held[i] for i in index.tolist()]

    def reset(self) -> None:
        self.buffer[:, : self.width] = self.fill
        self.held = [0] * len(self.held)

    def snapshot(self) -> dict[str, Any]:
        end = self.width + max(self.held, default=0)
        return {"buffer": self.buffer[:, :end].clone(), "held": torch.tensor(self.held, dtype=torch.int64)}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        self.buffer = snapshot["buffer"].to(dtype=self.buffer.dtype, device=self.buffer.device, copy=True)
        self.held = snapshot["held"].tolist()
