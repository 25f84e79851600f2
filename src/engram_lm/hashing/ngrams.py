"""The most frequent N-grams of a text, as the hash sees them: exact counts in bounded memory."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np

from engram_lm.errors import ConfigError, DataError, TokenError
from engram_lm.hashing.rows import numpy_sight
from engram_lm.hashing.spec import HashSpec

__all__ = ["FrequentNgrams", "frequent_ngrams", "seen_ngrams"]

# Dimension key: N tokens of the text, n of them at a time, K N-grams kept, O tokens in an N-gram.

_CHUNK_TOKENS = 1 << 18
# Odd, with bits all over: the golden ratio as a fraction of 2**64.
_SCATTER = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True, eq=False)
class FrequentNgrams:
    """The N-grams of one order that occur most often in a text, from the most frequent on."""

    order: int
    """Tokens in each."""
    vocab_size: int
    """Canonical tokens there are."""
    canonical: np.ndarray
    """Canonical tokens, oldest first, the spec's fill where an N-gram sees nothing; int64 ``[K, order]``."""
    tokens: np.ndarray
    """Raw tokens of the first occurrence, oldest first, -1 where it sees nothing; int64 ``[K, order]``."""
    counts: np.ndarray
    """Positions at which each occurs, exact; int64 ``[K]``."""
    num_distinct: int
    """Distinct N-grams of this order in the text, those left out included."""
    num_positions: int
    """Positions of the text that are alive, so that have an N-gram."""

    @property
    def covered(self) -> float:
        """Share of the text's positions that have one of these N-grams."""
        return float(self.counts.sum()) / max(self.num_positions, 1)

    def find(self, ngrams: np.ndarray) -> np.ndarray:
        """Look N-grams up.

        Args:
            ngrams: Canonical tokens, oldest first, int64 ``[n, order]``.

        Returns:
            The place of each among these, -1 where it is none of them; int64 ``[n]``.
        """
        keys, places = self._sorted_keys
        wanted = _keys(ngrams, self.vocab_size)
        if not len(keys):
            return np.full(len(wanted), -1, np.int64)
        near = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[near] == wanted, places[near], -1)

    @cached_property
    def _sorted_keys(self) -> tuple[np.ndarray, np.ndarray]:
        keys = _keys(self.canonical, self.vocab_size)
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
    """Count the N-grams of a text, for each order of a hash, and keep the most frequent.

    An N-gram is what `HashSpec` hashes: canonical tokens, with the fill where a look-back is blocked by the start of
    the text, an end token or a dead token. A dead token's own position has none. Of equally frequent N-grams the one
    that occurs first goes first, so the result depends on the text alone.

    Args:
        spec: The hash, with its token map.
        tokens: Raw tokens of the text, integers ``[N]``; they are read in pieces, so a memory-mapped array will do.
        num_ngrams: How many to keep of each order.
        max_distinct: Distinct N-grams held at a time. Where there are more, the text is read again for the others,
            about once for every ``max_distinct`` distinct N-grams; the counts are exact all the same.
        on_progress: Called with the number of tokens just read; all orders and readings together come to at least
            ``N * len(spec.orders)``.

    Returns:
        Order to N-grams.

    Raises:
        ConfigError: A number that is not positive.
        DataError: There are no tokens.
        TokenError: A token is outside the vocabulary, or ``tokens`` is not one row of integers.
        TokenMapError: No token map is bound.

    Memory: three times ``max_distinct`` entries of a key, a count and a place (24 bytes, 8 more for each further eight
    bytes that an N-gram's canonical tokens need), and a piece of 262,144 tokens.
    """
    for name, value in (("num_ngrams", num_ngrams), ("max_distinct", max_distinct)):
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name} is a whole number from 1, got {value!r}")
    tokens = np.asanyarray(tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise TokenError(f"a text is one row of token ids [num_tokens], got {tokens.dtype} {list(tokens.shape)}")
    if not len(tokens):
        raise DataError("there are no tokens to count N-grams in; pass a longer text")
    return {order: _count(spec, tokens, order, num_ngrams, max_distinct, on_progress) for order in spec.orders}


def seen_ngrams(spec: HashSpec, tokens: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Find what some positions of a text see.

    Args:
        spec: The hash, with its token map.
        tokens: Raw tokens of the whole text, integers ``[N]``.
        start: First position asked for.
        stop: One past the last.

    Returns:
        Canonical tokens, oldest first, the fill where nothing is seen, int64 ``[stop - start, highest order]``: an
        N-gram of a lower order is its last columns. And whether each position is alive, bool ``[stop - start]``.

    Raises:
        TokenError: A token is outside the vocabulary.
        TokenMapError: No token map is bound.
    """
    codes = _codes(spec, tokens, np.array([start]), stop - start)
    sight = numpy_sight(spec, codes)
    return np.stack([seen[0] for seen in reversed(sight)], axis=1), codes[0, spec.context :] >= 0


def _codes(spec: HashSpec, tokens: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Codes of some stretches of a text and of the context before each, int64 [stretches, context + length]."""
    places = starts[:, None] + np.arange(-spec.context, length)
    codes: np.ndarray = spec.encode(np.asarray(tokens[places.clip(min=0)]))
    return np.where(places < 0, -1, codes)


def _count(
    spec: HashSpec,
    tokens: np.ndarray,
    order: int,
    num_ngrams: int,
    max_distinct: int,
    on_progress: Callable[[int], None],
) -> FrequentNgrams:
    nothing = np.zeros(0, np.int64)
    none = _Entries.of(_keys(nothing.reshape(0, order), spec.vocab_size), nothing)
    best = none
    num_distinct = num_positions = 0
    # Shares of the keys still to be counted: those whose scattered bits begin with `begins`, `num_bits` long.
    shares = [(0, 0)]
    while shares:
        num_bits, begins = shares.pop()
        held, waiting = none, list[_Entries]()
        for keys, first, num_read in _pieces(spec, tokens, order):
            inside = _share(keys, num_bits) == begins
            waiting.append(_Entries.of(keys[inside], first[inside]))
            on_progress(num_read)
            # Merged when they have become as many as those held: each entry is then sorted a few times only.
            if sum(len(entries.keys) for entries in waiting) < min(max(len(held.keys), _CHUNK_TOKENS), max_distinct):
                continue
            held, waiting = _Entries.joined([held, *waiting]), []
            while len(held.keys) > max_distinct and num_bits < 64:
                # Too many: go on with the half whose next bit is 0, and come back for the other.
                num_bits, begins = num_bits + 1, begins * 2
                shares.append((num_bits, begins + 1))
                held = held.chosen(_share(held.keys, num_bits) == begins)
        held = _Entries.joined([held, *waiting])
        num_distinct += len(held.keys)
        num_positions += int(held.counts.sum())
        best = _Entries.joined([best, held]).most_frequent(num_ngrams)
    codes = _codes(spec, tokens, best.first, 1)
    return FrequentNgrams(
        order=order,
        vocab_size=spec.vocab_size,
        canonical=_oldest_first(numpy_sight(spec, codes), order),
        tokens=_raw_tokens(spec, tokens, codes, best.first, order),
        counts=best.counts,
        num_distinct=num_distinct,
        num_positions=num_positions,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Entries:
    """Distinct N-grams with their counts and first positions."""

    keys: np.ndarray
    counts: np.ndarray
    first: np.ndarray

    @classmethod
    def of(cls, keys: np.ndarray, places: np.ndarray) -> "_Entries":
        """One entry for each distinct key; places ascend."""
        distinct, first, counts = np.unique(keys, return_index=True, return_counts=True)
        return cls(distinct, counts.astype(np.int64), places[first])

    @classmethod
    def joined(cls, parts: "list[_Entries]") -> "_Entries":
        """Add up what several hold, given in the order of the text."""
        parts = [part for part in parts if len(part.keys)] or parts[:1]
        if len(parts) == 1:
            return parts[0]
        keys = np.concatenate([part.keys for part in parts])
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        begins = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        counts = np.concatenate([part.counts for part in parts])[order]
        first = np.concatenate([part.first for part in parts])[order]
        # The sort is stable and later parts lie later in the text, so the first of equals is the first occurrence.
        return cls(keys[begins], np.add.reduceat(counts, begins), first[begins])

    def chosen(self, which: np.ndarray) -> "_Entries":
        return _Entries(self.keys[which], self.counts[which], self.first[which])

    def most_frequent(self, number: int) -> "_Entries":
        """The most frequent from the first on; of equals, those that occur first."""
        return self.chosen(np.lexsort([self.first, -self.counts])[:number])


def _pieces(spec: HashSpec, tokens: np.ndarray, order: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Keys and places of the living positions of a text, and the tokens read for them, piece by piece."""
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        stop = min(start + _CHUNK_TOKENS, len(tokens))
        ngrams, alive = seen_ngrams(spec, tokens, start, stop)
        yield _keys(ngrams[alive, -order:], spec.vocab_size), np.flatnonzero(alive) + start, stop - start


def _keys(ngrams: np.ndarray, vocab_size: int) -> np.ndarray:
    """Pack N-grams into something NumPy sorts: one integer where it holds all tokens, else bytes of fixed length."""
    num_bits = max(1, (vocab_size - 1).bit_length())
    in_word = min(64 // num_bits, ngrams.shape[1])
    words = []
    for begin in range(0, ngrams.shape[1], in_word):
        word = np.zeros(len(ngrams), np.uint64)
        for column in ngrams[:, begin : begin + in_word].T:
            word = (word << np.uint64(num_bits)) | column.astype(np.uint64)
        words.append(word)
    if len(words) == 1:
        return words[0]
    # Bytes that only end in other zeros would compare equal at unequal length; these are all of one length.
    return np.ascontiguousarray(np.stack(words, axis=1)).view(f"S{8 * len(words)}")[:, 0]


def _share(keys: np.ndarray, num_bits: int) -> np.ndarray:
    """First bits of each key once its bits are scattered, uint64."""
    if num_bits == 0:
        return np.zeros(len(keys), np.uint64)
    words = keys.view(np.uint64).reshape(len(keys), keys.dtype.itemsize // 8)
    scattered = np.zeros(len(keys), np.uint64)
    for word in words.T:
        # The high half comes down before the next product: a product carries bits upwards only.
        scattered = (scattered ^ (scattered >> np.uint64(32)) ^ word) * _SCATTER
    return scattered >> np.uint64(64 - num_bits)


def _oldest_first(sight: list[np.ndarray], order: int) -> np.ndarray:
    """What single positions see, int64 [K, 1] for each distance, as N-grams ``[K, order]``."""
    return np.stack([seen[:, 0] for seen in reversed(sight[:order])], axis=1)


def _raw_tokens(spec: HashSpec, tokens: np.ndarray, codes: np.ndarray, places: np.ndarray, order: int) -> np.ndarray:
    """Raw tokens of N-grams that end at some places, -1 where nothing is seen, int64 ``[K, order]``."""
    before = (places[:, None] + np.arange(-spec.context, 1)).clip(min=0)
    # In place of canonical tokens, raw ones above all canonical ones: what then is seen is no fill.
    raw = (tokens[before].astype(np.int64) + spec.vocab_size) * 4
    seen = _oldest_first(numpy_sight(spec, np.where(codes < 0, -1, raw | (codes & 3))), order)
    return np.where(seen < spec.vocab_size, -1, seen - spec.vocab_size)
