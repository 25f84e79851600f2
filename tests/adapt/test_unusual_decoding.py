"""Ways to decode that memory cannot follow are refused in words; positions in several directions are understood."""

import logging

import pytest
import torch
import transformers
from tests.adapt.conftest import speak
from tests.adapt.small_models import SHAPE, TOKENIZER, small_model

import engram_lm
from engram_lm.errors import ConfigError, HistoryError, MismatchError
from engram_lm.hashing import Segments


def tokens(batch=2, length=20, seed=2):
    return torch.randint(2, 280, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def attached(config):
    def build(model, **kwargs):
        speak(engram_lm.attach(model.eval(), TOKENIZER, config(), **kwargs))
        return model

    return build


@torch.no_grad()
def test_a_cache_with_state_outside_of_its_layers_is_refused(attached):
    torch.manual_seed(0)
    config = transformers.MiniMaxConfig(
        **SHAPE, layer_types=["linear_attention", "full_attention", "linear_attention"], num_local_experts=2,
        num_experts_per_tok=1, block_size=8,
    )  # fmt: skip
    model, ids = attached(transformers.MiniMaxForCausalLM(config)), tokens()
    with pytest.raises(MismatchError, match=r"MiniMaxCache keeps state outside.*use_cache=False"):
        model.generate(ids, max_new_tokens=2)
    assert model.generate(ids, max_new_tokens=2, use_cache=False).shape == (2, 22)


@torch.no_grad()
def test_state_that_is_no_cache_is_refused(attached):
    torch.manual_seed(0)
    config = transformers.RwkvConfig(vocab_size=320, hidden_size=32, num_hidden_layers=3, attention_hidden_size=32)
    model, ids = attached(transformers.RwkvForCausalLM(config), layer_list="rwkv.blocks"), tokens()
    state = model(ids[:, :10], use_cache=True).state
    with pytest.raises(MismatchError, match="handed over as state, a list"):
        model(ids[:, 10:11], state=state)


def test_continuous_batching_is_refused(adapted, caplog):
    model, _ = adapted()
    prompts = [tokens(1, length, seed=length)[0].tolist() for length in (5, 9, 3)]
    config = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=1, eos_token_id=2)
    small = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    with caplog.at_level(logging.CRITICAL):
        outputs = model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=small, progress_bar=False
        )
    assert all("use generate" in output.error and not output.generated_tokens for output in outputs.values())


def test_embeddings_without_tokens_are_refused_with_what_helps(adapted):
    model, _ = adapted()
    ids = tokens()
    with pytest.raises(ConfigError, match="pass input_ids alone"):
        model.generate(input_ids=ids, inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=2)


@pytest.fixture
def vision_model():
    torch.manual_seed(0)
    shape = {key: value for key, value in SHAPE.items() if key != "head_dim"}
    ropes = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(
        text_config={**shape, "rope_parameters": ropes}, vision_config=vision, image_token_id=310, video_token_id=311,
        vision_start_token_id=312, vision_end_token_id=313,
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config)


def image_positions():
    """Positions ``[3, 1, 20]`` of 4 tokens of text, an image of 2 x 3 patches, 2 tokens of text, then a new text."""
    text = torch.arange(4).expand(3, -1)
    image = torch.stack([torch.zeros(6), torch.arange(6) // 3, torch.arange(6) % 3]).long() + 4
    return torch.cat([text, image, torch.arange(7, 9).expand(3, -1), torch.arange(8).expand(3, -1)], 1)[:, None]


@torch.no_grad()
def test_segments_by_position_read_the_text_s_positions_of_a_vision_model(vision_model, attached):
    model, ids = attached(vision_model, segments=Segments(positions=True)), tokens(1)
    adapter, codes = model.engram_adapters.default, []
    adapter.row_map = lambda block, rows: codes.append(rows) or rows
    three = image_positions()
    in_text = torch.cat([torch.arange(12), torch.arange(8)])[None]
    for positions in (in_text, three, torch.cat([in_text[None], three])):
        model(ids, position_ids=positions, use_cache=False)
    expected = adapter.spec.rows_for_layers(adapter.spec.encode(ids, position_ids=in_text))[adapter.spec.layers[1]]
    assert all(torch.equal(rows, expected) for rows in codes[1::2])
    one_text = adapter.spec.rows_for_layers(adapter.spec.encode(ids))[adapter.spec.layers[1]]
    assert not torch.equal(one_text, expected)
    asked = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(tokens(), **asked), model.generate(tokens(), use_cache=False, **asked))


def test_a_prompt_s_cache_goes_on_with_an_adapter_loaded_from_the_same_folder_and_with_no_other(adapted, tmp_path):
    _, adapter = adapted()
    adapter.save_pretrained(tmp_path / "one")
    speak(adapter, seed=5)
    adapter.save_pretrained(tmp_path / "other")
    models = {}
    for key, folder in (("first", "one"), ("again", "one"), ("other", "other")):
        models[key] = small_model()
        engram_lm.MemoryAdapter.from_pretrained(models[key], tmp_path / folder)
    ids = tokens()
    with torch.no_grad():
        torch.save(models["first"](ids[:, :12], use_cache=True)[1], tmp_path / "cache.pt")
        found = torch.load(tmp_path / "cache.pt", weights_only=False)
        logits = models["again"](ids[:, 12:], past_key_values=found).logits
        expected = models["again"](ids, use_cache=False).logits[:, 12:]
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
        found = torch.load(tmp_path / "cache.pt", weights_only=False)
        with pytest.raises(HistoryError, match="has seen 0"):
            models["other"](ids[:, 12:], past_key_values=found)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_sequences_that_share_a_row_read_what_they_read_alone(adapted, use_cache):
    model, _ = adapted()
    parts = [tokens(1, length, seed=length) for length in (7, 1, 9)]
    packed = {
        "input_ids": torch.cat(parts, 1),
        "position_ids": torch.cat([torch.arange(part.shape[1]) for part in parts])[None],
        "cu_seq_lens_q": torch.tensor([0, 7, 8, 17], dtype=torch.int32),
    }
    logits = model(**packed, use_cache=False).logits
    alone = torch.cat([model(part, use_cache=False).logits for part in parts], 1)
    torch.testing.assert_close(logits, alone, atol=2e-5, rtol=1e-5)
    mixed = model(packed["input_ids"], position_ids=packed["position_ids"], use_cache=False).logits
    assert not torch.allclose(mixed, alone, atol=1e-2)
    if use_cache:
        cache = model(**packed, use_cache=True)[1]
        with pytest.raises(HistoryError, match="has seen 0"):
            model(parts[0], past_key_values=cache)
    with pytest.raises(MismatchError, match="end at"):
        model(**{**packed, "input_ids": packed["input_ids"][:, :16], "position_ids": None})
