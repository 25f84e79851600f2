"""Rows and N-grams that say nearly the same: what lies nearest in a table, who reads it, and what it adds."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engram_lm.analysis.lens import LogitLens
from engram_lm.analysis.protocol import NotApplicable, PlainResult
from engram_lm.analysis.reading import read_text
from engram_lm.analysis.rows.collisions import TextNgrams
from engram_lm.analysis.subject import Subject
from engram_lm.errors import ConfigError, MismatchError, RowRangeError, check_whole
from engram_lm.evaluation.token_text import spelled
from engram_lm.hashing.counting import FrequentNgrams, ngram_rows
from engram_lm.hashing.token_map import read_vocabulary
from engram_lm.memory.interface import row_signs
from engram_lm.memory.layer import EngramLayer

if TYPE_CHECKING:
    from rich.table import Table

# Dimension key: N vectors, C channels of the memory vector, E row width, K heads of one order, D hidden,
# Q the query and its neighbours.


class Promoted(NamedTuple):
    """A token that a value raises."""

    token: int
    """Its id."""
    text: str
    """What it spells."""
    logit: float
    """Difference to the logit that an empty hidden state gives it."""


@torch.no_grad()
def promoted_tokens(
    subject: Subject, layer: EngramLayer, vectors: Tensor, channels: slice, number: int
) -> tuple[tuple[Promoted, ...], ...]:
    """Send parts of the memory vector through the value projection and on to the model's head.

    This is only the direct path to the output. It leaves out the gate (which scales the value), the convolution, the
    projection's bias and all later layers, so it shows what a row adds and not what the model makes of it. The final
    norm brings values of any size to one.

    The ``vectors``, floating ``[N, C]``, are the values of some ``channels`` of the layer's memory vector; the others
    are zero. For each vector the ``number`` tokens that it raises most are named; none if its value is zero or not
    finite, or if it is not known how the model predicts (see `Subject.predict`).

    Source: direct logit attribution, Elhage et al., “A Mathematical Framework for Transformer Circuits”, 2021.
    """
    num_tokens = min(len(read_vocabulary(subject.tokenizer)), subject.vocab_size)
    few = np.arange(min(4, num_tokens))
    if number < 1 or isinstance(
        read_text([subject], few, {"lens": LogitLens()}, length=len(few))["lens"], NotApplicable
    ):
        return ((),) * len(vectors)
    # The value projection without its bias. Quantized and offloaded ones must be called as modules.
    weight = layer.key_value.weight
    memory = torch.zeros(len(vectors) + 1, layer.config.memory_dim)
    memory[:-1, channels] = vectors
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    projected = layer.key_value(memory.to(subject.device if weight.is_meta else weight.device, dtype))
    values = projected[..., -layer.config.hidden_size :].float()
    values = (values[:-1] - values[-1:]).to(subject.device)
    # All streams hold the value, as they do behind the memory, except for their gates.
    states = values.to(subject.dtype).unsqueeze(-2).expand(-1, subject.num_streams, -1)
    logits = subject.predict(torch.cat([states, torch.zeros_like(states[:1])]))[..., :num_tokens].float().cpu()
    raised = logits[:-1] - logits[-1:]
    says = (values.abs().amax(-1) > 0).cpu() & raised.isfinite().all(-1)
    promoted = []
    for place, best in enumerate(raised):
        top = best.topk(min(number, num_tokens) if says[place] else 0)
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        promoted.append(tuple(Promoted(token, spelled(subject.tokenizer, [token]), logit) for token, logit in pairs))
    return tuple(promoted)


class TextNgram(NamedTuple):
    """An N-gram of a text."""

    text: str
    """What it spells where it first occurs; empty if all it saw was the start of the text."""
    order: int
    """Tokens in it."""
    num_positions: int
    """Positions at which it occurs."""
    block: int
    """Block that reads with it, counted from 0."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Neighbours(PlainResult):
    """A row or an N-gram, and what lies nearest to it.

    Entry 0 of axis Q is the query itself; its neighbours follow, the nearest first. ``rich.print(neighbours)`` shows
    them as a table.
    """

    also = ("shared_heads",)

    block: int
    """Block whose memory was searched, counted from 0."""
    order: int
    """N-gram order of the rows."""
    head: int | None
    """Hash head of that order, counted from 0; None if whole N-grams were compared, all heads side by side."""
    rows: np.ndarray
    """Row numbers, int64 ``[Q, 1]``; for N-grams one for each head, ``[Q, K]``."""
    cosines: np.ndarray
    """Cosine to the query, float64 ``[Q]``."""
    ngrams: tuple[tuple[TextNgram, ...], ...]
    """For each of Q the most frequent N-grams of the text that read the row, the most frequent first. If N-grams were
    compared, the N-gram itself; a query that does not occur in the text has 0 positions."""
    num_ngrams: np.ndarray
    """How many of the text's frequent N-grams read the row, int64 ``[Q]``; 1 for N-grams."""
    promoted: tuple[tuple[Promoted, ...], ...]
    """For each of Q the tokens that it raises most; see `promoted_tokens`. Empty if that is not known, or if the value
    is zero."""
    num_searched: int
    """Rows or N-grams that were compared with the query."""
    num_left_out: int
    """Rows or N-grams left out because they are all zero, or hold a NaN or an infinity."""

    @property
    def shared_heads(self) -> np.ndarray:
        """Heads in which an entry reads the same row as the query, int64 ``[Q]``: there it is near by a collision."""
        return np.asarray((self.rows == self.rows[:1]).sum(1))

    def __rich__(self) -> "Table":
        from rich.table import Table
        from rich.text import Text

        what = "all heads" if self.head is None else f"head {self.head}"
        found = Table(title=f"Nearest in block {self.block}, order {self.order}, {what}", title_justify="left")
        columns = ["cosine", "heads shared" if self.head is None else "row", "N-grams of the text", "promotes"]
        for place, name in enumerate(columns):
            found.add_column(name, justify="right" if place < 2 else "left")
        for place, cosine in enumerate(self.cosines.tolist()):
            own = self.shared_heads[place] if self.head is None else self.rows[place, 0]
            # `repr` keeps text from steering the terminal and shows its spaces; inside `Text` it is not read as markup.
            ngrams = ", ".join(f"{ngram.text!r} ×{ngram.num_positions}" for ngram in self.ngrams[place])
            more = int(self.num_ngrams[place]) - len(self.ngrams[place])
            ngrams += f" and {more} more" if more > 0 else ""
            promoted = " ".join(repr(token.text) for token in self.promoted[place])
            found.add_row(f"{cosine:.3f}", str(own), Text(ngrams), Text(promoted))
        return found


def nearest_rows(
    subject: Subject,
    row: int,
    text: Any = None,
    *,
    block: int | None = None,
    k: int = 10,
    among: Literal["head", "text"] = "head",
    num_ngrams: int = 5,
    num_promoted: int = 5,
    budget_bytes: int = 1 << 28,
) -> Neighbours:
    """Find the rows of one head that point in nearly the direction of a row, and the N-grams of a text that read them.

    Rows are compared as they are stored. Rows of different heads mean different things, because the projections see
    them in different channels, so only those of the row's own head are searched.

    Args:
        subject: A model with memory, from `engram_lm.analysis.find_subject`.
        row: Row number, offsets included.
        text: A text, its tokens, or a `TextNgrams`, whose N-grams are to be named; None names none.
        block: A block that reads memory, counted from 0; None means the first one.
        k: Neighbours to find.
        among: ``"head"`` compares all rows of the head, which reads that part of the table once; ``"text"`` only those
            that the text's frequent N-grams read, which suits a table that is far away.
        num_ngrams: N-grams to name for each row.
        num_promoted: Tokens to name for each row; 0 names none and does not run the model.
        budget_bytes: Rows are read in pieces that stay below this.

    Raises:
        RowRangeError: The row is outside the table, or in its padding.
        MismatchError: The model has no memory, or its tables are not at hand.
        ConfigError: The block has no memory, the row has no direction, or a number is impossible.
        DataError: The text has no tokens.
        TokenError: A token is outside the vocabulary.
    """
    memory = _Memory(subject, block)
    check_whole(k=k, budget_bytes=budget_bytes)
    if among not in ("head", "text") or (among == "text" and text is None):
        raise ConfigError(f"among is 'head', or 'text' with a text, got {among!r}")
    spec, offsets = memory.spec, memory.spec.offsets(memory.layer_id)
    primes = spec.primes[spec.layers.index(memory.layer_id)]
    if not isinstance(row, int | np.integer) or not 0 <= row < sum(primes):
        raise RowRangeError(
            f"block {memory.block} cannot read the row {row!r}; its rows go from 0 to {sum(primes) - 1}"
        )
    row, column = int(row), int(np.searchsorted(offsets, row, side="right")) - 1
    head, order = column % spec.num_heads, spec.orders[column // spec.num_heads]
    known = None if text is None else TextNgrams.of(subject, text).frequent(spec)[order]
    readers = _readers(memory, head, known)
    searched: Any = range(offsets[column], offsets[column] + primes[column]) if among == "head" else sorted(readers)
    nearest = _nearest(
        memory.gather(np.array([row]))[0], searched, row, memory.gather, k, budget_bytes // memory.row_bytes
    )
    rows = np.array([row, *nearest.places])
    return Neighbours(
        block=memory.block,
        order=order,
        head=head,
        rows=rows[:, None],
        ngrams=tuple(
            tuple(memory.describe(known, place, by) for place, by in readers.get(one, ())[:num_ngrams])
            for one in rows.tolist()
        ),
        num_ngrams=np.array([len(readers.get(one, ())) for one in rows.tolist()]),
        promoted=promoted_tokens(subject, memory.layer, memory.gather(rows), memory.channels(column, 1), num_promoted),
        cosines=nearest.cosines,
        num_searched=nearest.num_searched,
        num_left_out=nearest.num_left_out,
    )


def nearest_ngrams(
    subject: Subject,
    ngram: str | Sequence[int],
    text: Any,
    *,
    block: int | None = None,
    k: int = 10,
    min_count: int = 1,
    num_promoted: int = 5,
    max_ngrams: int = 1 << 16,
    budget_bytes: int = 1 << 28,
) -> Neighbours:
    """Find the N-grams of a text whose memory, all heads of the order side by side, is nearest to that of an N-gram.

    Args:
        subject: A model with memory, from `engram_lm.analysis.find_subject`.
        ngram: A text that is tokenized to as many tokens as one of the memory's orders has, or those raw tokens. A
            word within a text often begins with a space.
        text: A text, its tokens, or a `TextNgrams`, whose N-grams are compared.
        block: A block that reads memory, counted from 0; None means the first one.
        k: Neighbours to find.
        min_count: Compare N-grams that occur at this many positions or more.
        num_promoted: Tokens to name for each N-gram; 0 names none and does not run the model.
        max_ngrams: N-grams to compare, at most; the most frequent ones are taken.
        budget_bytes: Rows are read in pieces that stay below this.

    Raises:
        MismatchError: The model has no memory, or its tables are not at hand.
        ConfigError: The block has no memory, no order has the N-gram's number of tokens, its memory has no direction,
            or a number is impossible.
        DataError: The text has no tokens.
        TokenError: A token is outside the vocabulary.

    Example:
        >>> subject = find_subject(model, tokenizer)  # doctest: +SKIP
        >>> rich.print(nearest_ngrams(subject, " Alexander the", text))  # doctest: +SKIP
    """
    memory = _Memory(subject, block)
    spec = memory.spec
    check_whole(k=k, min_count=min_count, max_ngrams=max_ngrams, budget_bytes=budget_bytes)
    if isinstance(ngram, str):
        # It stands anywhere in a text, so it has no beginning.
        ngram = subject.tokenizer(ngram, add_special_tokens=False).input_ids
    tokens = np.asarray(ngram)
    order = len(tokens)
    if order not in spec.orders:
        raise ConfigError(
            f"{ngram!r} is {order} tokens, and this memory reads N-grams of {', '.join(map(str, spec.orders))}; pass "
            "one of those orders"
        )
    if text is None:
        raise ConfigError("N-grams are compared with those of a text; pass one, or its tokens")
    counted = TextNgrams.of(subject, text, max_ngrams).frequent(spec, max_ngrams)[order]
    first = spec.orders.index(order) * spec.num_heads
    own = spec.rows(tokens, memory.layer_id)[-1, first : first + spec.num_heads]
    rows = ngram_rows(spec, counted, memory.layer_id)
    assert spec.token_map is not None
    place = int(counted.find(spec.token_map.apply(tokens)[None])[0])
    searched, at_once = np.flatnonzero(counted.counts >= min_count), budget_bytes // (spec.num_heads * memory.row_bytes)
    nearest = _nearest(
        memory.vectors(own[None])[0], searched, place, lambda places: memory.vectors(rows[places]), k, at_once
    )
    found = np.concatenate([own[None], rows[nearest.places]])
    channels = memory.channels(first, spec.num_heads)
    query = TextNgram(
        spelled(subject.tokenizer, tokens), order, counted.counts[place] if place >= 0 else 0, memory.block
    )
    return Neighbours(
        block=memory.block,
        order=order,
        head=None,
        rows=found,
        ngrams=((query,), *((memory.describe(counted, one),) for one in nearest.places.tolist())),
        num_ngrams=np.ones(len(found), np.int64),
        promoted=promoted_tokens(subject, memory.layer, memory.vectors(found), channels, num_promoted),
        cosines=nearest.cosines,
        num_searched=nearest.num_searched,
        num_left_out=nearest.num_left_out,
    )


class _Memory:
    """The memory of one block, on whatever tier its table is."""

    def __init__(self, subject: Subject, block: int | None) -> None:
        if subject.spec is None or not subject.memories:
            raise MismatchError(f"{subject.name} has no memory, so it has no rows; pass a model with memory")
        self.subject, self.spec = subject, subject.spec
        self.block = next(iter(subject.memories)) if block is None else block
        if self.block not in subject.memories:
            there = ", ".join(map(str, subject.memories))
            raise ConfigError(f"block {block} reads no memory; those that do are {there}")
        self.layer = subject.memories[self.block]
        self.layer_id = self.spec.layers[self.spec.blocks.index(self.block)]
        if self.layer.table is None:
            raise MismatchError(
                f"the memory of block {self.block} has no table to look into; load the model with its tables"
            )
        self.table = self.layer.table
        self.row_bytes = self.table.row_bytes + 12 * self.layer.config.head_dim
        """Bytes of a row, as it is read and while it is compared."""

    @torch.no_grad()
    def gather(self, rows: np.ndarray) -> Tensor:
        """Return rows as they are stored, float32 [N, E], on the CPU."""
        return self.table.gather(torch.from_numpy(np.ascontiguousarray(rows, np.int64))).float().cpu()

    def vectors(self, rows: np.ndarray) -> Tensor:
        """Return the memory of N-grams of one order: rows [N, K] with their signs, float32 [N, K * E]."""
        found = self.gather(rows)
        if self.layer.config.signs == "hashed":
            found = found * row_signs(torch.from_numpy(rows), self.spec.num_heads).unsqueeze(-1)
        return found.flatten(1)

    def channels(self, column: int, number: int) -> slice:
        """Return where some columns lie in the memory vector."""
        width = self.layer.config.head_dim
        return slice(column * width, (column + number) * width)

    def describe(self, counted: FrequentNgrams | None, place: int, block: int | None = None) -> TextNgram:
        """Describe the N-gram at a place of those counted, for a block that reads with it."""
        assert counted is not None
        text = spelled(self.subject.tokenizer, counted.tokens[place])
        return TextNgram(text, counted.order, int(counted.counts[place]), self.block if block is None else block)


def _readers(memory: _Memory, head: int, counted: FrequentNgrams | None) -> dict[int, list[tuple[int, int]]]:
    """Find which rows of one head the frequent N-grams of a text read, in all blocks that share the table.

    Returns for each row the places of its N-grams, the most frequent first, with the block that reads.
    """
    readers: dict[int, list[tuple[int, int]]] = {}
    spec = memory.spec
    if counted is not None:
        for layer, block in zip(spec.layers, spec.blocks, strict=True):
            if spec.shared_table or layer == memory.layer_id:
                for place, row in enumerate(ngram_rows(spec, counted, layer)[:, head].tolist()):
                    readers.setdefault(row, []).append((place, block))
    return {row: sorted(found) for row, found in readers.items()}


class _Nearest(NamedTuple):
    """The vectors nearest to a query; ``cosines`` begin with the query's own, 1."""

    places: np.ndarray
    cosines: np.ndarray
    num_searched: int
    num_left_out: int


def _nearest(
    query: Tensor,
    places: Sequence[int] | np.ndarray,
    own: int,
    vectors_of: Callable[[np.ndarray], Tensor],
    k: int,
    at_once: int,
) -> _Nearest:
    """Compare the vectors at some places with the query, ``at_once`` of them at a time and except for its own."""
    norm = query.norm()
    if not norm.isfinite() or norm == 0:
        raise ConfigError(
            "there is nothing near it: the row, or the memory of the N-gram, is all zero, or holds a NaN or an "
            "infinity, so it has no direction; ask for another one"
        )
    best, best_cosines = np.zeros(0, np.int64), np.zeros(0, np.float64)
    num_searched = num_left_out = 0
    for start in range(0, len(places), max(1, at_once)):
        piece = np.asarray(places[start : start + max(1, at_once)], np.int64)
        piece = piece[piece != own]
        vectors = vectors_of(piece)
        norms = vectors.norm(dim=1)
        usable = (norms > 0) & norms.isfinite()
        cosines = ((vectors[usable] @ (query / norm)) / norms[usable]).numpy().astype(np.float64)
        num_searched += len(cosines)
        num_left_out += len(piece) - len(cosines)
        best, best_cosines = np.append(best, piece[usable.numpy()]), np.append(best_cosines, cosines)
        # Among equals the lower place comes first.
        nearest = np.lexsort([best, -best_cosines])[:k]
        best, best_cosines = best[nearest], best_cosines[nearest]
    return _Nearest(best, np.append(1.0, best_cosines), num_searched, num_left_out)
