"""When the memory fires: the gate of every token of a text, and which N-gram opened it."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engram.errors import ConfigError, DataError, MismatchError
from engram.hashing import HashSpec, TokenMap
from engram.memory.layer import EngramLayer, EngramOutput

__all__ = ["GateTrace", "Ngram", "NgramGate", "gate_trace", "strongest"]

# Dimension key: B batch (one here), L length, S streams, D hidden, O orders, M memory width.


class Ngram(NamedTuple):
    """An N-gram that was looked up, as much of it as was visible."""

    order: int
    """Tokens the order asks for; fewer are visible near the start of a segment."""
    tokens: tuple[int, ...]
    """Raw ids, oldest first; the last one is the token at whose position the N-gram was looked up."""
    text: str
    """What they spell."""
    score: float
    """Its order's contribution to the gate's score."""


class NgramGate(NamedTuple):
    """How far an N-gram opens the gate."""

    text: str
    """What the N-gram spells."""
    order: int
    """Its order."""
    mean_gate: float
    """Mean gate over the positions where it fired."""
    num_positions: int
    """Number of those positions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateTrace:
    """The gates of a text, position by position. Made by `gate_trace`."""

    tokens: np.ndarray
    """Raw token ids, int64 ``[length]``."""
    texts: tuple[str, ...]
    """What each token spells; joined they give back the text. A character that is split over tokens belongs to the
    token that completes it, and the tokens before that one spell nothing."""
    blocks: tuple[int, ...]
    """Blocks that read memory, counted from 0, in order of depth."""
    orders: tuple[int, ...]
    """N-gram orders, ascending."""
    gates: np.ndarray
    """Gate in (0, 1), 0 at dead positions, float32 ``[num_blocks, length, num_streams]``."""
    order_scores: np.ndarray
    """What each order's N-gram adds to the score inside the gate, before its squashing, float32
    ``[num_blocks, length, num_orders, num_streams]``."""
    bias_scores: np.ndarray
    """What the bias of the key projection adds, 0 without one, float32 ``[num_blocks, length, num_streams]``."""
    visible: np.ndarray
    """Tokens that an N-gram sees, itself included and at most the highest order; 0 at dead positions; int64
    ``[length]``."""

    @property
    def scores(self) -> np.ndarray:
        """Score of every gate before its squashing, the sum of its parts, ``[num_blocks, length, num_streams]``."""
        return self.order_scores.sum(2) + self.bias_scores

    @property
    def num_streams(self) -> int:
        """Residual streams, each with a gate of its own."""
        return int(self.gates.shape[2])

    def fired(self, block: int, position: int, stream: int | None = None) -> Ngram | None:
        """Find the N-gram that contributed most to the score at a position.

        Args:
            block: A block that reads memory, counted from 0.
            position: Where in the text, from 0.
            stream: Which residual stream; the sum over all of them where None.

        Returns:
            The N-gram that ends at the position, cut at the start of its segment; None at a dead position.

        Raises:
            ConfigError: The block reads no memory.
        """
        if not self.visible[position]:
            return None
        scores = self.order_scores[self._index(block), position]
        scores = scores.sum(-1) if stream is None else scores[:, stream]
        strongest_order = int(scores.argmax())
        order = self.orders[strongest_order]
        start = position + 1 - min(order, int(self.visible[position]))
        return Ngram(
            order=order,
            tokens=tuple(self.tokens[start : position + 1].tolist()),
            text="".join(self.texts[start : position + 1]),
            score=float(scores[strongest_order]),
        )

    def _index(self, block: int) -> int:
        if block not in self.blocks:
            raise ConfigError(f"block {block} reads no memory; those that do are {', '.join(map(str, self.blocks))}")
        return self.blocks.index(block)


@torch.no_grad()
def gate_trace(
    model: Any, tokenizer: Any, text: str | Sequence[int] | np.ndarray | Tensor, *, length: int | None = None
) -> GateTrace:
    """Run a text through a model and keep the gates of its memory, split by the order of the N-grams.

    The score inside a gate is linear in the memory vector once the two normalizations are known, so each order's part
    of it is exact: the parts, and the bias if there is one, sum to the score.

    Args:
        model: An `engram.EngramForCausalLM` with memory. It is put back into the mode it was in.
        tokenizer: The tokenizer it was trained with.
        text: A text, tokenized without special tokens, or its token ids ``[length]``.
        length: Tokens the model sees at once. A longer text is cut into windows that do not see each other; all of it
            is one window where None.

    Raises:
        MismatchError: The model has no memory or no gate, or the tokenizer is another one.
        DataError: The text has no tokens.
        TokenError: A token id outside the vocabulary.
        ConfigError: ``length`` is below 1.

    Source: paper, Eq. 4 and section 6.5; the attribution to orders is ours.
    """
    layers = _memory_layers(model)
    spec: HashSpec = model.hash_spec
    _check_tokenizer(tokenizer, spec)
    if length is not None and length < 1:
        raise ConfigError(f"length is the number of tokens seen at once, at least 1, not {length}")
    if isinstance(text, str):
        text = tokenizer(text, add_special_tokens=False).input_ids
    elif isinstance(text, Tensor):
        text = text.cpu().numpy()
    tokens = np.asarray(text, dtype=np.int64)
    if tokens.ndim != 1 or not len(tokens):
        raise DataError(f"a trace needs a text of at least one token, or ids [length]; got the shape {tokens.shape}")

    device = next(model.parameters()).device
    windows: list[list[_Record]] = []
    visible: list[np.ndarray] = []
    with _evaluating(model), _recording(layers) as records:
        for start in range(0, len(tokens), length or len(tokens)):
            window = tokens[start : start + (length or len(tokens))][None]
            codes = spec.encode(window, position_ids=np.arange(window.shape[1])[None])
            visible.append(_visible_tokens(codes[0], spec.orders[-1]))
            records.clear()
            model(input_ids=torch.from_numpy(window).to(device), use_cache=False)
            windows.append([records[block] for block in layers])
    by_block = [_Record(*map(np.concatenate, zip(*parts, strict=True))) for parts in zip(*windows, strict=True)]
    return GateTrace(
        tokens=tokens,
        texts=tuple(_token_texts(tokenizer, tokens.tolist())),
        blocks=tuple(layers),
        orders=spec.orders,
        gates=np.stack([record.gates for record in by_block]),
        order_scores=np.stack([record.order_scores for record in by_block]),
        bias_scores=np.stack([record.bias_scores for record in by_block]),
        visible=np.concatenate(visible),
    )


def strongest(
    traces: GateTrace | Sequence[GateTrace], block: int, k: int = 20, *, min_count: int = 1
) -> list[NgramGate]:
    """Rank the N-grams that fired by the gate they opened.

    Args:
        traces: One trace, or several of one model.
        block: A block that reads memory, counted from 0.
        k: How many to return at most.
        min_count: Leave out N-grams that fired at fewer positions.

    Returns:
        N-grams by mean gate (over positions and streams), highest first; the more frequent one first where equal.

    Raises:
        ConfigError: The block reads no memory.
    """
    found: dict[tuple[int, ...], list[float]] = {}
    names: dict[tuple[int, ...], tuple[str, int]] = {}
    for trace in [traces] if isinstance(traces, GateTrace) else traces:
        gates = trace.gates[trace._index(block)].mean(-1)
        for position, gate in enumerate(gates.tolist()):
            ngram = trace.fired(block, position)
            if ngram is not None:
                key = (ngram.order, *ngram.tokens)
                found.setdefault(key, []).append(gate)
                names.setdefault(key, (ngram.text, ngram.order))
    ranked = [
        NgramGate(*names[key], sum(gates) / len(gates), len(gates))
        for key, gates in found.items()
        if len(gates) >= min_count
    ]
    return sorted(ranked, key=lambda item: (-item.mean_gate, -item.num_positions, item.text, item.order))[:k]


class _Record(NamedTuple):
    """What one layer did in one window."""

    gates: np.ndarray  # [L, S]
    order_scores: np.ndarray  # [L, O, S]
    bias_scores: np.ndarray  # [L, S]


def _memory_layers(model: Any) -> dict[int, EngramLayer]:
    """Find the layers by their block, in order of depth."""
    blocks = enumerate(getattr(getattr(model, "base_model", None), "layers", ()))
    layers = {index: block.memory for index, block in blocks if isinstance(getattr(block, "memory", None), EngramLayer)}
    if not layers:
        raise MismatchError(
            f"{type(model).__name__} has no memory, so it has no gates; pass an EngramForCausalLM whose configuration "
            "has memory"
        )
    if any(layer.config.gate == "none" for layer in layers.values()):
        raise MismatchError("the memory of this model is not gated (EngramConfig.gate is 'none'), so nothing can fire")
    return layers


def _check_tokenizer(tokenizer: Any, spec: HashSpec) -> None:
    given = TokenMap.identity(len(tokenizer), tokenizer).vocabulary_digest
    if spec.vocabulary_digest not in (None, given):
        raise MismatchError(
            f"the model was trained with the vocabulary {spec.vocabulary_digest}, this tokenizer has {given}; "
            "pass the model's own tokenizer"
        )


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def _recording(layers: dict[int, EngramLayer]) -> Iterator[dict[int, _Record]]:
    """Keep what the layers did in their last forward, by block."""
    records: dict[int, _Record] = {}

    def record(block: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: EngramOutput) -> None:
        parts = score_parts(layer, args[0], args[1], kwargs.get("active"))
        records[block] = _Record(*(part[0].float().cpu().numpy() for part in (output.gates, *parts)))

    with contextlib.ExitStack() as hooks:
        for block, layer in layers.items():
            handle = layer.register_forward_hook(functools.partial(record, block), with_kwargs=True)
            hooks.callback(handle.remove)
        yield records


def score_parts(
    layer: EngramLayer, hidden_states: Tensor, memory: Tensor, active: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Split the score of every gate into what each order and the bias add.

    The score is (h * w) . (W e + b) times two scales. Multiplying the query side into W leaves one number per channel
    of the memory vector, and those of one order are summed.

    Args:
        layer: A layer with a gate.
        hidden_states: As the layer takes them, ``[B, L, S, D]`` or ``[B, L, D]``.
        memory: Row numbers ``[B, L, H]`` or memory vectors ``[B, L, M]``.
        active: Bool ``[B, L]``; both parts are 0 where it is False.

    Returns:
        Float32 ``[B, L, O, S]`` and ``[B, L, S]``.
    """
    config = layer.config
    streams = (config.num_streams, config.hidden_size)
    wide = config.num_streams * config.hidden_size
    weight, bias = layer.key_value.weight, layer.key_value.bias
    hidden_BLSD = layer._split_streams(hidden_states).float()
    memory_BLM = (memory if memory.is_floating_point() else layer.read(memory)).to(hidden_BLSD)
    weight_SDM = weight[:wide].float().unflatten(0, streams)
    bias_SD = weight.new_zeros(streams).float() if bias is None else bias[:wide].float().unflatten(0, streams)
    with torch.autocast(hidden_BLSD.device.type, enabled=False):
        key_BLSD = torch.einsum("blm,sdm->blsd", memory_BLM, weight_SDM) + bias_SD
        scale_BLS = torch.rsqrt(hidden_BLSD.square().mean(-1) + config.norm_eps)
        scale_BLS = scale_BLS * torch.rsqrt(key_BLSD.square().mean(-1) + config.norm_eps)
        scale_BLS = scale_BLS / math.sqrt(config.hidden_size)
        if active is not None:
            scale_BLS = scale_BLS * active.unsqueeze(-1)
        query_BLSD = hidden_BLSD * (layer._gain(layer.query_norm) * layer._gain(layer.key_norm)).float()
        parts_BLSM = torch.einsum("blsd,sdm->blsm", query_BLSD, weight_SDM) * memory_BLM.unsqueeze(2)
        parts_BLSO = parts_BLSM.unflatten(-1, (len(config.orders), -1)).sum(-1) * scale_BLS.unsqueeze(-1)
        return parts_BLSO.transpose(-1, -2), (query_BLSD * bias_SD).sum(-1) * scale_BLS


def _visible_tokens(codes: np.ndarray, highest_order: int) -> np.ndarray:
    """Count the tokens from each position back to the start of its segment; see `engram.hashing.Segments`.

    Args:
        codes: As from `HashSpec.encode`, int64 ``[length]``.
        highest_order: Where to stop counting.
    """
    visible = np.zeros(len(codes), dtype=np.int64)
    for position, code in enumerate(codes.tolist()):
        if code < 0:
            continue
        before = int(visible[position - 1]) if position else 0
        blocked = not before or codes[position - 1] & 2 or code & 1
        visible[position] = 1 if blocked else min(before + 1, highest_order)
    return visible


_REPLACEMENT = "\ufffd"
# A character has at most four bytes, but a text may hold replacement characters of its own, which look unfinished.
_LONGEST_WAIT = 16


def _token_texts(tokenizer: Any, tokens: Sequence[int]) -> Iterator[str]:
    """Decode tokens one by one, each in the context of the ones before it.

    A token that ends inside a character spells nothing; the one that completes the character spells all of it.
    """

    def decode(start: int, end: int) -> str:
        # Tokenizers that strip or merge spaces do so only at the start, which the context keeps away.
        return str(tokenizer.decode(tokens[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    context = start = 0
    for end in range(1, len(tokens) + 1):
        text = decode(context, end)
        if text.endswith(_REPLACEMENT) and end < len(tokens) and end - start < _LONGEST_WAIT:
            yield ""
            continue
        yield text[len(decode(context, start)) :]
        context, start = start, end
