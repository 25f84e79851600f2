"""OverEncoding: the mean of the token embedding and of projected N-gram embeddings, at the input of the model."""

import torch
from torch import Tensor, nn

from engram_lm.errors import ConfigError
from engram_lm.memory.config import EngramConfig
from engram_lm.memory.interface import EngramOutput, Lengths, MemoryLayer, State
from engram_lm.memory.layer import gated_values
from engram_lm.tables.table import Table

# Dimension key: B batch, L length, S streams, D hidden, M memory width.


class OverEncodingLayer(MemoryLayer):
    """Average the token embedding with what each hash head reads, projected to the hidden size; no gate, no context.

    Of k heads for each of the orders 2 to N, ``embedding ← (embedding + Σ rowᵢ Wᵢ) / (1 + k (N - 1))``. The matrices of
    all heads are one product with the rows side by side. Rows are addressed by the model's hash (canonical tokens,
    prime numbers of rows), so that a comparison with Engram is one of layers. The published hash is a polynomial of
    tokens, which collides more often where its moduli are near multiples of the vocabulary's size.

    The arguments are those of `MemoryLayer`; a ConfigError refuses what this layer does not have.

    Source: Over-Tokenized Transformer, arXiv 2501.16975, section 3.2 and appendix A.
    """

    def __init__(self, config: EngramConfig, table: Table | None = None) -> None:
        _check(config)
        super().__init__(config, table)
        self.projection = nn.Linear(config.memory_dim, config.hidden_size, bias=config.bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize the projection: at zero, or with ``projection_std``, as ``value_init`` says."""
        if self.config.value_init == "zero":
            nn.init.zeros_(self.projection.weight)
        else:
            nn.init.normal_(self.projection.weight, std=self.config.projection_std)
        if self.projection.bias is not None:
            nn.init.zeros_(self.projection.bias)

    @property
    def window_shape(self) -> tuple[int, int]:
        """Decoding keeps no earlier positions for this layer."""
        return 0, self.config.hidden_size

    @classmethod
    def count_parameters(cls, config: EngramConfig) -> int:
        """Count the numbers in one layer besides its table: the projection."""
        _check(config)
        return (config.memory_dim + config.bias) * config.hidden_size

    @classmethod
    def count_flops(cls, config: EngramConfig) -> int:
        """Count the floating-point operations of one token's forward pass: the projection, the sum and its division."""
        return 2 * config.memory_dim * config.hidden_size + 2 * config.num_streams * config.hidden_size

    def respond(
        self, hidden_states: Tensor, vectors: Tensor, state: State, active: Tensor | None, lengths: Lengths
    ) -> EngramOutput:
        """Return what turns the embedding into the mean; it depends on no other position. Gates are 1."""
        config = self.config
        streams_BLSD = hidden_states.view(*hidden_states.shape[:2], config.num_streams, config.hidden_size)
        gates_BLS = streams_BLSD.new_ones(streams_BLSD.shape[:3], dtype=torch.float32)
        value_BLD = self.projection(vectors.to(device=hidden_states.device, dtype=self.projection.weight.dtype))
        update = (streams_BLSD + gated_values(value_BLD, gates_BLS)) / (1 + config.num_heads_total) - streams_BLSD
        if active is not None:
            spoken = active.to(hidden_states.device, torch.bool)[..., None]
            gates_BLS = gates_BLS.masked_fill(~spoken, 0)
            update = update.masked_fill(~spoken[..., None], 0)
        return EngramOutput(update.reshape(hidden_states.shape).to(hidden_states.dtype), gates_BLS)


def _check(config: EngramConfig) -> None:
    """Refuse what belongs to other layers, so that a configuration does not say what the model does not do."""
    wanted = {"layers": (0,), "gate": "none", "kernel_size": 0}
    wrong = [f"{name}={value!r}" for name, value in wanted.items() if getattr(config, name) != value]
    if wrong:
        raise ConfigError(
            "OverEncoding is read at the input, without a gate and without a convolution; set " + ", ".join(wrong)
        )
