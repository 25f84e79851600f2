"""Retrieval against its published formulas: nearest neighbors of contexts, mixed with what a trained model says."""

import json
import math

import numpy as np
import pytest
import torch
from tests.adapt.patched_models import trained_model
from tests.adapt.small_models import TEXT, TOKENIZER
from tests.studies.test_study import some_text

from engram_lm.studies.rivals import knn
from engram_lm.studies.rivals.study import RivalsStudy


def plain_neighbors(keys, tokens, query, number):
    """The formula, written as a loop."""
    found = sorted(
        (sum((a - b) ** 2 for a, b in zip(key, query, strict=True)), token)
        for key, token in zip(keys.tolist(), tokens.tolist(), strict=True)
    )
    return found[:number]


def test_the_search_is_exact_and_its_probabilities_are_the_published_ones(monkeypatch):
    monkeypatch.setattr(knn, "_KEYS_AT_ONCE", 7)
    monkeypatch.setattr(knn, "_QUERIES_AT_ONCE", 3)
    store = knn.Datastore(torch.randn(40, 5).half(), torch.randint(6, (40,), dtype=torch.int32))
    queries, targets = torch.randn(8, 5), torch.randint(6, (8,))
    for number in (1, 9, 100):
        found = store.nearest(queries, number)
        near = knn.neighbor_probabilities(found, targets, number, 1.7)
        for place, (query, target) in enumerate(zip(queries.tolist(), targets.tolist(), strict=True)):
            wanted = plain_neighbors(store.keys, store.tokens, query, number)
            assert found.distances[place].tolist() == pytest.approx([far for far, _ in wanted], abs=1e-4)
            assert found.tokens[place].tolist() == [token for _, token in wanted]
            weights = [math.exp(-far / 1.7) for far, _ in wanted]
            right = sum(weight for weight, (_, token) in zip(weights, wanted, strict=True) if token == target)
            assert near[place] == pytest.approx(right / sum(weights), abs=1e-5)
    fewer = knn.neighbor_probabilities(store.nearest(queries, 9), targets, 4, 1.7)
    assert fewer == pytest.approx(knn.neighbor_probabilities(store.nearest(queries, 4), targets, 4, 1.7))
    assert store.num_bytes == 40 * knn.entry_bytes(5)


def test_keys_are_what_the_last_feed_forward_network_is_given_and_depend_on_no_later_token():
    model = trained_model(kind="reference").eval()
    windows = torch.tensor(TOKENIZER(TEXT).input_ids[:49]).view(1, -1)
    read = knn.contexts(model, windows[:, :-1], windows[:, 1:])
    block = model.model.layers[-1]
    seen = []
    hook = block.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits = model(input_ids=windows[:, :-1]).logits[0]
    hook.remove()
    if model.config.num_streams == 1:
        assert torch.allclose(read.keys, seen[0][0], atol=1e-5)
    nats = -logits.log_softmax(-1).gather(1, windows[0, 1:, None])[:, 0]
    assert read.nats == pytest.approx(nats.detach().numpy(), abs=1e-4)
    changed = windows.clone()
    changed[0, 30:] = 7
    again = knn.contexts(model, changed[:, :-1], changed[:, 1:])
    assert torch.equal(again.keys[:30], read.keys[:30]) and not torch.equal(again.keys[30:], read.keys[30:])


def test_a_text_that_was_stored_is_recalled_and_the_choices_say_so():
    model = trained_model(kind="reference").eval()
    windows = torch.tensor(TOKENIZER(TEXT).input_ids[: 8 * 32 + 1])
    sequences = windows[:-1].view(8, 32), windows[1:].view(8, 32)
    store = knn.build_store(model, iter([sequences]))
    read = knn.contexts(model, *sequences)
    choice = knn.choose(store.nearest(read.keys, 64), read)
    assert choice["share"] > 0.5
    other = knn.Datastore(store.keys, torch.full_like(store.tokens, 299))  # a token that never follows
    assert knn.choose(other.nearest(read.keys, 64), read)["share"] == 0
    assert (store.nearest(read.keys, 1).distances < 1e-2).all()


def test_the_study_measures_models_with_their_neighbors_and_measures_them_once(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(60):
        (text / f"{number}.txt").write_text(f"{number} " + some_text(300)[number:])
    options = {
        "out": tmp_path / "out", "data": (text,), "vocab_size": 300, "tokens": 4096, "sequence_length": 32,
        "rows_per_head": 997, "arms": ("knn_bytes", "knn", "none"), "seeds": 1, "mode": "one_by_one",
    }  # fmt: skip
    assert RivalsStudy(**options).run() == 0
    result = json.loads((tmp_path / "out/result.json").read_text())
    arms = result["arms"]
    assert arms["knn"]["searches"][0]["num_entries"] == 4096 and arms["none"]["searches"] == []
    few = arms["knn_bytes"]["searches"][0]
    assert few["num_bytes"] <= arms["knn_bytes"]["cost"]["bytes"] - arms["none"]["cost"]["bytes"]
    assert few["num_entries"] % 32 == 0
    assert arms["engram"]["cost"]["bytes"] == pytest.approx(arms["knn_bytes"]["cost"]["bytes"], rel=0.02)
    # The same model: what its loss changes by is what its neighbors change.
    change = arms["knn"]["runs"][0]["loss"] - arms["none"]["runs"][0]["loss"]
    assert change != 0 or arms["knn"]["searches"][0]["share"] == 0
    assert "What searching takes" in (tmp_path / "out/report.html").read_text()
    (path,) = (tmp_path / "out/seed-0").glob("knn.evaluated-*.json")
    stamp = path.stat().st_mtime_ns
    assert RivalsStudy(**options, resume=True).run() == 0 and path.stat().st_mtime_ns == stamp
    assert np.isfinite(change)
