"""UltraMem: rows are chosen by a grid of scores with a Tucker core, and read through virtual copies of the table."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engram_lm.errors import ConfigError
from engram_lm.memory.config import EngramConfig
from engram_lm.studies.rivals.product_keys import num_chosen
from engram_lm.studies.rivals.rival_layer import RivalLayer, rms_norm
from engram_lm.tables.table import Table

# Dimension key: B batch, L length, D hidden, N keys of each half, R rank, C cores, K chosen rows, E virtual copies,
# Q width of half a query, V width of a row.


class TuckerKeyLayer(RivalLayer):
    """Choose rows by ``s₁ᵀ C s₂``, where each half of a query has R scores for each of N keys.

    The ``chosen`` best keys of each half are found by the best approximation of rank one of the core C, the
    ``chosen²`` scores among them are computed with all of it, and the best ``chosen`` are read, weighted by their
    scores (no softmax). C is the sum of ``cores`` cores, and each of them scores its own part of a row. The grid has
    ``expansion`` times as many cells as the table has rows: a fixed shuffle says which row, and which of ``expansion``
    projections, a cell stands for. There is one query head, as published.

    The shuffle is a multiplication modulo the number of cells, not a list, which would be as long as the table. The
    published auxiliary loss on the core's other singular values (weight 0.001) is left out.

    Source: UltraMem, arXiv 2411.12364, section 3; ZihaoHuang-notabot/Ultra-Sparse-Memory-Network
    ``olmo/ultramem_layer.py``.
    """

    fields = {"orders": (1,), "num_heads": 1}

    def __init__(self, config: EngramConfig, table: Table | None = None) -> None:
        super().__init__(config, table)
        half, rank = config.option("key_width") // 2, config.option("rank")
        self.num_keys, self.num_rows = grid(config)
        self.num_cells = self.num_keys**2
        self.step = shuffle_step(self.num_cells)
        self.input_norm = nn.Parameter(torch.empty(config.hidden_size))
        self.query = nn.Linear(config.hidden_size, 2 * half, bias=False)
        self.query_norm, self.key_norm = (nn.Parameter(torch.empty(half)) for _ in range(2))
        self.keys = nn.Parameter(torch.empty(2, self.num_keys, rank, half))
        self.core = nn.Parameter(torch.empty(1, config.option("cores"), rank, rank))
        self.output = nn.Linear(config.option("expansion") * config.memory_dim, config.hidden_size, bias=False)
        self.reset_parameters()

    @classmethod
    def check(cls, config: EngramConfig) -> None:
        """Refuse options that cannot be, and what belongs to other layers."""
        super().check(config)
        if min(config.option(name) for name in config.entry.options) < 1 or config.option("key_width") % 2:
            raise ConfigError(f"options are at least 1, and key_width is even: {dict(config.layer_options)}")
        if config.memory_dim % config.option("cores") or math.isqrt(config.option("expansion")) ** 2 != config.option(
            "expansion"
        ):
            raise ConfigError("the cores divide memory_dim, and expansion is a square, such as 4")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize everything but the rows, whose spread is ``table_std`` (published: 0.02)."""
        half = self.config.option("key_width") // 2
        nn.init.ones_(self.input_norm)
        for norm in (self.query_norm, self.key_norm):
            nn.init.constant_(norm, half**-0.33)
        nn.init.normal_(self.query.weight, std=half**-0.5)
        nn.init.normal_(self.keys, std=half**-0.5)
        nn.init.uniform_(self.core)
        if self.config.value_init == "zero":
            nn.init.zeros_(self.output.weight)
        else:
            nn.init.normal_(self.output.weight, std=self.output.in_features**-0.5)

    @classmethod
    def count_parameters(cls, config: EngramConfig) -> int:
        """Count norms, queries, keys, cores and the projections."""
        cls.check(config)
        width, hidden, rank = config.option("key_width"), config.hidden_size, config.option("rank")
        found = hidden + width * (hidden + 1 + grid(config)[0] * rank) + config.option("cores") * rank**2
        return int(found + config.option("expansion") * config.memory_dim * hidden)

    @classmethod
    def count_flops(cls, config: EngramConfig) -> int:
        """Count queries, scores, the grid of the candidates, the weighted sums, and the projections."""
        width, hidden, rank = config.option("key_width"), config.hidden_size, config.option("rank")
        keys, chosen = grid(config)[0], num_chosen(config)
        scores = 2 * width * (hidden + keys * rank) + 4 * keys * rank
        exact = config.option("cores") * 2 * (chosen * rank**2 + chosen**2 * rank)
        sums = 2 * chosen * config.memory_dim
        return int(4 * hidden + scores + exact + sums + 2 * config.option("expansion") * config.memory_dim * hidden)

    @classmethod
    def count_numbers_read(cls, config: EngramConfig) -> int:
        """The chosen rows."""
        return num_chosen(config) * config.memory_dim

    def choose(self, hidden_states: Tensor) -> Tensor:
        """Read the chosen rows and add them up by the copy that they stand for: ``[B, L, E * V]``."""
        table = self.require_table()
        scores, cells = self.best(rms_norm(hidden_states, self.input_norm, self.config.norm_eps))
        shuffled = cells * self.step % self.num_cells
        rows = table.gather(shuffled % self.num_rows).to(scores.dtype)
        parts = rows.unflatten(-1, (scores.shape[-1], -1)) * scores.unsqueeze(-1)
        copy = F.one_hot(shuffled // self.num_rows, self.config.option("expansion")).to(scores.dtype)
        return torch.einsum("blke,blkv->blev", copy, parts.flatten(-2)).flatten(-2)

    def best(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Find the best cells: their scores for each core ``[B, L, K, C]``, and their numbers ``[B, L, K]``."""
        half, chosen = self.config.option("key_width") // 2, num_chosen(self.config)
        queries = self.query(normed).unflatten(-1, (2, half)).float()
        queries = F.layer_norm(queries, (half,)) * self.query_norm
        keys = F.layer_norm(self.keys, (half,)) * self.key_norm
        scores = torch.einsum("blsq,snrq->blsnr", queries, keys)
        core = self.core[0]
        left, _, right = torch.linalg.svd(core.detach().sum(0))
        first = torch.stack([left[:, 0], right[0]])
        first = first * torch.where(first[:1].sum() < 0, -1.0, 1.0)  # both, so that their product stays
        places = torch.einsum("blsnr,sr->blsn", scores, first).topk(chosen, dim=-1).indices
        near = scores.gather(-2, places.unsqueeze(-1).expand(*places.shape, scores.shape[-1]))
        exact = torch.einsum("blir,crs,bljs->blijc", near[:, :, 0], core, near[:, :, 1]).flatten(2, 3)
        numbers = (places[:, :, 0, :, None] * self.num_keys + places[:, :, 1, None, :]).flatten(-2)
        which = exact.sum(-1).topk(chosen, dim=-1).indices
        return exact.gather(-2, which.unsqueeze(-1).expand(*which.shape, exact.shape[-1])), numbers.gather(-1, which)

    def update(self, hidden_states: Tensor, vectors: Tensor) -> Tensor:
        """Project what each copy gave, and add it up."""
        output: Tensor = self.output(vectors)
        return output


def grid(config: EngramConfig) -> tuple[int, int]:
    """Keys of each half, and rows that are used: the largest grid of ``expansion`` cells for each row of the table."""
    copies = math.isqrt(config.option("expansion"))
    side = math.isqrt(config.num_table_rows()[0])
    return side * copies, side**2


def shuffle_step(num_cells: int) -> int:
    """A number near ``num_cells`` times the golden ratio, without a common divisor, so that its multiples meet all."""
    step = max(1, round(num_cells * 0.6180339887498949))
    while math.gcd(step, num_cells) > 1:
        step += 1
    return step
