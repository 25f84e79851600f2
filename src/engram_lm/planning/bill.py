"""What one rank holds, computes and sends in one step: arithmetic on a configuration."""

import dataclasses
from typing import Any

import numpy as np

from engram_lm.memory.config import EngramConfig
from engram_lm.model.config import EngramLMConfig
from engram_lm.planning.deduplication import CURVES, distinct_rows
from engram_lm.planning.shape import ITEM_BYTES, TABLE_STATE_BYTES, TrainingShape
from engram_lm.planning.sizes import ModelSizes, matrices, model_sizes, muon_parameters

_INDEX_BYTES = 8  # row numbers and counts are int64
_COUNT_WORDS = 4  # numbers of the first message of an exchange: engram_lm.tables.tiers.row_exchange
_NUM_NORMALIZATIONS = 5  # iterations of Muon


@dataclasses.dataclass(frozen=True)
class TableTraffic:
    """What the exchange of rows sends, per rank and step, in bytes. What stays on its rank is not counted."""

    counts: int
    """Four int64 to every other rank for each gather: how many rows are asked of it, and any error."""
    places: int
    """Requests: an int32 for each row that another rank owns (int64 where a rank has more than 2^31 rows)."""
    rows: int
    """Rows that owners send back."""
    gradients: int
    """Gradients of those rows, to their owners."""
    busiest_rows: int
    """Rows sent by the rank that sends most: blocks of rows of a higher order are asked for more."""

    @property
    def total(self) -> int:
        """All four, of the mean rank."""
        return self.counts + self.places + self.rows + self.gradients

    @classmethod
    def of_requests(cls, requests: np.ndarray, row_bytes: int, num_gathers: int, rows_per_rank: int) -> "TableTraffic":
        """Count, but for rounding the mean exactly, what is sent for ``[W, W]`` rows that rank i asks of owner j."""
        away, world = requests - np.diag(np.diag(requests)), len(requests)
        return cls._of_ranks(away.sum() / world, away.sum(0).max(), row_bytes, num_gathers, world, rows_per_rank)

    @classmethod
    def _of_ranks(
        cls, mean: float, most: float, row_bytes: int, num_gathers: int, world: int, rows_per_rank: int
    ) -> "TableTraffic":
        """Count what ranks send that ask for ``mean`` rows of others, where the busiest owner sends ``most``."""
        return cls(
            counts=num_gathers * (world - 1) * _COUNT_WORDS * _INDEX_BYTES,
            places=round(float(mean) * (4 if rows_per_rank <= 2**31 else 8)),
            rows=round(float(mean) * row_bytes),
            gradients=round(float(mean) * row_bytes),
            busiest_rows=round(float(most) * row_bytes),
        )


@dataclasses.dataclass(frozen=True)
class Bill:
    """What one rank holds, computes and sends in one step. Whole numbers; bytes unless the name says otherwise."""

    shape: TrainingShape
    """How the step is divided, kept and sent."""
    parameters: dict[str, int]
    """``backbone`` (memory's projections with it), ``tables``, ``total``, and ``active`` per token (paper's P_act)."""
    flops: dict[str, int]
    """``forward_per_token``; ``per_token`` of a training step (backward is twice a forward; one more forward where
    blocks are computed again); ``per_rank``; ``per_step`` of all ranks; ``optimizer_per_rank``: orthogonalizations of
    Muon."""
    tokens: dict[str, int]
    """``per_step``, ``per_rank`` and ``per_gather`` (of one forward pass of one rank)."""
    rows: dict[str, int]
    """``lookups_per_gather`` and ``distinct_per_gather`` over all layers, of one rank; ``lookups_per_step`` and
    ``distinct_per_step`` over all ranks; ``per_rank``: rows that a rank keeps."""
    memory: dict[str, int]
    """By kind: ``weights``, ``weights_gathered`` (FSDP2), ``weights_cast`` (copies in the type of products),
    ``gradients``, ``gradient_buckets`` (DDP), ``optimizer``, ``table_rows``, ``table_optimizer``, ``table_gradients``,
    ``activations`` (an estimate), ``workspace`` (logits again and their gradient, while the loss goes backward),
    ``exchange`` (buffers of one gather), and ``total``."""
    backbone_sent: dict[str, int]
    """Per rank and step: ``all_reduce``, ``all_gather``, ``reduce_scatter``, ``muon_gather`` (matrices that no
    rank has whole, and what each has made of its share), ``total``."""
    tables_sent: TableTraffic
    """What the exchanges of rows send under this shape."""
    tables_sent_with_duplicates: TableTraffic
    """The same if every lookup were asked for and sent on its own."""
    memory_blocks: tuple[int, ...]
    """Blocks that read memory, from 0: what a prefetch can hide behind."""
    num_blocks: int
    """All blocks."""

    @property
    def distinct_share(self) -> float:
        """Distinct rows over lookups of one gather; 1 without memory."""
        lookups = self.rows["lookups_per_gather"]
        return self.rows["distinct_per_gather"] / lookups if lookups else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {**dataclasses.asdict(self), "memory_blocks": list(self.memory_blocks)}
        for name in ("tables_sent", "tables_sent_with_duplicates"):
            values[name]["total"] = getattr(self, name).total
        return {**values, "distinct_share": self.distinct_share}


def bill(config: EngramLMConfig, shape: TrainingShape) -> Bill:
    """Price a step of training a configuration.

    Example:
        >>> found = bill(EngramLMConfig.preset("engram-27b"), TrainingShape(world_size=64, batch_size=1280,
        ...                                                                 sequence_length=4096, backbone="fsdp2"))
        >>> found.rows["per_rank"]  # of 72,404,232 rows
        1131317

    Source: FLOPs and parameters as in `model_sizes`; volumes of collectives as in Thakur et al., “Optimization of
    collective communication operations in MPICH” (ring: an all-gather sends (W-1)/W of the whole per rank).
    """
    sizes, memory = model_sizes(config, context=shape.sequence_length), config.memory_config
    dense = sizes.total - sizes.memory_tables
    tokens = {
        "per_step": shape.batch_size * shape.sequence_length,
        "per_rank": shape.sequences_per_rank * shape.sequence_length,
        "per_gather": shape.micro_batch * shape.sequence_length,
    }
    training = sizes.flops_per_token * (4 if shape.checkpointing else 3)
    tables = _Tables(config, memory, shape, tokens) if memory is not None and memory.entry.has_table else None
    backbone_sent = _backbone_sent(config, sizes, shape)
    held = _memory(config, sizes, shape, tokens, tables)
    nothing = TableTraffic(0, 0, 0, 0, 0)
    return Bill(
        shape=shape,
        parameters={
            "backbone": dense,
            "tables": sizes.memory_tables,
            "total": sizes.total,
            "active": sizes.active,
        },
        flops={
            "forward_per_token": sizes.flops_per_token,
            "per_token": training,
            "per_rank": training * tokens["per_rank"],
            "per_step": training * tokens["per_step"],
            "optimizer_per_rank": _muon_flops(config, shape),
        },
        tokens=tokens,
        rows=tables.rows() if tables else dict.fromkeys(_ROW_KEYS, 0),
        memory=held,
        backbone_sent=backbone_sent,
        tables_sent=tables.traffic(deduplicate=shape.deduplicate) if tables else nothing,
        tables_sent_with_duplicates=tables.traffic(deduplicate=False) if tables else nothing,
        memory_blocks=config.memory_layers,
        num_blocks=config.num_hidden_layers,
    )


_ROW_KEYS = ("lookups_per_gather", "distinct_per_gather", "lookups_per_step", "distinct_per_step", "per_rank")


class _Tables:
    """Lookups, distinct rows, owners and traffic of a model's tables."""

    def __init__(
        self, config: EngramLMConfig, memory: EngramConfig, shape: TrainingShape, tokens: dict[str, int]
    ) -> None:
        spec = config.spec
        assert spec is not None
        self.memory, self.shape, self.tokens = memory, shape, tokens
        self.order_of_head = np.repeat(spec.orders, spec.num_heads)
        self.heads = np.array(spec.primes, dtype=np.int64)  # [layers, heads]: rows of each head
        self.num_rows = memory.num_table_rows()
        self.row_bytes = memory.head_dim * ITEM_BYTES[shape.table_dtype]

    @property
    def rows_per_rank(self) -> int:
        """Rows of the rank that has most: blocks of ceil(rows / W), as DTensor divides them."""
        world = self.shape.world_size if self.shape.shard_tables else 1
        return sum(-(-rows // world) for rows in self.num_rows)

    def distinct(self, num_tokens: int, *, gathers: int = 1) -> np.ndarray:
        """Expected distinct rows of each head, float ``[layers, heads]``."""
        share = self.shape.distinct_share
        if share is not None and gathers == 1:
            return np.full(self.heads.shape, share * num_tokens)
        curve = CURVES[self.shape.curve]
        ngrams = [curve.ngrams(int(order), num_tokens, self.shape.sequence_length) for order in self.order_of_head]
        return np.array(
            [[distinct_rows(n, int(rows)) for n, rows in zip(ngrams, row, strict=True)] for row in self.heads]
        )

    def touched(self) -> float:
        """Distinct rows of a step over all ranks: the rows an optimizer updates."""
        of_layers = self.distinct(self.tokens["per_step"], gathers=0).sum(1)
        # Layers that share a table read it by unrelated multipliers, so their rows meet by chance only.
        return distinct_rows(of_layers.sum(), self.num_rows[0]) if len(self.num_rows) == 1 else float(of_layers.sum())

    def rows(self) -> dict[str, int]:
        per_token = self.heads.size
        values = (
            self.tokens["per_gather"] * per_token,
            self.distinct(self.tokens["per_gather"]).sum(),
            self.tokens["per_step"] * per_token,
            self.touched(),
            self.rows_per_rank,
        )
        return {name: round(float(value)) for name, value in zip(_ROW_KEYS, values, strict=True)}

    def requests(self, *, deduplicate: bool) -> np.ndarray:
        """Rows that a rank asks for in a step, by layer and head."""
        gather = self.tokens["per_gather"]
        each = self.distinct(gather) if deduplicate else np.full(self.heads.shape, float(gather))
        # The last pass of a rank may be smaller; it is priced by its share.
        return each * (self.tokens["per_rank"] / gather)

    def traffic(self, *, deduplicate: bool) -> TableTraffic:
        """Bytes sent by the mean rank, whose own rows are 1/W of what it asks for, and by the busiest owner."""
        world = self.shape.world_size
        if world == 1 or not self.shape.shard_tables:
            return TableTraffic(0, 0, 0, 0, 0)
        asked = self.requests(deduplicate=deduplicate)
        away = asked.sum() * (world - 1) / world
        owners = np.zeros(world)
        for layer, row in enumerate(self.heads):
            block = -(-self.num_rows[min(layer, len(self.num_rows) - 1)] // world)
            ends = np.cumsum(row)
            edges = np.arange(world + 1) * block
            # Rows of each head that lie in each block, [W, heads].
            inside = np.minimum(edges[1:, None], ends) - np.maximum(edges[:-1, None], ends - row)
            owners += (np.maximum(inside, 0) / row * asked[layer]).sum(1) * (world - 1)
        num_gathers = len(self.heads) * self.shape.num_micro_batches
        rows_per_rank = max(-(-rows // world) for rows in self.num_rows)
        return TableTraffic._of_ranks(away, owners.max(), self.row_bytes, num_gathers, world, rows_per_rank)

    def memory_bytes(self) -> dict[str, int]:
        """What rows, their optimizer, their gradients and one exchange take on a rank."""
        shape, width = self.shape, self.memory.head_dim
        item, world = ITEM_BYTES[shape.table_dtype], shape.world_size if shape.shard_tables else 1
        found = self.rows()
        asked = found["distinct_per_gather" if shape.deduplicate else "lookups_per_gather"]
        received = found["distinct_per_step"] if world == 1 else asked * shape.num_micro_batches
        return {
            "table_rows": self.rows_per_rank * self.row_bytes,
            "table_optimizer": self.rows_per_rank * TABLE_STATE_BYTES[shape.table_optimizer](width),
            # Sparse, not merged before the optimizer does it: a row stands there once for each rank that read it.
            "table_gradients": received * (_INDEX_BYTES + width * item),
            # Numbers and rows, as asked and as answered; where each lookup finds its row.
            "exchange": asked * 2 * (_INDEX_BYTES + self.row_bytes) + found["lookups_per_gather"] * _INDEX_BYTES
            if world > 1
            else 0,
        }


def _backbone_sent(config: EngramLMConfig, sizes: ModelSizes, shape: TrainingShape) -> dict[str, int]:
    """Bytes that a rank sends for everything but tables."""
    others, dense = (shape.world_size - 1) / shape.world_size, sizes.total - sizes.memory_tables
    sent = {"all_reduce": 0, "all_gather": 0, "reduce_scatter": 0, "muon_gather": 0}
    muon = muon_parameters(config) if shape.backbone_optimizer == "muon" else 0
    if shape.backbone == "ddp":  # once per step: gradients of earlier passes are added up first
        sent["all_reduce"] = round(2 * others * dense * 4)
        sent["muon_gather"] = round(others * muon * ITEM_BYTES[shape.dtype])  # each rank's share of the results
    elif shape.backbone == "fsdp2":
        # Blocks are gathered for forward and again for backward, of every pass; what is outside them stays between.
        blocks = dense - sizes.vocabulary
        gathered = shape.num_micro_batches * (2 * blocks + sizes.vocabulary)
        sent["all_gather"] = round(others * gathered * ITEM_BYTES[shape.gather_dtype])
        sent["reduce_scatter"] = round(others * dense * 4 * shape.num_micro_batches)
        if muon:  # FSDP2 divides stacks of experts between matrices; others are divided within, so they are gathered
            sent["muon_gather"] = round(2 * others * (muon - sizes.routed_experts) * ITEM_BYTES[shape.dtype])
    return {**sent, "total": sum(sent.values())}


def _muon_flops(config: EngramLMConfig, shape: TrainingShape) -> int:
    """Operations of a rank's orthogonalizations: three products for each of five iterations.

    The matrices of a shape are shared out among the ranks; stacks of experts under FSDP2 are divided so already.
    """
    if shape.backbone_optimizer != "muon":
        return 0
    total = 0
    for matrix in matrices(config):
        count = matrix.count
        if matrix.stacked and shape.backbone == "fsdp2":
            experts = config.n_routed_experts or 1
            count = count // experts * -(-experts // shape.world_size)
        else:
            count = -(-count // shape.world_size)
        short, long = sorted((matrix.rows, matrix.columns))
        total += count * _NUM_NORMALIZATIONS * (4 * short * short * long + 2 * short**3)
    return total


def activation_bytes_per_token(config: EngramLMConfig, shape: TrainingShape) -> int:
    """Estimate what backward keeps of a token: the tensors of each part, added up.

    Within 15 % of what autograd keeps in the presets of this library (``benchmarks/scaling.py``). A block that is
    computed again keeps its input, and one block at a time keeps the rest.
    """
    item, streams, hidden = ITEM_BYTES[shape.dtype], config.num_streams, config.hidden_size
    heads, blocks, dense_blocks = config.num_attention_heads, config.num_hidden_layers, config.num_dense_layers
    keys, values = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim), heads * (config.v_head_dim or 0)
    # Residual streams and norms are float32.
    residual = 4 * hidden * 2
    if streams > 1:
        sinkhorn = 2 * config.num_sinkhorn_iterations * (streams * streams + streams)
        residual = 4 * (2 * streams * hidden + 2 * hidden + sinkhorn + 4 * streams * (streams + 2))
    scores = 0 if shape.fused_attention else 4 * heads * shape.sequence_length
    attention = 8 * hidden + item * (2 * hidden + 3 * keys + 2 * values + 3 * config.kv_lora_rank) + scores
    dense = item * (hidden + 4 * config.intermediate_size)
    routed = 0
    if config.has_experts:
        chosen, width = config.num_experts_per_tok or 0, config.moe_intermediate_size
        routed = item * (chosen * (2 * hidden + 4 * width) + 2 * hidden + 4 * width * config.n_shared_experts)
        routed += 4 * (4 * (config.n_routed_experts or 0) + hidden) + 32 * chosen
    memory_layer, memory = 0, config.memory_config
    if memory is not None:
        memory_layer = item * (memory.memory_dim + (4 * streams + 1) * hidden) + 4 * 5 * streams * hidden
    head = 12 * hidden + item * (hidden + config.vocab_size) + (8 * streams * hidden if streams > 1 else 0)
    each = 2 * residual + attention
    if shape.checkpointing:
        return head + blocks * 4 * streams * hidden + each + max(dense if dense_blocks else 0, routed) + memory_layer
    whole = blocks * each + dense_blocks * dense + (blocks - dense_blocks) * routed
    return head + whole + (len(memory.layers) * memory_layer if memory is not None else 0)


def _memory(
    config: EngramLMConfig, sizes: ModelSizes, shape: TrainingShape, tokens: dict[str, int], tables: "_Tables | None"
) -> dict[str, int]:
    dense, item = sizes.total - sizes.memory_tables, ITEM_BYTES[shape.dtype]
    divided = shape.world_size if shape.backbone == "fsdp2" else 1
    muon = muon_parameters(config) if shape.backbone_optimizer == "muon" else 0
    share = -(-dense // divided)
    # FSDP2 has one block together and gathers the next meanwhile; what is outside the blocks stays.
    block = (dense - sizes.vocabulary) // config.num_hidden_layers
    gathered = (sizes.vocabulary + 2 * block) * ITEM_BYTES[shape.gather_dtype] if divided > 1 else 0
    # Products in a lower type keep copies of the weights until backward, unless weights come in that type.
    is_cast = shape.dtype != "float32" and not (divided > 1 and shape.gather_dtype == shape.dtype)
    gradients = 4 * share
    if divided > 1:  # whole, of one block at a time
        gradients += 4 * block
    held = {
        "weights": 4 * share,
        "weights_gathered": gathered,
        # Of one block at a time, where blocks are computed again.
        "weights_cast": (block + sizes.vocabulary_matrix if shape.checkpointing else dense) * item if is_cast else 0,
        "gradients": gradients,
        "gradient_buckets": 4 * dense if shape.backbone == "ddp" and shape.world_size > 1 else 0,
        "optimizer": -(-(8 * dense - 4 * muon) // divided),
        "table_rows": 0,
        "table_optimizer": 0,
        "table_gradients": 0,
        "activations": tokens["per_gather"] * activation_bytes_per_token(config, shape),
        "workspace": 2 * tokens["per_gather"] * config.vocab_size * item,
        "exchange": 0,
    }
    held.update(tables.memory_bytes() if tables else {})
    return {**held, "total": sum(held.values())}
