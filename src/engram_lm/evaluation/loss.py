"""Loss of a model on text it has not seen."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from engram_lm.errors import DataError
from engram_lm.training.loss import autocast, cut_into_sequences

__all__ = ["HeldOutLoss", "held_out_loss"]


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
    on_progress: Callable[[int], None] = lambda num_tokens: None,
) -> HeldOutLoss:
    """Evaluate on packed tokens, cut into sequences of equal length that do not see each other.

    Args:
        model: A causal language model of transformers; its training flag is put back afterwards.
        tokens: Packed tokens, integers ``[num_tokens]``. Every one but the first is predicted once.
        length: Tokens in a sequence.
        batch_size: Sequences at a time.
        max_tokens: Evaluate only so many tokens, from the start; all where None.
        num_bytes: Bytes of the text that ``tokens`` came from.
        dtype: Type of matrix products.
        on_progress: Called with the number of tokens just evaluated.

    Raises:
        DataError: There are fewer than two tokens.
    """
    if max_tokens is not None:
        tokens = tokens[: max_tokens + 1]
    if len(tokens) < 2:
        raise DataError(f"evaluation needs at least 2 tokens, the text gives {len(tokens)}")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, started = 0.0, time.perf_counter()
    try:
        for inputs, targets in _sequences(tokens, length, batch_size):
            inputs, targets = inputs.to(device), targets.to(device)
            with autocast(device, dtype):
                logits = model(input_ids=inputs, use_cache=False).logits
            total += float(F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum"))
            on_progress(targets.numel())
    finally:
        model.train(was_training)
    count = len(tokens) - 1
    loss = total / count
    return HeldOutLoss(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        num_tokens=count,
        tokens_per_second=count / (time.perf_counter() - started),
        bits_per_byte=total / math.log(2) / num_bytes if num_bytes else None,
    )


def _sequences(tokens: np.ndarray, length: int, batch_size: int):  # type: ignore[no-untyped-def]
    """Whole sequences in batches, then the shorter rest alone, so that no padding is needed."""
    pieces = cut_into_sequences(tokens, length)
    whole = [piece for piece in pieces if piece.stop - piece.start == length + 1]
    for chosen in [*(whole[i : i + batch_size] for i in range(0, len(whole), batch_size)), pieces[len(whole) :]]:
        if chosen:
            batch = torch.from_numpy(np.stack([tokens[piece] for piece in chosen]).astype(np.int64))
            yield batch[:, :-1], batch[:, 1:]
