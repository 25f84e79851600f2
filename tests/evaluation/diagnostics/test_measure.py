"""The bits of groups add up to the loss, memory on and off; errors are those of blocks."""

import json
import math

import numpy as np
import pytest
import torch
from tests.adapt.small_models import TEXT, TOKENIZER, small_model
from tests.small_model import BACKBONE, MEMORY, perturbed

import engram_lm
from engram_lm import EngramConfig, EngramForCausalLM, EngramLMConfig
from engram_lm.evaluation.diagnostics.measure import _mean, diagnose
from engram_lm.evaluation.diagnostics.reference import ReferenceText
from engram_lm.evaluation.diagnostics.tables import about, columns, rows
from engram_lm.evaluation.suppressing import suppressed
from engram_lm.training.data.documents import Document, pack
from engram_lm.training.held_out import held_out_loss

DOCUMENTS = [f"the rat number{number} saw Zelda{number}. " + TEXT[: 60 + 9 * number] + "Zelda" for number in range(12)]
PARTS = [pack([Document("", text)], TOKENIZER) for text in DOCUMENTS]
TOKENS, ENDS = np.concatenate(PARTS), np.cumsum([len(part) for part in PARTS])
KNOWN = pack([Document("", TEXT)], TOKENIZER)


def own(memory=MEMORY):
    torch.manual_seed(0)
    config = EngramLMConfig.for_tokenizer(TOKENIZER, memory and EngramConfig(**memory), **BACKBONE)
    model = EngramForCausalLM(config).eval()
    return perturbed(model, 0.05)


def attached():
    model = small_model()
    adapter = engram_lm.attach(model, TOKENIZER, layers=(1,), rows_per_head=97, num_heads=2, memory_dim=24)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("build", [own, attached])
@pytest.mark.parametrize("known", [True, False])
def test_groups_add_up_to_the_loss_with_memory_and_without(build, known):
    model = build()
    reference = ReferenceText(name="a text", tokens=KNOWN, num_tokens=len(KNOWN)) if known else None
    done, most = [], len(TOKENS) - 31
    found = diagnose(
        model, TOKENIZER, TOKENS, document_ends=ENDS, length=32, max_tokens=most, reference=reference,
        batch_size=3, on_progress=done.append,
    )  # fmt: skip
    on = held_out_loss(model, TOKENS, length=32, max_tokens=most, batch_size=3)
    with suppressed(model):
        off = held_out_loss(model, TOKENS, length=32, max_tokens=most, batch_size=3)
    assert sum(done) == 2 * on.num_tokens == 2 * most
    assert on.loss != off.loss
    assert {name: loss.loss for name, loss in found.losses.items()} == {"memory on": on.loss, "memory off": off.loss}
    expected = ["token_frequency", "word_frequency", "rare_words", *(["ngrams_2", "ngrams_3"] if known else [])]
    assert list(found.divisions) == expected
    for _, groups in found.divisions.values():
        assert len(groups) > 1
        assert sum(group.num_tokens for group in groups) == found.total.num_tokens == most
        assert sum(group.num_bytes for group in groups) == found.total.num_bytes
        for name, loss in (("memory on", on), ("memory off", off)):
            bits = math.fsum(group.bits[name].per_token * group.num_tokens for group in groups)
            assert bits * math.log(2) == pytest.approx(loss.loss * most, rel=1e-9)
        more = math.fsum(group.bits["memory off"].more * group.num_tokens for group in groups)
        assert more * math.log(2) == pytest.approx((off.loss - on.loss) * most, rel=1e-6)
    plain = found.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    tables = dict(rows(plain))
    assert len(columns(plain)) == 5 == len(tables[""][0])
    assert ("a text" in about(plain)) == known and "12 documents" in about(plain)


@pytest.mark.parametrize("build", [small_model, lambda: own(None)])
def test_a_model_without_memory_is_read_once_and_models_are_compared_by_pairs(build):
    plain, memory = build(), own()
    found = diagnose(plain, TOKENIZER, TOKENS, document_ends=ENDS[-1:], length=64)
    assert list(found.losses) == ["model"] and found.blocks == "sequences"
    both = diagnose({"a": plain, "b": memory}, TOKENIZER, TOKENS, document_ends=ENDS, length=64)
    assert list(both.losses) == ["a", "b", "memory off"]
    bits = both.total.bits
    assert bits["a"].more is None
    assert bits["b"].more == pytest.approx(bits["b"].per_token - bits["a"].per_token, rel=1e-9)
    assert bits["a"].per_byte * both.total.num_bytes == pytest.approx(bits["a"].per_token * both.total.num_tokens)
    same = diagnose({"a": plain, "again": plain}, TOKENIZER, TOKENS, document_ends=ENDS, length=64).total.bits["again"]
    assert (same.more, same.more_error) == (0, 0) and same.error > 0


def test_errors_are_those_of_block_means():
    chance = np.random.default_rng(0)
    values, block = chance.normal(size=60) + np.repeat(chance.normal(size=6), 10), np.repeat(np.arange(6), 10)
    means = values.reshape(6, 10).mean(1)
    mean, error = _mean(values, block, np.full(6, 10))
    assert mean == pytest.approx(values.mean()) and error == pytest.approx(means.std(ddof=1) / math.sqrt(6))
    # Blocks of unlike size: near the spread over many drawings of blocks with replacement.
    sizes = chance.integers(5, 40, 50)
    block = np.repeat(np.arange(50), sizes)
    values = chance.normal(size=len(block)) + chance.normal(size=50)[block]
    sums = np.bincount(block, weights=values)
    drawn = [sums[chosen].sum() / sizes[chosen].sum() for chosen in (chance.integers(0, 50, 50) for _ in range(4000))]
    assert _mean(values, block, sizes)[1] == pytest.approx(np.std(drawn), rel=0.1)
    assert _mean(values[:5], block[:5] * 0, np.array([5]))[1] is None
    assert _mean(np.array([math.nan]), np.array([0]), np.array([1])) == (None, None)
