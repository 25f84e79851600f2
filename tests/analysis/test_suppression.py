"""Suppressed memory says nothing, or something else; afterwards everything is as it was."""

import json

import numpy as np
import pytest
import torch
from tests.adapt.conftest import speak
from tests.adapt.small_models import TOKENIZER, small_model
from tests.small_model import BACKBONE, MEMORY, VARIANTS, perturbed

import engram_lm
from engram_lm import EngramConfig, EngramForCausalLM, EngramLMConfig
from engram_lm.analysis.suppression import Condition, conditions, suppressed, suppression_effect
from engram_lm.errors import ConfigError, MismatchError
from engram_lm.evaluation.task_scores import score_tasks
from engram_lm.evaluation.tasks import TaskItem
from engram_lm.training.held_out import held_out_loss

IDS = TOKENIZER("The Cat saw a rat; the rat ran to the mat.", return_tensors="pt").input_ids
ITEMS = (
    TaskItem(id="a", family="cat", prompt="the cat sat on", answer=" the mat", choices=(" the mat", " a rat")),
    TaskItem(id="b", family="free", prompt="the rat ran to", answer=" the"),
)


def own(variant="plain"):
    torch.manual_seed(0)
    backbone, memory = VARIANTS[variant]
    config = EngramLMConfig.for_tokenizer(TOKENIZER, EngramConfig(**{**MEMORY, **memory}), **{**BACKBONE, **backbone})
    model = EngramForCausalLM(config).eval()
    return perturbed(model, 0.2)


def attached():
    model = small_model("llama")
    speak(engram_lm.attach(model, TOKENIZER, EngramConfig(**MEMORY)))
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def memory_layers(model):
    found = [module for module in model.modules() if isinstance(module, engram_lm.EngramLayer)]
    assert len(found) == 2
    return found


def hooks(model):
    return [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]


def silenced(model):
    """The same model with values and convolutions of zero, so that its memory has nothing to say."""
    with torch.no_grad():
        for layer in memory_layers(model):
            layer.key_value.weight[-layer.config.hidden_size :] = 0
            layer.conv_weight.zero_()
    return model


@pytest.mark.parametrize("variant", ["plain", "streams", "single"])
def test_zero_is_a_memory_without_a_value(variant):
    model = own(variant)
    with suppressed(model):
        found = logits(model)
    assert not torch.equal(logits(model), found)
    assert torch.allclose(logits(silenced(model)), found, atol=1e-6)


def test_zero_of_an_attached_memory_is_the_plain_model():
    model = attached()
    with suppressed(model):
        found = logits(model)
    assert torch.equal(found, logits(small_model("llama")))
    (adapter,) = engram_lm.adapt.attached_adapters(model).values()
    with suppressed(adapter, how="zero"):
        assert torch.equal(logits(model), found)
    assert not torch.allclose(logits(model), found, atol=1e-3)


@pytest.mark.parametrize("build", [own, attached])
def test_blocks_are_suppressed_by_themselves(build):
    model = build()
    found = {}
    for blocks in ([], [0], [2], [0, 2]):
        with suppressed(model, blocks):
            found[tuple(blocks)] = logits(model)
    assert torch.equal(found[()], logits(model))
    with suppressed(model):
        assert torch.equal(found[0, 2], logits(model))
    parts = list(found.values())
    assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(parts) for b in parts[:i])


def test_shuffling_moves_every_row_within_its_head_and_no_two_to_one_place():
    model = own()
    spec, seen = model.hash_spec, {}
    for block, index in ((0, 0), (2, 1)):
        layer = model.model.layers[block].memory
        layer.read = lambda rows, block=block, layer=layer: (
            seen.setdefault(block, []).append(rows) or type(layer).read(layer, rows)
        )
        hidden = torch.zeros(1, max(spec.primes[index]), 32)
        # All rows of all heads at once; a shorter head reads its last row again.
        sizes, offsets = torch.tensor(spec.primes[index]), torch.tensor(spec.offsets_at(index))
        rows = offsets + torch.minimum(torch.arange(hidden.shape[1])[:, None], sizes - 1)
        with torch.no_grad(), suppressed(model, how="shuffle", seed=3):
            layer(hidden, rows[None])
        moved = seen[block][0][0]
        for head, (offset, size) in enumerate(zip(offsets.tolist(), sizes.tolist())):
            column = moved[:size, head]
            assert sorted(column.tolist()) == list(range(offset, offset + size))
            assert int((column == rows[:size, head]).sum()) <= 1


@pytest.mark.parametrize("build", [own, attached])
def test_shuffled_rows_are_the_same_each_time_and_other_ones_with_another_seed(build):
    model, found = build(), []
    for seed in (0, 0, 1):
        with suppressed(model, how="shuffle", seed=seed):
            found.append(logits(model))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2], atol=1e-3)
    assert not torch.allclose(found[0], logits(model), atol=1e-3)


@pytest.mark.parametrize("how", ["zero", "shuffle"])
@pytest.mark.parametrize("build", [own, attached])
def test_generation_with_a_cache_is_suppressed_too(build, how):
    model = build()
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    with suppressed(model, how=how):
        made = [model.generate(IDS, use_cache=use_cache, **options) for use_cache in (True, False)]
        with torch.no_grad():
            last = model(input_ids=made[0], use_cache=False).logits[0, IDS.shape[1] - 1 : -1]
    assert torch.equal(made[0], made[1]) and torch.equal(last.argmax(-1), made[0][0, IDS.shape[1] :])


def test_everything_is_as_it_was_after_an_error():
    model = own()
    before, found = hooks(model), logits(model)
    for how in ("zero", "shuffle"):
        with pytest.raises(RuntimeError, match="stop"), suppressed(model, how=how):
            raise RuntimeError("stop")
    with pytest.raises(ConfigError, match="block 1 reads no memory; those that do are 0, 2"), suppressed(model, [0, 1]):
        pytest.fail("it began")
    assert hooks(model) == before and torch.equal(logits(model), found)


def test_nothing_to_suppress_is_refused():
    for nothing in (small_model("llama"), torch.nn.Linear(1, 1), None):
        with pytest.raises(MismatchError, match=f"{type(nothing).__name__} has no memory"), suppressed(nothing):
            pytest.fail("it began")
    with pytest.raises(ConfigError, match="'zero' or 'shuffle', not 'none'"), suppressed(own(), how="none"):
        pytest.fail("it began")
    with pytest.raises(ConfigError, match="give one"):
        suppression_effect(own(), TOKENIZER)


@pytest.mark.parametrize("build", [own, attached])
def test_the_effect_is_what_each_condition_measures_by_itself(build):
    model, tokens = build(), IDS[0].numpy()
    done = []
    effect = suppression_effect(model, TOKENIZER, items=ITEMS, tokens=tokens, length=8, on_progress=done.append)
    assert effect.conditions == conditions(model) == tuple(done)
    assert [str(one) for one in done] == [
        "memory on", "zero in blocks 0, 2", "zero in block 0", "zero in block 2",
        "shuffled in blocks 0, 2", "shuffled in block 0", "shuffled in block 2",
    ]  # fmt: skip
    assert effect.families == ("cat", "free") and effect.num_items.tolist() == [1, 1]
    for row, condition in enumerate(effect.conditions):
        with suppressed(model, condition.blocks, condition.how or "zero"):
            scores = score_tasks(model, TOKENIZER, ITEMS)
            loss = held_out_loss(model, tokens, length=8).loss
        assert effect.loss[row] == pytest.approx(loss, rel=1e-5)
        for column, name in enumerate(effect.families):
            assert effect.answer_loss[row, column] == pytest.approx(scores[name].answer_loss, rel=1e-5)
            assert effect.exact_match[row, column] == scores[name].exact_match
    assert np.isnan(effect.accuracy[:, 1]).all() and effect.chance[0] == 0.5
    json.dumps(effect.to_dict(), allow_nan=False)


def test_a_subject_is_suppressed_as_its_model_is():
    from engram_lm.analysis.subject import find_subject

    model = own()
    subject = find_subject(model, TOKENIZER)
    with suppressed(model, how="shuffle"):
        expected = logits(model)
    with suppressed(subject, how="shuffle"):
        assert torch.equal(logits(model), expected)
    only = suppression_effect(subject, TOKENIZER, items=ITEMS, chosen=[Condition((2,), "zero")])
    assert [str(one) for one in only.conditions] == ["memory on", "zero in block 2"]


def test_retained_is_relative_to_the_whole_model():
    effect = suppression_effect(own(), TOKENIZER, items=ITEMS)
    made = type(effect)(
        conditions=(Condition(), Condition((0,), "zero")),
        families=("a", "b"),
        num_items=np.array([100, 100]),
        exact_match=np.array([[0.8, 0.0], [0.2, 0.0]]),
        accuracy=np.full((2, 2), np.nan),
        chance=np.full(2, np.nan),
        answer_loss=np.zeros((2, 2)),
        loss=np.zeros(2),
    )
    assert made.retained[:, 0].tolist() == [1.0, 0.25] and np.isnan(made.retained[:, 1]).all()
    # The error of a quotient: sqrt(0.2 * 0.8 / 100 + 0.25^2 * 0.8 * 0.2 / 100) / 0.8.
    assert made.retained_error[1, 0] == pytest.approx(0.05153882, rel=1e-5)
    assert made.to_dict()["retained"] == [[1.0, None], [0.25, None]]
