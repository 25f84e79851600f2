"""Several residual streams: transformers' hyper-connection as the plain twin, and a start that keeps streams apart."""

import pytest
import torch
from tests.small_model import BACKBONE, MEMORY
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection, DeepseekV4HyperHead

from engram_lm.errors import ConfigError
from engram_lm.model import EngramForCausalLM, EngramLMConfig
from engram_lm.model.streams import StreamHead, StreamMixer, sinkhorn

IDS = torch.randint(2, 280, (2, 24), generator=torch.Generator().manual_seed(1))
FOUR = {"memory": {"num_streams": 4}, "backbone": {"num_streams": 4}}


@pytest.mark.parametrize("num_streams", [2, 3, 4])
def test_mixer_and_its_gradients_equal_transformers_own(num_streams):
    # Both eps are large, so that leaving one out somewhere would be seen.
    config = EngramLMConfig(**BACKBONE, num_streams=num_streams, rms_norm_eps=1e-3, stream_eps=1e-2)
    torch.manual_seed(0)
    theirs, ours = DeepseekV4HyperConnection(config), StreamMixer(config, site=0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict())
    streams = torch.randn(2, 5, num_streams, 32, requires_grad=True)
    output = torch.randn(2, 5, 32, requires_grad=True)

    def expected(streams, output):
        post, comb, read = theirs(streams)
        return post.unsqueeze(-1) * output.unsqueeze(-2) + torch.matmul(comb.transpose(-1, -2), streams), read

    def own(streams, output):
        post, comb, read = ours(streams)
        return ours.write(streams, output, post, comb), read

    results = []
    for module, function in ((theirs, expected), (ours, own)):
        written, read = function(streams, output)
        loss = (written * torch.linspace(-1, 1, 32)).sum() + (read**2).sum()
        gradients = torch.autograd.grad(loss, [streams, output, *module.parameters()])
        results.append([written, read, *gradients])
    for a, b in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)


def test_sinkhorn_gives_doubly_stochastic_matrices():
    logits = torch.randn(2, 7, 4, 4, generator=torch.Generator().manual_seed(0))
    matrices = sinkhorn(logits, iterations=20, eps=1e-6)
    torch.testing.assert_close(matrices.sum(-2), torch.ones(2, 7, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(matrices.sum(-1), torch.ones(2, 7, 4), atol=1e-3, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(
    ("num_streams", "read", "written"), [(2, (0.625, 0.375), (1.25, 0.75)), (4, (0.4375, 0.1875), (1.25, 11 / 12))]
)
def test_every_sublayer_of_a_new_model_starts_by_preferring_another_stream_by_a_quarter(num_streams, read, written):
    torch.manual_seed(0)
    model = EngramForCausalLM(EngramLMConfig(vocab_size=300, **BACKBONE, num_streams=num_streams))
    mixers = [module for module in model.modules() if isinstance(module, StreamMixer)]
    assert len(mixers) == 6
    for site, mixer in enumerate(mixers):
        pre, post, mix = mixer.base.split([num_streams, num_streams, num_streams**2])
        own = torch.arange(num_streams) == site % num_streams
        torch.testing.assert_close(pre.sigmoid(), torch.where(own, *map(torch.tensor, read)))
        torch.testing.assert_close(2 * post.sigmoid(), torch.where(own, *map(torch.tensor, written)))
        torch.testing.assert_close(pre.sigmoid().sum(), torch.tensor(1.0))
        torch.testing.assert_close(2 * post.sigmoid().mean(), torch.tensor(1.0))
        assert torch.equal(mix.view(num_streams, num_streams), 8 * (torch.eye(num_streams) - 1))
        assert torch.equal(mixer.scale, torch.full((3,), 0.01))  # the mHC paper's alpha
        assert float(mixer.fn.std()) == pytest.approx(model.config.initializer_range, rel=0.2)
    assert torch.equal(model.model.stream_head.hc_scale, torch.full((1,), 0.01))
    assert float(model.model.stream_head.hc_fn.std()) == pytest.approx(model.config.initializer_range, rel=0.2)


@torch.no_grad()
def test_loading_keeps_the_base_that_was_saved_also_beside_weights_that_begin_anew(build, tmp_path):
    model = build(**FOUR)
    saved = {name: base.normal_().clone() for name, base in model.named_parameters() if name.endswith(".base")}
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("streams.fn")}
    for folder, kept in (("whole", model.state_dict()), ("part", state)):
        model.save_pretrained(tmp_path / folder, state_dict=kept)
        loaded = EngramForCausalLM.from_pretrained(tmp_path / folder, ignore_mismatched_sizes=folder == "part")
        assert len(saved) == 6
        assert all(torch.equal(loaded.get_parameter(name), base) for name, base in saved.items())
    fn = loaded.model.layers[0].attention_streams.fn
    assert float(fn.std()) == pytest.approx(loaded.config.initializer_range, rel=0.2)


def apart(streams: torch.Tensor) -> float:
    """How far streams are from their mean, relative to its length: 0 where they are one stream copied."""
    mean = streams.mean(2, keepdim=True)
    return float((streams - mean).norm() / (mean.norm() * streams.shape[2] ** 0.5))


@torch.no_grad()
@pytest.mark.parametrize("num_streams", [2, 4])
def test_a_new_model_is_near_the_plain_residual_network_with_streams_apart(num_streams):
    backbone = {**BACKBONE, "num_hidden_layers": 8}
    torch.manual_seed(0)
    plain = EngramForCausalLM(EngramLMConfig(vocab_size=300, **backbone)).eval()
    torch.manual_seed(0)
    ours = EngramForCausalLM(EngramLMConfig(vocab_size=300, num_streams=num_streams, **backbone)).eval()
    for parameter in plain.model.layers.parameters():
        if parameter.dim() == 2:
            parameter.mul_(3)  # so that eight blocks matter beside the embedding
    missing = ours.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert all("stream" in name for name in missing)
    expected = plain(IDS, output_hidden_states=True).hidden_states
    found = ours(IDS, output_hidden_states=True).hidden_states
    # Relative to what the blocks did to the embedding that both begin with.
    distance = (found[-2].mean(2) - expected[-2]).norm() / (expected[-2] - expected[0]).norm()
    assert distance < 0.2
    assert apart(found[-2]) > 0.1

    # DeepSeek-V4's first values, an even mix, make the streams one again at every sublayer.
    for module in ours.modules():
        if isinstance(module, DeepseekV4HyperConnection):
            module.base.zero_()
            module.scale.fill_(1)
    assert apart(ours(IDS, output_hidden_states=True).hidden_states[-2]) < 0.03


@torch.no_grad()
def test_all_streams_differ_from_each_other_at_the_start(build):
    torch.manual_seed(0)
    config = build(**FOUR).config
    model = EngramForCausalLM(config)
    streams = model.model(IDS, output_hidden_states=True).hidden_states[-2]
    for a in range(4):
        for b in range(a):
            assert (streams[:, :, a] - streams[:, :, b]).norm() > 1e-3 * streams[:, :, a].norm()


@torch.no_grad()
def test_a_new_head_takes_the_mean_of_the_streams_as_transformers_head_would():
    config = EngramLMConfig(**BACKBONE, num_streams=4)
    head, theirs = StreamHead(config), DeepseekV4HyperHead(config)
    torch.manual_seed(0)
    head.reset_parameters(0.0)
    theirs.load_state_dict(head.state_dict())
    streams = torch.randn(2, 3, 4, 32)
    assert torch.equal(head(streams), theirs(streams))
    torch.testing.assert_close(head(streams), streams.mean(2), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_update_of_memory_is_added_to_every_stream_before_attention(build):
    model = build(**FOUR)
    block = model.model.layers[0]
    seen = {}
    block.memory.register_forward_hook(lambda module, given, result: seen.update(given=given[0], update=result[0]))
    block.attention_streams.register_forward_pre_hook(lambda module, given: seen.update(read=given[0]))
    model(IDS)
    assert seen["given"].shape == (2, 24, 4, 32)
    assert torch.equal(seen["read"], seen["given"] + seen["update"])
    # Four keys, four gates: the update is another one in each stream.
    assert not torch.allclose(seen["update"][:, :, 0], seen["update"][:, :, 1])


@torch.no_grad()
def test_single_fusion_reads_what_attention_reads_and_writes_with_its_output(build):
    model = build(backbone={"num_streams": 4, "memory_fusion": "single"})
    block = model.model.layers[0]
    seen = {}
    block.memory.register_forward_hook(lambda module, given, result: seen.update(given=given[0], update=result[0]))
    block.attention_streams.register_forward_hook(lambda module, given, result: seen.update(mixer=result))
    block.input_layernorm.register_forward_pre_hook(lambda module, given: seen.update(attended=given[0]))
    block.self_attn.register_forward_hook(lambda module, given, result: seen.update(attention=result[0]))
    block.feed_forward_streams.register_forward_pre_hook(lambda module, given: seen.update(after=given[0]))
    model(IDS)
    post, comb, read = seen["mixer"]
    assert seen["given"].shape == (2, 24, 32)
    assert torch.equal(seen["given"], read)
    assert torch.equal(seen["attended"], read + seen["update"])
    before = model.model.embed_tokens(IDS).unsqueeze(2).expand(-1, -1, 4, -1)
    expected = post.unsqueeze(-1) * (seen["attention"] + seen["update"]).unsqueeze(-2) + comb.mT @ before
    torch.testing.assert_close(seen["after"], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_single_fusion_with_one_stream_is_the_ordinary_model(build):
    single = build(backbone={"memory_fusion": "single"})
    assert torch.equal(single(IDS).logits, build()(IDS).logits)


@torch.no_grad()
def test_autocast_leaves_the_streams_in_float32(build):
    model = build(**FOUR)
    seen = []
    model.model.layers[1].register_forward_hook(lambda module, given, result: seen.append((given[0], result)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(IDS)
    assert [tensor.dtype for tensor in seen[0]] == [torch.float32] * 2


def test_streams_that_contradict_the_memory_are_refused(build):
    with pytest.raises(ConfigError, match="num_streams must be at least 1"):
        EngramLMConfig(**BACKBONE, num_streams=0)
    with pytest.raises(ConfigError, match="needs 4 of 32"):
        build(backbone={"num_streams": 4})
    with pytest.raises(ConfigError, match="memory_fusion"):
        build(backbone={"memory_fusion": "both"})
    with pytest.raises(ConfigError, match="needs 1 of 32"):
        build(memory={**MEMORY, "num_streams": 4}, backbone={"num_streams": 4, "memory_fusion": "single"})
