"""vLLM gives the tokens that transformers gives, whatever it does to requests and their cache."""

import pytest
from tests.serving.vllm.engines import assert_equal, count, engine, generate
from tests.serving.vllm.models import CHECKPOINTS, prompts

MAIN = ["dense", "experts_streams", "shared_signed"]
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
    with engine(folder, **NGRAM) as llm:
        assert_equal(generate(llm, prompts()), expected)
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
        assert count(llm, "spec_decode_num_accepted_tokens") > 0
