"""Gates inside the memory vector: FactorEngram, with one for each number, and a cheap form with one for each head."""

import math

import torch
from torch import Tensor, nn

from engram_lm.memory.config import EngramConfig
from engram_lm.memory.refined import RefinedLayer, silent
from engram_lm.tables.table import Table

# Dimension key: B batch, L length, S streams, D hidden, H heads of all orders, M memory width, R width of the
# dictionary.


class SegmentGateLayer(RefinedLayer):
    """A gate for each head's part of the memory vector, computed from the hidden state, before the value projection.

    v = V (z ⊙ σ(W RMSNorm(h))), where each output of W is the gate of one head. This is FactorEngram without its
    dictionary.
    """

    def __init__(self, config: EngramConfig, table: Table | None = None) -> None:
        super().__init__(config, table)
        self.query_norm = nn.Parameter(torch.empty(config.num_streams, config.hidden_size))
        self._make_projections()
        self.make_convolution()
        self.reset_parameters()

    def _make_projections(self) -> None:
        config = self.config
        self.query = nn.Linear(config.hidden_size, config.num_heads_total, bias=False)
        self.value = nn.Linear(config.memory_dim, config.hidden_size, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize everything but the table; the value projection as ``value_init`` says."""
        for name, projection in self.named_children():
            assert isinstance(projection, nn.Linear)
            is_zero = name == "value" and self.config.value_init == "zero"
            nn.init.normal_(projection.weight, std=self.config.projection_std)
            if is_zero:
                nn.init.zeros_(projection.weight)
        self.reset_norms("query_norm")

    @classmethod
    def count_parameters(cls, config: EngramConfig) -> int:
        """Count the numbers in one layer besides its table: gates, value projection, norm and convolution."""
        matrices = config.hidden_size * (config.num_heads_total + config.memory_dim)
        return matrices + config.num_streams * config.hidden_size + cls.convolution_parameters(config)

    @classmethod
    def count_flops(cls, config: EngramConfig) -> int:
        """Count the operations of one token: for each stream a norm, the gates, their products and the value."""
        products = 2 * config.hidden_size * (config.num_heads_total + config.memory_dim)
        return config.num_streams * (products + 3 * config.hidden_size + config.memory_dim) + cls.convolution_flops(
            config
        )

    def gated(self, hidden_states: Tensor, vectors: Tensor, active: Tensor | None) -> tuple[Tensor, Tensor]:
        """Project what the gates let pass; the gates that are reported are means over the memory vector."""
        hidden_BLSD = self.split_streams(hidden_states)
        vectors_BLM = self.fitted(hidden_BLSD, vectors, self.value.weight.dtype)
        gates_BLSM = silent(self._gates(self._normed(hidden_BLSD, self.query_norm)), active)
        passed_BLSM = vectors_BLM.unsqueeze(2) * gates_BLSM.to(vectors_BLM.dtype)
        return self._value(passed_BLSM), gates_BLSM.float().mean(-1)

    def _gates(self, query: Tensor) -> Tensor:
        """Compute the gates of the memory vector's numbers, ``[B, L, S, M]``."""
        return torch.sigmoid(self.query(query).float()).repeat_interleave(self.config.head_dim, dim=-1)

    def _value(self, passed: Tensor) -> Tensor:
        """Project what passed the gates, ``[B, L, S, M]``, to ``[B, L, S, D]``."""
        value: Tensor = self.value(passed)
        return value

    def _normed(self, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        wide = hidden.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.config.norm_eps)
        return (scaled if weight is None else scaled * self._gain(weight)).to(self.value.weight.dtype)


class FactorEngramLayer(SegmentGateLayer):
    """FactorEngram: rows are coefficients z of a dictionary, and the hidden state gates each of them.

    q = RMSNorm(Q h); α = σ(K q / √R) in (0, 1)ᴹ; e = Kᵀ (z ⊙ α); v = V e, with a dictionary K of ``[M, R]``. R is the
    width at which the three matrices have as many numbers as those of `EngramLayer` with one stream. The published
    layer has orders 1 to 3, and an L1 penalty on z that is left out here (its own ablation: perplexity 21.47 without,
    21.29 with). The hidden state is normalized before Q, as it is everywhere in a model; the published text does not
    say. The short convolution stays, as far as the configuration has one, so that a comparison is one of the readers.

    Source: FactorEngram, arXiv 2609.35578.
    """

    @staticmethod
    def _width(config: EngramConfig) -> int:
        return max(1, round(2 * config.hidden_size * config.memory_dim / (2 * config.hidden_size + config.memory_dim)))

    def _make_projections(self) -> None:
        config, width = self.config, self._width(self.config)
        self.query = nn.Linear(config.hidden_size, width, bias=False)
        self.dictionary = nn.Linear(width, config.memory_dim, bias=False)
        self.value = nn.Linear(width, config.hidden_size, bias=False)

    @classmethod
    def count_parameters(cls, config: EngramConfig) -> int:
        """Count the numbers in one layer besides its table: three matrices, norm and convolution."""
        matrices = cls._width(config) * (2 * config.hidden_size + config.memory_dim)
        return matrices + config.num_streams * config.hidden_size + cls.convolution_parameters(config)

    @classmethod
    def count_flops(cls, config: EngramConfig) -> int:
        """Count the operations of one token: the dictionary is used twice, and all of it for each stream."""
        width = cls._width(config)
        products = 4 * width * (config.hidden_size + config.memory_dim)
        norms = 3 * (config.hidden_size + width) + config.memory_dim
        return config.num_streams * (products + norms) + cls.convolution_flops(config)

    def _gates(self, query: Tensor) -> Tensor:
        normed_BLSR = self._normed(self.query(query))
        return torch.sigmoid(self.dictionary(normed_BLSR).float() / math.sqrt(normed_BLSR.shape[-1]))

    def _value(self, passed: Tensor) -> Tensor:
        value: Tensor = self.value(passed @ self.dictionary.weight)
        return value
