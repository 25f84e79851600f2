"""Rows are counted as by a dictionary, in bounded memory; collisions are those of pairs, compared one by one."""

import collections
import itertools
import json

import numpy as np
import pytest
import torch
from tests.adapt.small_models import TEXT, TOKENIZER, small_model
from tests.analysis.looking import row_use
from tests.small_model import BACKBONE, MEMORY

import engram_lm
from engram_lm.analysis import NotApplicable, RowUse, collision_study, find_subject, read_text
from engram_lm.analysis.rows.collisions import ngram_collisions
from engram_lm.analysis.rows.usage import HitCounter, RowHits, log_ranks, zipf_exponent
from engram_lm.errors import ConfigError, DataError, MismatchError, TokenError
from engram_lm.hashing import HashSpec, Segments, TokenMap
from engram_lm.hashing.counting import frequent_ngrams, ngram_rows
from engram_lm.tokenizing import text_tokens

LENGTH = 16
TOKENS = np.random.default_rng(0).permutation(text_tokens(TOKENIZER, TEXT))[:400]


def own_model(memory=True, segments=None, **changes):
    torch.manual_seed(0)
    config = engram_lm.EngramConfig(**{**MEMORY, **changes}) if memory else None
    config = engram_lm.EngramLMConfig.for_tokenizer(TOKENIZER, config, segments=segments, **BACKBONE)
    return engram_lm.EngramForCausalLM(config).eval()


def attached_model():
    model = small_model()
    engram_lm.attach(model, TOKENIZER, engram_lm.EngramConfig(**MEMORY))
    return model


def counts_of(spec, layer, tokens):
    """Row to reads, window by window, dead positions left out; and how many of those there are."""
    counts, num_dead = collections.Counter(), 0
    for start in range(0, len(tokens), LENGTH):
        window = tokens[start : start + LENGTH]
        alive = spec.encode(window[None])[0] >= 0
        counts.update(spec.rows(window, layer)[alive].flatten().tolist())
        num_dead += int((~alive).sum())
    return counts, num_dead


END, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
MODELS = {
    "own": own_model,
    "attached": attached_model,
    "shared table": lambda: own_model(tables="shared"),
    "segments": lambda: own_model(segments=Segments(end_tokens=(END,), dead_tokens=(PAD,))),
}


@pytest.mark.parametrize("kind", MODELS)
def test_hits_are_those_of_every_window_looked_up_alone(kind):
    model, tokens = MODELS[kind](), TOKENS.copy()
    tokens[50::70], tokens[33::90] = END, PAD
    subject = find_subject(model, TOKENIZER)
    spec = subject.spec
    usage = row_use(model, TOKENIZER, tokens, length=LENGTH)
    expected = {block: counts_of(spec, spec.layers[spec.blocks.index(block)], tokens)[0] for block in (0, 2)}
    num_dead = counts_of(spec, spec.layers[0], tokens)[1]
    assert (num_dead > 0) == (kind == "segments")
    assert (usage.blocks, usage.num_positions, usage.num_dead) == ((0, 2), 400 - num_dead, num_dead)
    for index, block in enumerate(usage.blocks):
        starts = np.cumsum([0, *usage.num_rows[index].flatten()])
        hit = [sum(start <= row < end for row in expected[block]) for start, end in itertools.pairwise(starts)]
        assert usage.num_rows_hit[index].flatten().tolist() == hit
        assert usage.occupancy_by_block[index] == len(expected[block]) / starts[-1]
    assert usage.tables == (((0, 2),) if kind == "shared table" else ((0,), (2,)))
    for index, blocks in enumerate(usage.tables):
        hot = sorted(sum((expected[block] for block in blocks), collections.Counter()).values(), reverse=True)
        assert usage.num_table_rows_hit[index] == len(hot)
        wanted = [hot[rank - 1] if rank <= len(hot) else 0 for rank in usage.ranks.tolist()]
        assert usage.hits[index].tolist() == wanted
        covered = np.array([sum(hot[:rank]) for rank in usage.ranks.tolist()]) / sum(hot)
        np.testing.assert_allclose(usage.covered[index], covered)
        assert usage.covered[index, -1] == 1
        # Reads divide evenly between the orders, and the hottest row is of one of them.
        assert usage.hits_by_order[index, :, 0].max() == hot[0]


def test_a_counter_within_its_budget_counts_alike_whether_it_holds_all_rows_or_those_that_were_read():
    rows = np.random.default_rng(1).zipf(1.3, 200_000) % 5000
    dense, sparse = HitCounter(5000, 40_000), HitCounter(10**15, 5000 * 48)
    for piece in np.split(rows, 40):
        dense.add(piece)
        sparse.add(piece)
    expected = np.unique(rows, return_counts=True)
    for hits in (dense.hits(), sparse.hits()):
        assert hits.share == 1
        np.testing.assert_array_equal([hits.rows, hits.counts], expected)


def test_a_counter_beyond_its_budget_keeps_exact_counts_of_a_random_share_of_the_rows():
    rows = np.random.default_rng(2).integers(0, 10**12, 20_000).repeat(3)
    np.random.default_rng(3).shuffle(rows)
    counter = HitCounter(10**12, 1000 * 48)
    for piece in np.split(rows, 60):
        counter.add(piece)
        assert len(counter.hits().rows) <= 1000
    hits = counter.hits()
    assert hits.share == 1 / 32
    assert set(hits.counts.tolist()) == {3}
    assert hits.num_rows_hit == pytest.approx(20_000, rel=0.15)
    ranks = np.array([1, 10_000, 40_000])
    counts, covered = hits.at_ranks(ranks)
    assert counts.tolist() == [3, 3, 0]
    assert covered[1] == pytest.approx(0.5, abs=0.08)
    whole = RowHits(*np.unique(rows, return_counts=True))
    both = RowHits.joined([whole, hits])
    assert both.share == hits.share
    assert set(both.counts.tolist()) == {6}


def test_the_exponent_of_hits_that_fall_as_a_power_of_the_rank_is_that_power():
    ranks = log_ranks(1000)
    assert (ranks[0], ranks[-1], len(set(ranks.tolist()))) == (1, 1000, len(ranks))
    assert zipf_exponent(ranks, np.rint(1e6 * ranks**-1.3).astype(int)) == pytest.approx(1.3, abs=0.01)
    # Rows of a handful of hits would flatten it.
    assert zipf_exponent(ranks, np.maximum(np.rint(3000 * ranks**-1.0), 1).astype(int)) == pytest.approx(1, abs=0.02)
    assert np.isnan(zipf_exponent(ranks, np.ones(len(ranks))))


def test_a_model_without_memory_is_left_out_and_the_others_are_read():
    subjects = [
        find_subject(own_model(), TOKENIZER, name="with"),
        find_subject(own_model(memory=False), TOKENIZER, name="without"),
    ]
    found = read_text(subjects, TOKENS, {"rows": RowUse(TOKENS)}, length=LENGTH)["rows"]
    assert list(found.models) == ["with"]
    assert found.left_out == {"without": "it has no memory"}
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))["models"]["with"]
    assert np.shape(values["occupancy"]) == (2, 2, 2)
    assert np.shape(values["collisions"]["by_head"]) == (2, 2, 2)
    none = read_text(subjects[1:], TOKENS, {"rows": RowUse()}, length=LENGTH)["rows"]
    assert none == NotApplicable("it has no memory")
    with pytest.raises(MismatchError, match="it has no memory"):
        row_use(subjects[1].model, TOKENIZER, TOKENS)
    with pytest.raises(DataError, match="no tokens"):
        row_use(subjects[0].model, TOKENIZER, "")
    with pytest.raises(ConfigError, match="min_count"):
        RowUse(min_count=0)


def test_ids_that_no_tokenizer_makes_are_counted_like_others():
    tokens = TOKENS.copy()
    tokens[5] = 310
    usage = row_use(attached_model(), TOKENIZER, tokens, length=LENGTH)
    assert usage.num_dead == 0 and usage.collisions is not None


def small_spec(rows_per_head, heads=2, **options):
    token_map = TokenMap.from_tokenizer(TOKENIZER)
    return HashSpec.build(
        token_map, layers=(0, 3), heads=heads, rows_per_head=rows_per_head, pad_token_id=PAD, **options
    )


@pytest.mark.parametrize("variant", ["demo", "longcat"])
def test_rows_of_an_ngram_are_those_read_where_it_occurs(variant):
    spec = small_spec(101, variant=variant, orders=(2, 4), segments=Segments(end_tokens=(END,), dead_tokens=(PAD,)))
    tokens = TOKENS.copy()
    tokens[50::70], tokens[33::90] = END, PAD
    counted, alive = frequent_ngrams(spec, tokens, num_ngrams=1000), spec.encode(tokens[None])[0] >= 0
    for layer in spec.layers:
        rows = spec.rows(tokens, layer)[alive].reshape(-1, 2, 2)
        for place, order in enumerate(spec.orders):
            found = ngram_rows(spec, counted[order], layer).repeat(counted[order].counts, axis=0)
            assert sorted(found.tolist()) == sorted(rows[:, place].tolist())


def test_collisions_are_those_of_frequent_ngrams_compared_pair_by_pair():
    spec = small_spec(23)
    counted = frequent_ngrams(spec, TOKENS, num_ngrams=60)
    found = ngram_collisions(spec, counted, min_count=3)
    for index, layer in enumerate(spec.layers):
        for place, order in enumerate(spec.orders):
            number = int((counted[order].counts >= 3).sum())
            assert found.num_ngrams[place] == number > 10
            rows = ngram_rows(spec, counted[order], layer)[:number]
            same = (rows[:, None] == rows[None]) & ~np.eye(number, dtype=bool)[..., None]
            np.testing.assert_allclose(found.by_head[index, place], same.any(1).mean(0))
            np.testing.assert_allclose(found.all_heads[index, place], same.all(2).any(1).mean())
            primes = np.array(spec.primes[index][2 * place : 2 * place + 2], float)
            expected = 1 - (1 - 1 / primes) ** (number - 1)
            np.testing.assert_allclose(found.expected_by_head[index, place], expected)
            expected = 1 - (1 - 1 / primes.prod()) ** (number - 1)
            np.testing.assert_allclose(found.expected_all_heads[index, place], expected)
    assert found.num_distinct.tolist() == [counted[order].num_distinct for order in spec.orders]
    never = ngram_collisions(spec, counted, min_count=10**6)
    assert np.isnan(never.by_head).all()
    assert never.to_dict()["all_heads"] == [[None, None], [None, None]]


def test_an_even_hash_collides_as_often_as_expected():
    tokens = np.random.default_rng(4).integers(0, 280, 40_000)
    study = collision_study(
        TokenMap.identity(300), tokens, rows_per_order=8192, heads=(1, 2), compression=(True,), min_count=1
    )
    assert (study.num_ngrams > 20_000).all()
    np.testing.assert_allclose(study.one_head, study.expected_one_head, atol=0.02)
    np.testing.assert_allclose(study.all_heads, study.expected_all_heads, rtol=0.1, atol=2e-3)


def test_heads_crowd_each_other_but_keep_ngrams_apart_and_compression_leaves_fewer_of_them():
    text = TEXT + TEXT.upper() + TEXT.title()
    tokens = np.random.default_rng(5).permutation(text_tokens(TOKENIZER, text))
    study = collision_study(TOKENIZER, tokens, rows_per_order=1024, heads=(1, 2, 4), min_count=2)
    assert study.one_head.shape == (2, 3, 2)
    assert (np.diff(study.one_head, axis=1) > 0).all()
    assert (np.diff(study.all_heads, axis=1)[:, 0] < 0).all()
    np.testing.assert_array_equal(study.one_head[:, 0], study.all_heads[:, 0])
    canonical, raw = study.num_distinct.tolist()
    assert study.vocab_size[0] < study.vocab_size[1] == len(TOKENIZER)
    for distinct, of in ((canonical, TokenMap.from_tokenizer(TOKENIZER).apply(tokens)), (raw, tokens)):
        # Beside those within the text, the first positions have one each that sees its start.
        wanted = [len(set(zip(*(of[s:] for s in range(order)), strict=False))) + order - 1 for order in (2, 3)]
        assert distinct == wanted
    assert canonical[0] < raw[0]
    json.dumps(study.to_dict(), allow_nan=False)


def test_a_study_that_cannot_be_is_refused():
    for options, message in (
        ({"rows_per_order": 15}, "at least two for each of 8 heads"),
        ({"rows_per_order": 100, "heads": ()}, "heads is empty"),
        ({"rows_per_order": 100, "heads": (0,)}, "heads are whole numbers"),
        ({"rows_per_order": 100, "min_count": 0}, "min_count"),
    ):
        with pytest.raises(ConfigError, match=message):
            collision_study(TOKENIZER, TOKENS, **options)
    with pytest.raises(ConfigError, match="does not tokenize"):
        collision_study(TokenMap.identity(300), "text", rows_per_order=100)
    with pytest.raises(TokenError):
        collision_study(TokenMap.identity(3), TOKENS, rows_per_order=100)
