"""Product-key memory: each position chooses the rows that it reads by comparing a query with keys."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram_lm.errors import ConfigError
from engram_lm.memory.config import EngramConfig
from engram_lm.studies.rivals.rival_layer import RivalLayer, rms_norm
from engram_lm.tables.table import Table

# Dimension key: B batch, L length, D hidden, H query heads, N keys of each half, K chosen rows of each head,
# Q width of a query, V width of a row.


class ProductKeyLayer(RivalLayer):
    """Choose rows by the best sums of two half scores, and add their average, weighted by a softmax.

    A query has two halves, each of which is compared with N half keys; row ``i * N + j`` of the table belongs to the
    keys i and j. The ``chosen`` best of each half make ``chosen²`` sums, the best ``chosen`` of which are read. All
    heads read the same table, of which the first N² rows are used; N is the root of its number of rows, rounded down.
    ``num_heads`` are the query heads, and ``memory_dim`` over them is the width of a row.

    Options:
        chosen: Rows that each head reads.
        key_width: Width of a query, an even number.
        gate: ``"silu"`` projects the average back after a product with ``silu`` of a projection of the hidden state,
            as Memory+ does; ``"none"`` adds it as it is, as PKM does, and a row is as wide as the hidden state then.
        query_norm: ``"layer"`` normalizes the halves of the queries (PKM normalizes over the batch, which decoding step
            by step cannot); ``"none"``, as in Memory+.

    Hidden states are normalized first, as before the feed-forward networks that these memories stand for in the papers.

    Source: Large Memory Layers with Product Keys, arXiv 1907.05242, section 3; Memory Layers at Scale, arXiv
    2412.09764, section 3 (the gate).
    """

    fields = {"orders": (1,)}

    def __init__(self, config: EngramConfig, table: Table | None = None) -> None:
        super().__init__(config, table)
        heads, width = config.num_heads, config.option("key_width")
        self.num_keys = num_keys(config)
        self.input_norm = nn.Parameter(torch.empty(config.hidden_size))
        self.query = nn.Linear(config.hidden_size, heads * width, bias=False)
        self.keys = nn.Parameter(torch.empty(heads, 2, self.num_keys, width // 2))
        if config.option("query_norm") == "layer":
            self.query_norm = nn.Parameter(torch.empty(2, width // 2))
        if config.option("gate") == "silu":
            self.gate = nn.Linear(config.hidden_size, config.head_dim, bias=False)
            self.output = nn.Linear(config.head_dim, config.hidden_size, bias=False)
        self.reset_parameters()

    @classmethod
    def check(cls, config: EngramConfig) -> None:
        """Refuse options that cannot be, and what belongs to other layers."""
        super().check(config)
        if config.option("chosen") < 1 or config.option("key_width") < 2 or config.option("key_width") % 2:
            raise ConfigError("chosen is at least 1, and key_width an even number from 2")
        for name, allowed in (("gate", ("silu", "none")), ("query_norm", ("layer", "none"))):
            if config.option(name) not in allowed:
                raise ConfigError(f"the option {name} is one of {', '.join(allowed)}, not {config.option(name)!r}")
        if config.option("gate") == "none" and config.head_dim != config.hidden_size:
            raise ConfigError(
                f"without a gate rows are as wide as the hidden state: set memory_dim to num_heads x hidden_size, "
                f"{config.num_heads * config.hidden_size}"
            )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize everything but the rows, whose spread is ``table_std`` (published: ``head_dim ** -0.5``)."""
        nn.init.ones_(self.input_norm)
        nn.init.xavier_uniform_(self.query.weight)
        bound = self.config.option("key_width") ** -0.5
        nn.init.uniform_(self.keys, -bound, bound)
        if hasattr(self, "query_norm"):
            nn.init.ones_(self.query_norm)
        if hasattr(self, "gate"):
            nn.init.normal_(self.gate.weight, std=self.config.hidden_size**-0.5)
            if self.config.value_init == "zero":
                nn.init.zeros_(self.output.weight)
            else:
                nn.init.normal_(self.output.weight, std=self.config.head_dim**-0.5)

    @classmethod
    def count_parameters(cls, config: EngramConfig) -> int:
        """Count norms, queries, keys, and the two projections of the gate."""
        cls.check(config)
        hidden, width = config.hidden_size, config.option("key_width")
        found = hidden + config.num_heads * width * (hidden + num_keys(config))
        found += width if config.option("query_norm") == "layer" else 0
        return found + (2 * hidden * config.head_dim if config.option("gate") == "silu" else 0)

    @classmethod
    def count_flops(cls, config: EngramConfig) -> int:
        """Count queries, scores of all keys, sums of the candidates, the weighted average, and the gate."""
        hidden, heads, chosen = config.hidden_size, config.num_heads, num_chosen(config)
        scores = 2 * heads * config.option("key_width") * (hidden + num_keys(config))
        average = heads * (chosen**2 + 2 * chosen * config.head_dim)
        gate = 4 * hidden * config.head_dim + 2 * config.head_dim if config.option("gate") == "silu" else 0
        return 4 * hidden + scores + average + gate

    @classmethod
    def count_numbers_read(cls, config: EngramConfig) -> int:
        """Every head reads its chosen rows."""
        return config.num_heads * num_chosen(config) * config.head_dim

    def choose(self, hidden_states: Tensor) -> Tensor:
        """Read the chosen rows of all heads and average them: ``[B, L, V]``."""
        table = self.require_table()
        scores, rows = self.best(self.normed(hidden_states))
        values = table.gather(rows.flatten(-2)).to(scores.dtype)
        return (scores.softmax(-1).flatten(-2).unsqueeze(-2) @ values).squeeze(-2)

    def best(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Find the best rows of each head: their scores and their numbers, ``[B, L, H, K]``."""
        heads, chosen = self.config.num_heads, num_chosen(self.config)
        queries = self.query(normed).unflatten(-1, (heads, 2, -1))
        if hasattr(self, "query_norm"):
            queries = F.layer_norm(queries, queries.shape[-1:]) * self.query_norm
        halves, places = torch.einsum("blhsq,hsnq->blhsn", queries, self.keys).topk(chosen, dim=-1)
        sums = halves[..., 0, :, None] + halves[..., 1, None, :]
        numbers = places[..., 0, :, None] * self.num_keys + places[..., 1, None, :]
        scores, which = sums.flatten(-2).topk(chosen, dim=-1)
        return scores, numbers.flatten(-2).gather(-1, which)

    def normed(self, hidden_states: Tensor) -> Tensor:
        """Normalize hidden states ``[B, L, D]``."""
        return rms_norm(hidden_states, self.input_norm, self.config.norm_eps)

    def update(self, hidden_states: Tensor, vectors: Tensor) -> Tensor:
        """Gate the average and project it, or return it as it is."""
        if not hasattr(self, "gate"):
            return vectors
        output: Tensor = self.output(vectors * F.silu(self.gate(self.normed(hidden_states))))
        return output


def num_keys(config: EngramConfig) -> int:
    """Half keys of each head: the root of the table's number of rows, rounded down."""
    return math.isqrt(config.num_table_rows()[0])


def num_chosen(config: EngramConfig) -> int:
    """Rows that each head reads: the option, or as many as there are keys."""
    return min(int(config.option("chosen")), num_keys(config))
