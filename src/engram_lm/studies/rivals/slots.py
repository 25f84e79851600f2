"""Rows of several slots, of which the hidden state chooses a few: a mixture of memory experts."""

import dataclasses

import torch
from torch import Tensor, nn

from engram_lm.errors import ConfigError
from engram_lm.memory.config import EngramConfig
from engram_lm.memory.layer import EngramLayer
from engram_lm.tables.table import Table

# Dimension key: B batch, L length, S streams, D hidden, H heads of all orders, J slots of a row, W width of a slot.


class SlotLayer(EngramLayer):
    """The paper's layer, whose rows hold several slots: m = Σ over the best K of softmax(g(h)) E[z, slot].

    Each head has a router of its own, which sees the normalized mean of the streams. A configuration says the width of
    all slots together in ``memory_dim``; so ``slots`` times as many numbers are read, from as many fewer rows.

    Source: MoME, arXiv 2609.15126, with 6 slots of which 2 are chosen; reconstructed from a second-hand description.
    """

    def __init__(self, config: EngramConfig, table: Table | None = None) -> None:
        plain = _plain(config)
        super().__init__(config, table)
        self.key_value = nn.Linear(plain.memory_dim, (plain.num_streams + 1) * plain.hidden_size, bias=config.bias)
        self.router = nn.Linear(config.hidden_size, config.num_heads_total * config.option("slots"), bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize everything but the table."""
        super().reset_parameters()
        if hasattr(self, "router"):  # the paper's layer asks for it before there is one
            nn.init.normal_(self.router.weight, std=self.config.projection_std)

    @classmethod
    def count_parameters(cls, config: EngramConfig) -> int:
        """Count the numbers in one layer besides its table: those of `EngramLayer` for one slot, and routers."""
        routers = config.hidden_size * config.num_heads_total * config.option("slots")
        return EngramLayer.count_parameters(_plain(config)) + routers

    @classmethod
    def count_flops(cls, config: EngramConfig) -> int:
        """Count the operations of one token: those of `EngramLayer`, a norm, the routers and the sums of slots."""
        routers = 2 * config.hidden_size * config.num_heads_total * config.option("slots")
        return EngramLayer.count_flops(_plain(config)) + routers + 2 * config.memory_dim + 3 * config.hidden_size

    def vectors_for(self, hidden_states: Tensor, vectors: Tensor) -> Tensor:
        """Mix the slots of each head that the hidden states ``[B, L, S, D]`` choose."""
        config = self.config
        shape = (config.num_heads_total, config.option("slots"), -1)
        slots_BLHJW = super().vectors_for(hidden_states, vectors).unflatten(-1, shape)
        mean_BLD = hidden_states.float().mean(2)
        query_BLD = mean_BLD * torch.rsqrt(mean_BLD.square().mean(-1, keepdim=True) + config.norm_eps)
        scores_BLHJ = self.router(query_BLD.to(slots_BLHJW.dtype)).float().unflatten(-1, shape[:2])
        lowest = scores_BLHJ.topk(config.option("chosen"), dim=-1).values[..., -1:]
        shares_BLHJ = torch.softmax(scores_BLHJ.masked_fill(scores_BLHJ < lowest, float("-inf")), dim=-1)
        return (shares_BLHJ.unsqueeze(-1).to(slots_BLHJW.dtype) * slots_BLHJW).sum(-2).flatten(-2)


def _plain(config: EngramConfig) -> EngramConfig:
    """The paper's layer that reads what is chosen."""
    slots, chosen = config.option("slots"), config.option("chosen")
    if not 1 <= chosen <= slots or config.head_dim % slots:
        raise ConfigError(
            f"rows of {config.head_dim} numbers do not divide into {slots} slots, of which {chosen} are chosen; "
            "memory_dim is the width of all slots of all heads together"
        )
    return dataclasses.replace(config, layer="engram", layer_options={}, memory_dim=config.memory_dim // slots)
