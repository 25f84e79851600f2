"""The last positions of a stream, per sequence of a batch: what decoding one token at a time has to remember."""

# Dimension key: B batch, L length of a chunk, W width, R positions kept for rolling back.

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from engram_lm.errors import ConfigError, HistoryError

Counts = int | Sequence[int] | Tensor


class RollingWindow:
    """The last ``width`` items of each sequence, changed in place.

    The newest item stands at the right end of a buffer ``[B, R + W, *item_shape]``. How large R is, and with it how
    many items can be taken back, depends on ``max_rollback``:

    * a number: R is that number. The storage keeps its shape and address, so `advance` can be compiled and captured in
      a CUDA graph.
    * None: R grows with every item, so any number of items can be taken back.

    Args:
        batch_size: Number of sequences.
        width: Items to remember per sequence; may be 0.
        item_shape: Shape of one item.
        fill: What stands for items before the start.
        dtype: Type of the items.
        device: Device of the storage.
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
        self.max_rollback = max_rollback
        shape = (batch_size, (max_rollback or 0) + width, *self.item_shape)
        self._buffer = torch.full(shape, fill, dtype=dtype, device=device)
        # A tensor, because Python does not run when a CUDA graph is replayed.
        self._held = torch.zeros(batch_size, dtype=torch.int64, device=device)

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return self._buffer.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the items."""
        return self._buffer.dtype

    @property
    def device(self) -> torch.device:
        """Device of the storage."""
        return self._buffer.device

    @property
    def values(self) -> Tensor:
        """The last items, oldest first, [B, W, *item_shape], the fill where nothing was yet; valid until it changes."""
        return self._buffer[:, self._buffer.shape[1] - self.width :]

    def open(self, items: Tensor, width: int) -> Self:
        """Return the window, after a HistoryError for items ``[B, L, *item_shape]`` or a width that do not fit it."""
        if items.shape[0] != self.batch_size:
            raise HistoryError(
                f"the decode state holds {self.batch_size} sequences, this step has {items.shape[0]}; "
                "use fork, reorder or select to follow the batch"
            )
        if width != self.width:
            raise HistoryError(f"the decode state holds {self.width} positions, this step reads {width}")
        return self

    @torch.no_grad()
    def advance(self, items: Tensor, lengths: Sequence[int] | Tensor | None = None) -> Self:
        """Append a chunk ``[B, L, *item_shape]`` to every sequence, in place and cut off from autograd.

        ``lengths`` says how many of the L items count, per sequence, for chunks padded on the right. Without it all
        count, and nothing waits for the host.

        Raises:
            HistoryError: The items have another batch size or shape, or a length is outside [0, L].
        """
        if items.ndim != 2 + len(self.item_shape) or (items.shape[0], *items.shape[2:]) != (
            self.batch_size,
            *self.item_shape,
        ):
            raise HistoryError(
                f"this window holds {self.batch_size} sequences of items {list(self.item_shape)}, "
                f"got a chunk of shape {list(items.shape)}; expected [batch, length, *item]"
            )
        length = items.shape[1]
        joined = torch.cat([self._buffer, items.detach().to(dtype=self.dtype, device=self.device)], dim=1)
        added: Tensor | int = length
        if lengths is not None:
            counts = self._counts(lengths, "lengths")
            if any(not 0 <= count <= length for count in counts):
                raise HistoryError(f"lengths lie in 0..{length}, the length of the chunk, got {counts}")
            added = torch.tensor(counts, dtype=torch.int64, device=self.device)
            # Each sequence moves right by the places that its chunk left empty.
            joined = self._shifted(joined, length, added)
        if self.max_rollback is None:
            self._buffer = joined
            self._held = self._held + added
        else:
            self._buffer.copy_(joined[:, length:])
            self._held.add_(added).clamp_(max=self.max_rollback)
        return self

    @torch.no_grad()
    def rollback(self, n: Counts) -> Self:
        """Take the last ``n`` items back, in place, as if they had never come; one number or one per sequence.

        Raises:
            HistoryError: Fewer items are held than should be taken back. Nothing has changed then.
        """
        self.check_rollback(n)
        counts = self._counts(n, "n")
        most = max(counts, default=0)
        shift = torch.tensor(counts, dtype=torch.int64, device=self.device)
        self._replace(self._shifted(self._buffer, most, most - shift), self._held - shift)
        return self

    def check_rollback(self, n: Counts) -> None:
        """Refuse, by a HistoryError, what `rollback` would refuse."""
        for sequence, (count, held) in enumerate(zip(self._counts(n, "n"), self._held.tolist(), strict=True)):
            if count < 0:
                raise HistoryError(f"rollback takes a number from 0, got {count} for sequence {sequence}")
            if count > held:
                raise HistoryError(
                    f"rollback of {count} items of sequence {sequence}: {held} are held "
                    f"(max_rollback={self.max_rollback}); make the window with a larger max_rollback, or None for all"
                )

    @torch.no_grad()
    def reorder(self, indices: Sequence[int] | Tensor) -> Self:
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
        self._replace(self._buffer.index_select(0, index), self._held.index_select(0, index))
        return self

    @torch.no_grad()
    def select(self, indices: Sequence[int] | Tensor) -> Self:
        """Keep the sequences at the indices, in place; the batch size becomes their number, the storage is new.

        Raises:
            HistoryError: An index is out of range.
        """
        index = self._index(indices)
        self._buffer, self._held = self._buffer.index_select(0, index), self._held.index_select(0, index)
        return self

    @torch.no_grad()
    def fork(self, repeats: int = 1) -> Self:
        """Return an independent copy in which every sequence stands ``repeats`` times in a row.

        Raises:
            HistoryError: ``repeats`` is below 1.
        """
        if repeats < 1:
            raise HistoryError(f"fork takes repeats from 1, got {repeats}")
        forked = copy.copy(self)
        forked._buffer = self._buffer.repeat_interleave(repeats, dim=0)
        forked._held = self._held.repeat_interleave(repeats, dim=0)
        return forked

    def record(self) -> Self:
        """Keep everything from here on, in place, so that `rollback` can take it back (``max_rollback`` None)."""
        if self.max_rollback is not None:
            self.max_rollback = None
            self.trim()
        return self

    def trim(self) -> Self:
        """Give up what only `rollback` would need, in place, where everything is kept; the next step sees no change."""
        if self.max_rollback is None:
            self._buffer, self._held = self.values.clone(), torch.zeros_like(self._held)
        return self

    @torch.no_grad()
    def reset(self) -> Self:
        """Forget everything, in place."""
        self.trim()
        self._buffer.fill_(self.fill)
        self._held.zero_()
        return self

    def snapshot(self) -> dict[str, Any]:
        """Return a copy of the state: tensors and integers, safe to save and to restore any number of times."""
        return {
            "width": self.width,
            "max_rollback": self.max_rollback,
            "buffer": self._buffer.clone(),
            "held": self._held.clone(),
        }

    @torch.no_grad()
    def restore(self, snapshot: Mapping[str, Any]) -> Self:
        """Return, in place, to what `snapshot` saw.

        Raises:
            HistoryError: The snapshot is of a window of another kind, or of another number of sequences.
        """
        buffer, held = snapshot.get("buffer"), snapshot.get("held")
        if not isinstance(buffer, Tensor) or not isinstance(held, Tensor):
            raise HistoryError(f"this is no snapshot of a window: it holds {sorted(snapshot)}")
        ours = (self.width, self.max_rollback, self.item_shape)
        theirs = (snapshot.get("width"), snapshot.get("max_rollback"), tuple(buffer.shape[2:]))
        if ours != theirs:
            raise HistoryError(f"the snapshot has (width, max_rollback, item shape) {theirs}, this window {ours}")
        if buffer.shape[0] != self.batch_size:
            raise HistoryError(f"the snapshot holds {buffer.shape[0]} sequences, this window {self.batch_size}")
        self._replace(buffer.to(self._buffer, copy=True), held.to(self._held, copy=True))
        return self

    def _replace(self, buffer: Tensor, held: Tensor) -> None:
        """Take new contents; into the storage that is there, where its address has to stay."""
        if self.max_rollback is None or buffer.shape != self._buffer.shape:
            self._buffer, self._held = buffer, held
        else:
            self._buffer.copy_(buffer)
            self._held.copy_(held)

    def _shifted(self, items: Tensor, padding: int, start: Tensor) -> Tensor:
        """Put ``padding`` fills before the items, and take as many places as there were, from each sequence's start."""
        fills = items.new_full((items.shape[0], padding, *items.shape[2:]), self.fill)
        padded = torch.cat([fills, items], dim=1)
        places = torch.arange(items.shape[1], device=start.device) + start[:, None]
        return padded[torch.arange(len(start), device=start.device)[:, None], places]

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
