"""vLLM gives the tokens that transformers gives, whatever it does to requests and their cache."""

import pytest
import torch
from tests.serving.vllm.engines import assert_equal, count, engine, generate
from tests.serving.vllm.models import CHECKPOINTS, expect, prompts
from transformers import AutoModelForCausalLM

MAIN = ["quickstart", "dense", "experts_streams", "shared_signed"]
CHUNKS = {"max_num_batched_tokens": 64}
NGRAM = {
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    }
}
SMALL_BLOCKS = {"block_size": 32}
FEW_BLOCKS = {**SMALL_BLOCKS, "num_gpu_blocks_override": 20}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_kind_of_checkpoint(name, checkpoints):
    folder, expected = checkpoints(name)
    with engine(folder) as llm:
        assert_equal(generate(llm, prompts()), expected)


@pytest.mark.parametrize("name", MAIN)
def test_prompts_in_chunks(name, checkpoints):
    folder, expected = checkpoints(name)
    with engine(folder, **CHUNKS) as llm:
        assert_equal(generate(llm, prompts()), expected)


@pytest.mark.parametrize("name", MAIN)
def test_shared_prefixes(name, checkpoints):
    folder, expected = checkpoints(name)
    with engine(folder, enable_prefix_caching=True, **SMALL_BLOCKS) as llm:
        assert_equal(generate(llm, prompts()), expected)
        before = count(llm, "prefix_cache_hits")
        assert_equal(generate(llm, prompts()), expected)
        assert count(llm, "prefix_cache_hits") - before >= 200


@pytest.mark.parametrize("name", MAIN)
def test_preempted_requests(name, checkpoints):
    folder, expected = checkpoints(name)
    with engine(folder, **FEW_BLOCKS) as llm:
        assert_equal(generate(llm, prompts()), expected)
        assert count(llm, "num_preemptions") >= 1


@pytest.mark.parametrize("name", MAIN)
def test_speculation(name, checkpoints):
    folder, expected = checkpoints(name)
    # Each prompt ends as it did before its answer, so drafts repeat the answer, and memory often does so too.
    again = [prompt + answer.tokens + prompt[-3:] for prompt, answer in zip(prompts(), expected)]
    answers = expect(AutoModelForCausalLM.from_pretrained(folder).eval(), again)
    with engine(folder, **NGRAM) as llm:
        assert_equal(generate(llm, again), answers)
        assert count(llm, "spec_decode_num_accepted_tokens") >= 5
        assert count(llm, "spec_decode_num_draft_tokens") > count(llm, "spec_decode_num_accepted_tokens")


@pytest.mark.parametrize("name", MAIN)
def test_all_together(name, checkpoints):
    folder, expected = checkpoints(name)
    with engine(folder, enable_prefix_caching=True, **CHUNKS, **NGRAM, **FEW_BLOCKS) as llm:
        for _ in range(2):
            assert_equal(generate(llm, prompts()), expected)
        assert count(llm, "prefix_cache_hits") > 0
        assert count(llm, "num_preemptions") >= 1
        assert count(llm, "spec_decode_num_draft_tokens") > 0


# Without a mixture: which experts are chosen may hang on the last bit, whatever the margin of the tokens.
@pytest.mark.parametrize("name", ["quickstart", "dense", "shared_signed"])
def test_bfloat16_differs_only_where_two_tokens_are_almost_as_probable(name, checkpoints):
    folder, _ = checkpoints(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    expected = expect(model, prompts())
    with engine(folder, dtype="bfloat16") as llm:
        tokens, _ = generate(llm, prompts())
    for ours, theirs in zip(tokens, expected):
        differing = [place for place in range(len(ours)) if ours[place] != theirs.tokens[place]]
        # A logit between 8 and 16 has steps of 0.0625 in bfloat16.
        assert not differing or theirs.margins[differing[0]] < 0.07
    assert sum(ours == theirs.tokens for ours, theirs in zip(tokens, expected)) >= 8


@pytest.mark.parametrize("name", MAIN)
def test_the_cache_holds_as_many_tokens_as_computed(name, checkpoints):
    folder, _ = checkpoints(name)
    with engine(folder) as llm:
        config, cache = llm.llm_engine.model_config.hf_config, llm.llm_engine.vllm_config.cache_config
        head = 32  # the smallest that vLLM's attention on CPUs takes
        keys_values = 2 * config.num_hidden_layers * config.num_attention_heads * head * 4
        memory = config.memory_config
        rows = [
            4 * memory.hidden_size + 4 * memory.num_streams + 4 * (place == 0) for place in range(len(memory.layers))
        ]
        token_bytes = keys_values + sum(-(-row // 16) * 16 for row in rows)
        assert cache.num_gpu_blocks == (1 << 30) // (token_bytes * cache.block_size)
