"""What a model of a configuration holds and costs, without building it."""

import collections
import dataclasses
from typing import Literal

from engram_lm.model.config import EngramLMConfig


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """Parameters by kind, and floating-point operations."""

    vocabulary: int
    """Token embedding and output head (one matrix where they are tied)."""
    vocabulary_matrix: int
    """One of those matrices."""
    attention: int
    """Attention projections and their norms."""
    dense_feed_forward: int
    """Feed-forward networks of the leading dense blocks."""
    shared_experts: int
    """Experts that every token visits."""
    routed_experts: int
    """All experts that tokens are routed to."""
    chosen_experts: int
    """Those of them that one token visits."""
    routers: int
    """Routers; their selection biases are buffers and not counted."""
    norms: int
    """Norms of the residual stream."""
    streams: int
    """Maps of the hyper-connections and the weights that collapse the streams."""
    memory_layers: int
    """Projections, norms and convolutions of memory."""
    memory_tables: int
    """Rows of memory, and what its layers keep of the training text."""
    memory_read: int
    """Numbers of those rows that one token reads."""
    flops_per_token: int
    """Forward pass of one token, averaged over a sequence: matrix products, attention and the output head, a
    multiply-add counted as two. A training step takes three times it."""

    @property
    def total(self) -> int:
        """All parameters, as they are stored."""
        return self.backbone + self.memory_layers + self.memory_tables

    @property
    def backbone(self) -> int:
        """Everything but memory."""
        return self.vocabulary + self.attention + self.feed_forward + self.norms + self.streams

    @property
    def feed_forward(self) -> int:
        """Feed-forward networks, all experts and routers."""
        return self.dense_feed_forward + self.shared_experts + self.routed_experts + self.routers

    @property
    def without_vocabulary(self) -> int:
        """All parameters but the vocabulary's: what the paper's section 3.1 calls P_tot."""
        return self.total - self.vocabulary

    @property
    def paper_total(self) -> int:
        """Total as in the paper's Table 5, where one vocabulary matrix is counted whether tied or not."""
        return self.without_vocabulary + self.vocabulary_matrix

    @property
    def active(self) -> int:
        """Parameters that take part in one token, the vocabulary's left out: the paper's P_act."""
        return self.without_vocabulary - self.sparse

    @property
    def sparse(self) -> int:
        """Experts that a token does not visit and rows that it does not read: the paper's P_sparse."""
        return self.routed_experts - self.chosen_experts + self.memory_tables - self.memory_read


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Matrices of one shape that tokens are multiplied by, and that Muon updates."""

    kind: Literal["attention", "dense_feed_forward", "shared_experts", "routed_experts", "memory"]
    """Which part of the model they belong to."""
    count: int
    """How many there are."""
    rows: int
    """Outputs."""
    columns: int
    """Inputs."""
    stacked: bool = False
    """Whether they lie in one tensor with others, as the experts of a block do."""

    @property
    def parameters(self) -> int:
        """Numbers of all of them."""
        return self.count * self.rows * self.columns


def matrices(config: EngramLMConfig) -> list[Matrix]:
    """List the matrices of attention, feed-forward networks and memory's projections.

    Routers and stream mixers, the vocabulary, norms, biases and taps are not among them, nor are the tables; see
    `engram_lm.training.optimizers.sort_parameters`.
    """
    hidden, blocks, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    keys, values = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim), heads * (config.v_head_dim or 0)
    latent, rank, dense_blocks = config.kv_lora_rank, config.q_lora_rank, config.num_dense_layers
    if rank is None:
        found = [Matrix("attention", blocks, keys, hidden)]
    else:
        found = [Matrix("attention", blocks, rank, hidden), Matrix("attention", blocks, keys, rank)]
    found += [
        Matrix("attention", blocks, latent + config.qk_rope_head_dim, hidden),
        Matrix("attention", blocks, heads * config.qk_nope_head_dim + values, latent),
        Matrix("attention", blocks, hidden, values),
        Matrix("dense_feed_forward", 3 * dense_blocks, config.intermediate_size, hidden),
    ]
    if config.has_experts:
        width, num_experts = config.moe_intermediate_size, (blocks - dense_blocks) * (config.n_routed_experts or 0)
        found += [
            Matrix("shared_experts", 3 * (blocks - dense_blocks), width * config.n_shared_experts, hidden),
            Matrix("routed_experts", num_experts, 2 * width, hidden, stacked=True),
            Matrix("routed_experts", num_experts, hidden, width, stacked=True),
        ]
    memory = config.memory_config
    if memory is not None:
        found.append(Matrix("memory", len(memory.layers), (memory.num_streams + 1) * hidden, memory.memory_dim))
    return found


def muon_parameters(config: EngramLMConfig) -> int:
    """Count the numbers that Muon updates: those of all `matrices`."""
    return sum(matrix.parameters for matrix in matrices(config))


def model_sizes(config: EngramLMConfig, *, context: int) -> ModelSizes:
    """Count parameters and operations for sequences of ``context`` tokens; a token attends to half on average.

    Source: paper, section 3.1 (what counts as active and as sparse).
    """
    hidden, blocks, query_rank = config.hidden_size, config.num_hidden_layers, config.q_lora_rank
    by_kind: dict[str, int] = collections.Counter()
    for matrix in matrices(config):
        by_kind[matrix.kind] += matrix.parameters
    attention_rest = blocks * (config.kv_lora_rank + (query_rank or 0))
    if config.attention_bias:
        attention_rest += blocks * ((query_rank or 0) + config.kv_lora_rank + config.qk_rope_head_dim + hidden)
    chosen = expert_parameters(config) * (config.num_experts_per_tok or 0)
    routers = (blocks - config.num_dense_layers) * config.n_routed_experts * hidden
    embedding = config.vocab_size * hidden
    streams, stream_flops = _streams(config)
    memory = config.memory_config
    # One multiply-add per key and value number and position attended to, over half the context.
    widths = config.qk_nope_head_dim + config.qk_rope_head_dim + (config.v_head_dim or 0)
    scores = round(config.num_attention_heads * widths * (context + 1) * blocks)
    dense = by_kind["attention"] + by_kind["dense_feed_forward"] + by_kind["shared_experts"]
    products = dense + chosen + routers + embedding
    return ModelSizes(
        vocabulary=embedding * (1 if config.tie_word_embeddings else 2),
        vocabulary_matrix=embedding,
        attention=by_kind["attention"] + attention_rest,
        dense_feed_forward=by_kind["dense_feed_forward"],
        shared_experts=by_kind["shared_experts"],
        routed_experts=by_kind["routed_experts"],
        chosen_experts=chosen,
        routers=routers,
        norms=(2 * blocks + 1) * hidden,
        streams=streams,
        memory_layers=len(memory.layers) * memory.layer_parameters() if memory else 0,
        memory_tables=memory.table_parameters() + memory.kept_numbers() if memory else 0,
        memory_read=memory.numbers_read_per_token() if memory else 0,
        flops_per_token=2 * products + scores + stream_flops + (memory.flops_per_token() if memory else 0),
    )


def expert_parameters(config: EngramLMConfig) -> int:
    """Count one routed expert over all blocks that have experts."""
    return (config.num_hidden_layers - config.num_dense_layers) * 3 * config.hidden_size * config.moe_intermediate_size


def _streams(config: EngramLMConfig) -> tuple[int, int]:
    """Parameters and operations of all hyper-connections; the small Sinkhorn iteration is not counted."""
    num_streams, sites = config.num_streams, 2 * config.num_hidden_layers
    if num_streams == 1:
        return 0, 0
    wide, maps = num_streams * config.hidden_size, num_streams * (num_streams + 2)
    parameters = sites * (wide * maps + maps + 3) + wide * num_streams + num_streams + 1
    # Maps, reading one input, writing S streams from S + 1 sources; at the end the head's maps (its sum is not a
    # product).
    flops = sites * 2 * (wide * maps + wide + (num_streams + 1) * wide) + 2 * wide * num_streams
    return parameters, flops
