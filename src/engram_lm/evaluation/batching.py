"""How many sequences a model takes at a time: as many as fit, found by their lengths and by trying."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

_LOGIT_BYTES = 1 << 28
"""Bytes for the logits of a batch; a batch that would need more is cut."""

_BATCH_TOKENS = {"cpu": 1 << 12, "cuda": 1 << 16}
"""Tokens of a batch, padding included, where the caller does not say how many sequences it has. On a CPU a larger batch
is not faster; a GPU's memory decides by itself, and a batch that does not fit is halved."""


class Batches:
    """Cuts sequences that are sorted by length, the longest first, into batches.

    Args:
        batch_size: Sequences in a batch at most; None chooses by the number of tokens.
        device: Where the model is.
        num_logits: Values in a row of logits.
    """

    def __init__(self, batch_size: int | None, device: torch.device, num_logits: int) -> None:
        self._batch_size = batch_size
        self._tokens = _BATCH_TOKENS.get(device.type, _BATCH_TOKENS["cuda"])
        self._logit_rows = max(1, _LOGIT_BYTES // (4 * num_logits))

    def each(self, lengths: Sequence[int], num_kept: Sequence[int] | None, run: Callable[[int, int], None]) -> None:
        """Call ``run(start, stop)`` for batches until all sequences have had their turn.

        Without a ``batch_size``, a batch for which the device has too little memory is tried again with half of its
        sequences, as are all that follow.

        Args:
            lengths: Tokens of each sequence, the longest first.
            num_kept: Positions from the end of each sequence that need logits; None means all.
            run: Computes the sequences from ``start`` to before ``stop``. It may be called again for a batch that
                failed.
        """
        start = 0
        while start < len(lengths):
            stop = self._stop(start, lengths, num_kept)
            try:
                run(start, stop)
            except torch.OutOfMemoryError:
                if self._batch_size is not None or stop - start == 1:
                    raise
                self._tokens = lengths[start] * ((stop - start) // 2)
            else:
                start = stop

    def _stop(self, start: int, lengths: Sequence[int], num_kept: Sequence[int] | None) -> int:
        longest, most_kept, stop = lengths[start], 0, start
        while stop < len(lengths):
            kept = longest if num_kept is None else longest - lengths[stop] + num_kept[stop]
            most_kept, size = max(most_kept, kept), stop + 1 - start
            too_many = size > self._batch_size if self._batch_size else size * longest > self._tokens
            if size > 1 and (too_many or size * most_kept > self._logit_rows):
                break
            stop += 1
        return stop


def keeps_fewer_logits(model: Any) -> bool:
    """Tell whether a model computes logits for its last positions only when asked by ``logits_to_keep``."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's models pass it on
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
