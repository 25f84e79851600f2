"""How many tokens of a model of ours vLLM's cache holds, known before anything is loaded."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from engram_lm.memory.cache_row import memory_rows
from engram_lm.model.config import EngramLMConfig

if TYPE_CHECKING:
    import torch

CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Numbers in a head that the attention of vLLM 0.32 takes on CPUs; smaller heads are filled up."""


def cache_bytes_per_token(
    config: EngramLMConfig, dtype: "torch.dtype", *, ranks: int = 1, head_dims: Sequence[int] = CPU_HEAD_DIMS
) -> tuple[int, int] | None:
    """Bytes that each rank keeps of a token: keys and values of all heads of the rank, and memory's rows.

    Args:
        config: The model.
        dtype: Type of the cache.
        ranks: ``--tensor-parallel-size``. Heads are shared by the ranks; memory's rows are kept by each.
        head_dims: Numbers in a head that attention takes.

    Returns:
        Bytes of attention, and bytes of memory. None where vLLM does not serve the model: heads that are too large, or
        another memory layer than ``"engram"``.
    """
    needed = max(config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim)
    head_dim = min((size for size in head_dims if size >= needed), default=None)
    memory = config.memory_config
    if head_dim is None or (memory is not None and memory.layer != "engram"):
        return None
    heads = config.num_attention_heads // ranks
    attention = config.num_hidden_layers * heads * 2 * head_dim * dtype.itemsize
    rows = {} if memory is None else memory_rows(memory, memory.layers, dtype)
    return attention, sum(row.num_bytes for row in rows.values())


def cache_tokens(cache_bytes: int, bytes_per_token: int, block_size: int = 1) -> int:
    """Return how many tokens a cache of `cache_bytes` bytes holds, in whole blocks; vLLM keeps one block for itself."""
    return cache_bytes // (bytes_per_token * block_size) * block_size
