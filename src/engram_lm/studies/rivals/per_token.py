"""Per-layer embeddings: in each of several blocks, a row of its own for every token, gated by the hidden state."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram_lm.errors import MismatchError
from engram_lm.memory.config import EngramConfig
from engram_lm.studies.rivals.rival_layer import RivalLayer, rms_norm
from engram_lm.tables.table import Table

# Dimension key: B batch, L length, D hidden, P width of a row.


class PerTokenLayer(RivalLayer):
    """Multiply a token's row by a gate of the hidden state, project the product and normalize it.

    To the row, scaled by √P, a normalized projection of the token embedding is added, and the sum is divided by √2. The
    table has a row for every raw token, so the configuration asks for at least as many rows as the vocabulary has.
    Gemma applies it at the end of a block; here it comes at the start of the next one, like all memory.

    Source: Gemma 3n, transformers ``models/gemma3n/modeling_gemma3n.py`` (``Gemma3nTextDecoderLayer.forward`` and
    ``project_per_layer_inputs``).
    """

    fields = {"orders": (1,), "num_heads": 1, "token_map": "raw", "tables": "per_layer"}

    def __init__(self, config: EngramConfig, table: Table | None = None) -> None:
        super().__init__(config, table)
        hidden, width = config.hidden_size, config.memory_dim
        self.context = nn.Linear(hidden, width, bias=False)
        self.context_norm = nn.Parameter(torch.empty(width))
        self.gate = nn.Linear(hidden, width, bias=False)
        self.output = nn.Linear(width, hidden, bias=False)
        self.output_norm = nn.Parameter(torch.empty(hidden))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize everything but the table; with ``value_init="zero"`` the last norm, so that nothing is added."""
        for linear in (self.context, self.gate, self.output):
            nn.init.normal_(linear.weight, std=self.config.projection_std)
        nn.init.ones_(self.context_norm)
        nn.init.constant_(self.output_norm, 0.0 if self.config.value_init == "zero" else 1.0)

    @classmethod
    def count_parameters(cls, config: EngramConfig) -> int:
        """Count three projections and two norms."""
        cls.check(config)
        return 3 * config.hidden_size * config.memory_dim + config.memory_dim + config.hidden_size

    @classmethod
    def count_flops(cls, config: EngramConfig) -> int:
        """Count the projections, the products and sums of the row, and the norms."""
        return 6 * config.hidden_size * config.memory_dim + 8 * config.memory_dim + 4 * config.hidden_size

    def read(self, tokens: Tensor) -> Tensor:
        """Read the rows of tokens ``[B, L, 1]`` and their embeddings, side by side: ``[B, L, P + D]``."""
        if self.table is None or self.embedding is None:
            raise MismatchError("this layer needs a table and the token embedding of a model; build it as part of one")
        tokens = tokens[..., 0].clamp(min=0)  # what is read for a dead position is not heard
        return torch.cat([self.table.gather(tokens), self.embedding(tokens)], dim=-1)

    def update(self, hidden_states: Tensor, vectors: Tensor) -> Tensor:
        """Combine row and embedding, then gate, project and normalize."""
        width, eps = self.config.memory_dim, self.config.norm_eps
        row, embedding = vectors.split([width, self.config.hidden_size], dim=-1)
        context = self.context(embedding) * self.config.hidden_size**-0.5
        said = (row * math.sqrt(width) + rms_norm(context, self.context_norm, eps)) * math.sqrt(0.5)
        output = self.output(F.gelu(self.gate(hidden_states), approximate="tanh") * said)
        return rms_norm(output, self.output_norm, eps)
