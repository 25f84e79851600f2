"""How many tokens vLLM's cache holds for a checkpoint of ours, known before anything is loaded."""

import torch

from engram_lm.model.config import EngramLMConfig
from engram_lm.serving.vllm.attention import kernel_head_dim
from engram_lm.serving.vllm.state import memory_rows


def cache_bytes_per_token(config: EngramLMConfig, dtype: torch.dtype, *, ranks: int = 1) -> int:
    """Bytes that each rank keeps of a token: keys and values of all heads of the rank, and memory's rows.

    Args:
        config: The model.
        dtype: Type of the cache.
        ranks: ``--tensor-parallel-size``. Heads are shared by the ranks; memory's rows are kept by each.
    """
    head_dim = kernel_head_dim(max(config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim))
    heads = config.num_attention_heads // ranks
    attention = config.num_hidden_layers * heads * 2 * head_dim * dtype.itemsize
    memory = config.memory_config
    rows = {} if memory is None else memory_rows(memory, memory.layers, dtype)
    return attention + sum(row.num_bytes for row in rows.values())


def cache_tokens(cache_bytes: int, bytes_per_token: int, block_size: int) -> int:
    """Return how many tokens a cache of `cache_bytes` bytes holds, in whole blocks; vLLM keeps one block for itself."""
    return cache_bytes // (bytes_per_token * block_size) * block_size
