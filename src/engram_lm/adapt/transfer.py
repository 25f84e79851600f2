"""Rows that start from what the model already makes of frequent N-grams, instead of noise."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from engram_lm.adapt.adapter import MemoryAdapter, home
from engram_lm.adapt.decoder import Decoder, find_decoder
from engram_lm.adapt.evaluation_mode import evaluating
from engram_lm.adapt.patchable import trainable_tables
from engram_lm.errors import ConfigError, DataError, check_whole
from engram_lm.hashing import HashSpec
from engram_lm.hashing.counting import FrequentNgrams, frequent_ngrams, ngram_rows, seen_ngrams
from engram_lm.memory.interface import row_signs
from engram_lm.model.table_place import table_name
from engram_lm.tables import ParameterTable

# Dimension key: B batch, L length, D hidden, K N-grams of one order, H heads, E row width, P = heads of an order * E.

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
    beginning: Sequence[int] = (),
    on_progress: Callable[[int], None] = lambda num_tokens: None,
) -> NgramStates:
    """Run a model over a text once, and average its hidden states at the positions where each N-gram ends.

    The text is cut into windows of equal length that overlap by an eighth, because the first positions of a window have
    little context, and many models have an enormous hidden state at the very first. Every other position counts once.
    Only the decoder runs, without the model's head, so no logits are computed. Arguments and errors are those of
    `transfer_rows`.
    """
    check_whole(at_least=2 + len(beginning), length=length)
    check_whole(batch_size=batch_size)
    if source not in ("last", "block"):
        raise ConfigError(f"source is 'last' or 'block', got {source!r}")
    places = (_LAST,) if source == "last" else spec.blocks
    num_ngrams = sum(len(found.counts) for found in ngrams.values())
    ngram_bytes = len(places) * decoder.hidden_size * 4
    if num_ngrams * ngram_bytes > max_bytes:
        raise ConfigError(
            f"the hidden states of {num_ngrams:,} N-grams (all orders) take {num_ngrams * ngram_bytes:,} bytes, "
            f"{max_bytes:,} are allowed; {max_bytes // ngram_bytes:,} N-grams fit: lower num_ngrams, or raise max_bytes"
        )
    sums = {
        (place, order): torch.zeros(len(found.counts), decoder.hidden_size)
        for place in places
        for order, found in ngrams.items()
    }
    counts = {order: torch.zeros(len(found.counts), dtype=torch.int64) for order, found in ngrams.items()}
    num_positions = 0
    given = np.tile(np.array(beginning, dtype=np.int64), (batch_size, 1))
    length -= len(beginning)
    windows = _windows(len(tokens), length)
    device = home(decoder.layers[0])
    with evaluating(decoder.text_model), _recording(decoder, places) as recorded:
        for begin in range(0, len(windows), batch_size):
            batch = windows[begin : begin + batch_size]
            pieces = np.stack([tokens[stop - min(length, len(tokens)) : stop] for _, stop in batch]).astype(np.int64)
            pieces = np.concatenate([given[: len(pieces)], pieces], axis=1)
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


# Directions whose variance is below this share of the largest are rounding errors.
_LEAST_VARIANCE = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferReport:
    """What `transfer_rows` did."""

    source: Source
    """Where the hidden states were taken from."""
    num_tokens: int
    """Number of tokens of the text."""
    num_positions: int
    """Number of positions whose hidden states were taken."""
    num_ngrams: dict[int, int]
    """Number of N-grams that gave rows, by order."""
    num_distinct_ngrams: dict[int, int]
    """Number of distinct N-grams of the text, by order."""
    covered: dict[int, float]
    """Share of the text's positions that have one of the N-grams, by order, from 0 to 1."""
    num_rows_written: dict[str, int]
    """Number of rows that were written, by table."""
    rows_written: dict[str, float]
    """The same as a share of the table, from 0 to 1."""
    variance_kept: dict[str, dict[int, float]]
    """Share of the hidden states' variance that lies in the directions which the rows keep, by block (as text) and
    order."""
    seconds: float
    """Duration of the call."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return dataclasses.asdict(self)


def transfer_rows(
    adapter: MemoryAdapter,
    tokens: np.ndarray,
    *,
    num_ngrams: int = 100_000,
    source: Source = "last",
    length: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    max_bytes: int = 2 << 30,
    beginning: Sequence[int] = (),
    on_progress: Callable[[str, int, int | None], None] = lambda task, num_tokens, total: None,
) -> TransferReport:
    """Write into an adapter's tables what the model makes of the most frequent N-grams of a text.

    The most frequent N-grams of each order are counted, the model (without this memory) runs over the text once, and
    the mean of its hidden states at the positions where each N-gram ends is taken. The strongest directions of these
    means, as many as an order has numbers over all its heads, are scaled to equal variance and turned by a random
    rotation, so that every head holds an equal part of all of them. Then each head's part is written to the row that
    the N-gram reads there. A row that several N-grams read gets their mean, weighted by how often each occurs. Written
    rows have the standard deviation ``config.table_std`` in each head. All other rows keep their random numbers.

    Call it once, between `attach` and training, because optimizers do not notice that rows have changed. The value
    projections stay as they are, so a new adapter leaves the model's outputs as they were, bit for bit. The same text,
    model, seed and machine give the same rows.

    Args:
        adapter: An attached adapter, whose tables are parameters.
        tokens: Raw tokens of the text, integers ``[num_tokens]``; the array may be memory-mapped.
        num_ngrams: Number of N-grams of each order. More than ``rows_per_head`` of them crowd the rows.
        source: Where hidden states are taken from: ``"last"`` is the output of the last decoder layer, which holds what
            the model expects next; ``"block"`` is the input of the block that reads the memory.
        length: Tokens that the model sees at once, at least 2.
        batch_size: Windows of that length at a time.
        seed: Seed of the rotation.
        max_bytes: The most bytes that the sums of hidden states may take on the host: 4 bytes for each N-gram and
            number of a hidden state, times the blocks with memory if ``source`` is ``"block"``. Finding directions
            takes as much again for one order.
        beginning: Tokens that each window begins with, from `engram_lm.tokenizing.beginning_tokens`; they count in
            ``length``.
        on_progress: Called with a task (``"counting"`` or ``"measuring"``), the number of tokens just done, and the
            number to do in all (None if it is not known).

    Returns:
        A report of what was written.

    Raises:
        ConfigError: The adapter is detached, a table is not a parameter or has no rows, a number is impossible, the
            sums do not fit ``max_bytes``, or the model's hidden states are not finite. No row has changed then.
        DataError: The text is too short.
        TokenError: The text has a token outside the adapter's vocabulary.
    """
    started = time.perf_counter()
    if adapter.model is None:
        raise ConfigError("this adapter is detached, so there are no hidden states to take; attach it to a model first")
    spec, tables = adapter.spec, trainable_tables(adapter.tables)
    decoder = find_decoder(adapter.model, adapter.layer_list)
    tokens = np.asanyarray(tokens)
    ngrams = frequent_ngrams(
        spec, tokens, num_ngrams=num_ngrams, on_progress=lambda number: on_progress("counting", number, None)
    )
    with adapter.disabled():
        states = mean_states(
            decoder,
            spec,
            tokens,
            ngrams,
            source=source,
            length=length,
            batch_size=batch_size,
            max_bytes=max_bytes,
            beginning=beginning,
            on_progress=lambda number: on_progress("measuring", number, len(tokens)),
        )
    pieces, variance_kept = _pieces(adapter, states, seed)
    written = {name: _write(adapter, name, table, ngrams, states, pieces) for name, table in tables.items()}
    return TransferReport(
        source=source,
        num_tokens=len(tokens),
        num_positions=states.num_positions,
        num_ngrams={order: int((counts > 0).sum()) for order, counts in states.counts.items()},
        num_distinct_ngrams={order: found.num_distinct for order, found in ngrams.items()},
        covered={order: found.covered for order, found in ngrams.items()},
        num_rows_written=written,
        rows_written={name: number / tables[name].num_rows for name, number in written.items()},
        variance_kept=variance_kept,
        seconds=time.perf_counter() - started,
    )


def _pieces(
    adapter: MemoryAdapter, states: NgramStates, seed: int
) -> tuple[dict[tuple[int, int], Tensor], dict[str, dict[int, float]]]:
    """Turn mean hidden states into the numbers of an order's heads side by side, ``[K, P]``, by block and order."""
    width = adapter.config.num_heads * adapter.config.head_dim
    pieces: dict[tuple[int, int], Tensor] = {}
    kept: dict[str, dict[int, float]] = {}
    # The last layer's hidden states are the same for all blocks: their directions are found once.
    done: dict[tuple[int, int], tuple[Tensor, float]] = {}
    for (block, order), means in states.means.items():
        key = (id(means), order)
        if key not in done:
            generator = torch.Generator().manual_seed(seed * 1009 + order)
            done[key] = reduced(means, states.counts[order] > 0, width, generator)
        pieces[block, order], share = done[key]
        kept.setdefault(str(block), {})[order] = share
    return pieces, kept


def reduced(means: Tensor, met: Tensor, width: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """Keep the ``width`` strongest directions of the vectors ``[K, D]`` that ``met``, bool ``[K]``, chooses.

    They are scaled to equal variance and spread evenly by a rotation. Returns float32 ``[K, width]`` with variance 1
    over the chosen vectors and 0 for the others, and the share of the variance that lay in the directions kept, from 0
    to 1.
    """
    vectors = means[met]
    result = torch.zeros(len(means), width)
    if not len(vectors):
        return result, 0.0
    centred = vectors - vectors.mean(0, dtype=torch.float64).float()
    covariance = torch.zeros(means.shape[1], means.shape[1], dtype=torch.float64)
    for part in centred.split(1 << 14):
        covariance += part.double().T @ part.double()
    variances, directions = torch.linalg.eigh(covariance / len(vectors))
    variances, directions = variances.flip(0).clamp(min=0), directions.flip(1)
    num_kept = min(width, int((variances > variances[0] * _LEAST_VARIANCE).sum()))
    if not num_kept:
        return result, 0.0
    scaled = directions[:, :num_kept] / variances[:num_kept].sqrt()
    rotation = torch.linalg.qr(torch.randn(width, num_kept, dtype=torch.float64, generator=generator))[0]
    turned = (scaled @ rotation.T * (width / num_kept) ** 0.5).float()
    result[met] = centred @ turned
    return result, float(variances[:num_kept].sum() / variances.sum())


@torch.no_grad()
def _write(
    adapter: MemoryAdapter,
    name: str,
    table: ParameterTable,
    ngrams: Mapping[int, FrequentNgrams],
    states: NgramStates,
    pieces: Mapping[tuple[int, int], Tensor],
) -> int:
    """Write one table and return the number of rows written."""
    config, spec = adapter.config, adapter.spec
    blocks = [block for block in spec.blocks if table_name(spec, block) == name]
    written = 0
    for order, found in ngrams.items():
        met = states.counts[order] > 0
        if not met.any():
            continue
        rows, values = [], []
        for block in blocks:
            mine = torch.from_numpy(ngram_rows(spec, found, spec.layers[spec.blocks.index(block)]))
            value = pieces[block, order].unflatten(-1, (config.num_heads, config.head_dim))
            if config.signs == "hashed":
                value = value * row_signs(mine, config.num_heads).unsqueeze(-1)
            rows.append(mine[met])
            values.append(value[met])
        weights = states.counts[order][met].float().repeat(len(blocks))
        for head in range(config.num_heads):
            written += _write_head(
                table,
                torch.cat([row[:, head] for row in rows]),
                torch.cat([value[:, head] for value in values]),
                weights,
                config.table_std,
            )
    return written


def _write_head(table: ParameterTable, rows: Tensor, values: Tensor, weights: Tensor, std: float) -> int:
    """Write weighted means of ``values [n, E]`` to the distinct ``rows [n]``, and return the number of those."""
    distinct, place = rows.unique(return_inverse=True)
    total = torch.zeros(len(distinct)).index_add_(0, place, weights)
    mean = torch.zeros(len(distinct), values.shape[1]).index_add_(0, place, values * weights[:, None])
    mean /= total[:, None]
    size = mean.square().mean().sqrt()
    if not size > 0:
        return 0
    # N-grams that share a row partly cancel out, so the whole head is scaled back to the size that rows should have.
    weight, values = table.weight, mean * (std / size)
    if table.trained_rows is not None:
        chosen = table.trained_rows[distinct.to(table.trained_rows.device)].to(distinct.device)
        distinct, values = distinct[chosen], values[chosen]
    weight[distinct.to(weight.device)] = values.to(weight)
    return len(distinct)
