"""Loss and gates on tokens that are not trained on, on one process or on many."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engram_lm.errors import DataError
from engram_lm.memory.layer import EngramLayer
from engram_lm.training.distribution import Ranks, reshard, share
from engram_lm.training.loss import cut_into_sequences

__all__ = ["evaluate"]


@torch.no_grad()
def evaluate(
    model: Any,
    loss_module: nn.Module,
    tokens: np.ndarray,
    *,
    length: int,
    batch_size: int,
    ranks: Ranks,
    document_ends: np.ndarray | None = None,
) -> dict[str, Any]:
    """Measure the held-out loss, and how far the gates of memory are open.

    Every process calls this with the same tokens and gets the same answer.

    Args:
        model: The model; its training flag is put back afterwards.
        loss_module: What computes its loss, wrapped for several processes or not.
        tokens: Packed tokens ``[num_tokens]``; all but the first are predicted.
        length: Tokens in a sequence.
        batch_size: Sequences at a time, over all processes.
        ranks: The processes.
        document_ends: One past the last token of each document, in order, where positions restart with documents as
            they do in training; None where they do not.

    Returns:
        ``loss`` (mean nats per token), ``perplexity``, ``num_tokens`` and, with memory, ``gates``: for each block with
        memory the mean gate, and the share of gates above one half.
    """
    whole = [piece for piece in cut_into_sequences(tokens, length) if piece.stop - piece.start == length + 1]
    pieces = whole or cut_into_sequences(tokens, length)
    if not pieces:
        raise DataError(f"the held-out text has {len(tokens)} tokens, so none follows another; hold out more")
    within = None if document_ends is None else _places_in_documents(len(tokens), document_ends)
    total = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    was_training = model.training
    model.eval()
    try:
        with _gates(model) as gates:
            for first in range(0, len(pieces), max(batch_size, ranks.world_size)):
                batch = pieces[first : first + max(batch_size, ranks.world_size)]
                start, stop = share(len(batch), ranks) if len(batch) >= ranks.world_size else (0, len(batch))
                # Where fewer sequences are left than processes, all compute the same and only the first counts it.
                counts = len(batch) >= ranks.world_size or ranks.rank == 0
                windows = torch.from_numpy(np.stack([tokens[piece] for piece in batch[start:stop]]).astype(np.int64))
                windows = windows.to(ranks.device)
                positions = None
                if within is not None:
                    # Counted from the start of the document or of the sequence, whichever is nearer.
                    nearer = [np.minimum(within[p][:-1], np.arange(p.stop - p.start - 1)) for p in batch[start:stop]]
                    positions = torch.from_numpy(np.stack(nearer)).to(ranks.device)
                loss = loss_module(windows[:, :-1].contiguous(), windows[:, 1:].contiguous(), position_ids=positions)
                if counts:
                    number = windows.shape[0] * (windows.shape[1] - 1)
                    total += torch.stack([loss.double() * number, torch.tensor(float(number), device=ranks.device)])
                else:
                    gates.forget()
    finally:
        model.train(was_training)
        reshard(loss_module)
    nats, count = (float(value) for value in ranks.sum(total))
    found = {"loss": nats / count, "perplexity": math.exp(min(nats / count, 700.0)), "num_tokens": int(count)}
    summary = gates.summary(ranks)
    return {**found, "gates": summary} if summary else found


def _places_in_documents(num_tokens: int, ends: np.ndarray) -> np.ndarray:
    """Place of each token in its document, int64 ``[num_tokens]``."""
    starts = np.zeros(num_tokens, dtype=np.int64)
    begun = ends[ends < num_tokens]
    starts[begun] = begun
    places: np.ndarray = np.arange(num_tokens) - np.maximum.accumulate(starts)
    return places


class _GateStatistics:
    """Sums of the gates that layers return, by block."""

    def __init__(self, blocks: list[int], device: torch.device) -> None:
        self._sums = {block: torch.zeros(3, dtype=torch.float64, device=device) for block in blocks}
        self._last: dict[int, Tensor] = {}

    def add(self, block: int, gates: Tensor) -> None:
        gates = gates.detach().double()
        number = torch.tensor(float(gates.numel()), dtype=torch.float64, device=gates.device)
        self._last[block] = torch.stack([gates.sum(), (gates > 0.5).double().sum(), number])
        self._sums[block] += self._last[block]

    def forget(self) -> None:
        """Leave out the pass that was added last."""
        for block, last in self._last.items():
            self._sums[block] -= last

    def summary(self, ranks: Ranks) -> dict[str, dict[str, float]]:
        found = {}
        for block, sums in self._sums.items():
            total, above, number = (float(value) for value in ranks.sum(sums))
            found[str(block)] = {"mean": total / max(number, 1), "above_half": above / max(number, 1)}
        return found


@contextlib.contextmanager
def _gates(model: Any) -> Iterator[_GateStatistics]:
    layers = {
        block: layer.memory
        for block, layer in enumerate(model.base_model.layers)
        if isinstance(layer.memory, EngramLayer)
    }
    statistics = _GateStatistics(list(layers), next(model.parameters()).device)

    def watch(block: int) -> Any:
        return lambda module, inputs, output: statistics.add(block, output[1])

    handles = [layer.register_forward_hook(watch(block)) for block, layer in layers.items()]
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()
