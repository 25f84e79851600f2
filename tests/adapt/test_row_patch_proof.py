"""The proof counts what reads a patch's rows, and finds out where text that does not is answered differently."""

import json

import numpy as np
import pytest
import torch
from tests.adapt.patched_models import FACT, bits, same_state, trained_model
from tests.adapt.small_models import TEXT, TOKENIZER

from engram_lm import RowPatch
from engram_lm.adapt import FitOptions, attached_adapters
from engram_lm.errors import ConfigError, DataError, MismatchError

REFERENCE = np.random.default_rng(1).integers(2, 280, 2000)
WINDOWS = {"window_tokens": 12, "max_windows": 40}
LEARN = FitOptions(orders=(2, 3), learning_rate=0.3, margin=0.2)


def fitted(**kind):
    model = trained_model(**kind)
    return model, RowPatch.fit(model, TOKENIZER, [FACT], LEARN, title="a rat")


@pytest.mark.parametrize("kind", [{}, {"tables": "shared"}, {"dtype": torch.bfloat16}, {"kind": "reference"}])
def test_text_that_reads_none_of_the_rows_is_answered_the_same_bit_for_bit(kind):
    model, patch = fitted(**kind)
    before = bits(model)
    proof = patch.proof(model, REFERENCE, **WINDOWS)
    assert proof.holds
    assert proof.num_windows_apart == 40
    assert (proof.num_windows_changed, proof.max_difference_apart) == (0, 0.0)
    assert proof.num_windows_touched > 0
    assert proof.max_difference_touched > 0
    (fact,) = proof.facts
    assert (fact.is_greedy_before, fact.is_greedy_after) == (False, True)
    assert fact.loss_before == pytest.approx(patch.facts[0].loss_before, abs=1e-6)
    assert fact.loss_after == pytest.approx(patch.facts[0].loss_after, abs=1e-6)
    assert same_state(bits(model), before)
    # The same whether the patch is in the tables or not, and it stays where it was.
    patch.apply(model)
    applied = bits(model)
    assert patch.proof(model, REFERENCE, **WINDOWS) == proof
    assert same_state(bits(model), applied)
    assert json.loads(json.dumps(proof.to_dict()))["holds"] is True
    assert "40 windows of 12 tokens that read none, all logits the same bit for bit" in str(proof)


@pytest.mark.parametrize("tables", ["per_layer", "shared"])
def test_rows_and_positions_are_counted_as_one_by_one(tables):
    model, patch = fitted(tables=tables)
    spec = attached_adapters(model)["default"].spec
    # The fact's own text is part of the reference: its N-grams are readers, but no collisions.
    own = TOKENIZER(FACT[0] + FACT[1])["input_ids"]
    reference = np.concatenate([REFERENCE, TOKENIZER("the cat sat on the mat")["input_ids"]])
    proof = patch.proof(model, reference, **WINDOWS)

    def readers(tokens, layer, row):
        codes = spec.encode(np.array([tokens]))[0] >> 2
        hits = (spec.rows(tokens, layer) == row).nonzero()
        seen = [
            tuple(int(codes[t - s]) if t >= s else spec.fill for s in range(spec.orders[column // spec.num_heads]))
            for t, column in zip(*hits, strict=True)
        ]
        return seen, set(hits[0].tolist())

    expected, touched = {}, set()
    for name, change in patch.tables.items():
        layers = spec.layers if tables == "shared" else [int(name)]
        for row in change.rows.tolist():
            others = positions = 0
            for layer in layers:
                seen, places = readers(reference, layer, row)
                others += len(set(seen) - set(readers(own, layer, row)[0]))
                positions += len(seen)
                touched |= places
            expected[name, row] = (others, positions)
    assert {(row.table, row.row): (row.num_other_ngrams, row.num_positions) for row in proof.rows} == expected
    assert proof.num_touched_positions == len(touched)
    assert proof.num_other_ngrams == sum(others for others, _ in expected.values()) > 0
    assert proof.touched_share == len(touched) / len(reference)
    assert {row.order for row in proof.rows} == {2, 3}
    assert f"{proof.num_other_ngrams} pairs" in str(proof)


def test_a_model_that_reads_the_rows_some_other_way_fails_the_proof():
    model, patch = fitted()
    table, row = attached_adapters(model)["default"].tables["0"], int(patch.tables["0"].rows[0])
    model.lm_head.register_forward_hook(lambda module, args, output: output + table.weight[row].sum())
    proof = patch.proof(model, REFERENCE, **WINDOWS)
    assert not proof.holds
    assert proof.num_windows_changed == 40
    assert proof.max_difference_apart > 0
    assert "40 CHANGED" in str(proof)


def test_nothing_is_proved_where_nothing_could_be_compared():
    model, patch = fitted()
    proof = patch.proof(model, "the cat sat on the mat", tokenizer=TOKENIZER)
    assert (proof.num_windows_apart, proof.holds) == (0, False)
    assert "nothing could be compared" in str(proof)


def test_the_model_keeps_its_rows_and_mode_where_a_proof_breaks_off():
    model, patch = fitted()
    model.train()
    before, calls = bits(model), []

    def break_off(module, args):
        calls.append(args)
        if len(calls) > 12:
            raise KeyboardInterrupt

    model.lm_head.register_forward_pre_hook(break_off)
    with pytest.raises(KeyboardInterrupt):
        patch.proof(model, REFERENCE, **WINDOWS)
    assert same_state(bits(model), before)
    assert all(module.training for module in model.modules())


def test_what_cannot_be_proved_is_refused():
    model, patch = fitted()
    with pytest.raises(ConfigError, match="pass tokenizer="):
        patch.proof(model, TEXT)
    with pytest.raises(ConfigError, match=r"tokens \[num_tokens\], got float64"):
        patch.proof(model, np.zeros(5))
    with pytest.raises(DataError, match="at least 2 tokens"):
        patch.proof(model, [3])
    with pytest.raises(ConfigError, match="window_tokens is a whole number from 2"):
        patch.proof(model, REFERENCE, window_tokens=1)
    with torch.no_grad():
        attached_adapters(model)["default"].tables["0"].weight.add_(1)
    with pytest.raises(MismatchError, match="do not hold the numbers"):
        patch.proof(model, REFERENCE)
