"""The most frequent N-grams of a text: against a dictionary, in pieces, and with little memory."""

import collections

import numpy as np
import pytest
from tests.hashing.conftest import encode_plainly, small_map

from engram_lm.errors import ConfigError, DataError, TokenError
from engram_lm.hashing import HashSpec, TokenMap, counting
from engram_lm.hashing.codes import look_back_reference
from engram_lm.hashing.counting import NgramCounter, frequent_ngrams, seen_ngrams


def text(spec, num_tokens, seed=0):
    """Tokens of very unequal frequency, with ends and dead ones among them."""
    generator = np.random.default_rng(seed)
    tokens = (generator.random(num_tokens) ** 3 * spec.num_tokens).astype(np.uint16)
    return np.where(generator.random(num_tokens) < 0.1, 9, tokens)


def counted_with_a_dictionary(spec, tokens, order):
    """Counts, first places and the first occurrence's raw tokens of every N-gram."""
    canonical, starts = encode_plainly(spec, tokens.tolist())
    counts, first = collections.Counter(), {}
    for t, token in enumerate(canonical):
        if token is None:
            continue
        seen = tuple(look_back_reference(canonical, starts, t, s, spec.fill) for s in reversed(range(order)))
        counts[seen] += 1
        if seen not in first:
            blind = [look_back_reference(canonical, starts, t, s, -1) < 0 for s in reversed(range(order))]
            raw = [-1 if hidden else int(tokens[t - s]) for s, hidden in zip(reversed(range(order)), blind)]
            first[seen] = (t, raw)
    return counts, first


def test_counts_and_raw_tokens_are_those_of_a_dictionary_over_the_plain_hash(spec):
    tokens = text(spec, 700)
    found = frequent_ngrams(spec, tokens, num_ngrams=60)
    assert list(found) == list(spec.orders)
    for order, ngram in found.items():
        counts, first = counted_with_a_dictionary(spec, tokens, order)
        best = sorted(counts, key=lambda seen: (-counts[seen], first[seen][0]))[:60]
        assert [tuple(row) for row in ngram.canonical.tolist()] == best
        assert ngram.counts.tolist() == [counts[seen] for seen in best]
        assert ngram.tokens.tolist() == [first[seen][1] for seen in best]
        assert (ngram.num_distinct, ngram.num_positions) == (len(counts), sum(counts.values()))
        assert ngram.covered == sum(counts[seen] for seen in best) / sum(counts.values())


def test_pieces_and_little_memory_change_nothing(spec, monkeypatch):
    tokens = text(spec, 900)
    whole = frequent_ngrams(spec, tokens, num_ngrams=40)
    monkeypatch.setattr(counting, "_CHUNK_TOKENS", 97)
    read = []
    pieces = frequent_ngrams(spec, tokens, num_ngrams=40, max_distinct=20, on_progress=read.append)
    for order, expected in whole.items():
        for name in ("canonical", "tokens", "counts", "num_distinct", "num_positions"):
            np.testing.assert_array_equal(getattr(pieces[order], name), getattr(expected, name))
    assert sum(read) > len(tokens) * len(spec.orders)  # there was more than fits, so the text was read again


def test_no_more_is_held_than_was_allowed(monkeypatch):
    spec = HashSpec.build(TokenMap.identity(1000), layers=(0,), orders=(2,), heads=1, rows_per_head=9, pad_token_id=0)
    monkeypatch.setattr(counting, "_CHUNK_TOKENS", 64)
    held, joined = [], counting.NgramEntries.joined

    def watched(parts):
        held.append(sum(len(part) for part in parts))
        return joined(parts)

    monkeypatch.setattr(counting.NgramEntries, "joined", watched)
    frequent_ngrams(spec, np.random.default_rng(0).integers(0, 1000, 5000), num_ngrams=5, max_distinct=200)
    assert max(held) <= 3 * 200


@pytest.mark.parametrize("num_tokens", [2, 50, 1 << 17, 1 << 33])
def test_ngrams_are_found_again_however_many_bytes_they_take(num_tokens):
    generator = np.random.default_rng(1)
    known = generator.integers(0, num_tokens, (300, 5))
    known[:3] = [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
    known = np.unique(known, axis=0)
    generator.shuffle(known)
    found = counting.FrequentNgrams(5, num_tokens, known, known, np.ones(len(known), np.int64), len(known), 0)
    np.testing.assert_array_equal(found.find(known), np.arange(len(known)))
    others = generator.integers(0, num_tokens, (200, 5))
    place = {tuple(row): index for index, row in enumerate(known.tolist())}
    np.testing.assert_array_equal(found.find(others), [place.get(tuple(row), -1) for row in others.tolist()])


def test_what_positions_see_does_not_depend_on_where_a_piece_begins(spec):
    tokens = text(spec, 60)
    whole, alive = seen_ngrams(spec, tokens, 0, 60)
    for start, stop in [(0, 1), (1, 7), (59, 60), (20, 55)]:
        part, living = seen_ngrams(spec, tokens, start, stop)
        np.testing.assert_array_equal(part, whole[start:stop])
        np.testing.assert_array_equal(living, alive[start:stop])


def test_what_cannot_be_counted_is_refused():
    spec = HashSpec.build(small_map(), layers=(0,), heads=1, rows_per_head=9, pad_token_id=0)
    with pytest.raises(DataError, match="no tokens"):
        frequent_ngrams(spec, np.zeros(0, np.int64), num_ngrams=3)
    with pytest.raises(ConfigError, match="num_ngrams"):
        frequent_ngrams(spec, np.zeros(4, np.int64), num_ngrams=0)
    with pytest.raises(TokenError, match="one row"):
        frequent_ngrams(spec, np.zeros((2, 2), np.int64), num_ngrams=3)
    with pytest.raises(TokenError, match="50"):
        frequent_ngrams(spec, np.array([1, 50]), num_ngrams=3)


def counter_of(keys, max_distinct, step):
    counter = NgramCounter(max_distinct)
    for start in range(0, len(keys), step):
        part = keys[start : start + step]
        even, weights = (part % np.uint64(2) == 0).astype(np.int64), (part % np.uint64(97)).astype(float)[:, None]
        counter.add(part, sums={"even": even, "weights": weights})
    return counter


def test_a_bounded_counter_keeps_a_sample_of_the_ngrams_and_each_of_them_exactly():
    generator = np.random.default_rng(3)
    distinct = generator.integers(0, 2**64, 20_000, dtype=np.uint64, endpoint=False)
    keys = distinct[generator.zipf(1.3, 60_000) % 20_000]
    whole, bounded = counter_of(keys, 1 << 20, 700), counter_of(keys, 1000, 700)
    exact, sample = whole.entries(), bounded.entries()
    assert (whole.share, len(exact)) == (1, len(np.unique(keys)))
    assert 200 < len(sample) <= 1000
    assert len(sample) / bounded.share == pytest.approx(len(exact), rel=0.15)
    places = np.searchsorted(exact.keys, sample.keys)
    np.testing.assert_array_equal(exact.keys[places], sample.keys)
    for name in ("counts", "even", "weights"):
        np.testing.assert_array_equal(sample.sums[name], exact.sums[name][places])
    assert exact.counts.sum() == 60_000
    np.testing.assert_array_equal(exact.sums["weights"][:, 0], exact.counts * (exact.keys % np.uint64(97)))
