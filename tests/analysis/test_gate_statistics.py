"""Averages of gates over a long text are those of its positions, looked at one by one."""

import collections
import json

import numpy as np
import pytest
import torch
from tests.adapt.small_models import TEXT, TOKENIZER, small_model
from tests.adapt.test_vocabularies import holes
from tests.analysis.looking import average_gates
from tests.small_model import BACKBONE, MEMORY, VARIANTS

import engram_lm
from engram_lm.analysis import GateStatistics, NotApplicable, find_subject, gate_trace, read_text
from engram_lm.analysis.gates.averages import TOKEN_CLASSES, token_classes
from engram_lm.errors import ConfigError, DataError, MismatchError
from engram_lm.hashing import Segments
from engram_lm.tokenizing import text_tokens

LENGTH = 16
TOKENS = np.random.default_rng(0).permutation(text_tokens(TOKENIZER, TEXT))[:400]


def own_model(variant="plain", memory=True, segments=None, **changes):
    torch.manual_seed(0)
    backbone, more = VARIANTS[variant]
    config = engram_lm.EngramConfig(**{**MEMORY, **more, **changes}) if memory else None
    model = engram_lm.EngramForCausalLM(
        engram_lm.EngramLMConfig.for_tokenizer(TOKENIZER, config, segments=segments, **{**BACKBONE, **backbone})
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".memory." in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.7)
    return model


def attached_model():
    model = small_model()
    engram_lm.attach(model, TOKENIZER, engram_lm.EngramConfig(**MEMORY))
    return model


@pytest.fixture(scope="module")
def traced():
    """A model of four streams, its averages, and the same text position by position."""
    end = TOKENIZER.eos_token_id
    model = own_model("streams", segments=Segments(end_tokens=(end,), dead_tokens=(TOKENIZER.pad_token_id,)))
    tokens = TOKENS.copy()
    tokens[50::70], tokens[33::90] = end, TOKENIZER.pad_token_id
    trace = gate_trace(model, TOKENIZER, tokens, length=LENGTH)
    return model, tokens, trace, average_gates(model, TOKENIZER, tokens, length=LENGTH, min_count=1, num_ngrams=10_000)


def fired_by_position(trace, block):
    """Position to the N-gram that fired there."""
    found = ((place, trace.fired(block, place)) for place in range(len(trace.tokens)))
    return {place: ngram for place, ngram in found if ngram is not None}


def test_mean_spread_and_histogram_are_those_of_the_living_positions(traced):
    _, _, trace, averages = traced
    gates = trace.gates[:, trace.visible > 0].astype(np.float64)
    assert (averages.blocks, averages.orders) == ((0, 2), (2, 3))
    assert averages.num_positions == gates.shape[1] == len(trace.tokens) - averages.num_dead
    assert averages.num_dead == 5 and averages.num_not_finite == 0
    np.testing.assert_allclose(averages.mean, gates.mean(1), atol=1e-6)
    np.testing.assert_allclose(averages.std, gates.std(1), atol=1e-6)
    for block in range(2):
        for stream in range(4):
            expected = np.histogram(gates[block, :, stream], averages.bin_edges)[0]
            assert np.abs(averages.histogram[block, stream] - expected).sum() <= 2  # a gate on an edge


def test_averages_by_order_are_over_the_positions_where_that_order_fired(traced):
    _, _, trace, averages = traced
    for index, block in enumerate(trace.blocks):
        fired = fired_by_position(trace, block)
        for place, order in enumerate(trace.orders):
            there = [position for position, ngram in fired.items() if ngram.order == order]
            assert averages.order_positions[index, place] == len(there) > 0
            np.testing.assert_allclose(averages.by_order[index, place], trace.gates[index, there].mean(0), atol=1e-6)


def canonical_ngrams(model, trace):
    """Count the N-grams of all orders as the hash sees them: by order and canonical tokens."""
    canonical = model.hash_spec.token_map.apply(trace.tokens)

    def ngram(position, order):
        return (order, *canonical[position + 1 - min(order, trace.visible[position]) : position + 1].tolist())

    alive = np.flatnonzero(trace.visible)
    return ngram, collections.Counter(ngram(position, order) for position in alive for order in trace.orders)


def test_averages_by_frequency_count_an_ngram_wherever_it_is_looked_up(traced):
    model, _, trace, averages = traced
    ngram, counts = canonical_ngrams(model, trace)
    for index, block in enumerate(trace.blocks):
        classes = collections.defaultdict(list)
        for position, fired in fired_by_position(trace, block).items():
            count = counts[ngram(position, fired.order)]
            classes[0 if count == 1 else 1 if count < 10 else 2].append(trace.gates[index, position])
        assert set(classes) == {0, 1, 2}
        for place, gates in classes.items():
            assert averages.frequency_positions[index, place] == len(gates)
            np.testing.assert_allclose(averages.by_frequency[index, place], np.mean(gates, 0), atol=1e-6)
        assert np.isnan(averages.by_frequency[index, 3:]).all()


def test_ngrams_are_listed_by_the_gate_they_open(traced):
    model, _, trace, averages = traced
    ngram, _ = canonical_ngrams(model, trace)
    for index, block in enumerate(trace.blocks):
        gates = collections.defaultdict(list)
        for position, fired in fired_by_position(trace, block).items():
            gates[ngram(position, fired.order)].append(trace.gates[index, position].mean())
        expected = sorted((np.mean(values), len(values)) for values in gates.values())[::-1]
        found = [(item.mean_gate, item.num_positions) for item in averages.ngrams[index]]
        np.testing.assert_allclose(found, expected, atol=1e-6)
        best = max(gates, key=lambda key: np.mean(gates[key]))
        assert averages.ngrams[index][0].order == best[0]
    assert averages.ngram_share == 1


def test_an_ngram_is_listed_once_with_the_text_of_its_first_occurrence():
    model = own_model(orders=(2,), memory_dim=8)
    ngrams = average_gates(model, TOKENIZER, ";R;r;R", length=99, min_count=2).ngrams
    assert [{(item.text, item.num_positions) for item in items} for items in ngrams] == [{(";R", 3), ("R;", 2)}] * 2


def test_averages_by_token_go_over_kinds_and_over_tenths_of_the_vocabulary_in_use(traced):
    _, _, trace, averages = traced
    alive = np.flatnonzero(trace.visible)
    classes = token_classes(TOKENIZER, trace.tokens)
    for place in range(len(TOKEN_CLASSES)):
        there = alive[classes[alive] == place]
        assert averages.token_class_positions[place] == len(there)
        if len(there):
            expected = trace.gates[:, there].mean(1)
            np.testing.assert_allclose(averages.by_token_class[:, place], expected, atol=1e-6)
    counts = collections.Counter(trace.tokens[alive].tolist())
    ranked = sorted(counts, key=lambda token: (-counts[token], token))
    first = [token for rank, token in enumerate(ranked) if rank * 10 // len(ranked) == 0]
    there = alive[np.isin(trace.tokens[alive], first)]
    assert averages.token_frequency_positions[0] == len(there) == averages.token_frequency_positions.max()
    np.testing.assert_allclose(averages.by_token_frequency[:, 0], trace.gates[:, there].mean(1), atol=1e-6)
    assert averages.token_frequency_positions.sum() == averages.num_positions


def test_tokens_are_told_apart_by_what_they_are_made_of():
    texts = ["cat", "é", "7", ";", "\n", "<|pad|>"]
    ids = [TOKENIZER(text).input_ids for text in texts]
    found = token_classes(TOKENIZER, [token[0] for token in ids] + [10_000])
    names = [TOKEN_CLASSES[place] for place in found]
    assert names == ["letters", "other", "digits", "punctuation", "space", "other", "other"]  # é is two bytes


def test_tokens_behind_holes_of_a_vocabulary_have_classes_too():
    found = token_classes(holes(word=400), [300, 305, 400, 401])
    assert [TOKEN_CLASSES[place] for place in found] == ["other", "other", "letters", "other"]


@pytest.mark.parametrize("make", [lambda: own_model("single"), attached_model], ids=["single fusion", "attached"])
def test_results_do_not_depend_on_how_many_windows_are_read_at_once(make):
    subject = find_subject(make(), TOKENIZER)
    alone, together = (
        read_text([subject], TOKENS, {"it": GateStatistics()}, length=LENGTH, max_batch_size=size)["it"].to_dict()
        for size in (1, 9)
    )
    (alone,), (together,) = alone["models"].values(), together["models"].values()
    for name in ("mean", "by_order", "by_frequency", "by_token_class", "by_token_frequency"):
        assert np.array(together[name], float) == pytest.approx(np.array(alone[name], float), abs=1e-6, nan_ok=True)
    assert alone["order_positions"] == together["order_positions"]


def test_positions_that_are_not_finite_are_left_out_and_counted():
    model = own_model()
    rows = model.hash_spec.rows(TOKENS[None, :LENGTH], 2)[0]
    with torch.no_grad():
        model.model.memory_tables["2"].weight[int(rows[5, 0])] = torch.nan
    averages = average_gates(model, TOKENIZER, TOKENS, length=LENGTH)
    trace = gate_trace(model, TOKENIZER, TOKENS, length=LENGTH)
    finite = np.isfinite(trace.gates).all((0, 2))
    assert averages.num_not_finite == (~finite).sum() > 0
    assert averages.num_positions == finite.sum() > 0
    np.testing.assert_allclose(averages.mean, trace.gates[:, finite].mean(1), atol=1e-6)
    assert (
        averages.order_positions.sum(1).tolist() == averages.frequency_positions.sum(1).tolist() == [finite.sum()] * 2
    )


def test_models_without_gates_are_left_out_and_named():
    subjects = [
        find_subject(own_model(), TOKENIZER, name="with"),
        find_subject(own_model(memory=False), TOKENIZER, name="twin"),
        find_subject(own_model(gate="none"), TOKENIZER, name="open"),
    ]
    found = read_text(subjects, TOKENS, {"gates": GateStatistics()}, length=LENGTH)["gates"]
    assert list(found.models) == ["with"]
    assert found.left_out == {"twin": "it has no memory", "open": "its memory is not gated"}
    nothing = read_text(subjects[1:], TOKENS, {"gates": GateStatistics()}, length=LENGTH)["gates"]
    assert nothing == NotApplicable("twin: it has no memory; open: its memory is not gated")
    with pytest.raises(MismatchError, match="does not apply to LlamaForCausalLM: it has no memory"):
        average_gates(small_model(), TOKENIZER, TOKENS)


def test_findings_become_plain_json_with_none_for_a_mean_over_nothing(traced):
    values = traced[3].to_dict()
    back = json.loads(json.dumps(values, allow_nan=False))
    assert back == values
    assert back["by_frequency"][0][-1] == [None] * 4
    assert back["frequency_classes"][0] == "1" and len(back["by_frequency"][0]) == len(back["frequency_classes"])
    assert back["ngrams"][0][0].keys() == {"text", "order", "mean_gate", "num_positions"}


def test_impossible_requests_are_refused():
    for options in ({"num_ngrams": -1}, {"min_count": 0}, {"max_ngrams": 0}, {"max_ngrams": 1.5}):
        with pytest.raises(ConfigError, match=f"{next(iter(options))} is a whole number"):
            GateStatistics(**options)
    with pytest.raises(DataError, match="no tokens"):
        average_gates(own_model(), TOKENIZER, "")
