"""Collisions among the frequent N-grams of a text, beside what a perfectly even hash would give; no model needed."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engram_lm.analysis.protocol import PlainResult
from engram_lm.analysis.subject import Subject
from engram_lm.errors import ConfigError, check_whole
from engram_lm.hashing import HashSpec, TokenMap
from engram_lm.hashing.counting import FrequentNgrams, frequent_ngrams, ngram_rows
from engram_lm.tokenizing import text_tokens


class TextNgrams:
    """Counts the N-grams of a text when they are first asked for, once for each way of telling N-grams apart.

    Args:
        tokens: The text, raw tokens, integers ``[num_tokens]``; a memory-mapped array will do.
        max_ngrams: N-grams of each order that are kept, the most frequent ones.
    """

    def __init__(self, tokens: Any, *, max_ngrams: int = 1 << 16) -> None:
        self.tokens, self.max_ngrams = np.asanyarray(tokens), max_ngrams
        self._counted: dict[Any, dict[int, FrequentNgrams]] = {}

    @classmethod
    def of(cls, subject: Subject, text: Any, max_ngrams: int = 1 << 16) -> "TextNgrams":
        """Take a text, its tokens, or what this call returned for them before."""
        if isinstance(text, TextNgrams):
            return text
        return cls(text_tokens(subject.tokenizer, text) if isinstance(text, str) else text, max_ngrams=max_ngrams)

    def frequent(self, spec: HashSpec, num_ngrams: int | None = None) -> Mapping[int, FrequentNgrams]:
        """Return the most frequent N-grams of each order, ``num_ngrams`` or all that are kept.

        Two hashes that see the same N-grams and differ only in their rows share one count. Raises `DataError` if the
        text has no tokens, and `TokenError` if one is outside the vocabulary.
        """
        key = (spec.orders, spec.token_map_digest, spec.fill, spec.segments)
        if key not in self._counted:
            self._counted[key] = frequent_ngrams(spec, self.tokens, num_ngrams=self.max_ngrams)
        return {order: ngrams.first(num_ngrams or self.max_ngrams) for order, ngrams in self._counted[key].items()}


# Dimension key: G blocks with memory, O orders, K heads of one order, N N-grams; C token maps, T choices of heads.


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class NgramCollisions(PlainResult):
    """How many of the frequent N-grams of a text share rows. A share of no N-grams is NaN (None in `to_dict`).

    Shares are of distinct N-grams, and only frequent N-grams count as colliding: those that occur once or twice share
    rows with everything and hardly train them.
    """

    blocks: tuple[int, ...]
    """Blocks that read memory, counted from 0: axis G."""
    orders: tuple[int, ...]
    """N-gram orders: axis O."""
    min_count: int
    """The least number of positions at which a frequent N-gram occurs."""
    num_ngrams: np.ndarray
    """Number of frequent N-grams, int64 ``[O]``."""
    num_distinct: np.ndarray
    """Number of distinct N-grams of the text, frequent or not, int64 ``[O]``."""
    covered: np.ndarray
    """Share of the text's positions that have a frequent N-gram, float64 ``[O]``."""
    by_head: np.ndarray
    """Share of the frequent N-grams whose row another one reads too, head by head, float64 ``[G, O, K]``."""
    expected_by_head: np.ndarray
    """The same share for an even hash, on average, float64 ``[G, O, K]``."""
    all_heads: np.ndarray
    """Share of the frequent N-grams that another one meets in all heads of the order, so that the two read the same
    rows and cannot be told apart, float64 ``[G, O]``."""
    expected_all_heads: np.ndarray
    """The same share for even and independent heads, on average, float64 ``[G, O]``."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class CollisionStudy(PlainResult):
    """What token compression and the number of heads do to collisions. Made by `collision_study`.

    More heads on the same rows make each head more crowded, but leave fewer N-grams confused in all of them.
    """

    orders: tuple[int, ...]
    """N-gram orders: axis O."""
    heads: tuple[int, ...]
    """Heads per order: axis T."""
    compression: tuple[bool, ...]
    """Whether canonical tokens are hashed (True) or raw ones: axis C."""
    rows_per_order: int
    """Rows that all heads of one order have together, approximately: the rows of each head are a prime number."""
    min_count: int
    """The least number of positions at which a frequent N-gram occurs."""
    num_tokens: int
    """Tokens of the text."""
    vocab_size: np.ndarray
    """Number of different tokens that are hashed, int64 ``[C]``."""
    num_distinct: np.ndarray
    """Number of distinct N-grams of the text, int64 ``[C, O]``."""
    num_ngrams: np.ndarray
    """Number of frequent ones among them, int64 ``[C, O]``."""
    covered: np.ndarray
    """Share of the text's positions that have a frequent N-gram, float64 ``[C, O]``."""
    one_head: np.ndarray
    """Share of the frequent N-grams whose row another one reads too, mean over heads, float64 ``[C, T, O]``."""
    expected_one_head: np.ndarray
    """The same share for an even hash, float64 ``[C, T, O]``."""
    all_heads: np.ndarray
    """Share of the frequent N-grams that another one meets in all heads, float64 ``[C, T, O]``."""
    expected_all_heads: np.ndarray
    """The same share for even and independent heads, float64 ``[C, T, O]``."""


def ngram_collisions(spec: HashSpec, ngrams: Mapping[int, FrequentNgrams], *, min_count: int = 2) -> NgramCollisions:
    """Count the collisions among N-grams that occur at ``min_count`` positions or more.

    The N-grams, by order, come from `engram_lm.hashing.counting.frequent_ngrams` with a hash of the same orders, token
    map and segments. No others are compared.
    """
    check_whole(min_count=min_count)
    frequent = [ngrams[order].first(int((ngrams[order].counts >= min_count).sum())) for order in spec.orders]
    shape = (len(spec.layers), len(spec.orders), spec.num_heads)
    heads = {name: np.full(shape, np.nan) for name in ("by_head", "expected_by_head")}
    whole = {name: np.full(shape[:2], np.nan) for name in ("all_heads", "expected_all_heads")}
    for index, layer in enumerate(spec.layers):
        for place, some in enumerate(frequent):
            if number := len(some.counts):
                rows, first = ngram_rows(spec, some, layer), place * spec.num_heads
                log_primes = np.log(np.array(spec.primes[index][first : first + spec.num_heads], np.float64))
                heads["by_head"][index, place] = [_met(column) for column in rows.T]
                heads["expected_by_head"][index, place] = [_expected(number, one) for one in log_primes]
                whole["all_heads"][index, place] = _met(rows)
                whole["expected_all_heads"][index, place] = _expected(number, float(log_primes.sum()))
    return NgramCollisions(
        blocks=spec.blocks,
        orders=spec.orders,
        min_count=min_count,
        num_ngrams=np.array([len(some.counts) for some in frequent]),
        num_distinct=np.array([some.num_distinct for some in frequent]),
        covered=np.array([some.covered for some in frequent]),
        **heads,
        **whole,
    )


def collision_study(
    tokenizer: Any,
    text: Any,
    *,
    rows_per_order: int,
    orders: Sequence[int] = (2, 3),
    heads: Sequence[int] = (1, 2, 4, 8),
    compression: Sequence[bool] = (True, False),
    min_count: int = 2,
) -> CollisionStudy:
    """Measure on a text what token compression and the number of heads do to collisions, at one budget of rows.

    Args:
        tokenizer: A fast Hugging Face tokenizer, or a `TokenMap`.
        text: Raw tokens, integers ``[num_tokens]``; with a tokenizer also a text; or a `TextNgrams`.
        rows_per_order: Rows of one order over all its heads.
        orders: N-gram orders, ascending.
        heads: Numbers of heads per order to compare.
        compression: Whether to hash canonical tokens (True), raw tokens (False), or one after the other.
        min_count: Compare N-grams that occur at this many positions or more.

    Raises:
        ConfigError: There are fewer rows than two for each head, or another number is impossible.
        DataError: The text has no tokens.
        TokenError: A token is outside the vocabulary.

    Example:
        >>> study = collision_study(tokenizer, text, rows_per_order=1 << 16)  # doctest: +SKIP
        >>> study.all_heads[:, :, -1]  # [compression, heads] of the highest order  # doctest: +SKIP
    """
    compared = {"heads": heads, "compression": compression, "orders": orders}
    if empty := [name for name, values in compared.items() if not len(values)]:
        raise ConfigError(f"there is nothing to compare: {empty[0]} is empty; pass at least one value")
    if any(type(number) is not int or number < 1 for number in heads):
        raise ConfigError(f"heads are whole numbers from 1, got {list(heads)}")
    if type(rows_per_order) is not int or rows_per_order < 2 * max(heads):
        raise ConfigError(
            f"rows_per_order is a whole number, at least two for each of {max(heads)} heads, got {rows_per_order!r}"
        )
    if isinstance(text, str):
        if isinstance(tokenizer, TokenMap):
            raise ConfigError("a TokenMap does not tokenize text; pass the tokenizer, or token ids")
        text = text_tokens(tokenizer, text)
    ngrams = text if isinstance(text, TextNgrams) else TextNgrams(text)
    token_map = tokenizer if isinstance(tokenizer, TokenMap) else TokenMap.from_tokenizer(tokenizer)
    maps = [token_map if compressed else TokenMap.identity(token_map.num_tokens) for compressed in compression]
    found: list[list[NgramCollisions]] = []
    for used in maps:
        specs = [
            HashSpec.build(
                used, layers=(0,), orders=orders, heads=number, rows_per_head=rows_per_order // number,
                pad_token_id=getattr(tokenizer, "pad_token_id", None) or 0,
            )
            for number in heads
        ]  # fmt: skip
        # What an N-gram is does not depend on the heads.
        counted = ngrams.frequent(specs[0])
        found.append([ngram_collisions(spec, counted, min_count=min_count) for spec in specs])

    measures = {"one_head": "by_head", "all_heads": "all_heads"}
    measures |= {f"expected_{name}": f"expected_{measure}" for name, measure in measures.items()}
    by_heads = {
        # The mean over the heads of an order; what belongs to all of them has no such axis.
        name: np.array([[getattr(one, of)[0].reshape(len(orders), -1).mean(-1) for one in row] for row in found])
        for name, of in measures.items()
    }
    by_map = {
        name: np.array([getattr(row[0], name) for row in found]) for name in ("num_distinct", "num_ngrams", "covered")
    }
    return CollisionStudy(
        orders=tuple(orders),
        heads=tuple(heads),
        compression=tuple(bool(value) for value in compression),
        rows_per_order=rows_per_order,
        min_count=min_count,
        num_tokens=len(ngrams.tokens),
        vocab_size=np.array([len(used) for used in maps]),
        **by_map,
        **by_heads,
    )


def _met(rows: np.ndarray) -> float:
    """Share of entries ``[N]`` or ``[N, K]`` that another one equals."""
    counts = np.unique(rows, axis=0, return_counts=True)[1]
    return float(counts[counts > 1].sum() / len(rows))


def _expected(number: int, log_places: float) -> float:
    """Chance that at least one of the others falls on the same of exp(log_places) places."""
    if number == 1:
        return 0.0
    chance = np.exp(-log_places)
    return 1.0 if chance >= 1 else float(-np.expm1((number - 1) * np.log1p(-chance)))
