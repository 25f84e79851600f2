"""When the memory fires: the gate of every token of a text, and which N-gram opened it."""

import dataclasses
import html
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from engram_lm.analysis.protocol import ModelAnalysis, Reading
from engram_lm.analysis.reading import look
from engram_lm.analysis.subject import Subject
from engram_lm.errors import ConfigError
from engram_lm.evaluation.token_text import token_texts, visible_text
from engram_lm.tokenizing import begin, beginning_tokens, text_tokens

if TYPE_CHECKING:
    from rich.text import Text

# Dimension key: L length, S streams, O orders.

_PASSAGE_TOKENS = 160


class Ngram(NamedTuple):
    """An N-gram that was looked up, cut to what was visible."""

    order: int
    """Its order: the number of its tokens, unless it was cut at the start of a segment."""
    tokens: tuple[int, ...]
    """Raw token ids, oldest first; the last one stands at the position where the N-gram was looked up."""
    text: str
    """What they spell."""
    score: float
    """What its order adds to the score inside the gate."""


class NgramGate(NamedTuple):
    """How far an N-gram opens the gate."""

    text: str
    """What the N-gram spells."""
    order: int
    """Its order."""
    mean_gate: float
    """Mean gate over the positions where it fired."""
    num_positions: int
    """Number of positions where it fired."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateTrace:
    """The gates of a text, position by position. Made by `gate_trace`."""

    tokens: np.ndarray
    """Raw token ids, int64 ``[length]``."""
    texts: tuple[str, ...]
    """What each token spells; joined, they give back the text. A character that is split over tokens belongs to the
    token that completes it; the tokens before that one spell nothing."""
    blocks: tuple[int, ...]
    """Blocks that read memory, counted from 0, in order of depth."""
    orders: tuple[int, ...]
    """N-gram orders, ascending."""
    gates: np.ndarray
    """The gates, in (0, 1), and 0 at dead positions; float32 ``[num_blocks, length, num_streams]``."""
    order_scores: np.ndarray
    """What each order's N-gram adds to the score inside the gate, before its squashing, float32
    ``[num_blocks, length, num_orders, num_streams]``."""
    bias_scores: np.ndarray
    """What the bias of the key projection adds; 0 without a bias; float32 ``[num_blocks, length, num_streams]``."""
    visible: np.ndarray
    """Number of tokens that an N-gram sees, including its own and at most the highest order; 0 at dead positions;
    int64 ``[length]``."""

    @property
    def scores(self) -> np.ndarray:
        """The score of every gate before its squashing, ``[num_blocks, length, num_streams]``: the sum of its parts."""
        return self.order_scores.sum(2) + self.bias_scores

    @property
    def num_streams(self) -> int:
        """Number of residual streams; each has its own gate."""
        return int(self.gates.shape[2])

    def fired(self, block: int, position: int, stream: int | None = None) -> Ngram | None:
        """Find the N-gram that contributed most to the score at a position.

        The N-gram is cut at the start of its segment; there is none at a dead position. ``stream`` is a residual
        stream; None means the sum over all of them. Raises `ConfigError` if the block reads no memory.
        """
        if not self.visible[position]:
            return None
        scores = self.order_scores[self.place_of(block), position]
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

    def place_of(self, block: int) -> int:
        """Find the place of a block among `blocks`; raises `ConfigError` if it reads no memory."""
        if block not in self.blocks:
            raise ConfigError(f"block {block} reads no memory; those that do are {', '.join(map(str, self.blocks))}")
        return self.blocks.index(block)


def gate_trace(
    model: Any,
    tokenizer: Any,
    text: str | Sequence[int] | np.ndarray | Tensor,
    *,
    length: int | None = None,
    adapter: str | None = None,
) -> GateTrace:
    """Run a text through a model and keep the gates of its memory, split by the order of the N-grams.

    Once the two normalizations are known, the score inside a gate is linear in the memory vector, so the part of each
    order is exact: the parts, and the bias if there is one, sum to the score.

    Args:
        model: An `engram_lm.EngramForCausalLM` with memory, or a model with an attached one. It is put back into the
            mode it was in.
        tokenizer: The tokenizer it was trained with.
        text: A text, or its token ids ``[length]``. All its gates are kept, so it should be
            short; for averages over a long text see `GateStatistics`.
        length: Tokens that the model sees at once. A longer text is cut into windows that do not see each other. None
            makes it one window.
        adapter: Which attached memory to look at, if there are several.

    Raises:
        MismatchError: The model has no memory or no gate, or the tokenizer is another one.
        DataError: The text has no tokens.
        TokenError: A token id is outside the vocabulary.
        ConfigError: ``length`` is below 1.

    Source: paper, Eq. 4 and section 6.5; the attribution to orders is ours.
    """
    if isinstance(text, str):
        text = text_tokens(tokenizer, text)
    tokens = text.cpu().numpy() if isinstance(text, Tensor) else np.asarray(text, dtype=np.int64)
    if length is None:
        beginning = beginning_tokens(tokenizer)
        length = max(len(beginning) + 1, len(begin(beginning, tokens.tolist())))
    # There is no budget, because all of it is kept anyway.
    options: dict[str, Any] = {"length": length, "adapter": adapter, "budget_bytes": sys.maxsize}
    ((trace,),) = look(model, tokenizer, tokens, TraceKeeper(), **options).values()
    return trace


def strongest(
    traces: GateTrace | Sequence[GateTrace], block: int, k: int = 20, *, min_count: int = 1
) -> list[NgramGate]:
    """Rank the N-grams that fired by the gate they opened. N-grams that are spelled differently are ranked apart.

    Args:
        traces: One trace, or several of one model.
        block: A block that reads memory, counted from 0.
        k: How many to return, at most.
        min_count: Leave out N-grams that fired at fewer positions.

    Returns:
        N-grams by mean gate (over positions and streams), highest first; among equals the more frequent one first.

    Raises:
        ConfigError: The block reads no memory.
    """
    found: dict[tuple[int, ...], tuple[str, list[float]]] = {}
    for trace in [traces] if isinstance(traces, GateTrace) else traces:
        gates = trace.gates[trace.place_of(block)].mean(-1)
        for position, gate in enumerate(gates.tolist()):
            ngram = trace.fired(block, position)
            if ngram is not None:
                found.setdefault((ngram.order, *ngram.tokens), (ngram.text, []))[1].append(gate)
    ranked = [
        NgramGate(text, key[0], sum(gates) / len(gates), len(gates))
        for key, (text, gates) in found.items()
        if len(gates) >= min_count
    ]
    return sorted(ranked, key=lambda item: (-item.mean_gate, -item.num_positions, item.text, item.order))[:k]


class TraceKeeper(ModelAnalysis):
    """Keeps all gates of a text, or those of passages spread evenly over it. Feed it with `read_text`.

    A passage begins where a window begins, because only there it holds every token that its N-grams see.

    Args:
        num_tokens: Tokens of the text, for passages of 160 tokens at most; None keeps the whole text as one.
        num_passages: Passages to keep, at most one for each window.
    """

    wants = frozenset({"gates", "order_scores"})

    def __init__(self, num_tokens: int | None = None, *, num_passages: int = 6) -> None:
        self.num_tokens, self.num_passages = num_tokens, num_passages

    def why_not(self, subject: Subject) -> str | None:
        """Apply to the models with gated memory."""
        return subject.ungated

    def sums_for(self, subject: Subject, applied: Sequence[Subject]) -> "_Passages":
        """Return passages of which nothing has been read yet."""
        return _Passages(subject, self)

    def result(self) -> dict[str, tuple[GateTrace, ...]]:
        """Return a trace for each passage, by model."""
        return {name: passages.traces() for name, passages in self.sums.items()}

    def places(self, length: int) -> tuple[list[int], int]:
        """Find where passages begin, and how long they are, once the length of a window is known."""
        if self.num_tokens is None:
            return [0], sys.maxsize
        # The last window may be a stub of a few tokens; it is taken only if it is all there is.
        num_windows = max(1, self.num_tokens // length)
        places = np.linspace(0, num_windows - 1, min(self.num_passages, num_windows)).round().astype(int)
        return [int(place) * length for place in places], min(_PASSAGE_TOKENS, length)


class _Passages:
    """The passages of one model: by their starts, what was read of each, piece by piece."""

    def __init__(self, subject: Subject, keeper: TraceKeeper) -> None:
        self.subject, self.keeper = subject, keeper
        self.kept: dict[int, list[dict[str, np.ndarray]]] = {}

    def add(self, reading: Reading) -> None:
        first, (num_windows, length) = reading.start, reading.tokens.shape
        if first == 0:
            self.starts, self.length = self.keeper.places(length)
        for start in self.starts:
            begin, end = max(start - first, 0), min(start - first + self.length, num_windows * length)
            if begin < end:
                self.kept.setdefault(start, []).append(self._piece(reading, slice(begin, end)))

    def _piece(self, reading: Reading, places: slice) -> dict[str, np.ndarray]:
        """Copy what a trace holds of some positions, counted from the start of the reading."""
        piece = {name: getattr(reading, name).flatten()[places].cpu().numpy() for name in ("tokens", "visible")}
        for name in ("gates", "order_scores", "bias_scores"):
            values = getattr(reading, name)
            blocks = [values[block].flatten(0, 1)[places].float().cpu().numpy() for block in self.subject.memories]
            piece[name] = np.stack(blocks)
        return piece

    def traces(self) -> tuple[GateTrace, ...]:
        assert self.subject.spec is not None
        blocks, orders = tuple(self.subject.memories), self.subject.spec.orders
        traces = []
        for pieces in self.kept.values():
            whole = {
                name: np.concatenate([piece[name] for piece in pieces], axis=0 if name in ("tokens", "visible") else 1)
                for name in pieces[0]
            }
            texts = tuple(token_texts(self.subject.tokenizer, whole["tokens"].tolist()))
            traces.append(GateTrace(texts=texts, blocks=blocks, orders=orders, **whole))
        return tuple(traces)


_RED = (227, 26, 28)
"""Color of a gate of 1. A gate of 0 is white, and between them the color is linear, as in the paper's figure."""


def gates_to_show(trace: GateTrace, block: int | None = None, stream: int | None = None) -> np.ndarray:
    """Choose one gate for each token, float32 ``[length]``; None means the mean over blocks or streams."""
    gates = trace.gates if block is None else trace.gates[[trace.place_of(block)]]
    if stream is not None and not 0 <= stream < trace.num_streams:
        raise ConfigError(f"there is no stream {stream}; the memory has {trace.num_streams}, counted from 0")
    gates = gates if stream is None else gates[:, :, [stream]]
    return np.asarray(gates.mean(axis=(0, 2)))


def colored_gates(trace: GateTrace, block: int | None = None, stream: int | None = None) -> "Text":
    """Lay the gates behind a text for the terminal: ``rich.print(colored_gates(trace))``.

    Both colors of each token are set, so the text looks the same on light and dark terminals. Where there are no colors
    (in a file, or with ``NO_COLOR``) the plain text remains.

    Args:
        trace: From `engram_lm.analysis.gate_trace`.
        block: A block that reads memory; None means the mean over all of them.
        stream: A residual stream; None means the mean over all of them.

    Raises:
        ConfigError: There is no such block or stream.

    Source: paper, Figure 7.
    """
    from rich.text import Text

    text = Text()
    for spelled, gate in zip(trace.texts, gates_to_show(trace, block, stream).tolist(), strict=True):
        red, green, blue = _color(gate)
        text.append(visible_text(spelled), style=f"black on #{red:02x}{green:02x}{blue:02x}")
    return text


def colored_html(trace: GateTrace, block: int | None = None, stream: int | None = None) -> str:
    """Lay the gates behind a text as HTML, for a notebook or a page; it needs no style sheet.

    Every token is a ``span`` whose title is its gate, inside one ``div`` that keeps line breaks. Arguments and errors
    are those of `colored_gates`.
    """
    spans = []
    for spelled, gate in zip(trace.texts, gates_to_show(trace, block, stream).tolist(), strict=True):
        if spelled:
            style = "background:rgb({},{},{})".format(*_color(gate))
            spans.append(f'<span style="{style}" title="{gate:.3f}">{html.escape(visible_text(spelled))}</span>')
    style = "white-space:pre-wrap;overflow-wrap:anywhere;font-family:monospace;color:#000;background:#fff;padding:.5em"
    return f'<div style="{style}">{"".join(spans)}</div>'


def _color(gate: float) -> tuple[int, int, int]:
    share = min(max(gate, 0.0), 1.0) if gate == gate else 0.0
    red, green, blue = (round(255 + share * (full - 255)) for full in _RED)
    return red, green, blue
