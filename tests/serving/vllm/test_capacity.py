"""vLLM's cache holds as many tokens as we say."""

import pytest
import torch
from tests.serving.vllm.engines import CACHE_BYTES, engine
from tests.small_model import BACKBONE
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from engram_lm.model import EngramForCausalLM, EngramLMConfig
from engram_lm.planning.served_cache import CPU_HEAD_DIMS, cache_bytes_per_token, cache_tokens


def without_memory(folder):
    EngramForCausalLM(EngramLMConfig(vocab_size=300, **BACKBONE)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "dtype", "num_bytes"),
    # By hand: 3 blocks x 2 heads x (key, value) x 32 numbers; memory in 2 of them keeps D numbers, S gates and a code.
    [
        (None, torch.float32, 1536),
        ("dense", torch.float32, 1536 + 144 + 144),
        ("experts_streams", torch.bfloat16, 768 + 96 + 80),
    ],
)
def test_the_cache_holds_as_many_tokens_as_we_say(name, dtype, num_bytes, checkpoints, tmp_path):
    folder = without_memory(tmp_path) if name is None else checkpoints(name)[0]
    found = cache_bytes_per_token(EngramLMConfig.from_pretrained(folder), dtype)
    with engine(folder, dtype=dtype, block_size=32, skip_tokenizer_init=name is None) as llm:
        cache = llm.llm_engine.vllm_config.cache_config
        assert cache.num_gpu_blocks * cache.block_size == cache_tokens(CACHE_BYTES, sum(found), 32)
    assert sum(found) == num_bytes


def test_heads_are_filled_up_to_the_sizes_that_the_attention_of_vllm_takes():
    assert list(CPU_HEAD_DIMS) == sorted(CPUAttentionBackend.get_supported_head_sizes())
