"""Memory that writes into the values of attention: its formula, its beginning, its cost and where it cannot be."""

import pytest
import torch
from tests.small_model import BACKBONE, MEMORY
from torch import nn
from transformers import DynamicCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

import engram_lm
from engram_lm.errors import ConfigError
from engram_lm.memory import EngramConfig
from engram_lm.model import EngramLMConfig
from engram_lm.planning.sizes import model_sizes

FUSED = {"num_streams": 4, "memory_fusion": "single"}


def tokens(batch=2, length=9, seed=3):
    return torch.randint(2, 280, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def values_model(build):
    """Its memory writes into values; all weights but norms are away from their first ones."""
    return build(memory={"layer": "values"}, attn_implementation="eager")


def plain_attention(attention):
    """The same attention without what memory adds."""
    plain = DeepseekV3Attention(attention.config, attention.layer_idx)
    plain.load_state_dict(attention.state_dict())
    return plain.eval()


@torch.no_grad()
def test_each_head_adds_its_part_of_the_update_as_often_as_it_looks_at_the_position(values_model):
    block, seen = values_model.model.layers[2], {}
    block.memory.register_forward_hook(lambda module, given, output: seen.update(update=output.update))
    block.register_forward_pre_hook(lambda module, given: seen.update(hidden=given[0]))
    block.self_attn.register_forward_hook(
        lambda module, given, kwargs, output: seen.update(kwargs=kwargs, output=output[0]), with_kwargs=True
    )
    values_model(tokens(), use_cache=False)
    # The gate and the query are the paper's: memory sees the hidden state, and attention what the norm makes of it.
    torch.testing.assert_close(seen["kwargs"]["hidden_states"], block.input_layernorm(seen["hidden"]))
    asked = {name: value for name, value in seen["kwargs"].items() if name != "values"}
    expected, weights_BHLL = plain_attention(block.self_attn)(**asked)
    width = BACKBONE["v_head_dim"]
    for b in range(2):
        for t in range(9):
            added = torch.zeros(BACKBONE["num_attention_heads"] * width)
            for head in range(BACKBONE["num_attention_heads"]):
                own = slice(head * width, (head + 1) * width)
                for source in range(t + 1):
                    added[own] += weights_BHLL[b, head, t, source] * seen["update"][b, source, own]
            expected[b, t] += block.self_attn.o_proj.weight @ added
    assert seen["update"].abs().max() > 0.1
    torch.testing.assert_close(seen["output"], expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("backbone", [{}, FUSED])
def test_values_that_begin_at_zero_leave_the_model_as_it_is_without_memory(build, backbone):
    model, ids = build(memory={"layer": "values"}, backbone=backbone), tokens()
    for block in model.model.layers:
        if block.memory is not None:
            block.memory.key_value.weight[-BACKBONE["hidden_size"] :].zero_()
    bare = build(memory=False, backbone=backbone)
    bare.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(model(ids, use_cache=False).logits, bare(ids, use_cache=False).logits)


@torch.no_grad()
@pytest.mark.parametrize("kernel_size", [0, 4])
def test_it_decodes_as_its_whole_forward_pass_with_streams_too(build, kernel_size):
    model, ids = build(memory={"layer": "values", "kernel_size": kernel_size}, backbone=FUSED), tokens(length=20)
    cache = DynamicCache(config=model.config)
    parts = [model(piece, past_key_values=cache).logits for piece in ids.split([9, 1, 1, 8, 1], dim=1)]
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=2e-5, rtol=1e-5)
    for block in model.model.layers:
        if block.memory is not None:
            block.memory.key_value.weight[-BACKBONE["hidden_size"] :].zero_()
    assert (model(ids, use_cache=False).logits - expected).abs().max() > 0.01  # memory has a part in it


def test_it_has_the_paper_s_bytes_and_is_counted_as_it_is_built(values_model):
    config = values_model.config.memory_config
    assert config.num_parameters() == EngramConfig(**MEMORY).num_parameters()
    assert (
        sum(weight.numel() for weight in values_model.parameters()) == model_sizes(values_model.config, context=1).total
    )


def test_memory_learns_from_the_first_step_and_what_is_recorded_is_as_ever(build):
    model, ids = build(memory={"layer": "values"}, attn_implementation="eager"), tokens()
    for block in model.model.layers:
        if block.memory is not None:
            nn.init.zeros_(block.memory.key_value.weight[-BACKBONE["hidden_size"] :].data)
    output = model(ids, labels=ids, output_attentions=True, output_gates=True)
    assert [tuple(one.shape) for one in output.attentions] == [(2, 2, 9, 9)] * 3
    assert [tuple(gates.shape) for gates in output.gates] == [(2, 9, 1)] * 2
    output.loss.backward()
    for block in (0, 2):
        gradient = model.model.layers[block].memory.key_value.weight.grad[-BACKBONE["hidden_size"] :]
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("backbone", [{"v_head_dim": 8}, {"num_streams": 2}])
def test_a_backbone_whose_values_it_does_not_fit_is_refused(backbone, tokenizer):
    streams = backbone.get("num_streams", 1)
    memory = EngramConfig(**MEMORY, layer="values", num_streams=streams)
    with pytest.raises(ConfigError, match="'values' adds one update of 32 numbers to the values of attention"):
        EngramLMConfig.for_tokenizer(tokenizer, memory, **{**BACKBONE, **backbone})


def test_it_is_not_attached_to_other_models(model, tokenizer):
    memory = EngramConfig(**MEMORY, layer="values")
    with pytest.raises(ConfigError, match="'values' adds to the values of attention"):
        engram_lm.attach(model, tokenizer, memory)
