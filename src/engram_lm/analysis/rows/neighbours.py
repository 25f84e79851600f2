"""Rows and N-grams that say nearly the same: what lies nearest in a table, who reads it, and what it adds."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from engram_lm.analysis.plain_values import plain
from engram_lm.analysis.reading import text_tokens
from engram_lm.analysis.rows.memory_rows import RowReaders, TextNgram, counted_ngrams, memory_rows, spelled, text_ngram
from engram_lm.analysis.rows.promoted import Promoted, promoted_tokens
from engram_lm.analysis.subject import Subject
from engram_lm.errors import ConfigError, RowRangeError
from engram_lm.hashing.counting import ngram_rows

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Neighbours", "nearest_ngrams", "nearest_rows"]

# Dimension key: N vectors that are compared, E row width, K heads of one order, Q the query and its neighbours.


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Neighbours:
    """A row or an N-gram, and what lies nearest to it.

    Entry 0 of axis Q is the query itself, then come its neighbours, the nearest first. ``rich.print(neighbours)`` shows
    them as a table.
    """

    block: int
    """Block whose memory was searched, from 0."""
    order: int
    """N-gram order of the rows."""
    head: int | None
    """Hash head of that order, from 0; None where whole N-grams were compared, all heads of the order side by side."""
    rows: np.ndarray
    """Row numbers, int64 ``[Q, 1]``, or for N-grams one for each head, ``[Q, K]``."""
    cosines: np.ndarray
    """Cosine to the query, float64 ``[Q]``."""
    ngrams: tuple[tuple[TextNgram, ...], ...]
    """For each of Q the most frequent N-grams of the text that read the row, the first one most often; or the N-gram
    itself, with no positions for a query that the text does not have."""
    num_ngrams: np.ndarray
    """How many of the text's frequent N-grams read the row, int64 ``[Q]``; 1 for N-grams."""
    promoted: tuple[tuple[Promoted, ...], ...]
    """For each of Q the tokens that it raises most; see `promoted_tokens`. Empty where that is not known, or where the
    value is zero."""
    num_searched: int
    """Rows or N-grams that were compared with the query."""
    num_left_out: int
    """Those left out because they are all zero, or hold a NaN or an infinity."""

    @property
    def shared_heads(self) -> np.ndarray:
        """Heads in which an entry reads the very row of the query, int64 ``[Q]``: collisions, near by no merit."""
        shared: np.ndarray = (self.rows == self.rows[:1]).sum(1)
        return shared

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        values["ngrams"] = [[ngram._asdict() for ngram in ngrams] for ngrams in self.ngrams]
        values["promoted"] = [[token._asdict() for token in tokens] for tokens in self.promoted]
        return {**values, "shared_heads": plain(self.shared_heads)}

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
            # As Python writes it, text steers no terminal and shows its spaces; in a `Text` it is no markup.
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
    max_ngrams: int = 1 << 16,
    budget_bytes: int = 1 << 28,
    on_progress: Callable[[int], None] = lambda num_rows: None,
) -> Neighbours:
    """Find the rows of one head that point in nearly the direction of a row, and the N-grams of a text that read them.

    Rows are compared as they are stored. Rows of different heads mean different things (the projections see them in
    different channels), so only those of the row's own head are searched.

    Args:
        subject: A model with memory, from `engram_lm.analysis.find_subject`.
        row: Row number, offsets included.
        text: A text or its tokens whose N-grams are to be named, or what `frequent_ngrams` counted in it.
        block: A block that reads memory, from 0; the first one where None.
        k: Neighbours to find.
        among: ``"head"`` compares all rows of the head, which reads that part of the table once; ``"text"`` only those
            that the text's frequent N-grams read, which suits a table that is far away.
        num_ngrams: N-grams to name for each row.
        num_promoted: Tokens to name for each row; 0 runs nothing of the model.
        max_ngrams: Take so many of the most frequent N-grams of each order at most.
        budget_bytes: Rows are read in pieces that stay below this.
        on_progress: Called with the number of rows just compared.

    Raises:
        RowRangeError: The row is outside the table, or in its padding.
        MismatchError: The model has no memory, or its tables are not at hand.
        ConfigError: The block has no memory, the row has no direction, or a number is impossible.
        DataError: The text has no tokens.
        TokenError: A token is outside the vocabulary.
    """
    memory = memory_rows(subject, block)
    _check_numbers(k=k, max_ngrams=max_ngrams, budget_bytes=budget_bytes)
    if among not in ("head", "text") or (among == "text" and text is None):
        raise ConfigError(f"among is 'head', or 'text' with a text, got {among!r}")
    offsets = memory.spec.offsets(memory.layer_id)
    primes = memory.spec.primes[memory.spec.layers.index(memory.layer_id)]
    if not isinstance(row, int | np.integer) or not 0 <= row < sum(primes):
        raise RowRangeError(
            f"row {row!r} is none that block {memory.block} can read; its rows go from 0 to {sum(primes) - 1}"
        )
    column = int(np.searchsorted(offsets, row, side="right")) - 1
    row = int(row)
    head, first, end = column % memory.spec.num_heads, offsets[column], offsets[column] + primes[column]
    order = memory.spec.orders[column // memory.spec.num_heads]
    readers = RowReaders(subject, memory, order, head, counted_ngrams(subject, text, max_ngrams))
    query = memory.gather(np.array([row]))[0]
    step = max(1, budget_bytes // (memory.row_bytes + 12 * memory.layer.config.head_dim))
    if among == "head":
        pieces = (np.arange(start, min(start + step, end)) for start in range(first, end, step))
    else:
        pieces = (readers.rows[start : start + step] for start in range(0, len(readers.rows), step))
    best = _Best(query, k)
    for rows in pieces:
        rows = rows[rows != row]
        best.add(memory.gather(rows), rows)
        on_progress(len(rows))
    rows = np.array([row, *best.places])
    channels = memory.channels(column, 1)
    return Neighbours(
        block=memory.block,
        order=order,
        head=head,
        rows=rows[:, None],
        cosines=np.array([1.0, *best.cosines]),
        ngrams=tuple(readers.first(one, num_ngrams) for one in rows.tolist()),
        num_ngrams=np.array([readers.count(one) for one in rows.tolist()]),
        promoted=promoted_tokens(subject, memory.layer, memory.gather(rows), channels, num_promoted),
        num_searched=best.num_searched,
        num_left_out=best.num_left_out,
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
    on_progress: Callable[[int], None] = lambda num_ngrams: None,
) -> Neighbours:
    """Find the N-grams of a text whose memory, all heads of the order side by side, is nearest to that of an N-gram.

    Args:
        subject: A model with memory, from `engram_lm.analysis.find_subject`.
        ngram: A text that is tokenized to as many tokens as one of the memory's orders has, or those raw tokens. A
            word within a text often begins with a space.
        text: A text or its tokens whose N-grams are compared, or what `frequent_ngrams` counted in it.
        block: A block that reads memory, from 0; the first one where None.
        k: Neighbours to find.
        min_count: Compare N-grams that occur at so many positions at least.
        num_promoted: Tokens to name for each N-gram; 0 runs nothing of the model.
        max_ngrams: Take so many of the most frequent N-grams of each order at most.
        budget_bytes: Rows are read in pieces that stay below this.
        on_progress: Called with the number of N-grams just compared.

    Raises:
        MismatchError: The model has no memory, or its tables are not at hand.
        ConfigError: The block has no memory, the N-gram is of no order, its memory has no direction, or a number is
            impossible.
        DataError: The text has no tokens.
        TokenError: A token is outside the vocabulary.

    Example:
        >>> subject = find_subject(model, tokenizer)  # doctest: +SKIP
        >>> rich.print(nearest_ngrams(subject, " Alexander the", text))  # doctest: +SKIP
    """
    memory = memory_rows(subject, block)
    spec = memory.spec
    _check_numbers(k=k, min_count=min_count, max_ngrams=max_ngrams, budget_bytes=budget_bytes)
    tokens = text_tokens(subject.tokenizer, ngram) if isinstance(ngram, str) else np.asarray(ngram)
    order = len(tokens)
    if order not in spec.orders:
        raise ConfigError(
            f"{ngram!r} is {order} tokens, and this memory reads N-grams of {', '.join(map(str, spec.orders))}; pass "
            "one of those orders"
        )
    first = spec.orders.index(order) * spec.num_heads
    of_text = counted_ngrams(subject, text, max_ngrams)
    if of_text is None:
        raise ConfigError("N-grams are compared with those of a text; pass one, or its tokens")
    counted = of_text[order]
    own = spec.rows(tokens, memory.layer_id)[-1, first : first + spec.num_heads]
    number = int((counted.counts >= min_count).sum())
    rows = ngram_rows(spec, counted, memory.layer_id)[:number]
    step = max(1, budget_bytes // (spec.num_heads * (memory.row_bytes + 12 * memory.layer.config.head_dim)))
    assert spec.token_map is not None
    place = int(counted.find(spec.token_map.apply(tokens)[None])[0])
    best = _Best(memory.vectors(own[None])[0], k)
    for start in range(0, number, step):
        places = np.arange(start, min(start + step, number))
        places = places[places != place]
        best.add(memory.vectors(rows[places]), places)
        on_progress(len(places))
    found = np.concatenate([own[None], rows[best.places]])
    count = int(counted.counts[place]) if place >= 0 else 0
    ngrams = [TextNgram(spelled(subject, tokens), order, count, memory.block)]
    ngrams += [text_ngram(subject, memory.block, counted, one) for one in best.places.tolist()]
    channels = memory.channels(first, spec.num_heads)
    return Neighbours(
        block=memory.block,
        order=order,
        head=None,
        rows=found,
        cosines=np.array([1.0, *best.cosines]),
        ngrams=tuple((one,) for one in ngrams),
        num_ngrams=np.ones(len(found), np.int64),
        promoted=promoted_tokens(subject, memory.layer, memory.vectors(found), channels, num_promoted),
        num_searched=best.num_searched,
        num_left_out=best.num_left_out,
    )


class _Best:
    """The vectors nearest to one, of those that came by."""

    def __init__(self, query: Tensor, k: int) -> None:
        norm = query.norm()
        if not norm.isfinite() or norm == 0:
            raise ConfigError(
                "there is nothing near it: the row, or the memory of the N-gram, is all zero, or holds a NaN or an "
                "infinity, so it has no direction; ask for another one"
            )
        self._query, self._k = query / norm, k
        self.places, self.cosines = np.zeros(0, np.int64), np.zeros(0, np.float64)
        self.num_searched = self.num_left_out = 0

    def add(self, vectors: Tensor, places: np.ndarray) -> None:
        """Compare vectors ``[N, E]``, known by their places ``[N]``."""
        norms = vectors.norm(dim=1)
        usable = (norms > 0) & norms.isfinite()
        cosines = ((vectors[usable] @ self._query) / norms[usable]).numpy().astype(np.float64)
        self.num_searched += len(cosines)
        self.num_left_out += len(places) - len(cosines)
        cosines = np.concatenate([self.cosines, cosines])
        places = np.concatenate([self.places, places[usable.numpy()]])
        # Of equals the lower place goes first.
        nearest = np.lexsort([places, -cosines])[: self._k]
        self.cosines, self.places = cosines[nearest], places[nearest]


def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name} is a whole number from 1, got {value!r}")
