"""What a model of a configuration holds and costs, without building it."""

import dataclasses

from engram.errors import ConfigError
from engram.model.config import EngramLMConfig

__all__ = ["ModelSizes", "model_sizes"]


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """Parameters by kind, and floating-point operations."""

    vocabulary: int
    """Token embedding and output head (one matrix where they are tied)."""
    attention: int
    """Attention projections and their norms."""
    feed_forward: int
    """Feed-forward networks, experts and routers included."""
    norms: int
    """Norms of the residual stream."""
    memory_layers: int
    """Projections, norms and convolutions of memory."""
    memory_tables: int
    """Rows of memory."""
    flops_per_token: int
    """Forward pass of one token, averaged over a sequence: matrix products, attention and the output head, a
    multiply-add counted as two."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.backbone + self.memory_layers + self.memory_tables

    @property
    def backbone(self) -> int:
        """Everything but memory."""
        return self.vocabulary + self.attention + self.feed_forward + self.norms


def model_sizes(config: EngramLMConfig, *, context: int) -> ModelSizes:
    """Count parameters and operations from the configuration.

    Args:
        config: A dense configuration.
        context: Tokens in a sequence; a token attends to half of it on average.

    Raises:
        ConfigError: The configuration has mixtures of experts, which are not counted yet.
    """
    if config.first_k_dense_replace is not None and config.first_k_dense_replace < config.num_hidden_layers:
        raise ConfigError("model_sizes counts dense models; this configuration has mixtures of experts")
    hidden, blocks = config.hidden_size, config.num_hidden_layers
    head_width = config.qk_nope_head_dim + config.qk_rope_head_dim
    queries = config.num_attention_heads * head_width
    if config.q_lora_rank is None:
        query, query_norm = hidden * queries, 0
    else:
        query, query_norm = config.q_lora_rank * (hidden + queries), config.q_lora_rank
    value_width = config.v_head_dim or 0
    key_value = hidden * (config.kv_lora_rank + config.qk_rope_head_dim)
    key_value += config.kv_lora_rank * config.num_attention_heads * (config.qk_nope_head_dim + value_width)
    output = config.num_attention_heads * value_width * hidden
    attention = blocks * (query + key_value + output)
    feed_forward = blocks * 3 * hidden * config.intermediate_size
    embedding = config.vocab_size * hidden
    memory = config.memory_config
    scores = 2 * config.num_attention_heads * (head_width + value_width) * (context + 1) / 2 * blocks
    flops = 2 * (attention + feed_forward + embedding) + round(scores)
    return ModelSizes(
        vocabulary=embedding * (1 if config.tie_word_embeddings else 2),
        attention=attention + blocks * (query_norm + config.kv_lora_rank),
        feed_forward=feed_forward,
        norms=(2 * blocks + 1) * hidden,
        memory_layers=len(memory.layers) * memory.layer_parameters() if memory else 0,
        memory_tables=memory.table_parameters() if memory else 0,
        flops_per_token=flops + (memory.flops_per_token() if memory else 0),
    )
