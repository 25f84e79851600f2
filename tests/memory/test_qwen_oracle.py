"""The layer against transformers' own PLE layer of ``qwen4_exp``, with copied weights."""

import pytest
import torch
from transformers.cache_utils import Cache, LinearAttentionLayer
from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextPLELayer

from engram_lm.hashing import HashSpec, TokenHistory
from engram_lm.memory import EngramConfig, EngramLayer
from engram_lm.tables import ParameterTable

END, VOCABULARY, HIDDEN, STREAMS = 7, 97, 16, 3
PUBLISHED = {
    "model_type": "qwen4_exp_text",
    "ple_layer_ids": [1],
    "ngram_size": 3,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 101,
    "make_ngram_vocab_size_divisible_by": 8,
    "seed": 1234,
    "vocab_size": VOCABULARY,
    "eos_token_id": END,
    "ple_embed_dim": 24,
    "ple_conv_kernel_size": 4,
    "hidden_size": HIDDEN,
    "hc_count": STREAMS,
}


@pytest.fixture(scope="module")
def oracle():
    keys = {key: value for key, value in PUBLISHED.items() if key != "model_type"}
    config = Qwen4ExpTextConfig(**keys, num_hidden_layers=1, layer_types=["linear_attention"])
    torch.manual_seed(3)
    layer = Qwen4ExpTextPLELayer(config, layer_idx=0, ple_layer_index=0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return layer


@pytest.fixture(scope="module")
def ours(oracle):
    config = EngramConfig(
        hidden_size=HIDDEN,
        num_streams=STREAMS,
        orders=(2, 3),
        num_heads=2,
        memory_dim=24,
        rows_per_head=101,
        kernel_size=4,
        norm_weight="zero_centered",
        norm_eps=oracle.norm_key.eps,
    )
    theirs = oracle.ple_embedding.ngram_embedding.weight
    layer = EngramLayer(config, ParameterTable(*theirs.shape, gradient="dense"))
    with torch.no_grad():
        layer.table.weight.copy_(theirs)
        layer.key_value.weight.copy_(torch.cat([oracle.key_proj.weight, oracle.value_proj.weight]))
        layer.query_norm.copy_(oracle.norm_query.weight.view(STREAMS, HIDDEN))
        layer.key_norm.copy_(oracle.norm_key.weight.view(STREAMS, HIDDEN))
        layer.conv_norm.copy_(oracle.norm_conv.weight.view(STREAMS, HIDDEN))
        layer.conv_weight.copy_(oracle.conv1d.weight[:, 0])
    return layer


SPEC = HashSpec.from_config(PUBLISHED)


def sample(batch=3, length=25):
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(VOCABULARY, (batch, length), generator=generator)
    tokens[0, 4] = tokens[1, 20] = tokens[1, 21] = END
    return tokens, torch.randn(batch, length, STREAMS, HIDDEN, generator=generator)


def test_forward_and_gradients_equal_transformers(oracle, ours):
    tokens, hidden = sample()
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5))
    hidden.requires_grad_(True)
    expected = oracle(hidden.flatten(-2), tokens, None).view(hidden.shape)
    update = ours(hidden, SPEC.rows(tokens, 1))
    torch.testing.assert_close(update, expected, atol=1e-5, rtol=1e-5)

    names = ["key_proj", "value_proj", "norm_query", "norm_key", "norm_conv", "conv1d"]
    parameters = [hidden, oracle.ple_embedding.ngram_embedding.weight]
    parameters += [getattr(oracle, name).weight for name in names]
    theirs = torch.autograd.grad((expected * direction).sum(), parameters)
    parameters = [hidden, ours.table.weight, ours.key_value.weight]
    parameters += [ours.query_norm, ours.key_norm, ours.conv_norm, ours.conv_weight]
    own = torch.autograd.grad((update * direction).sum(), parameters)
    pairs = [(own[0], theirs[0]), (own[1], theirs[1]), (own[2], torch.cat(theirs[2:4]))]
    pairs += [(a.flatten(), b.flatten()) for a, b in zip(own[3:], theirs[4:], strict=True)]
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=1e-3 * float(b.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("chunks", [[1] * 25, [10, 1, 1, 13], [2, 23]], ids=str)
def test_cached_decoding_equals_transformers_step_by_step(oracle, ours, chunks):
    tokens, hidden = sample()
    cache = Cache(layers=[LinearAttentionLayer(number_of_states=3)])
    history, state = TokenHistory(SPEC, 3), ours.new_state(3)
    start = 0
    for size in chunks:
        part = slice(start, start + size)
        with torch.no_grad():
            expected = oracle(hidden[:, part].flatten(-2), tokens[:, part], cache)
            update = ours(hidden[:, part], SPEC.rows(tokens[:, part], 1, history), state)
        history.advance(tokens[:, part])
        torch.testing.assert_close(update.flatten(-2), expected, atol=1e-5, rtol=1e-5)
        start += size


def test_left_padding_equals_transformers_at_every_real_token(oracle, ours):
    tokens, hidden = sample()
    mask = torch.ones_like(tokens)
    mask[0, :6] = mask[2, :1] = 0
    expected = oracle(hidden.flatten(-2), torch.where(mask.bool(), tokens, END), None, conv_mask=mask)
    codes = SPEC.encode(tokens, attention_mask=mask)
    update = ours(hidden, SPEC.rows_for_layers(codes)[1], active=codes >= 0)
    torch.testing.assert_close(update.flatten(-2)[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)
