"""The Engram layer: rows and hidden state → update of the hidden state."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram_lm.errors import ConfigError, HistoryError, MismatchError
from engram_lm.memory.config import EngramConfig
from engram_lm.memory.convolution import causal_convolution
from engram_lm.memory.gate import gate_values
from engram_lm.memory.state import ConvolutionState
from engram_lm.tables.table import Table

__all__ = ["EngramLayer", "EngramOutput"]

# Dimension key: B batch, L length, S streams, D hidden, H heads of all orders, E row width, M = H * E memory width.


class EngramOutput(NamedTuple):
    """What `EngramLayer` returns when gates are asked for."""

    update: Tensor
    """To be added to the hidden state; its shape."""
    gates: Tensor
    """Gate of every token and stream, float32 ``[B, L, S]``; 0 at inactive positions, 1 where there is no gate."""


class EngramLayer(nn.Module):
    """Read rows, weigh them by the context, refine them over the last few tokens.

    The layer owns its projections, norms and convolution. It owns neither a tokenizer (it takes row numbers) nor its
    table, which is any `Table` passed in: passing the same one to two layers shares it. A trainable table's parameters
    are therefore not among ``layer.parameters()``.

    Args:
        config: Geometry and options.
        table: Where rows are read from; may be None if embeddings are always passed in.

    Raises:
        ConfigError: The table's rows are not as wide as the configuration says.

    Source: paper, section 2.2 to 2.4 and Eq. 1-6.
    """

    def __init__(self, config: EngramConfig, table: Table | None = None) -> None:
        super().__init__()
        if table is not None and table.width != config.head_dim:
            raise ConfigError(
                f"the table's rows are {table.width} wide, this configuration reads rows of {config.head_dim} "
                f"(memory_dim {config.memory_dim} over {config.num_heads_total} heads)"
            )
        self.config = config
        self.table: Table | None = table
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

    def __setattr__(self, name: str, value: object) -> None:
        # The table stays outside the module tree: it may live on another tier and be shared by several layers.
        if name == "table":
            self.__dict__["table"] = value
        else:
            super().__setattr__(name, value)  # type: ignore[arg-type]

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

    def new_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, max_rollback: int | None = 0
    ) -> ConvolutionState:
        """Start the decode state of this layer for a batch of sequences, on the layer's device."""
        weight = self.key_value.weight
        return ConvolutionState(
            self.config, batch_size, device=weight.device, dtype=dtype or weight.dtype, max_rollback=max_rollback
        )

    def read(self, rows: Tensor) -> Tensor:
        """Gather rows and lay the heads side by side.

        Args:
            rows: Row numbers, int64 ``[B, L, H]``.

        Returns:
            Memory vectors ``[B, L, M]``, in the table's type. ``layer(hidden, layer.read(rows))`` equals
            ``layer(hidden, rows)``.

        Raises:
            RowRangeError: A row number outside the table.
            MismatchError: Another number of heads than the configuration's, or no table.
        """
        if self.table is None:
            raise MismatchError("this layer was built without a table; pass embeddings, or build it with table=...")
        if rows.shape[-1] != self.config.num_heads_total:
            raise MismatchError(
                f"row numbers hold {rows.shape[-1]} heads, the layer reads {self.config.num_heads_total} "
                f"({len(self.config.orders)} orders x {self.config.num_heads}); they come from another HashSpec"
            )
        embeddings: Tensor = self.table.gather(rows)
        if self.config.signs == "hashed":
            embeddings = embeddings * row_signs(rows, self.config.num_heads).unsqueeze(-1).to(embeddings)
        return embeddings.flatten(-2)

    def forward(
        self,
        hidden_states: Tensor,
        memory: Tensor,
        state: ConvolutionState | None = None,
        *,
        active: Tensor | None = None,
        lengths: Tensor | list[int] | None = None,
        return_gates: bool = False,
    ) -> Tensor | EngramOutput:
        """Compute the update of the hidden state.

        Args:
            hidden_states: ``[B, L, S, D]``, or ``[B, L, D]`` where there is one stream.
            memory: Row numbers, int64 ``[B, L, H]``, or the memory vectors themselves, floating ``[B, L, M]``.
            state: What the convolution remembers; read first, then moved past these positions in place.
            active: Bool ``[B, L]``; where False (padding, dead tokens) the gate is 0 and the update is 0.
            lengths: Positions of each sequence that are real, for chunks padded on the right to unequal lengths. Only
                the state needs to know.
            return_gates: Whether to return the gates too.

        Returns:
            The update, in the hidden state's shape and type; with ``return_gates`` an `EngramOutput`.

        Raises:
            MismatchError: Shapes that do not fit the configuration.
            RowRangeError: A row number outside the table.
        """
        config = self.config
        hidden_BLSD = self._split_streams(hidden_states)
        embeddings_BLM = memory if memory.is_floating_point() else self.read(memory)
        if embeddings_BLM.shape != (*hidden_BLSD.shape[:2], config.memory_dim):
            raise MismatchError(
                f"memory is {tuple(embeddings_BLM.shape)} for hidden states {tuple(hidden_states.shape)}; expected "
                f"{(*hidden_BLSD.shape[:2], config.memory_dim)}"
            )
        # Rows may come from another device; where weights are offloaded, only the hidden states know where to compute.
        embeddings_BLM = embeddings_BLM.to(device=hidden_states.device, dtype=self.key_value.weight.dtype)
        projected = self.key_value(embeddings_BLM)
        key, value = projected.split([config.num_streams * config.hidden_size, config.hidden_size], dim=-1)
        gates_BLS = self._gates(hidden_BLSD, key)
        if active is not None:
            # Filled, not multiplied: padding may hold anything, NaN included.
            gates_BLS = gates_BLS.masked_fill(~active.unsqueeze(-1).bool(), 0)
        update = gates_BLS.unsqueeze(-1).to(value.dtype) * value.unsqueeze(-2)
        if config.kernel_size:
            update = update + self._convolve(update, state, active, lengths)
        update = update.reshape(hidden_states.shape).to(hidden_states.dtype)
        return EngramOutput(update, gates_BLS) if return_gates else update

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        config = self.config
        return f"orders={config.orders}, heads={config.num_heads}, rows of {config.head_dim}, gate={config.gate!r}"

    def _split_streams(self, hidden_states: Tensor) -> Tensor:
        config = self.config
        if hidden_states.dim() == 3 and config.num_streams == 1:
            hidden_states = hidden_states.unsqueeze(2)
        if hidden_states.dim() != 4 or hidden_states.shape[2:] != (config.num_streams, config.hidden_size):
            raise MismatchError(
                f"hidden states are {tuple(hidden_states.shape)}; expected [batch, length, {config.num_streams}, "
                f"{config.hidden_size}]" + (" or without the stream dimension" if config.num_streams == 1 else "")
            )
        return hidden_states

    def _gates(self, hidden: Tensor, key: Tensor) -> Tensor:
        config = self.config
        if config.gate == "none":
            return torch.ones(hidden.shape[:3], device=hidden.device)
        weight = self._gain(self.query_norm) * self._gain(self.key_norm)
        key_BLSD = key.unflatten(-1, (config.num_streams, config.hidden_size))
        with torch.autocast(hidden.device.type, enabled=False):
            return gate_values(hidden, key_BLSD, weight, eps=config.norm_eps, squash=config.gate)

    def _convolve(
        self,
        update: Tensor,
        state: ConvolutionState | None,
        active: Tensor | None,
        lengths: Tensor | list[int] | None,
    ) -> Tensor:
        config = self.config
        # In float32: with a small eps the scale alone leaves the range of float16.
        wide = update.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + config.norm_eps)
        normed = (wide * scale * self._gain(self.conv_norm)).to(update.dtype).flatten(-2)
        if state is not None and state.batch_size != normed.shape[0]:
            raise HistoryError(
                f"the decode state holds {state.batch_size} sequences, this step has {normed.shape[0]}; "
                "use fork, reorder or select to follow the batch"
            )
        context = None if state is None else state.values
        result = F.silu(causal_convolution(normed, context, self.conv_weight.to(normed.dtype), config.conv_dilation))
        if state is not None:
            state.advance(normed, lengths=lengths)
        if active is not None:
            # An inactive position adds nothing, but its taps may still see the active ones before it.
            result = result * active.unsqueeze(-1).to(result.dtype)
        return result.view_as(update)

    def _gain(self, weight: Tensor) -> Tensor:
        # In float32: a gain of 1 + weight, or a product of two, would be rounded in a lower type.
        return weight.float() + 1 if self.config.norm_weight == "zero_centered" else weight.float()


def row_signs(rows: Tensor, num_heads: int) -> Tensor:
    """Draw a sign for every row read, from the row number of the next head of the same order.

    Two N-grams that meet in one head have unrelated rows in the next, so their signs are unrelated too, and nothing
    but the row numbers is needed to know them.

    Args:
        rows: Row numbers, int64 ``[..., H]``, orders outermost.
        num_heads: Heads per order, at least 2.

    Returns:
        +1 or -1, int64 ``[..., H]``.

    Source: random signs on hashed rows, KellerJordan/modded-nanogpt #299; the rule for drawing them is ours.
    """
    next_head = rows.unflatten(-1, (-1, num_heads)).roll(-1, dims=-1).flatten(-2)
    return 1 - 2 * (next_head & 1)
