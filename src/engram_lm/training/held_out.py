"""The loss of a model on text it was not trained on: the one measure that every command and study reports."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engram_lm.adapt import attached_adapters
from engram_lm.errors import DataError, check_whole
from engram_lm.hashing.token_map import check_tokens
from engram_lm.memory.gate_recorder import record_gates
from engram_lm.memory.layer import EngramLayer
from engram_lm.tokenizing import starts_of
from engram_lm.training.data.batches import restarting_positions
from engram_lm.training.distribution import LossModule, Ranks, reshard, share
from engram_lm.training.loss import NOT_SCORED, language_model_loss, token_losses


@dataclasses.dataclass(frozen=True)
class HeldOutLoss:
    """Loss on held-out tokens."""

    loss: float
    """Mean nats per token."""
    perplexity: float
    """exp(loss)."""
    num_tokens: int
    """Tokens predicted."""
    tokens_per_second: float
    """Speed of this evaluation."""
    bits_per_byte: float | None = None
    """Loss in bits per byte of the text, which compares models with different tokenizers; None if bytes are unknown."""
    gates: dict[str, dict[str, float]] | None = None
    """By block with memory, the ``mean`` gate and the share of gates ``above_half``, over all tokens and streams; None
    without memory."""

    def to_dict(self) -> dict[str, Any]:
        """Whatever is known and does not depend on the machine: every field but the speed."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        del values["tokens_per_second"]
        return values


@torch.no_grad()
def held_out_loss(
    model: Any,
    tokens: np.ndarray,
    *,
    length: int,
    batch_size: int = 16,
    max_tokens: int | None = None,
    num_bytes: int | None = None,
    dtype: str = "float32",
    ranks: Ranks | None = None,
    loss_module: nn.Module | None = None,
    document_ends: np.ndarray | None = None,
    beginning: Sequence[int] = (),
    on_token_losses: Callable[[np.ndarray, np.ndarray], None] | None = None,
    on_progress: Callable[[int], None] = lambda num_tokens: None,
) -> HeldOutLoss:
    """Evaluate on packed tokens, cut into sequences of equal length that do not see each other.

    With several ranks, every one calls this with the same tokens and gets the same answer.

    Args:
        model: An `EngramForCausalLM` or any causal language model of transformers, with memory attached or without.
            Its training flag is put back afterwards.
        tokens: Packed tokens, integers ``[num_tokens]``. Every one but the first is predicted exactly once; with a
            ``beginning``, every one that is not part of the beginning of a document.
        length: Tokens in a sequence; the last sequence may be shorter.
        batch_size: Sequences at a time, over all ranks.
        max_tokens: Predict at most this many tokens, from the start; all where None.
        num_bytes: Bytes of the text that ``tokens`` came from.
        dtype: Type of matrix products. A ``loss_module`` brings its own.
        ranks: The processes; this one alone where None.
        loss_module: What computes the model's loss, wrapped for several processes; the model's own loss where None.
        document_ends: One past the last token of each document, in order, where positions restart with documents as
            they do in training; None where they do not.
        beginning: Tokens that every sequence begins with, from `engram_lm.tokenizing.beginning_tokens`.
        on_token_losses: Called with the places in ``tokens`` of those that some sequences predict, int64 ``[B, L]``,
            -1 where none is predicted, and with the nats of each, float32 ``[B, L]``, which add up to the loss. Only
            without a ``loss_module``, and for the sequences of this rank.
        on_progress: Called with the number of tokens just evaluated, over all ranks.

    Raises:
        DataError: There are fewer than two tokens.
        ConfigError: ``length`` is below 1, or less than the beginning.
        TokenError: The model does not embed one of the tokens.
    """
    check_whole(at_least=max(1, len(beginning)), length=length)
    check_tokens(tokens, model.get_input_embeddings().num_embeddings)
    scored = ~starts_of(beginning, tokens)
    if not beginning:
        scored[:1] = False  # nothing stands before it
    if max_tokens is not None:
        scored = scored[: np.searchsorted(scored.cumsum(), max_tokens) + 1]
        tokens = tokens[: len(scored)]
    count = int(scored.sum())
    if count < 1:
        raise DataError(
            f"the held-out text has {len(tokens)} tokens, and it takes at least 2 for one to follow another; hold out "
            "more"
        )
    ranks = ranks or Ranks()
    assert loss_module is None or on_token_losses is None
    each = language_model_loss if on_token_losses is None else token_losses
    loss_module = loss_module or LossModule(model, functools.partial(each, dtype=dtype))
    device, num_before = next(model.parameters()).device, max(1, len(beginning))
    layers = _memory_layers(model)
    gate_sums = torch.zeros(len(layers), 3, dtype=torch.float64, device=device)
    places = {block: place for place, block in enumerate(layers)}
    pass_sums = torch.zeros_like(gate_sums)

    def add_gates(block: int, gates: Tensor) -> None:
        values = gates.double()
        pass_sums[places[block]] += torch.stack(
            [values.sum(), (gates > 0.5).double().sum(), values.new_tensor(float(values.numel()))]
        ).to(device)

    total = torch.zeros((), dtype=torch.float64, device=device)
    was_training, started = model.training, time.perf_counter()
    model.eval()
    try:
        with record_gates(layers, add_gates):
            for pieces in _batches(scored, length + 1 - num_before, max(batch_size, ranks.world_size)):
                # Where there are fewer sequences than ranks, all compute the same and only the first counts it.
                shared = len(pieces) >= ranks.world_size
                own = pieces[slice(*share(len(pieces), ranks))] if shared else pieces
                windows, counts = _windows(tokens, scored, own, beginning)
                loss = loss_module(
                    torch.from_numpy(windows[:, :-1]).contiguous().to(device),
                    torch.from_numpy(np.where(counts, windows, NOT_SCORED)[:, 1:]).contiguous().to(device),
                    position_ids=None
                    if document_ends is None
                    else _positions(own, document_ends, num_before).to(device),
                )
                if on_token_losses is not None:
                    on_token_losses(_places(own, counts), loss.cpu().numpy())
                    loss = loss.double().sum() / int(counts[:, 1:].sum())
                if shared or ranks.is_first:
                    total += loss.double() * int(counts[:, 1:].sum())
                    gate_sums += pass_sums
                pass_sums.zero_()
                on_progress(sum(int(scored[piece].sum()) for piece in pieces))
    finally:
        model.train(was_training)
        reshard(loss_module)
    nats = float(ranks.sum(total))
    gates = {
        str(block): {"mean": mean / max(number, 1.0), "above_half": above / max(number, 1.0)}
        for block, (mean, above, number) in zip(layers, ranks.sum(gate_sums).tolist(), strict=True)
    }
    return HeldOutLoss(
        loss=nats / count,
        perplexity=math.exp(min(nats / count, 700.0)),
        num_tokens=count,
        tokens_per_second=count / (time.perf_counter() - started),
        bits_per_byte=nats / math.log(2) / num_bytes if num_bytes else None,
        gates=gates or None,
    )


def _batches(scored: np.ndarray, width: int, batch_size: int) -> list[list[slice]]:
    """Cut a text into the tokens that each sequence predicts, ``width`` of them, the first one a token that counts.

    Whole sequences come in batches, then the shorter rest alone, so that no padding is needed.
    """
    pieces, stop = list[slice](), 0
    while scored[stop:].any():
        first = stop + int(scored[stop:].argmax())
        stop = min(first + width, len(scored))
        pieces.append(slice(first, stop))
    num_whole = sum(piece.stop - piece.start == width for piece in pieces)
    batches = [pieces[first : min(first + batch_size, num_whole)] for first in range(0, num_whole, batch_size)]
    return [*batches, *([piece] for piece in pieces[num_whole:])]


def _windows(
    tokens: np.ndarray, scored: np.ndarray, pieces: list[slice], beginning: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Put before each piece what its first token is predicted from: the beginning, or the token before it.

    Returns the sequences, int64 ``[len(pieces), length + 1]``, and which of their tokens are predicted, bool.
    """
    windows, counts = [], []
    for piece in pieces:
        before = np.array(beginning, dtype=np.int64) if beginning else tokens[piece.start - 1 : piece.start]
        windows.append(np.concatenate([before, tokens[piece]]))
        counts.append(np.concatenate([np.zeros(len(before), dtype=bool), scored[piece]]))
    return np.stack(windows).astype(np.int64), np.stack(counts)


def _places(pieces: list[slice], counts: np.ndarray) -> np.ndarray:
    """Find where in the text the tokens stand that `_windows` says are predicted; -1 for the others."""
    num_before = counts.shape[1] - (pieces[0].stop - pieces[0].start)
    places = np.stack([np.arange(piece.start - num_before, piece.stop) for piece in pieces])
    return np.where(counts, places, -1)[:, 1:]


def _positions(pieces: list[slice], document_ends: np.ndarray, num_before: int) -> Tensor:
    """Count positions from the starts of documents, for sequences with some tokens before those that they predict."""
    rows = []
    for piece in pieces:
        start, stop = piece.start - num_before, piece.stop - 1
        first, last = np.searchsorted(document_ends, (start, stop), side="left")
        rows.append(restarting_positions(stop - start, document_ends[first:last] - start))
    return torch.from_numpy(np.stack(rows))


def _memory_layers(model: Any) -> dict[int, EngramLayer]:
    """The memory layers by block: the model's own, or those of the memory attached to it if there is exactly one."""
    blocks = enumerate(getattr(model.base_model, "layers", ()))
    layers = {block: getattr(layer, "memory", None) for block, layer in blocks}
    adapters = list(attached_adapters(model).values())
    if not any(isinstance(layer, EngramLayer) for layer in layers.values()) and len(adapters) == 1:
        layers = {int(block): layer for block, layer in adapters[0].layers.items()}
    return {block: layer for block, layer in layers.items() if isinstance(layer, EngramLayer)}
