"""What a model makes of frequent N-grams: the mean hidden state at the positions where each of them ends."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from engram_lm.adapt.adapter import home
from engram_lm.adapt.decoder import Decoder
from engram_lm.adapt.evaluation_mode import evaluating
from engram_lm.errors import ConfigError, DataError
from engram_lm.hashing import HashSpec
from engram_lm.hashing.counting import FrequentNgrams, seen_ngrams

__all__ = ["NgramStates", "Source", "mean_states"]

# Dimension key: B batch, L length, D hidden, K N-grams of one order.

Source = Literal["last", "block"]

_LAST = -1


@dataclasses.dataclass(frozen=True, eq=False)
class NgramStates:
    """Mean hidden states of N-grams."""

    means: dict[tuple[int, int], Tensor]
    """Mean by block and order, float32 ``[K, D]`` on the host; 0 for an N-gram that was not met."""
    counts: dict[int, Tensor]
    """Number of positions that each mean is taken over, by order, int64 ``[K]``. An N-gram that occurs only at the
    beginning of windows is not met."""
    num_positions: int
    """Number of positions at which hidden states were taken."""


@torch.no_grad()
def mean_states(
    decoder: Decoder,
    spec: HashSpec,
    tokens: np.ndarray,
    ngrams: Mapping[int, FrequentNgrams],
    *,
    source: Source,
    length: int,
    batch_size: int,
    max_bytes: int,
    on_progress: Callable[[int], None] = lambda num_tokens: None,
) -> NgramStates:
    """Run a model over a text once, and average its hidden states at the positions where each N-gram ends.

    The text is cut into windows of equal length that overlap by an eighth, because the first positions of a window have
    little context, and many models have an enormous hidden state at the very first. Every other position counts once.
    Only the decoder runs, without the model's head, so no logits are computed. The arguments are those of
    `transfer_rows`.

    Raises:
        ConfigError: A number is impossible, the sums do not fit ``max_bytes``, or hidden states are not finite.
        DataError: The text is too short.
    """
    for name, value, least in (("length", length, 2), ("batch_size", batch_size, 1)):
        if type(value) is not int or value < least:
            raise ConfigError(f"{name} is a whole number from {least}, got {value!r}")
    if source not in ("last", "block"):
        raise ConfigError(f"source is 'last' or 'block', got {source!r}")
    places = (_LAST,) if source == "last" else spec.blocks
    _check_size(sum(len(found.counts) for found in ngrams.values()), len(places), decoder.hidden_size, max_bytes)
    sums = {
        (place, order): torch.zeros(len(found.counts), decoder.hidden_size)
        for place in places
        for order, found in ngrams.items()
    }
    counts = {order: torch.zeros(len(found.counts), dtype=torch.int64) for order, found in ngrams.items()}
    num_positions = 0
    windows = _windows(len(tokens), length)
    device = home(decoder.layers[0])
    with evaluating(decoder.text_model), _recording(decoder, places) as recorded:
        for begin in range(0, len(windows), batch_size):
            batch = windows[begin : begin + batch_size]
            pieces = np.stack([tokens[stop - min(length, len(tokens)) : stop] for _, stop in batch]).astype(np.int64)
            decoder.text_model(input_ids=torch.from_numpy(pieces).to(device), use_cache=False)
            # The last positions of each window, which no earlier window has measured.
            states = {
                place: torch.cat([hidden[i, start - stop :] for i, (start, stop) in enumerate(batch)]).float().cpu()
                for place, hidden in recorded.items()
            }
            seen, alive = (
                np.concatenate(parts)
                for parts in zip(*(seen_ngrams(spec, tokens, start, stop) for start, stop in batch), strict=True)
            )
            for order, found in ngrams.items():
                ids = torch.from_numpy(np.where(alive, found.find(seen[:, -order:]), -1))
                met = ids >= 0
                counts[order] += torch.bincount(ids[met], minlength=len(counts[order]))
                for place, hidden in states.items():
                    # Added up on the host, in a fixed order, so that the result is always the same.
                    sums[place, order].index_add_(0, ids[met], hidden[met])
            measured = sum(stop - start for start, stop in batch)
            num_positions += measured
            on_progress(measured)
    for (_, order), total in sums.items():
        if not bool(total.isfinite().all()):
            raise ConfigError(
                "the model's hidden states are not finite on this text; load the model with dtype=torch.bfloat16 or "
                "torch.float32"
            )
        total /= counts[order].clamp(min=1)[:, None]
    means = {
        (block, order): sums[_LAST if source == "last" else block, order] for block in spec.blocks for order in ngrams
    }
    return NgramStates(means, counts, num_positions)


def _windows(num_tokens: int, length: int) -> list[tuple[int, int]]:
    """Return the first position to measure in each window, and one past the last, which is where the window ends."""
    overlap = max(1, length // 8)
    if num_tokens <= overlap:
        raise DataError(f"the text has {num_tokens} tokens, of which the first {overlap} only give context; pass more")
    stops = [*range(min(length, num_tokens), num_tokens, length - overlap), num_tokens]
    return list(zip([overlap, *stops[:-1]], stops, strict=True))


def _check_size(num_ngrams: int, num_places: int, hidden_size: int, max_bytes: int) -> None:
    needed = num_ngrams * num_places * hidden_size * 4
    if needed > max_bytes:
        fits = max_bytes // (num_places * hidden_size * 4)
        raise ConfigError(
            f"the hidden states of {num_ngrams:,} N-grams (all orders) take {needed:,} bytes, {max_bytes:,} are "
            f"allowed; {fits:,} N-grams fit: lower num_ngrams, or raise max_bytes"
        )


@contextlib.contextmanager
def _recording(decoder: Decoder, places: tuple[int, ...]) -> Iterator[dict[int, Tensor]]:
    """Keep hidden states ``[B, L, D]`` of each forward pass: the inputs of blocks, or the output of the last one."""
    recorded: dict[int, Tensor] = {}

    def keep_input(place: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            recorded[place] = args[0] if args else kwargs["hidden_states"]

        return hook

    def keep_output(module: nn.Module, args: Any, output: Any) -> None:
        recorded[_LAST] = output if isinstance(output, Tensor) else output[0]

    handles = [
        decoder.layers[-1].register_forward_hook(keep_output)
        if place == _LAST
        else decoder.layers[place].register_forward_pre_hook(keep_input(place), with_kwargs=True)
        for place in places
    ]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
