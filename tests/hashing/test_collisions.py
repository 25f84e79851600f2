"""Collisions are counted exactly: against dictionaries filled one position at a time, and on published hashes."""

import collections

import numpy as np
import pytest
from tests.hashing.conftest import encode_plainly, rows_plainly

from engram_lm.errors import ConfigError, RowRangeError
from engram_lm.hashing import HashSpec
from engram_lm.hashing.codes import look_back_reference
from engram_lm.hashing.collisions import row_collisions
from engram_lm.hashing.counting import ngram_keys, ngrams_of


def some_text(spec, seed, shape):
    """Tokens of a small part of the vocabulary, so that N-grams repeat, with ends and dead ones among them."""
    generator = np.random.default_rng(seed)
    return generator.choice(np.array([3, 7, 2, 10, 11, 12, 13, 44]) % spec.num_tokens, shape)


def plain_ngrams(spec, tokens, mask=None, positions=None):
    """Per sequence and position, order to what the hash sees; None where the position is no text."""
    found = []
    for b, sequence in enumerate(tokens.tolist()):
        canonical, starts = encode_plainly(
            spec,
            sequence,
            None if mask is None else mask[b].tolist(),
            None if positions is None else positions[b].tolist(),
        )
        found.append(
            [
                None
                if canonical[t] is None
                else {
                    order: tuple(look_back_reference(canonical, starts, t, s, spec.fill) for s in range(order))
                    for order in spec.orders
                }
                for t in range(len(sequence))
            ]
        )
    return found


def plain_counts(spec, layer, tokens, besides=()):
    """Row to its set of N-grams and its number of positions."""
    left_out = {
        (order, ngram)
        for text in besides
        for position in plain_ngrams(spec, np.array([text]))[0]
        if position is not None
        for order, ngram in position.items()
    }
    ngrams, readings = plain_ngrams(spec, tokens), []
    for sequence, seen in zip(tokens.tolist(), ngrams, strict=True):
        for rows, position in zip(rows_plainly(spec, *encode_plainly(spec, sequence), layer), seen, strict=True):
            if position is not None:
                for column, row in enumerate(rows):
                    order = spec.orders[column // spec.num_heads]
                    readings.append((row, (order, position[order])))
    sets, counts = collections.defaultdict(set), collections.Counter()
    for row, ngram in readings:
        if ngram not in left_out:
            sets[row].add(ngram)
            counts[row] += 1
    return sets, counts


@pytest.mark.parametrize("extras", ["bare", "mask and positions"])
def test_two_positions_have_one_key_exactly_where_the_hash_sees_the_same_tokens(spec, extras):
    tokens = some_text(spec, 1, (3, 60))
    mask = positions = None
    if extras != "bare":
        generator = np.random.default_rng(2)
        mask = (generator.random(tokens.shape) > 0.2).astype(np.int64)
        positions = np.arange(60)[None].repeat(3, 0) % 17
    seen = plain_ngrams(spec, tokens, mask, positions)
    codes = spec.encode(tokens, mask, positions)
    ngrams = ngrams_of(spec, codes)
    known = {}
    for order in spec.orders:
        padded = np.where(np.arange(spec.orders[-1]) < spec.orders[-1] - order, -1, ngrams)
        for keys, name in (
            (ngram_keys(ngrams[..., -order:], spec.vocab_size), order),
            (ngram_keys(padded, spec.vocab_size), 0),
        ):
            assert keys.shape == tokens.shape
            for b, t in np.ndindex(*tokens.shape):
                assert (seen[b][t] is None) == (codes[b, t] == -1)
                if seen[b][t] is not None:
                    ngram = (name, order, seen[b][t][order])
                    assert known.setdefault(ngram, keys[b, t]) == keys[b, t]
    for name in (0, *spec.orders):
        keys = [key for ngram, key in known.items() if ngram[0] == name]
        assert len(set(keys)) == len(keys)


def test_rows_are_counted_as_by_a_dictionary(spec):
    tokens, besides = some_text(spec, 3, (2, 300)), [some_text(spec, 4, 9), some_text(spec, 5, 4)]
    for layer in spec.layers:
        for options in ({}, {"besides": besides}):
            sets, counts = plain_counts(spec, layer, tokens, **options)
            found = row_collisions(spec, layer, tokens, **options)
            assert found.rows.tolist() == sorted(sets)
            assert found.num_ngrams.tolist() == [len(sets[row]) for row in sorted(sets)]
            assert found.num_positions.tolist() == [counts[row] for row in sorted(sets)]
            orders = [{order for order, _ in sets[row]} for row in sorted(sets)]
            assert [{order} for order in found.orders.tolist()] == orders
            wanted = [int(found.rows[-1]), 0, 1, int(found.rows[0])]
            some = row_collisions(spec, layer, tokens, wanted, **options)
            assert some.rows.tolist() == wanted
            assert some.num_ngrams.tolist() == [len(sets[row]) for row in wanted]
            assert some.num_positions.tolist() == [counts[row] for row in wanted]


def test_published_row_numbers_are_those_that_are_counted(golden):
    file = golden["qwen_ple"]
    spec = HashSpec.from_config(file["config"])
    for layer, published in file["layers"].items():
        counts = collections.Counter(row for position in published["rows"][0] for row in position)
        found = row_collisions(spec, int(layer), file["ids"])
        assert dict(zip(found.rows.tolist(), found.num_positions.tolist(), strict=True)) == counts
        # So few N-grams share no row of 20,000.
        assert set(found.num_ngrams.tolist()) == {1}
        padding = row_collisions(spec, int(layer), file["ids"], [spec.num_rows(int(layer)) - 1])
        assert (padding.orders.tolist(), padding.heads.tolist(), padding.num_ngrams.tolist()) == ([0], [-1], [0])


def test_what_is_not_there_is_refused_and_an_empty_text_reads_nothing(specs):
    spec = specs["demo"]
    with pytest.raises(ConfigError, match=r"layer 2 has no memory.*1, 4"):
        row_collisions(spec, 2, [1, 2])
    with pytest.raises(RowRangeError, match=f"row {spec.num_rows(1)} is outside the table of layer 1"):
        row_collisions(spec, 1, [1, 2], [0, spec.num_rows(1)])
    empty = row_collisions(spec, 1, np.zeros(0, np.int64), [5])
    assert (empty.num_ngrams.tolist(), empty.num_positions.tolist()) == ([0], [0])
    assert len(row_collisions(spec, 1, np.zeros(0, np.int64)).rows) == 0
