"""Held-out loss is the mean over every token but the first, however it is batched."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.training.test_loop import TOKENS, model

from engram_lm.errors import ConfigError, DataError, TokenError
from engram_lm.memory.gate_recorder import record_gates
from engram_lm.training import loss as loss_module
from engram_lm.training.held_out import held_out_loss


def test_the_loss_is_the_mean_over_sequences_that_do_not_see_each_other():
    one = model()
    tokens = TOKENS[:70]
    total = 0.0
    for start in (0, 32, 64):
        part = torch.from_numpy(tokens[start : start + 33].astype(np.int64))
        logits = one.eval()(part[None, :-1]).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum").detach())
    done = []
    one.train()
    found = held_out_loss(one, tokens, length=32, batch_size=2, num_bytes=200, on_progress=done.append)
    assert found.loss == pytest.approx(total / 69, rel=1e-5) and found.num_tokens == sum(done) == 69
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / 200, rel=1e-5)
    assert one.training


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batching_changes_nothing(batch_size):
    one = model()
    expected = held_out_loss(one, TOKENS[:200], length=16, batch_size=2).loss
    assert held_out_loss(one, TOKENS[:200], length=16, batch_size=batch_size).loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tokens_at_once", [1, 7, 64])
def test_how_many_logits_are_in_memory_changes_nothing(tokens_at_once, monkeypatch):
    one = model()
    expected = held_out_loss(one, TOKENS[:400], length=16).loss
    monkeypatch.setattr(loss_module, "_LOGITS_IN_CACHE", 1)
    monkeypatch.setattr(loss_module, "_FEWEST_TOKENS", tokens_at_once)
    assert held_out_loss(one, TOKENS[:400], length=16).loss == pytest.approx(expected, rel=1e-6)


def test_a_limit_evaluates_the_beginning():
    one = model()
    assert held_out_loss(one, TOKENS, length=16, max_tokens=40).loss == held_out_loss(one, TOKENS[:41], length=16).loss


def test_tokens_that_the_model_does_not_embed_are_refused():
    with pytest.raises(TokenError, match="token id 320 is outside the vocabulary of 270"):
        held_out_loss(model(), np.array([1, 320, 2]), length=16)


def test_too_little_text_is_refused():
    with pytest.raises(DataError, match="at least 2"):
        held_out_loss(model(), TOKENS[:1], length=16)


def test_documents_restart_in_evaluation_as_in_training():
    tokens, given = np.arange(9), []

    class Model(torch.nn.Linear):
        base_model = SimpleNamespace(layers=[])

        def get_input_embeddings(self):
            return SimpleNamespace(num_embeddings=9)

    class Loss(torch.nn.Module):
        def forward(self, inputs, targets, position_ids):
            given.append(position_ids.tolist())
            return torch.zeros(())

    ends = np.array([2, 3, 9])
    held_out_loss(Model(1, 1), tokens, length=4, batch_size=8, loss_module=Loss(), document_ends=ends)
    assert given == [[[0, 1, 0, 0], [0, 1, 2, 3]]]
    with pytest.raises(DataError, match="hold out more"):
        held_out_loss(Model(1, 1), tokens[:1], length=4, loss_module=Loss())


def test_gates_are_summed_over_every_token_predicted():
    one = model()
    seen = {block: [] for block in one.config.memory_layers}
    layers = {block: one.base_model.layers[block].memory for block in seen}
    with record_gates(layers, lambda block, gates: seen[block].append(gates.flatten().double())):
        found = held_out_loss(one, TOKENS[:70], length=32, batch_size=2)
    assert found.gates is not None and set(found.gates) == {str(block) for block in seen}
    for block, parts in seen.items():
        gates = torch.cat(parts)
        expected = {"mean": pytest.approx(float(gates.mean())), "above_half": float((gates > 0.5).double().mean())}
        assert len(gates) == 69 and found.gates[str(block)] == expected


def test_every_sequence_begins_as_texts_do_and_beginnings_are_never_predicted():
    one, given = model(), 3
    tokens = np.array([3, *TOKENS[:50], 3, *TOKENS[50:100], 3, *TOKENS[100:120]])
    tokens = np.where(np.isin(np.arange(len(tokens)), (0, 51, 102)), 3, np.where(tokens == 3, 4, tokens))
    total, count, start = 0.0, 0, 0
    while start < len(tokens):
        start += int(tokens[start] == given)  # such as the third document, whose own beginning is not read twice
        part = torch.tensor([given, *tokens[start : start + 17]])
        losses = torch.nn.functional.cross_entropy(one.eval()(part[None, :-1]).logits[0], part[1:], reduction="none")
        total += float(losses[part[1:] != given].sum().detach())
        count += int((part[1:] != given).sum())
        start += 17
    done = []
    found = held_out_loss(one, tokens, length=17, batch_size=4, beginning=(given,), on_progress=done.append)
    assert count == found.num_tokens == sum(done) == 120
    assert found.loss == pytest.approx(total / count, rel=1e-5)
    some = held_out_loss(one, tokens, length=17, max_tokens=55, beginning=(given,))
    assert some.num_tokens == 55  # the second document's beginning is not among them
    assert some.loss == held_out_loss(one, tokens[:57], length=17, beginning=(given,)).loss
    with pytest.raises(ConfigError, match="length is a whole number from 2"):
        held_out_loss(one, tokens, length=1, beginning=(given, given))


@pytest.mark.parametrize("beginning", [(), (3,)])
def test_losses_of_tokens_add_up_to_the_loss_and_stand_where_their_tokens_do(beginning):
    one = model()
    tokens = np.where(TOKENS[:70] == 3, 4, TOKENS[:70])
    nats = np.full(70, np.nan)

    def take(places, losses):
        assert (losses[places < 0] == 0).all() and np.isnan(nats[places[places >= 0]]).all()  # each once
        nats[places[places >= 0]] = losses[places >= 0]

    found = held_out_loss(one, tokens, length=32, batch_size=2, beginning=beginning, on_token_losses=take)
    assert np.isfinite(nats).sum() == found.num_tokens
    assert math.fsum(nats[np.isfinite(nats)]) / found.num_tokens == pytest.approx(found.loss, rel=1e-12)
    assert found.loss == held_out_loss(one, tokens, length=32, batch_size=2, beginning=beginning).loss
    part = torch.tensor([*beginning, *tokens[64:].tolist()])  # the last sequence
    losses = torch.nn.functional.cross_entropy(one.eval()(part[None, :-1]).logits[0], part[1:], reduction="none")
    assert nats[65 - len(beginning) :] == pytest.approx(losses.detach().numpy(), rel=1e-4)
