"""Decoding in every mode equals the forward pass over the whole sequence."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.small_model import VARIANTS, any_interleaving_equals_the_whole, threads_get_what_one_gets
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from engram_lm.errors import ConfigError, HistoryError, MismatchError
from engram_lm.model.cache import CACHE_NAME


@pytest.fixture
def variant(request, build):
    """The small model, or the one of `VARIANTS` that the test is parametrized with."""
    backbone, memory = VARIANTS[request.param]
    return build(backbone=backbone, memory=memory)


ALL_VARIANTS = pytest.mark.parametrize("variant", VARIANTS, indirect=True)


def tokens(batch=2, length=30, seed=2):
    return torch.randint(2, 280, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def whole(model, ids, **kwargs):
    return model(input_ids=ids, use_cache=False, **kwargs).logits


def caches(model):
    return {
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=40),
        "bare": DynamicCache,
    }


CHUNKS = {"ones": [1] * 30, "mixed": [7, 1, 1, 11, 10], "prefill": [29, 1]}
# Every pair on the plain model and on the one with everything; on the others the two that differ most.
CHUNKED = [
    (name, way, kind)
    for name in VARIANTS
    for way in CHUNKS
    for kind in ("dynamic", "static", "bare")
    if name in ("plain", "all") or (way, kind) in (("ones", "dynamic"), ("mixed", "static"))
]


@torch.no_grad()
@pytest.mark.parametrize(("variant", "way", "kind"), CHUNKED, indirect=["variant"])
def test_logits_of_any_chunking_and_cache_equal_the_whole_forward(variant, way, kind):
    model, ids, chunks = variant, tokens(), CHUNKS[way]
    cache = caches(model)[kind]()
    pieces, start = [], 0
    for size in chunks:
        pieces.append(model(ids[:, start : start + size], past_key_values=cache, use_cache=True).logits)
        start += size
    torch.testing.assert_close(torch.cat(pieces, 1), whole(model, ids), atol=2e-5, rtol=1e-5)


GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "returned beams": {"num_beams": 3, "num_return_sequences": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 5},
    "static": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 4},
    "early exit": {"assistant_early_exit": 2},
}
# Everything on the plain model and on the one with everything; on the others, what moves a cache most.
GENERATED = [
    (name, way)
    for name in VARIANTS
    for way in (GENERATION if name in ("plain", "all") else ("beams", "prompt lookup", "static"))
]


@pytest.mark.parametrize(("variant", "way"), GENERATED, indirect=["variant"])
def test_generation_with_a_cache_equals_generation_without(variant, way):
    model, options = variant, GENERATION[way]
    prompt = torch.cat([tokens(1, 8)] * 2, dim=1)  # a repeated prompt, so that prompt lookup finds candidates
    if not options.keys() & {"prompt_lookup_num_tokens", "assistant_early_exit"}:  # they take one prompt
        prompt = torch.cat([prompt, tokens(1, 16, seed=9)])
    asked = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 1, **options}
    plain = {
        key: asked[key]
        for key in ("do_sample", "max_new_tokens", "pad_token_id", "num_beams", "num_return_sequences")
        if key in asked
    }
    torch.manual_seed(0)
    cached = model.generate(prompt, **asked)
    torch.manual_seed(0)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **plain))


@pytest.mark.parametrize("variant", ["plain", "all"], indirect=True)
def test_an_assistant_model_s_guesses_change_nothing(variant):
    model = variant
    prompt = tokens(1, 12)
    # A near copy, so that some guesses are accepted and some are rolled back.
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        assistant.lm_head.weight.add_(torch.randn_like(assistant.lm_head.weight) * 0.05)
    expected = model.generate(prompt, do_sample=False, max_new_tokens=30)
    calls = []
    forward = model.forward
    model.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    assisted = model.generate(prompt, do_sample=False, max_new_tokens=30, assistant_model=assistant)
    assert torch.equal(assisted, expected)
    assert 2 < len(calls) < 30  # some guesses were right, some were not


@ALL_VARIANTS
def test_left_padding_changes_no_continuation(variant):
    model = variant
    short, long = tokens(1, 7, seed=3), tokens(1, 15, seed=4)
    padded = torch.cat([torch.full((1, 8), 1), short], dim=1)
    batch = torch.cat([padded, long])
    mask = torch.ones_like(batch)
    mask[0, :8] = 0
    together = model.generate(batch, attention_mask=mask, do_sample=False, max_new_tokens=20, pad_token_id=1)
    for row, alone in enumerate([short, long]):
        expected = model.generate(alone, do_sample=False, max_new_tokens=20, pad_token_id=1)[0, alone.shape[1] :]
        assert torch.equal(together[row, 15:], expected)


@torch.no_grad()
@ALL_VARIANTS
def test_padding_on_either_side_changes_no_logit(variant):
    model = variant
    ids = tokens(1, 10)
    expected = whole(model, ids)
    left = torch.cat([torch.full((1, 5), 1), ids], dim=1)
    mask = (torch.arange(15) >= 5).long()[None]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits = whole(model, left, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(logits[:, 5:], expected, atol=2e-5, rtol=1e-5)
    right = torch.cat([ids, torch.full((1, 5), 1)], dim=1)
    logits = whole(model, right, attention_mask=mask.flip(1))
    torch.testing.assert_close(logits[:, :10], expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_a_document_in_a_packed_sequence_reads_the_rows_it_reads_alone(model, tokenizer):
    spec, end = model.hash_spec, tokenizer.eos_token_id
    first, second = tokens(1, 9, seed=5), tokens(1, 11, seed=6)
    packed = torch.cat([first, torch.tensor([[end]]), second], dim=1)
    for layer in spec.layers:
        assert torch.equal(spec.rows(packed, layer)[:, 10:], spec.rows(second, layer))


@pytest.mark.parametrize("name", ["plain", "all"])
@settings(max_examples=25)
@given(data=st.data())
def test_any_interleaving_of_steps_rollbacks_and_beam_moves_equals_the_whole(name, data):
    model = _interleaved_model(name)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    any_interleaving_equals_the_whole(model, cache, data, resets=True)


_MODELS = {}


def _interleaved_model(name):
    # hypothesis cannot take function fixtures; one model for all examples.
    if name not in _MODELS:
        from tests.small_model import BACKBONE, MEMORY, TEXT
        from transformers import AutoModelForCausalLM

        from engram_lm.memory import EngramConfig
        from engram_lm.model import EngramLMConfig
        from engram_lm.training.data.tokenizer import train_tokenizer

        backbone, memory = VARIANTS[name]
        memory = EngramConfig(**{**MEMORY, **memory})
        config = EngramLMConfig.for_tokenizer(train_tokenizer([TEXT], 300), memory, **{**BACKBONE, **backbone})
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        _MODELS[name] = model
    return _MODELS[name]


def test_a_reset_cache_starts_over(model):
    ids = tokens()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(seed=77), past_key_values=cache)
        cache.reset()
        logits = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(logits, whole(model, ids), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cache_is_cut_back_without_being_told_beforehand_or_refuses_to_be(build):
    model, ids = build(), tokens()
    model.model.max_rollback = 6
    cache = DynamicCache(config=model.config)
    model(ids[:, :20], past_key_values=cache)
    cache.crop(-6)
    logits = model(ids[:, 14:], past_key_values=cache).logits
    torch.testing.assert_close(logits, whole(model, ids)[:, 14:], atol=2e-5, rtol=1e-5)
    held = cache.get_seq_length()
    with pytest.raises(HistoryError, match=r"takes back 7 tokens.*activate_past_recording"):
        cache.crop(-7)
    assert cache.get_seq_length() == held


@torch.no_grad()
@pytest.mark.parametrize("taken_back", [5, 64])
def test_a_new_message_after_an_answer_that_was_taken_back_is_answered_alike(taken_back, model):
    ids, cache = tokens(length=12), DynamicCache(config=model.config)
    model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=taken_back + 1, pad_token_id=1)
    cache.crop(-taken_back)
    new = torch.cat([ids, tokens(length=3, seed=8)], 1)
    asked = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 1}
    assert torch.equal(model.generate(new, past_key_values=cache, **asked), model.generate(new, **asked))


@torch.no_grad()
def test_a_cache_made_for_another_configuration_is_followed_and_one_without_layers_is_refused(model, build):
    plain, ids = build(memory=False), tokens()
    cache = DynamicCache(config=plain.config)
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split(10, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole(model, ids), atol=2e-5, rtol=1e-5)
    with pytest.raises(MismatchError, match=r"DynamicCache\(config=model.config\)"):
        model(ids, past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()))


@torch.no_grad()
def test_a_cache_that_memory_has_not_followed_is_refused(model, build):
    plain, cache = build(memory=False), DynamicCache(config=model.config)
    plain(tokens(), past_key_values=cache)
    with pytest.raises(HistoryError, match="30 tokens, of which the memory 'model' has seen 0"):
        model(tokens(2, 1), past_key_values=cache)
    cache = DynamicCache(config=model.config)
    model(tokens(2), past_key_values=cache)
    with pytest.raises(HistoryError, match="batch"):
        model(tokens(3), past_key_values=cache)


@torch.no_grad()
def test_nothing_has_changed_where_a_rollback_is_refused(build):
    model = build(memory={"layers": (2,)})  # the blocks before it have a cache of their own
    model.model.max_rollback = 0
    ids, cache = tokens(), DynamicCache(config=model.config)
    model(ids[:, :20], past_key_values=cache)
    with pytest.raises(HistoryError, match="takes back 3 tokens"):
        cache.crop(-3)
    logits = model(ids[:, 20:], past_key_values=cache).logits
    torch.testing.assert_close(logits, whole(model, ids)[:, 20:], atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("kind", ["dynamic", "static", "bare"])
def test_a_copy_of_a_prompt_s_cache_goes_on_alike(kind, copied, model):
    ids, cache = tokens(), caches(model)[kind]()
    model(ids[:, :20], past_key_values=cache)
    copies = [copied(cache) for _ in range(2)]
    for each in (copies[0], cache, copies[1]):
        logits = model(ids[:, 20:], past_key_values=each).logits
        torch.testing.assert_close(logits, whole(model, ids)[:, 20:], atol=2e-5, rtol=1e-5)


def test_two_threads_get_what_one_gets(model):
    threads_get_what_one_gets(model)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["plain", "streams"], indirect=True)
def test_decoding_under_bfloat16_equals_its_own_whole_forward(variant, tmp_path):
    variant.save_pretrained(tmp_path)
    model = type(variant).from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = tokens(1, 12)
    cache = DynamicCache(config=model.config)
    pieces = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(12)]
    torch.testing.assert_close(torch.cat(pieces, 1).float(), whole(model, ids).float(), atol=0.15, rtol=0.1)


@torch.no_grad()
@pytest.mark.parametrize("name", ["past_key_values", "cache", "cache_params"])
def test_the_cache_is_used_under_each_name_that_transformers_gives_it(build, name):
    model, ids = build(), tokens()
    cache = DynamicCache(config=model.config)
    first = model(ids[:, :20], **{name: cache}).logits
    torch.testing.assert_close(
        torch.cat([first, model(ids[:, 20:], **{name: cache}).logits], 1), whole(model, ids), atol=2e-5, rtol=1e-5
    )


@torch.no_grad()
def test_what_earlier_steps_left_is_refused_where_forward_would_swallow_it(build):
    model, ids = build(), tokens()
    cache = DynamicCache(config=model.config)
    for wrong in ({"kv_cache": cache}, {"layer_past": ((ids, ids),)}, {"state": [ids]}):
        with pytest.raises(MismatchError, match=next(iter(wrong))):
            model(ids, **wrong)
    with pytest.raises(MismatchError, match="two different caches"):
        model(ids, past_key_values=cache, cache=DynamicCache(config=model.config))
    assert cache.get_seq_length() == 0
    assert model(ids, num_items_in_batch=torch.tensor(3), output_attentions=False).logits.isfinite().all()


@torch.no_grad()
def test_decoding_between_training_steps_is_right_or_refused_with_gradient_checkpointing(build):
    # Nothing is computed twice where there are no gradients; transformers drops the cache there before 5.24.
    model, ids = build(), tokens()
    expected = whole(model, ids)
    model.train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    cache = DynamicCache(config=model.config)
    first = model(ids[:, :20], **{CACHE_NAME: cache}).logits
    if CACHE_NAME == "cache":
        logits = torch.cat([first, model(ids[:, 20:], cache=cache).logits], 1)
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
    else:
        with pytest.raises(HistoryError, match="holds 0 tokens"):
            model(ids[:, 20:], past_key_values=cache)


def test_embeddings_without_tokens_and_continuous_batching_are_refused_in_words(model, build):
    ids = tokens()
    embeddings = model.get_input_embeddings()(ids)
    with pytest.raises(ConfigError, match="let it begin with input_ids"):
        model.generate(input_ids=ids, inputs_embeds=embeddings, max_new_tokens=2)
    with pytest.raises(MismatchError, match="use generate"):
        model.generate_batch([[5, 6, 7]])
    assert torch.equal(whole(model, ids, inputs_embeds=embeddings), whole(model, ids))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (5,)])
def test_input_without_tokens_or_without_a_batch_is_refused_in_words(model, shape):
    with pytest.raises(ConfigError, match="at least one token"):
        model(torch.ones(shape, dtype=torch.int64))


@torch.no_grad()
def test_sequences_that_share_a_row_read_what_they_read_alone(model):
    parts = [tokens(1, length, seed=length) for length in (7, 1, 9)]
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    ends = torch.tensor([0, 7, 8, 17], dtype=torch.int32)
    logits = whole(model, torch.cat(parts, 1), position_ids=positions, cu_seq_lens_q=ends)
    torch.testing.assert_close(logits, torch.cat([whole(model, part) for part in parts], 1), atol=2e-5, rtol=1e-5)
