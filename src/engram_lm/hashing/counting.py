"""N-grams as the hash sees them: what one is, and how often each occurs in a text, in bounded memory.

An N-gram is what `HashSpec` hashes at a position: its canonical tokens, oldest first, with the spec's fill in place of
each token that a look-back cannot see (because the text starts there, a segment ends, or a token is dead). A dead
position has no N-gram. `ngram_keys` tells N-grams apart, and everything that counts, samples or compares them uses it.
"""

# Dimension key: N tokens of a text or entries of a table, K N-grams that are kept, B batch, L length, O tokens.

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property

import numpy as np

from engram_lm.errors import DataError, TokenError, check_whole
from engram_lm.hashing.codes import look_back
from engram_lm.hashing.multipliers import splitmix64
from engram_lm.hashing.spec import HashSpec

_CHUNK_TOKENS = 1 << 18
_MERGE_AT = 1 << 16


# What an N-gram is ----------------------------------------------------------------------------------------------------


def ngrams_of(
    spec: HashSpec, codes: np.ndarray, context: np.ndarray | None = None, *, fill: int | None = None
) -> np.ndarray:
    """Return the N-gram of the highest order at each position; one of a lower order is its last columns.

    Takes codes ``[B, L]`` and the codes before them, as `look_back` does. Returns canonical tokens, oldest first,
    ``fill`` (by default the spec's) where nothing is seen, int64 ``[B, L, spec.orders[-1]]``. At dead positions they
    mean nothing.
    """
    fill = spec.fill if fill is None else fill
    assert fill is not None
    seen = look_back(codes, context, width=spec.context, fill=fill, positions=spec.segments.positions)
    return np.stack(seen[::-1], axis=-1)


def ngram_keys(ngrams: np.ndarray, vocab_size: int) -> np.ndarray:
    """Pack each N-gram into one value that NumPy can sort: equal for equal N-grams, and only for those.

    Takes canonical tokens, oldest first, int64 ``[..., O]``. To compare N-grams of several orders, give all of them the
    width of the longest and write -1 into the columns that a shorter one lacks. Returns ``[...]``: uint64 where 64 bits
    hold all tokens, otherwise bytes of a fixed length.
    """
    num_bits = vocab_size.bit_length()  # the tokens and -1
    in_word = min(64 // num_bits, ngrams.shape[-1])
    words = []
    for begin in range(0, ngrams.shape[-1], in_word):
        word = np.zeros(ngrams.shape[:-1], np.uint64)
        for column in range(begin, min(begin + in_word, ngrams.shape[-1])):
            word = (word << np.uint64(num_bits)) | (ngrams[..., column] + 1).astype(np.uint64)
        words.append(word)
    if len(words) == 1:
        return words[0]
    # NumPy ignores trailing zero bytes when it compares; all keys have one length, so this confuses no two of them.
    return np.ascontiguousarray(np.stack(words, axis=-1)).view(f"S{8 * len(words)}")[..., 0]


def scattered(keys: np.ndarray) -> np.ndarray:
    """Turn each key of `ngram_keys` into 64 bits that look random, uint64 ``[N]``: for samples and hashed counters."""
    words = keys.view(np.uint64).reshape(len(keys), keys.dtype.itemsize // 8)
    mixed = np.zeros(len(keys), np.uint64)
    for word in words.T:
        mixed = splitmix64(mixed ^ word)
    return mixed


def seen_ngrams(spec: HashSpec, tokens: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the N-grams at the positions ``start`` to ``stop`` (exclusive) of a text, raw tokens ``[N]``.

    Returns N-grams as from `ngrams_of`, int64 ``[stop - start, highest order]``, and whether each position is alive.
    """
    codes, context = _codes(spec, tokens, np.array([start]), stop - start)
    return ngrams_of(spec, codes, context)[0], codes[0] >= 0


def _codes(spec: HashSpec, tokens: np.ndarray, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes of some stretches of a text, int64 [stretches, length], and of the context before each."""
    places = starts[:, None] + np.arange(-spec.context, length)
    codes = np.where(places < 0, -1, spec.encode(np.asarray(tokens[places.clip(min=0)])))
    return codes[:, spec.context :], codes[:, : spec.context]


# Counting -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class NgramEntries:
    """Distinct N-grams and what was gathered about each."""

    keys: np.ndarray
    """From `ngram_keys`, ``[N]``, ascending."""
    first: Mapping[str, np.ndarray]
    """What was given with the first occurrence of each, by name, ``[N, ...]``."""
    sums: Mapping[str, np.ndarray]
    """What was added up over all occurrences, by name, ``[N, ...]``; ``"counts"`` is their number, int64 ``[N]``."""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def counts(self) -> np.ndarray:
        """Number of occurrences of each, int64 ``[N]``."""
        return self.sums["counts"]

    def chosen(self, which: np.ndarray) -> "NgramEntries":
        """Return some of them, chosen by a mask or by places."""
        columns = ({name: values[which] for name, values in group.items()} for group in (self.first, self.sums))
        return NgramEntries(self.keys[which], *columns)

    @classmethod
    def joined(cls, parts: "list[NgramEntries]") -> "NgramEntries":
        """Add up what several hold, given in the order of the text; a key may occur many times in one part."""
        parts = [part for part in parts if len(part)] or parts[-1:]
        keys = np.concatenate([part.keys for part in parts])
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        begins = np.flatnonzero(np.concatenate([np.ones(min(len(keys), 1), bool), keys[1:] != keys[:-1]]))
        if not len(begins):
            return parts[0]
        # The sort is stable and later parts lie later in the text, so the first of equals is the first occurrence.
        first = {name: np.concatenate([part.first[name] for part in parts])[order[begins]] for name in parts[0].first}
        sums = {
            name: np.add.reduceat(np.concatenate([part.sums[name] for part in parts])[order], begins)
            for name in parts[0].sums
        }
        return cls(keys[begins], first, sums)


class NgramCounter:
    """Counts N-grams as they come, and adds up whatever is given with them.

    At most ``max_distinct`` distinct N-grams are held (three times as many in memory while they are merged). When there
    are more, half of them are dropped: those whose scattered key has one more leading bit set. What stays is a random
    sample of the N-grams, chosen by their keys alone, and everything about each N-gram in it is exact, as if none had
    been dropped. ``part`` restricts a counter to the keys whose scattered form starts with certain bits, given as the
    number of bits and their value.

    Source: distinct sampling, Gibbons, “Distinct Sampling for Highly-Accurate Answers to Distinct Values Queries and
    Event Reports”, VLDB 2001.
    """

    def __init__(self, max_distinct: int, part: tuple[int, int] = (0, 0)) -> None:
        self.max_distinct = max_distinct
        self.left_out: list[tuple[int, int]] = []
        """The parts that were dropped; a counter for each of them would count the rest."""
        self._num_bits, self._begins = part
        self._held = NgramEntries(np.zeros(0, np.uint64), {}, {"counts": np.zeros(0, np.int64)})
        self._waiting: list[NgramEntries] = []

    @property
    def share(self) -> float:
        """Share of all N-grams that is counted: 1, or a power of one half."""
        return 0.5**self._num_bits

    def add(
        self,
        keys: np.ndarray,
        *,
        first: Mapping[str, np.ndarray] | None = None,
        sums: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Take in one occurrence for each key ``[N]``, in the order of the text.

        Of the arrays in ``first``, ``[N, ...]``, the entry of each N-gram's first occurrence is kept; those in ``sums``
        are added up for each N-gram. Every call gives the same names.
        """
        added = NgramEntries(keys, first or {}, {"counts": np.ones(len(keys), np.int64), **(sums or {})})
        self._waiting.append(NgramEntries.joined([self._sampled(added)]))
        # They are merged when they have become as many as those held, so each entry is sorted only a few times.
        if sum(map(len, self._waiting)) >= min(max(len(self._held), _MERGE_AT), self.max_distinct):
            self._merge()

    def entries(self) -> NgramEntries:
        """Return what has been counted so far."""
        self._merge()
        return self._held

    def _merge(self) -> None:
        self._held, self._waiting = NgramEntries.joined([self._held, *self._waiting]), []
        while len(self._held) > self.max_distinct and self._num_bits < 63:
            self._num_bits, self._begins = self._num_bits + 1, self._begins * 2
            self.left_out.append((self._num_bits, self._begins + 1))
            self._held = self._sampled(self._held)

    def _sampled(self, entries: NgramEntries) -> NgramEntries:
        if not self._num_bits:
            return entries
        return entries.chosen(scattered(entries.keys) >> np.uint64(64 - self._num_bits) == self._begins)


# The most frequent N-grams of a text ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class FrequentNgrams:
    """The N-grams of one order that occur most often in a text, the most frequent first."""

    order: int
    """Tokens in each."""
    vocab_size: int
    """Number of canonical tokens."""
    canonical: np.ndarray
    """Canonical tokens, oldest first, the spec's fill where an N-gram sees nothing; int64 ``[K, order]``."""
    tokens: np.ndarray
    """Raw tokens of the first occurrence, oldest first, -1 where it sees nothing; int64 ``[K, order]``."""
    counts: np.ndarray
    """Number of positions at which each occurs, exact; int64 ``[K]``."""
    num_distinct: int
    """Distinct N-grams of this order in the text, including those that were not kept."""
    num_positions: int
    """Positions of the text that are alive and therefore have an N-gram."""

    @property
    def covered(self) -> float:
        """Share of the text's positions that have one of these N-grams."""
        return float(self.counts.sum()) / max(self.num_positions, 1)

    def first(self, number: int) -> "FrequentNgrams":
        """Return the most frequent of these N-grams, at most ``number``."""
        columns = {name: getattr(self, name)[:number] for name in ("canonical", "tokens", "counts")}
        return dataclasses.replace(self, **columns)

    def find(self, ngrams: np.ndarray) -> np.ndarray:
        """Return the place among these of each N-gram ``[n, order]``, -1 where it is none of them; int64 ``[n]``."""
        keys, places = self._sorted_keys
        wanted = ngram_keys(ngrams, self.vocab_size)
        if not len(keys):
            return np.full(len(wanted), -1, np.int64)
        near = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[near] == wanted, places[near], -1)

    @cached_property
    def _sorted_keys(self) -> tuple[np.ndarray, np.ndarray]:
        keys = ngram_keys(self.canonical, self.vocab_size)
        places = np.argsort(keys)
        return keys[places], places


def frequent_ngrams(
    spec: HashSpec,
    tokens: np.ndarray,
    *,
    num_ngrams: int,
    max_distinct: int = 1 << 22,
    on_progress: Callable[[int], None] = lambda num_tokens: None,
) -> dict[int, FrequentNgrams]:
    """Count the N-grams of a text, raw tokens ``[N]``, and return the most frequent of each order.

    Of equally frequent N-grams the one that occurs first comes first, so the result depends on the text alone. The text
    is read in pieces, so it may be memory-mapped; if it has more than ``max_distinct`` distinct N-grams, it is read
    again for the others, and the counts are exact all the same. ``on_progress`` is called with the number of tokens
    just read, which come to at least ``N * len(spec.orders)``.

    Raises:
        ConfigError: A number is not positive.
        DataError: There are no tokens.
        TokenError: A token is outside the vocabulary, or ``tokens`` is not one row of integers.

    Memory: three times ``max_distinct`` entries of a key, a count and a place (24 bytes, and 8 more for each further
    eight bytes that an N-gram's canonical tokens need), and a piece of 262,144 tokens.
    """
    check_whole(num_ngrams=num_ngrams, max_distinct=max_distinct)
    tokens = np.asanyarray(tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise TokenError(f"a text is one row of token ids [num_tokens], got {tokens.dtype} {list(tokens.shape)}")
    if not len(tokens):
        raise DataError("there are no tokens to count N-grams in; pass a longer text")
    return {order: _frequent(spec, tokens, order, num_ngrams, max_distinct, on_progress) for order in spec.orders}


def _frequent(
    spec: HashSpec,
    tokens: np.ndarray,
    order: int,
    num_ngrams: int,
    max_distinct: int,
    on_progress: Callable[[int], None],
) -> FrequentNgrams:
    best: list[NgramEntries] = []
    num_distinct = num_positions = 0
    parts = [(0, 0)]
    while parts:
        counter = NgramCounter(max_distinct, parts.pop())
        for keys, places, num_read in _pieces(spec, tokens, order):
            counter.add(keys, first={"place": places})
            on_progress(num_read)
        found = counter.entries()
        parts += counter.left_out
        num_distinct += len(found)
        num_positions += int(found.counts.sum())
        joined = NgramEntries.joined([*best, found])
        best = [joined.chosen(np.lexsort([joined.first["place"], -joined.counts])[:num_ngrams])]
    places = best[0].first["place"]
    codes, context = _codes(spec, tokens, places, 1)
    raw = tokens[(places[:, None] + np.arange(1 - order, 1)).clip(min=0)].astype(np.int64)
    unseen = ngrams_of(spec, codes, context, fill=-1)[:, 0, -order:] < 0
    return FrequentNgrams(
        order=order,
        vocab_size=spec.num_canonical,
        canonical=ngrams_of(spec, codes, context)[:, 0, -order:],
        tokens=np.where(unseen, -1, raw),
        counts=best[0].counts,
        num_distinct=num_distinct,
        num_positions=num_positions,
    )


def _pieces(spec: HashSpec, tokens: np.ndarray, order: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Keys and places of the living positions of a text, and the tokens read for them, piece by piece."""
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        stop = min(start + _CHUNK_TOKENS, len(tokens))
        ngrams, alive = seen_ngrams(spec, tokens, start, stop)
        yield ngram_keys(ngrams[alive, -order:], spec.num_canonical), np.flatnonzero(alive) + start, stop - start


def ngram_rows(spec: HashSpec, ngrams: FrequentNgrams, layer: int) -> np.ndarray:
    """Find the rows that N-grams read in a layer, one for each head of their order, int64 ``[K, heads]``.

    Raises:
        ConfigError: The layer has no memory.
    """
    spec.offsets(layer)
    # Codes of canonical tokens without a break. What is older than the N-gram does not reach its columns.
    codes = np.full((len(ngrams.canonical), spec.orders[-1]), -1, np.int64)
    codes[:, spec.orders[-1] - ngrams.order :] = ngrams.canonical * 4
    rows: np.ndarray = spec.rows_for_layers(codes[:, -1:], codes[:, :-1])[layer][:, 0]
    first = spec.orders.index(ngrams.order) * spec.num_heads
    return rows[:, first : first + spec.num_heads]
