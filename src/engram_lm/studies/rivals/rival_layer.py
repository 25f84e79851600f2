"""What the rivals have in common: an update that depends on one position alone, in a model of one residual stream."""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from engram_lm.errors import ConfigError
from engram_lm.memory.config import EngramConfig
from engram_lm.memory.interface import EngramOutput, Lengths, MemoryLayer, State
from engram_lm.tables.table import Table

# Dimension key: B batch, L length, D hidden.


class RivalLayer(MemoryLayer):
    """A layer without convolution, and without the gate of the paper's layer, for one residual stream.

    The arguments are those of `MemoryLayer`; a ConfigError refuses what the layer does not have, so that a
    configuration does not say what the model does not do.
    """

    fields: ClassVar[Mapping[str, Any]] = {}
    """Other fields of the configuration that must have these values."""

    def __init__(self, config: EngramConfig, table: Table | None = None) -> None:
        self.check(config)
        super().__init__(config, table)

    @classmethod
    def check(cls, config: EngramConfig) -> None:
        """Refuse what belongs to other layers."""
        wanted = {"num_streams": 1, "gate": "none", "kernel_size": 0, "bias": False, **cls.fields}
        wrong = [f"{name}={value!r}" for name, value in wanted.items() if getattr(config, name) != value]
        if wrong:
            raise ConfigError(f"the memory layer {config.layer!r} has none of that; set {', '.join(wrong)}")

    @property
    def window_shape(self) -> tuple[int, int]:
        """Decoding keeps no earlier positions for this layer."""
        return 0, self.config.hidden_size

    @abc.abstractmethod
    def update(self, hidden_states: Tensor, vectors: Tensor) -> Tensor:
        """Compute the update ``[B, L, D]`` of hidden states ``[B, L, D]`` from what was read, ``[B, L, …]``."""

    def respond(
        self, hidden_states: Tensor, vectors: Tensor, state: State, active: Tensor | None, lengths: Lengths
    ) -> EngramOutput:
        """Return the update, 0 where a position is inactive. Gates are 1, or 0 there."""
        update = self.update(hidden_states, vectors)
        gates = hidden_states.new_ones((*hidden_states.shape[:2], 1)).float()
        if active is not None:
            spoken = active.to(hidden_states.device).bool()[..., None]
            update, gates = update.masked_fill(~spoken, 0), gates.masked_fill(~spoken, 0)
        return EngramOutput(update.to(hidden_states.dtype), gates)


def rms_norm(values: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize ``[..., n]`` by the root of the mean square, in float32 whatever the type; the weight is ``[n]``."""
    wide = values.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(values.dtype)
