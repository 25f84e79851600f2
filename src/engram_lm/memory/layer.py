"""The Engram layer: rows and hidden state → update of the hidden state."""

import torch
import torch.nn.functional as F
from torch import Tensor

from engram_lm.memory.config import EngramConfig
from engram_lm.memory.gate import gate_values
from engram_lm.memory.refined import NOTHING, RefinedLayer, silent
from engram_lm.tables.table import Table

# Dimension key: B batch, L length, S streams, D hidden, H heads of all orders, E row width, M = H * E memory width.


class EngramLayer(RefinedLayer):
    """Read rows, weigh them by the context, refine them over the last few tokens.

    The layer owns its projections, norms and convolution. It owns neither a tokenizer (it takes row numbers) nor its
    table, which is any `Table` passed in: passing the same one to two layers shares it. A trainable table's parameters
    are therefore not among ``layer.parameters()``. The arguments are those of `MemoryLayer`.

    Source: paper, section 2.2 to 2.4 and Eq. 1-6.
    """

    def __init__(self, config: EngramConfig, table: Table | None = None) -> None:
        super().__init__(config, table)
        self.make_keys_and_value()
        self.make_convolution()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize everything but the table. The convolution starts at zero (paper, Table 5)."""
        self.reset_projection(self.key_value)
        self.reset_norms("query_norm", "key_norm")

    @classmethod
    def count_parameters(cls, config: EngramConfig) -> int:
        """Count the numbers in one layer besides its table: projections, norms and convolution."""
        wide = config.num_streams * config.hidden_size
        projection = (config.memory_dim + config.bias) * (wide + config.hidden_size)
        gate_norms = 2 * wide if config.gate != "none" else 0
        return projection + gate_norms + cls.convolution_parameters(config)

    @classmethod
    def count_flops(cls, config: EngramConfig) -> int:
        """Count the floating-point operations of one token's forward pass through one layer."""
        wide = config.num_streams * config.hidden_size
        projection = 2 * config.memory_dim * (wide + config.hidden_size)
        gate = 6 * wide + wide if config.gate != "none" else 0  # two mean squares, one dot product, one scaling
        return projection + gate + cls.convolution_flops(config)

    def gated(self, hidden_states: Tensor, vectors: Tensor, active: Tensor | None) -> tuple[Tensor, Tensor]:
        """Let each stream have its share of the value, see `weigh`."""
        value, gates_BLS = self.weigh(hidden_states, vectors, active)
        return gated_values(value, gates_BLS), gates_BLS

    @property
    def tap_distances(self) -> tuple[int, ...]:
        """How many positions back the taps of the convolution read, farthest first, without the current position."""
        return tuple(tap * self.config.conv_dilation for tap in range(self.config.kernel_size - 1, 0, -1))

    def refine(
        self,
        value: Tensor,
        gates: Tensor,
        scales: Tensor | None = None,
        earlier_value: Tensor | None = None,
        earlier_scales: Tensor | None = None,
        *,
        active: Tensor | None = None,
    ) -> Tensor:
        """Compute the updates of single tokens from what was kept of them and of the positions that their taps read.

        For engines that keep values and `convolution_scales` themselves, which are fewer numbers than the convolution's
        input. They give what `forward` gives, rounded alike; gradients do not go through.

        Args:
            value: Values of T tokens, ``[T, 1, D]``.
            gates: Their gates, ``[T, 1, S]``.
            scales: Their `convolution_scales`, ``[T, 1, S]``; not used, nor the next two, where the layer has no
                convolution.
            earlier_value: Values at the `tap_distances` before each token, ``[T, taps - 1, D]``; None where nothing
                came before.
            earlier_scales: The scales there, ``[T, taps - 1, S]``; 0 before the start of a text.
            active: Bool ``[T, 1]``; where False the update is 0.

        Returns:
            The updates, ``[T, 1, S, D]``.
        """
        if not self.config.kernel_size:
            return gated_values(value, gates)
        assert scales is not None, "there is a convolution"
        if value.dtype != torch.float32:
            update, earlier = gated_values(value, gates), None
            if earlier_value is not None and earlier_scales is not None:
                earlier = self.convolution_input(gated_values(earlier_value, earlier_scales))
            # Only the positions that taps meet were given, so they lie side by side.
            return update + self._taps(update, self.convolution_input(update), earlier, 1, active)
        # A tap adds value x scale x (norm weight x tap weight). The last two are one factor for all tokens, so that no
        # position has to be normalized again for each token that reads it.
        gain = self._gain(self.conv_norm)
        weights = (self.conv_weight.unflatten(0, gain.shape) * gain.unsqueeze(-1)).movedim(-1, 0).contiguous()
        result = gated_values(value, scales).mul_(weights[-1])
        if earlier_value is not None and earlier_scales is not None:
            taps = zip(earlier_value.split(1, dim=1), earlier_scales.split(1, dim=1), weights, strict=False)
            for values, factors, weight in taps:
                result.addcmul_(gated_values(values, factors), weight)
        result = F.silu(result, inplace=True).addcmul_(gates.unsqueeze(-1), value.unsqueeze(-2))
        return result if active is None else result.masked_fill_(~active[..., None, None], NOTHING)

    def weigh(self, hidden_states: Tensor, vectors: Tensor, active: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute what a token reads, and how much of it each stream takes.

        The two are all that the convolution of later positions depends on, and fewer numbers than its input: an engine
        that keeps its own state may store them, or the values with their `convolution_scales`, and call `refine`.

        Args:
            hidden_states: As for `forward`.
            vectors: Memory vectors ``[B, L, M]``, as `read` gives them.
            active: As for `forward`.

        Returns:
            Values ``[B, L, D]`` and gates, float32 ``[B, L, S]``.

        Raises:
            MismatchError: Shapes that do not fit the configuration.
        """
        config = self.config
        hidden_BLSD = self.split_streams(hidden_states)
        projected = self.key_value(self.vectors_for(hidden_BLSD, vectors))
        key, value = projected.split([config.num_streams * config.hidden_size, config.hidden_size], dim=-1)
        if config.gate == "none":
            gates_BLS = torch.ones(hidden_BLSD.shape[:3], device=hidden_BLSD.device)
        else:
            key_BLSD = key.unflatten(-1, (config.num_streams, config.hidden_size))
            with torch.autocast(hidden_BLSD.device.type, enabled=False):
                gates_BLS = gate_values(
                    hidden_BLSD, key_BLSD, self.gate_gain(), eps=config.norm_eps, squash=config.gate
                )
        return value, silent(gates_BLS, active)

    def vectors_for(self, hidden_states: Tensor, vectors: Tensor) -> Tensor:
        """Return what is projected for hidden states ``[B, L, S, D]``: here the memory vectors ``[B, L, M]``."""
        return self.fitted(hidden_states, vectors, self.key_value.weight.dtype)

    def convolution_scales(self, value: Tensor, gates: Tensor) -> Tensor:
        """Compute what an engine keeps beside a value for the convolution: one number per stream.

        In float32 it turns the value into the normalized gated value, before the norm's weight: RMSNorm(gate x value)
        is value x gate / sqrt(gate² x mean(value²) + eps). In lower types `forward` rounds the gated value before it
        normalizes it; so that the same is rounded later, the gates themselves are kept.

        Args:
            value: Values ``[B, L, D]``, as `weigh` gives them.
            gates: Their gates, float32 ``[B, L, S]``.

        Returns:
            Scales, float32 ``[B, L, S]``; 0 where the gate is 0.
        """
        if value.dtype != torch.float32:
            return gates
        mean_square = torch.linalg.vector_norm(value, dim=-1, keepdim=True).square() / value.shape[-1]
        return gates * torch.rsqrt(gates.square() * mean_square + self.config.norm_eps)

    def gate_gain(self) -> Tensor:
        """Return the product of the norm weights of query and key, float32 ``[S, D]``."""
        return self._gain(self.query_norm) * self._gain(self.key_norm)


def gated_values(value: Tensor, gates: Tensor) -> Tensor:
    """Let each stream have its share of the value: ``[B, L, D]`` and gates ``[B, L, S]`` give ``[B, L, S, D]``."""
    return gates.unsqueeze(-1).to(value.dtype) * value.unsqueeze(-2)
