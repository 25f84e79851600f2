"""The Engram layer: rows and hidden state → update of the hidden state."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram_lm.errors import MismatchError
from engram_lm.memory.config import EngramConfig
from engram_lm.memory.convolution import causal_convolution
from engram_lm.memory.gate import gate_values
from engram_lm.memory.interface import EngramOutput, Lengths, MemoryLayer, State
from engram_lm.tables.table import Table

# Dimension key: B batch, L length, S streams, D hidden, H heads of all orders, E row width, M = H * E memory width,
# W positions before the current one that the convolution reads.

_NOTHING = -0.0
"""The number that leaves every other as it is when it is added: 0.0 turns -0.0 into 0.0."""


class EngramLayer(MemoryLayer):
    """Read rows, weigh them by the context, refine them over the last few tokens.

    The layer owns its projections, norms and convolution. It owns neither a tokenizer (it takes row numbers) nor its
    table, which is any `Table` passed in: passing the same one to two layers shares it. A trainable table's parameters
    are therefore not among ``layer.parameters()``. The arguments are those of `MemoryLayer`.

    Source: paper, section 2.2 to 2.4 and Eq. 1-6.
    """

    def __init__(self, config: EngramConfig, table: Table | None = None) -> None:
        super().__init__(config, table)
        wide = config.num_streams * config.hidden_size
        # All keys and the value in one product; the value comes last, as in DeepSeek-V4.1's `wkv`.
        self.key_value = nn.Linear(config.memory_dim, wide + config.hidden_size, bias=config.bias)
        if config.gate != "none":
            self.query_norm = nn.Parameter(torch.empty(config.num_streams, config.hidden_size))
            self.key_norm = nn.Parameter(torch.empty(config.num_streams, config.hidden_size))
        if config.kernel_size:
            self.conv_norm = nn.Parameter(torch.empty(config.num_streams, config.hidden_size))
            self.conv_weight = nn.Parameter(torch.empty(wide, config.kernel_size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize everything but the table. The convolution starts at zero (paper, Table 5)."""
        weight = self.key_value.weight
        nn.init.normal_(weight, std=self.config.projection_std)
        # transformers marks what a checkpoint has filled and then guards nn.init; a slice would lose the mark.
        if self.config.value_init == "zero" and not getattr(weight, "_is_hf_initialized", False):
            weight[-self.config.hidden_size :].zero_()
        if self.key_value.bias is not None:
            nn.init.zeros_(self.key_value.bias)
        start = 0.0 if self.config.norm_weight == "zero_centered" else 1.0
        for name in ("query_norm", "key_norm", "conv_norm"):
            if hasattr(self, name):
                nn.init.constant_(getattr(self, name), start)
        if self.config.kernel_size:
            nn.init.zeros_(self.conv_weight)

    @property
    def window_shape(self) -> tuple[int, int]:
        """Positions that the convolution looks back, and numbers of each (``S * D``)."""
        return self.config.conv_context, self.config.num_streams * self.config.hidden_size

    @classmethod
    def count_parameters(cls, config: EngramConfig) -> int:
        """Count the numbers in one layer besides its table: projections, norms and convolution."""
        wide = config.num_streams * config.hidden_size
        projection = (config.memory_dim + config.bias) * (wide + config.hidden_size)
        gate_norms = 2 * wide if config.gate != "none" else 0
        return projection + gate_norms + (wide * (config.kernel_size + 1) if config.kernel_size else 0)

    @classmethod
    def count_flops(cls, config: EngramConfig) -> int:
        """Count the floating-point operations of one token's forward pass through one layer."""
        wide = config.num_streams * config.hidden_size
        projection = 2 * config.memory_dim * (wide + config.hidden_size)
        gate = 6 * wide + wide if config.gate != "none" else 0  # two mean squares, one dot product, one scaling
        convolution = wide * (2 * config.kernel_size + 4) if config.kernel_size else 0  # taps, norm, residual
        return projection + gate + convolution

    def respond(
        self, hidden_states: Tensor, vectors: Tensor, state: State, active: Tensor | None, lengths: Lengths
    ) -> EngramOutput:
        """Weigh the vectors and refine them; a tensor as ``state`` holds what `convolution_input` gave before."""
        value, gates_BLS = self.weigh(hidden_states, vectors, active)
        update = gated_values(value, gates_BLS)
        if self.config.kernel_size:
            update = update + self._convolve(update, state, active, lengths)
        if self.config.occupancy != "none" and active is not None:
            update = update.masked_fill(~active[..., None, None].to(update.device), _NOTHING)
        return EngramOutput(update.reshape(hidden_states.shape).to(hidden_states.dtype), gates_BLS)

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
        return result if active is None else result.masked_fill_(~active[..., None, None], _NOTHING)

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
        if vectors.shape != (*hidden_BLSD.shape[:2], config.memory_dim):
            raise MismatchError(
                f"memory is {tuple(vectors.shape)} for hidden states {tuple(hidden_states.shape)}; expected "
                f"{(*hidden_BLSD.shape[:2], config.memory_dim)}"
            )
        # Rows may come from another device; where weights are offloaded, only the hidden states know where to compute.
        vectors_BLM = vectors.to(device=hidden_states.device, dtype=self.key_value.weight.dtype)
        projected = self.key_value(vectors_BLM)
        key, value = projected.split([config.num_streams * config.hidden_size, config.hidden_size], dim=-1)
        if config.gate == "none":
            gates_BLS = torch.ones(hidden_BLSD.shape[:3], device=hidden_BLSD.device)
        else:
            key_BLSD = key.unflatten(-1, (config.num_streams, config.hidden_size))
            with torch.autocast(hidden_BLSD.device.type, enabled=False):
                gates_BLS = gate_values(
                    hidden_BLSD, key_BLSD, self.gate_gain(), eps=config.norm_eps, squash=config.gate
                )
        if active is not None:
            # Filled, not multiplied: padding may hold anything, NaN included.
            gates_BLS = gates_BLS.masked_fill(~active.unsqueeze(-1).to(gates_BLS.device, torch.bool), 0)
        return value, gates_BLS

    def convolution_input(self, gated: Tensor) -> Tensor:
        """Normalize gated values ``[B, L, S, D]`` for the convolution, which reads and keeps ``[B, L, S * D]``."""
        # In float32: with a small eps the scale alone leaves the range of float16.
        wide = gated.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.config.norm_eps)
        return (wide * scale * self._gain(self.conv_norm)).to(gated.dtype).flatten(-2)

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

    def split_streams(self, hidden_states: Tensor) -> Tensor:
        """Return hidden states as ``[B, L, S, D]``, or raise a MismatchError for another shape than it takes."""
        config = self.config
        if hidden_states.dim() == 3 and config.num_streams == 1:
            hidden_states = hidden_states.unsqueeze(2)
        if hidden_states.dim() != 4 or hidden_states.shape[2:] != (config.num_streams, config.hidden_size):
            raise MismatchError(
                f"hidden states are {tuple(hidden_states.shape)}; expected [batch, length, {config.num_streams}, "
                f"{config.hidden_size}]" + (" or without the stream dimension" if config.num_streams == 1 else "")
            )
        return hidden_states

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        config = self.config
        return f"orders={config.orders}, heads={config.num_heads}, rows of {config.head_dim}, gate={config.gate!r}"

    def _convolve(self, gated: Tensor, state: State, active: Tensor | None, lengths: Lengths) -> Tensor:
        normed = self.convolution_input(gated)
        context = window = None
        if isinstance(state, Tensor):
            context = state
        elif state is not None:
            window = state.open(normed, self.config.conv_context)
            context = window.values
        result = self._taps(gated, normed, context, self.config.conv_dilation, active)
        if window is not None:
            window.advance(normed, lengths=lengths)
        return result

    def _taps(
        self, gated: Tensor, normed: Tensor, context: Tensor | None, dilation: int, active: Tensor | None
    ) -> Tensor:
        """What the convolution of ``normed`` adds to the gated values, in their shape."""
        result = F.silu(causal_convolution(normed, context, self.conv_weight.to(normed.dtype), dilation))
        if active is not None:
            # An inactive position adds nothing, but its taps may still see the active ones before it.
            result = result * active.unsqueeze(-1).to(result)
        return result.view_as(gated)

    def _gain(self, weight: Tensor) -> Tensor:
        # In float32: a gain of 1 + weight, or a product of two, would be rounded in a lower type.
        return weight.float() + 1 if self.config.norm_weight == "zero_centered" else weight.float()


def gated_values(value: Tensor, gates: Tensor) -> Tensor:
    """Let each stream have its share of the value: ``[B, L, D]`` and gates ``[B, L, S]`` give ``[B, L, S, D]``."""
    return gates.unsqueeze(-1).to(value.dtype) * value.unsqueeze(-2)
