"""What decoding remembers between two steps: the codes of the last tokens, and each layer's window of past values.

Knows nothing of transformers. A cache of transformers carries such states through `engram_lm.model.cache`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engram_lm.errors import HistoryError
from engram_lm.hashing.window import RollingWindow


class DecodeState:
    """The memory's state for a batch of sequences: one token history for all layers, one window for each layer.

    Args:
        batch_size: Number of sequences.
        context: How many earlier tokens a row depends on (`HashSpec.context`).
        device: Where the tokens are.
        max_rollback: How many tokens can be taken back unless `record` was called. Storage then has a fixed size and
            address.
    """

    def __init__(
        self, batch_size: int, context: int, *, device: torch.device | str = "cpu", max_rollback: int | None = 0
    ) -> None:
        self.max_rollback = max_rollback
        self.history = RollingWindow(
            batch_size, context, fill=-1, dtype=torch.int64, device=device, max_rollback=max_rollback
        )
        """Codes of the last tokens, int64 ``[B, context]``; -1 before the start."""
        self.windows: dict[int, RollingWindow] = {}
        """Block to the window of its layer; made when the layer first asks for it."""
        self.seen: int | None = 0
        """Tokens since the start; None where they could not be counted (inside ``torch.compile``)."""

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        return self.history.batch_size

    def window(self, block: int) -> "LayerWindow":
        """Return what the layer of a block takes as its state."""
        return LayerWindow(self, block)

    def advance(self, codes: Tensor) -> None:
        """Move the history past a step's codes, int64 ``[B, L]``. Layers move their windows themselves, after this."""
        self.history.advance(codes)
        if torch.compiler.is_compiling():
            self.seen = None  # A number that changes with every step would cause a new compilation each time.
        elif self.seen is not None:
            self.seen += codes.shape[1]

    def record(self) -> None:
        """Keep everything from here on, so that any number of tokens can be taken back."""
        self.max_rollback = None
        for window in self._all:
            window.record()

    def check_rollback(self, count: int) -> None:
        """Refuse, by a HistoryError, to take back more tokens than are held."""
        if self.seen is not None and count >= self.seen:
            return  # Nothing that would have to be known is left.
        try:
            self.history.check_rollback(count)  # It holds as many as the windows do.
        except HistoryError as error:
            raise HistoryError(
                f"crop takes back {count} tokens, more than the memory's state of this cache still holds (its "
                f"max_rollback was {self.max_rollback} when it was started); call activate_past_recording() on the "
                "cache before the tokens that may have to be taken back, or set max_rollback of the adapter (or of "
                "model.model, where memory was not attached) higher, and begin with a new cache"
            ) from error

    def rollback(self, count: int) -> None:
        """Take back the last ``count`` tokens; where everything was recorded, then keep what the next step needs.

        Raises:
            HistoryError: They are not held any more. Nothing has changed then.
        """
        self.check_rollback(count)
        if self.seen is not None and count >= self.seen:
            self.reset()
            return
        if count:
            for window in self._all:
                window.rollback(count)
            if self.seen is not None:
                self.seen -= count
        self.trim()

    def trim(self) -> None:
        """Give up what was recorded and is needed for taking back only."""
        for window in self._all:
            window.trim()

    def reorder(self, index: Tensor) -> None:
        """Replace every sequence by the one at its index (beam search)."""
        for window in self._all:
            window.reorder(index)

    def select(self, index: Tensor) -> None:
        """Keep the sequences at the indices."""
        for window in self._all:
            window.select(index)

    def repeat(self, repeats: int) -> None:
        """Let every sequence stand ``repeats`` times in a row."""
        self.history = self.history.fork(repeats)
        self.windows = {block: window.fork(repeats) for block, window in self.windows.items()}

    def reset(self) -> None:
        """Forget everything; storage of fixed size stays where it is."""
        for window in self._all:
            window.reset()
        self.seen = 0

    def snapshot(self) -> dict[str, Any]:
        """Return a copy of the state: tensors and integers, safe to save and to restore any number of times."""
        windows = {block: window.snapshot() for block, window in self.windows.items()}
        return {"seen": self.seen, "history": self.history.snapshot(), "windows": windows}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Return to what `snapshot` saw of this state.

        Raises:
            HistoryError: The snapshot is of another kind of state, or holds another number of sequences.
        """
        self.history.restore(snapshot["history"])
        for block, window in self.windows.items():
            if block in snapshot["windows"]:
                window.restore(snapshot["windows"][block])
            else:
                window.reset()
        self.seen = snapshot["seen"]

    @property
    def _all(self) -> list[RollingWindow]:
        return [self.history, *self.windows.values()]


@dataclasses.dataclass(frozen=True, eq=False)
class LayerWindow:
    """The window of one block inside a decode state."""

    state: DecodeState
    """The state it belongs to."""
    block: int
    """The block whose layer uses it."""

    def open(self, items: Tensor, width: int) -> RollingWindow:
        """Return the window before this step; made empty on first use, with the type and device of the items.

        The layer will append the items ``[B, L, *item_shape]`` and reads ``width`` earlier ones. A HistoryError says
        that the state holds another number of sequences.
        """
        window = self.state.windows.get(self.block)
        if window is None:
            window = self.state.windows[self.block] = RollingWindow(
                self.state.batch_size,
                width,
                item_shape=items.shape[2:],
                fill=0,
                dtype=items.dtype,
                device=items.device,
                max_rollback=self.state.max_rollback,
            )
        return window.open(items, width)
