"""A key, a value and a gate for each order of N-grams, and the same with a sink that takes what no order deserves."""

import torch
from torch import Tensor

from engram_lm.errors import ConfigError
from engram_lm.memory.config import EngramConfig
from engram_lm.memory.gate import gate_scores
from engram_lm.memory.layer import EngramLayer
from engram_lm.memory.refined import RefinedLayer, silent
from engram_lm.tables.table import Table

# Dimension key: B batch, L length, O orders, S streams, D hidden, M memory width, N = M / O, P outputs of all keys and
# the value.


class PerOrderLayer(RefinedLayer):
    """The paper's layer for each order alone: its rows give a key, a value and a gate of their own.

    The matrices are those of `EngramLayer`, of which each order has its columns; the gated values of all orders are
    added. So there are as many numbers, and with a single order it is the paper's layer.
    """

    def __init__(self, config: EngramConfig, table: Table | None = None) -> None:
        _check(config)
        super().__init__(config, table)
        self.make_keys_and_value()
        self.make_convolution()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize everything but the table, as in `EngramLayer`."""
        self.reset_projection(self.key_value)
        self.reset_norms("query_norm", "key_norm")

    @classmethod
    def count_parameters(cls, config: EngramConfig) -> int:
        """Count the numbers in one layer besides its table: as many as in `EngramLayer`."""
        _check(config)
        return EngramLayer.count_parameters(config)

    @classmethod
    def count_flops(cls, config: EngramConfig) -> int:
        """Count the operations of one token: those of `EngramLayer`, with a gate and a sum for each further order."""
        wide, more = config.num_streams * config.hidden_size, len(config.orders) - 1
        return EngramLayer.count_flops(config) + more * 7 * wide

    def gated(self, hidden_states: Tensor, vectors: Tensor, active: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weigh the value of each order by its own gate; the gates that are reported are means over orders."""
        config = self.config
        hidden_BLSD, weight_PM = self.split_streams(hidden_states), self.key_value.weight
        vectors_BLON = self.fitted(hidden_BLSD, vectors, weight_PM.dtype).unflatten(-1, (len(config.orders), -1))
        weight_PON = weight_PM.unflatten(-1, vectors_BLON.shape[-2:])
        projected_BLOP = torch.einsum("blon,pon->blop", vectors_BLON, weight_PON)
        key, value_BLOD = projected_BLOP.split([weight_PM.shape[0] - config.hidden_size, config.hidden_size], dim=-1)
        with torch.autocast(hidden_BLSD.device.type, enabled=False):
            scores_BLOS = gate_scores(
                hidden_BLSD.unsqueeze(2),
                key.unflatten(-1, (config.num_streams, config.hidden_size)),
                self._gain(self.query_norm) * self._gain(self.key_norm),
                eps=config.norm_eps,
                squash="plain" if config.gate == "plain" else "signed_sqrt",
            )
            gates_BLOS = silent(self.shares(scores_BLOS), active)
        # Multiplied and added, not a product of matrices: there are two orders or three.
        update_BLSD = (gates_BLOS.unsqueeze(-1).to(value_BLOD.dtype) * value_BLOD.unsqueeze(3)).sum(2)
        return update_BLSD, gates_BLOS.mean(2)

    def shares(self, scores: Tensor) -> Tensor:
        """Turn scores ``[B, L, O, S]`` into gates of each order."""
        return torch.sigmoid(scores)


class SinkLayer(PerOrderLayer):
    """The orders compete: a softmax over their scores and that of a sink, which is 0 and whose value is zero.

    With a single order it is the paper's layer. Source: the readout of Lngram v2, arXiv 2609.03426, without its
    addresses; reconstructed from a second-hand description.
    """

    def shares(self, scores: Tensor) -> Tensor:
        """Turn scores ``[B, L, O, S]`` into shares of each order, which come to less than 1 together."""
        sink = torch.zeros_like(scores[:, :, :1])
        return torch.softmax(torch.cat([scores, sink], dim=2), dim=2)[:, :, :-1]


def _check(config: EngramConfig) -> None:
    if config.bias or config.gate == "none":
        raise ConfigError(
            f"the layer {config.layer!r} has a gate for each order and projections without a bias; set bias=False and "
            "another gate than 'none'"
        )
