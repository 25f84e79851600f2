"""What layers have in common that refine what they read over the last few tokens by the short convolution."""

import abc

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram_lm.errors import MismatchError
from engram_lm.memory.config import EngramConfig
from engram_lm.memory.convolution import causal_convolution
from engram_lm.memory.interface import EngramOutput, Lengths, MemoryLayer, State

# Dimension key: B batch, L length, S streams, D hidden, M memory width.

NOTHING = -0.0
"""The number that leaves every other as it is when it is added: 0.0 turns -0.0 into 0.0."""


class RefinedLayer(MemoryLayer):
    """A layer that says what each stream takes of a token's memory (`gated`), and leaves the convolution to this class.

    Source: paper, Eq. 5.
    """

    def make_keys_and_value(self) -> None:
        """Make one product for the keys of all streams and the value, and the norms of the gate, where there is one."""
        config = self.config
        wide = config.num_streams * config.hidden_size
        # The value comes last, as in DeepSeek-V4.1's `wkv`.
        self.key_value = nn.Linear(config.memory_dim, wide + config.hidden_size, bias=config.bias)
        if config.gate != "none":
            self.query_norm = nn.Parameter(torch.empty(config.num_streams, config.hidden_size))
            self.key_norm = nn.Parameter(torch.empty(config.num_streams, config.hidden_size))

    def make_convolution(self) -> None:
        """Make the parameters of the convolution, where the configuration has one."""
        config = self.config
        if config.kernel_size:
            self.conv_norm = nn.Parameter(torch.empty(config.num_streams, config.hidden_size))
            self.conv_weight = nn.Parameter(torch.empty(config.num_streams * config.hidden_size, config.kernel_size))

    def reset_norms(self, *names: str) -> None:
        """Let norms begin as ones, and the convolution at zero (paper, Table 5)."""
        start = 0.0 if self.config.norm_weight == "zero_centered" else 1.0
        for name in (*names, "conv_norm"):
            if hasattr(self, name):
                nn.init.constant_(getattr(self, name), start)
        if self.config.kernel_size:
            nn.init.zeros_(self.conv_weight)

    def reset_projection(self, projection: nn.Linear) -> None:
        """Draw the numbers of a projection whose last outputs, as many as the hidden size, are the value."""
        weight = projection.weight
        nn.init.normal_(weight, std=self.config.projection_std)
        # transformers marks what a checkpoint has filled and then guards nn.init; a slice would lose the mark.
        if self.config.value_init == "zero" and not getattr(weight, "_is_hf_initialized", False):
            weight[-self.config.hidden_size :].zero_()
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)

    @property
    def window_shape(self) -> tuple[int, int]:
        """Positions that the convolution looks back, and numbers of each (``S * D``)."""
        return self.config.conv_context, self.config.num_streams * self.config.hidden_size

    @staticmethod
    def convolution_parameters(config: EngramConfig) -> int:
        """Count the numbers of the convolution and its norm."""
        wide = config.num_streams * config.hidden_size
        return wide * (config.kernel_size + 1) if config.kernel_size else 0

    @staticmethod
    def convolution_flops(config: EngramConfig) -> int:
        """Count the operations of the convolution for one token: taps, norm and residual."""
        wide = config.num_streams * config.hidden_size
        return wide * (2 * config.kernel_size + 4) if config.kernel_size else 0

    @abc.abstractmethod
    def gated(self, hidden_states: Tensor, vectors: Tensor, active: Tensor | None) -> tuple[Tensor, Tensor]:
        """Say what each stream takes of the memory vectors ``[B, L, M]``; the other arguments are those of `forward`.

        Returns:
            What is taken, ``[B, L, S, D]``, 0 at inactive positions; and the gates to report, float32 ``[B, L, S]``.
        """

    def respond(
        self, hidden_states: Tensor, vectors: Tensor, state: State, active: Tensor | None, lengths: Lengths
    ) -> EngramOutput:
        """Weigh the vectors and refine them; a tensor as ``state`` holds what `convolution_input` gave before."""
        update, gates_BLS = self.gated(hidden_states, vectors, active)
        if self.config.kernel_size:
            update = update + self._convolve(update, state, active, lengths)
        if self.config.occupancy != "none" and active is not None:
            update = update.masked_fill(~active[..., None, None].to(update.device), NOTHING)
        return EngramOutput(update.reshape(hidden_states.shape).to(hidden_states.dtype), gates_BLS)

    def convolution_input(self, gated: Tensor) -> Tensor:
        """Normalize gated values ``[B, L, S, D]`` for the convolution, which reads and keeps ``[B, L, S * D]``."""
        # In float32: with a small eps the scale alone leaves the range of float16.
        wide = gated.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.config.norm_eps)
        return (wide * scale * self._gain(self.conv_norm)).to(gated.dtype).flatten(-2)

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

    def fitted(self, hidden_states: Tensor, vectors: Tensor, dtype: torch.dtype) -> Tensor:
        """Bring memory vectors ``[B, L, M]`` where the hidden states are, or raise a MismatchError for their shape."""
        expected = (*hidden_states.shape[:2], self.config.memory_dim)
        if vectors.shape != expected:
            raise MismatchError(
                f"memory is {tuple(vectors.shape)} for hidden states {tuple(hidden_states.shape)}; expected {expected}"
            )
        # Rows may come from another device; where weights are offloaded, only the hidden states know where to compute.
        return vectors.to(device=hidden_states.device, dtype=dtype)

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


def silent(gates: Tensor, active: Tensor | None) -> Tensor:
    """Close the gates ``[B, L, ...]`` of positions where ``active``, bool ``[B, L]``, is False."""
    if active is None:
        return gates
    # Filled, not multiplied: padding may hold anything, NaN included.
    there = active.to(gates.device, torch.bool)
    return gates.masked_fill(~there[(..., *[None] * (gates.dim() - 2))], 0)
