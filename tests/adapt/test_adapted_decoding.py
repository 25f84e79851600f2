"""An adapted model decodes what its whole forward pass computes, in every mode of ``generate`` and every cache."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.adapt.conftest import MEMORY, speak
from tests.adapt.small_models import CONFIGS, TOKENIZER, small_model
from tests.small_model import any_interleaving_equals_the_whole, threads_get_what_one_gets
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import engram_lm
from engram_lm import EngramConfig
from engram_lm.errors import HistoryError, MismatchError
from engram_lm.hashing import Segments
from engram_lm.model.cache import CACHE_NAME


def tokens(batch=2, length=30, seed=2):
    return torch.randint(2, 280, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def whole(model, ids, **kwargs):
    return model(input_ids=ids, use_cache=False, **kwargs).logits


CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=40),
    "bare": lambda model: DynamicCache(),
}
CHUNKS = {"ones": [1] * 30, "mixed": [7, 1, 1, 11, 10], "prefill": [29, 1]}
# Every pair on one model; on the others the two that differ most.
CHUNKED = [
    (name, way, kind)
    for name in CONFIGS
    for way in CHUNKS
    for kind in CACHES
    if name == "llama" or (way, kind) in (("ones", "dynamic"), ("mixed", "static"))
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "way", "kind"), CHUNKED)
def test_logits_of_any_chunking_and_cache_equal_the_whole_forward(name, way, kind, adapted):
    model, _ = adapted(name)
    ids, cache, pieces, start = tokens(), CACHES[kind](model), [], 0
    for size in CHUNKS[way]:
        pieces.append(model(ids[:, start : start + size], past_key_values=cache, use_cache=True).logits)
        start += size
    torch.testing.assert_close(torch.cat(pieces, 1), whole(model, ids), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cache_the_model_makes_itself_goes_on_with_the_memory(adapted):
    # Not before the first layer: the layers before have filled the cache by the time that memory sees it.
    model, _ = adapted(layers=(1, 2))
    ids = tokens()
    first = model(ids[:, :11], use_cache=True)
    second = model(ids[:, 11:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, whole(model, ids)[:, 11:], atol=2e-5, rtol=1e-5)


GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "returned beams": {"num_beams": 3, "num_return_sequences": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 5},
    "static": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 4},
}
GENERATED = [
    (name, way)
    for name in CONFIGS
    for way in (GENERATION if name in ("llama", "gemma3") else ("beams", "prompt lookup", "static"))
]


@pytest.mark.parametrize(("name", "way"), GENERATED)
def test_generation_with_a_cache_equals_generation_without(name, way, adapted):
    model, _ = adapted(name)
    options = GENERATION[way]
    prompt = torch.cat([tokens(1, 8)] * 2, dim=1)  # a repeated prompt, so that prompt lookup finds candidates
    if "prompt_lookup_num_tokens" not in options:
        prompt = torch.cat([prompt, tokens(1, 16, seed=9)])
    asked = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 1, **options}
    plain = {
        key: asked[key]
        for key in ("do_sample", "max_new_tokens", "pad_token_id", "num_beams", "num_return_sequences")
        if key in asked
    }
    torch.manual_seed(0)
    cached = model.generate(prompt, **asked)
    torch.manual_seed(0)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **plain))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_an_assistant_model_s_guesses_change_nothing(name, adapted):
    model, _ = adapted(name)
    prompt = tokens(1, 12)
    # A near copy, memory included, so that some guesses are accepted and some are rolled back.
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        assistant.lm_head.weight.add_(torch.randn_like(assistant.lm_head.weight) * 0.05)
    asked = {"do_sample": False, "max_new_tokens": 30, "pad_token_id": 1}
    expected = model.generate(prompt, **asked)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.equal(model.generate(prompt, **asked, assistant_model=assistant), expected)
    assert 2 < len(calls) < 30  # some guesses were right, some were not


@pytest.mark.parametrize("way", ["greedy", "beams", "static", "chunked prefill"])
@pytest.mark.parametrize(("name", "attention"), [("llama", "sdpa"), ("gemma3", "eager"), ("mistral", "sdpa")])
def test_left_padding_changes_no_continuation(name, attention, way, config):
    model = small_model(name, attn_implementation=attention)
    speak(engram_lm.attach(model, TOKENIZER, config()))
    short, long = tokens(1, 7, seed=3), tokens(1, 15, seed=4)
    batch = torch.cat([torch.cat([torch.full((1, 8), 1), short], dim=1), long])
    mask = torch.ones_like(batch)
    mask[0, :8] = 0
    asked = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 1}
    together = model.generate(batch, attention_mask=mask, **asked, **GENERATION[way])
    for row, alone in enumerate([short, long]):
        expected = model.generate(alone, **asked, num_beams=GENERATION[way].get("num_beams", 1))
        assert torch.equal(together[row, 15:], expected[0, alone.shape[1] :])


@torch.no_grad()
def test_padding_on_either_side_changes_no_logit(adapted):
    model, _ = adapted()
    ids = tokens(1, 10)
    expected = whole(model, ids)
    mask = (torch.arange(15) >= 5).long()[None]
    left = torch.cat([torch.full((1, 5), 7), ids], dim=1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits = whole(model, left, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(logits[:, 5:], expected, atol=2e-5, rtol=1e-5)
    pairs = mask[:, None, None, :].bool() & torch.ones(15, 15, dtype=torch.bool).tril()
    logits = whole(model, left, attention_mask=pairs, position_ids=positions)
    torch.testing.assert_close(logits[:, 5:], expected, atol=2e-5, rtol=1e-5)
    right = torch.cat([ids, torch.full((1, 5), 7)], dim=1)
    logits = whole(model, right, attention_mask=mask.flip(1))
    torch.testing.assert_close(logits[:, :10], expected, atol=2e-5, rtol=1e-5)
    with pytest.raises(MismatchError, match=r"attention_mask is \(1, 3\) for tokens \(1, 10\)"):
        whole(model, ids, attention_mask=torch.ones(1, 3))


_MODELS = {}


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@settings(max_examples=25)
@given(data=st.data())
def test_any_interleaving_of_steps_rollbacks_and_beam_moves_equals_the_whole(name, data):
    if name not in _MODELS:  # hypothesis cannot take function fixtures; one model for all examples
        model = small_model(name)
        adapter = engram_lm.attach(model, TOKENIZER, EngramConfig(**MEMORY))
        speak(adapter)
        # A cache with sliding windows says from the start that it records; then the bound is not asked for.
        adapter.max_rollback = 1 if name == "gemma3" else 9
        _MODELS[name] = model
    model = _MODELS[name]
    cache = DynamicCache(config=model.config)
    if data.draw(st.booleans()) or name == "gemma3":  # sliding windows take nothing back that was not recorded
        cache.activate_past_recording()
    any_interleaving_equals_the_whole(model, cache, data, resets=name != "gemma3")


@torch.no_grad()
def test_a_plain_cache_takes_back_as_much_as_was_agreed_and_refuses_more(adapted):
    model, adapter = adapted()
    adapter.max_rollback = 6
    ids, cache = tokens(1, 20), DynamicCache()
    model(ids, past_key_values=cache)
    before = cache.get_seq_length()
    with pytest.raises(HistoryError, match=r"takes back 7 tokens.*max_rollback was 6"):
        cache.crop(-7)
    assert cache.get_seq_length() == before
    cache.crop(-6)
    logits = model(ids[:, 14:], past_key_values=cache).logits
    torch.testing.assert_close(logits, whole(model, ids)[:, 14:], atol=2e-5, rtol=1e-5)
    cache.activate_past_recording()
    more = tokens(1, 15, seed=8)
    model(more, past_key_values=cache)
    cache.crop(-15)
    model(more, past_key_values=cache)
    cache.crop(0)  # all of it is wanted, so nothing needs to be kept for taking it back
    assert held(cache) == {0}
    cache.reset()
    model(ids, past_key_values=cache)
    logits = model(more, past_key_values=cache).logits
    torch.testing.assert_close(logits, whole(model, torch.cat([ids, more], 1))[:, 20:], atol=2e-5, rtol=1e-5)


def held(cache):
    """How many positions the parts of the state can take back."""
    (state,) = cache.layers[0].memory_states.values()
    parts = (state.history, *state.windows.values())
    return {count for part in parts for count in part.snapshot()["held"].tolist()}


@torch.no_grad()
@pytest.mark.parametrize("recorded", [False, True])
def test_a_cache_that_is_taken_back_to_nothing_starts_over(recorded, adapted):
    model, adapter = adapted()
    adapter.max_rollback = 6
    cache = DynamicCache()
    for piece in tokens(2, 20, seed=77).split(10, dim=1):
        model(piece, past_key_values=cache)
        if recorded:
            cache.activate_past_recording()
    cache.crop(-20)  # more than was agreed, but there is nothing left that would have to be known
    pieces = [model(piece, past_key_values=cache).logits for piece in tokens().split(10, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole(model, tokens()), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_what_was_recorded_is_given_up_once_some_of_it_is_taken_back(adapted):
    model, _ = adapted()
    ids, cache = tokens(), DynamicCache()
    model(ids[:, :10], past_key_values=cache)
    cache.activate_past_recording()
    model(ids[:, 10:25], past_key_values=cache)
    assert held(cache) == {15}
    cache.crop(-5)
    assert held(cache) == {0}
    logits = model(ids[:, 20:], past_key_values=cache).logits
    torch.testing.assert_close(logits, whole(model, ids)[:, 20:], atol=2e-5, rtol=1e-5)
    assert held(cache) == {10}  # and recording goes on


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
}


@torch.no_grad()
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize(
    ("name", "kind"), [*(("llama", kind) for kind in CACHES), ("gemma3", "dynamic"), ("gemma3", "static")]
)
def test_a_copy_of_a_prompt_s_cache_goes_on_alike(name, kind, way, adapted):
    model, _ = adapted(name)
    ids, cache = tokens(), CACHES[kind](model)
    before = type(cache)
    model(ids[:, :20], past_key_values=cache)
    assert type(cache) is before
    expected = whole(model, ids)[:, 20:]
    copies = [COPIES[way](cache) for _ in range(2)]
    for each in (copies[0], cache, copies[1]):
        torch.testing.assert_close(model(ids[:, 20:], past_key_values=each).logits, expected, atol=2e-5, rtol=1e-5)


def test_two_threads_get_what_one_gets(adapted, config):
    model, _ = adapted()
    speak(engram_lm.attach(model, TOKENIZER, config(layers=(1,), seed=5), name="second"), seed=3)
    threads_get_what_one_gets(model)


def test_a_call_without_the_memory_does_not_silence_one_that_has_begun(adapted):
    model, adapter = adapted()
    ids = tokens()
    expected = whole(model, ids)
    switch = model.model.layers[0].register_forward_hook(lambda *_: setattr(adapter, "enabled", False))
    assert torch.equal(whole(model, ids), expected)
    assert not torch.equal(whole(model, ids), expected)
    switch.remove()


@torch.no_grad()
def test_a_cache_that_cannot_carry_the_state_is_refused(adapted):
    model, _ = adapted()
    with pytest.raises(MismatchError, match=r"EncoderDecoderCache keeps no list of layers"):
        model(tokens(), past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()))


@torch.no_grad()
@pytest.mark.parametrize("recorded", [False, True])
def test_beams_that_change_places_take_their_tokens_and_windows_along(recorded, adapted):
    model, _ = adapted()
    first, second = tokens(3, 9), tokens(3, 4, seed=8)
    order = torch.tensor([2, 0, 0])
    cache = DynamicCache()
    model(first[:, :2], past_key_values=cache)
    if recorded:
        cache.activate_past_recording()
    model(first[:, 2:], past_key_values=cache)
    cache.reorder_cache(order)
    logits = model(second, past_key_values=cache).logits
    expected = whole(model, torch.cat([first[order], second], 1))[:, 9:]
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_a_reset_cache_starts_over_with_any_number_of_sequences(adapted):
    model, _ = adapted()
    cache = DynamicCache()
    model(tokens(2, seed=77), past_key_values=cache)
    for batch in (2, 3):
        cache.reset()
        logits = model(tokens(batch), past_key_values=cache).logits
        torch.testing.assert_close(logits, whole(model, tokens(batch)), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_segments_told_by_positions_go_on_through_a_cache(config):
    model, ids, cache = small_model(), tokens(), DynamicCache()
    speak(engram_lm.attach(model, TOKENIZER, config(), segments=Segments(positions=True)))
    pieces = [model(ids[:, t : t + 5], past_key_values=cache).logits for t in range(0, 30, 5)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole(model, ids), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cache_that_memory_has_not_followed_is_refused(adapted):
    model, adapter = adapted()
    cache = DynamicCache(config=model.config)
    with adapter.disabled():
        model(tokens(), past_key_values=cache)
    with pytest.raises(HistoryError, match="30 tokens, of which the memory 'default' has seen 0"):
        model(tokens(2, 1), past_key_values=cache)
    cache = DynamicCache(config=model.config)
    model(tokens(2), past_key_values=cache)
    with pytest.raises(HistoryError, match="2 sequences, this step has 3"):
        model(tokens(3), past_key_values=cache)


@torch.no_grad()
def test_another_memory_of_the_same_name_does_not_take_over_what_a_cache_holds(adapted, config):
    model, adapter = adapted()
    asked = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 1}
    prompt, cache = tokens(2, 9), StaticCache(config=model.config, max_cache_len=40)
    model.generate(prompt, **asked, past_key_values=cache)
    adapter.detach()
    speak(engram_lm.attach(model, TOKENIZER, config(orders=(2, 4), seed=7)), seed=4)
    with pytest.raises(HistoryError, match="has seen 0"):
        model(prompt, past_key_values=cache)
    cache.reset()
    cached = model.generate(prompt, **asked, past_key_values=cache)
    assert torch.equal(cached, model.generate(prompt, **asked, use_cache=False))


@torch.no_grad()
def test_two_memories_keep_their_own_state_in_one_cache(adapted, config):
    model, _ = adapted()
    speak(engram_lm.attach(model, TOKENIZER, config(layers=(0, 1), seed=7, orders=(2, 4)), name="second"), seed=4)
    asked = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 1, "num_beams": 3}
    prompt = tokens(2, 9)
    assert torch.equal(model.generate(prompt, **asked), model.generate(prompt, **asked, use_cache=False))


@torch.no_grad()
def test_of_two_memories_neither_goes_back_where_one_cannot(adapted, config):
    model, adapter = adapted()
    second = engram_lm.attach(model, TOKENIZER, config(layers=(0, 1), seed=7), name="second")
    adapter.max_rollback, second.max_rollback = 8, 4
    ids, cache = tokens(1, 20), DynamicCache()
    model(ids[:, :15], past_key_values=cache)
    with pytest.raises(HistoryError, match="max_rollback was 4"):
        cache.crop(-6)
    logits = model(ids[:, 15:], past_key_values=cache).logits
    torch.testing.assert_close(logits, whole(model, ids)[:, 15:], atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_under_bfloat16_equals_its_own_whole_forward(dtype, config):
    model = small_model().to(torch.bfloat16)
    speak(engram_lm.attach(model, TOKENIZER, config(), dtype=dtype))
    ids, cache = tokens(1, 12), DynamicCache(config=model.config)
    pieces = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(12)]
    expected = whole(model, ids)
    assert expected.dtype == torch.bfloat16
    torch.testing.assert_close(torch.cat(pieces, 1).float(), expected.float(), atol=0.15, rtol=0.1)


@torch.no_grad()
def test_a_compiled_step_on_a_static_cache_is_one_graph_and_equals_the_whole_forward(adapted):
    model, _ = adapted(layers=(1,))
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(1) or graph.forward, fullgraph=True)
    ids, cache = tokens(), StaticCache(config=model.config, max_cache_len=40)
    pieces = [model(ids[:, :10], past_key_values=cache).logits]
    pieces += [compiled(ids[:, t : t + 1], past_key_values=cache).logits for t in range(10, 20)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole(model, ids)[:, :20], atol=2e-5, rtol=1e-5)
    assert len(graphs) <= 2  # the count of tokens is given up in the first
    # It stays so in steps that are not compiled, until the cache is reset.
    logits = model(ids[:, 20:25], past_key_values=cache).logits
    torch.testing.assert_close(logits, whole(model, ids)[:, 20:25], atol=2e-5, rtol=1e-5)
    (state,) = cache.layers[0].memory_states.values()
    assert state.seen is None
    cache.reset()
    assert state.seen == 0


@torch.no_grad()
def test_what_earlier_steps_left_is_refused_where_the_model_would_swallow_it(adapted):
    model, _ = adapted()
    ids, cache = tokens(), DynamicCache(config=model.config)
    for wrong in ({"kv_cache": cache}, {"layer_past": ((ids, ids),)}, {"state": [ids]}):
        with pytest.raises(MismatchError, match=next(iter(wrong))):
            model(ids, **wrong)
    assert cache.get_seq_length() == 0
    if CACHE_NAME != "cache":
        with pytest.raises(MismatchError, match="pass it as past_key_values"):
            model(ids, cache=cache)
