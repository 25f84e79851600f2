"""A gate that also knows how often the training text has each N-gram."""

from typing import Any

import torch
from torch import Tensor, nn

from engram_lm.errors import ConfigError
from engram_lm.hashing.spec import HashSpec
from engram_lm.memory.config import EngramConfig
from engram_lm.memory.layer import EngramLayer
from engram_lm.studies.rivals.addresses import fingerprints, frequent_fingerprints, scattered
from engram_lm.tables.table import Table

# Dimension key: B batch, L length, O orders, S streams, M memory width, N N-grams.

_BYTES_PER_NGRAM = 8
_NUM_PROBES = 2
_SCALE = 8.0
"""What logarithms of counts are divided by, so that they are about as large as scores of the gate."""


class CountedGateLayer(EngramLayer):
    """The paper's layer, whose gate has a further term for each order: a weight times the logarithm of a count.

    The counts are those of the most frequent N-grams of the training text, as powers of two in a count-min sketch of
    ``count_bytes`` bytes, 8 for each N-gram; others count as 0. It is made before the first step (`prepare`), is saved
    with the weights, and is counted with the table's numbers, four bytes for one. Weights begin at 0, as if there were
    no counts.
    """

    counts: Tensor
    """The sketch, uint8: one more than the logarithm of a count to base 2; 0 where nothing was counted."""

    def __init__(self, config: EngramConfig, table: Table | None = None) -> None:
        _check(config)
        super().__init__(config, table)
        self.register_buffer("counts", torch.zeros(config.option("count_bytes"), dtype=torch.uint8))
        self.count_weight = nn.Parameter(torch.zeros(len(config.orders)))
        self.count_bias = nn.Parameter(torch.zeros(1))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize everything but the table."""
        super().reset_parameters()
        if hasattr(self, "count_bias"):  # the paper's layer asks for it before there is one
            nn.init.zeros_(self.count_weight)
            nn.init.zeros_(self.count_bias)

    @classmethod
    def count_parameters(cls, config: EngramConfig) -> int:
        """Count the numbers in one layer besides its table: those of `EngramLayer` and the weights of counts."""
        return super().count_parameters(config) + len(config.orders) + 1

    @classmethod
    def count_kept(cls, config: EngramConfig) -> int:
        """Count the numbers that the sketch takes the place of."""
        _check(config)
        return int(config.option("count_bytes")) // 4

    @classmethod
    def count_flops(cls, config: EngramConfig) -> int:
        """Count the operations of one token: those of `EngramLayer`, and for each gate a few more."""
        return super().count_flops(config) + 2 * len(config.orders) + 5 * config.num_streams

    def prepare(self, spec: HashSpec, tokens: Any) -> None:
        """Count the most frequent N-grams of each order."""
        number = self.counts.numel() // (_BYTES_PER_NGRAM * len(spec.orders))
        for ngrams, counts in frequent_fingerprints(spec, tokens, number):
            levels = (counts.double().log2().floor() + 1).to(self.counts)
            places, levels = self._places(ngrams.to(levels.device)), levels[:, None].expand(-1, _NUM_PROBES)
            self.counts.scatter_reduce_(0, places.flatten(), levels.flatten(), "amax")

    def _places(self, ngrams: Tensor) -> Tensor:
        """Where N-grams are counted, given by their fingerprints ``[...]``: ``[..., probes]``."""
        probes = torch.stack([scattered(ngrams, 200 + probe) for probe in range(_NUM_PROBES)], dim=-1)
        return probes % self.counts.numel()

    def read(self, rows: Tensor) -> Tensor:
        """Read rows ``[B, L, H]`` and behind them the logarithm of each order's count: ``[B, L, M + O]``."""
        vectors, places = super().read(rows), self._places(fingerprints(rows, self.config.num_heads))
        return torch.cat([vectors, self.counts[places].amin(-1).to(vectors)], dim=-1)

    def weigh(self, hidden_states: Tensor, vectors: Tensor, active: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Do what the paper's layer does, and add the term of the counts to the scores of its gates."""
        vectors, levels = vectors.split([self.config.memory_dim, len(self.config.orders)], dim=-1)
        value, gates = super().weigh(hidden_states, vectors, active)
        term = (levels.to(gates) / _SCALE * self.count_weight).sum(-1, keepdim=True) + self.count_bias
        # A term that is added to the score multiplies the odds.
        odds = gates * term.float().exp()
        return value, odds / (odds + 1 - gates)


def _check(config: EngramConfig) -> None:
    size = config.option("count_bytes")
    if len(config.layers) > 1 or config.occupancy != "none" or config.gate == "none" or size < 4 or size % 4:
        raise ConfigError(
            "a gate that knows counts needs one layer, occupancy='none', a gate and a multiple of 4 bytes for counts, "
            f"not layers={config.layers}, occupancy={config.occupancy!r}, gate={config.gate!r}, count_bytes={size}"
        )
