"""What every memory layer is: it reads rows of a table and updates the hidden state."""

import abc
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engram_lm.errors import ConfigError, MismatchError
from engram_lm.hashing.spec import HashSpec
from engram_lm.hashing.window import RollingWindow
from engram_lm.memory.config import EngramConfig
from engram_lm.memory.decode_state import LayerWindow
from engram_lm.memory.registry import layer_class
from engram_lm.tables.table import Table

# Dimension key: B batch, L length, S streams, D hidden, H heads of all orders, E row width, M = H * E memory width.


class EngramOutput(NamedTuple):
    """What a memory layer returns when gates are asked for."""

    update: Tensor
    """To be added to the hidden state; its shape."""
    gates: Tensor
    """Gate of every token and stream, float32 ``[B, L, S]``; 0 at inactive positions, 1 where there is no gate."""


State = RollingWindow | LayerWindow | Tensor | None
"""What a layer may be given of the positions before."""

Lengths = Tensor | list[int] | None
"""Real positions of each sequence in a chunk; None where all are."""


class MemoryLayer(nn.Module, abc.ABC):
    """The interface that `engram_lm.EngramLayer` and its rivals share; `engram_lm.memory.registry` names them.

    What a layer is handed, its line in the registry says. Layers that read rows take them through `read`; those that
    read tokens override `read`, which is then given the tokens; those that find by the hidden states what they read
    override `choose`. What these two return goes to `respond`.

    Args:
        config: Geometry and options.
        table: Where rows are read from; may be None if memory vectors are always passed in. It stays outside the module
            tree: it may live on another tier and be shared by several layers.

    Raises:
        ConfigError: The table's rows are not as wide as the configuration says.
    """

    table: Table | None
    embedding: nn.Module | None
    """The token embedding of the model that the layer is part of, for layers that look at it; it stays outside the
    module tree, like the table. None in a layer on its own."""

    def __init__(self, config: EngramConfig, table: Table | None = None) -> None:
        super().__init__()
        if table is not None and table.width != config.head_dim:
            raise ConfigError(
                f"the table's rows are {table.width} wide, this configuration reads rows of {config.head_dim} "
                f"(memory_dim {config.memory_dim} over {config.num_heads_total} heads)"
            )
        self.config = config
        self.table = table
        self.embedding = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("table", "embedding"):
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def forward(
        self,
        hidden_states: Tensor,
        memory: Tensor | None,
        state: State = None,
        *,
        active: Tensor | None = None,
        lengths: Lengths = None,
        return_gates: bool = False,
    ) -> Tensor | EngramOutput:
        """Compute the update of the hidden state.

        Args:
            hidden_states: ``[B, L, S, D]``, or ``[B, L, D]`` where there is one stream.
            memory: Row numbers, int64 ``[B, L, H]``, or the memory vectors themselves, floating ``[B, L, M]``. For a
                layer that reads tokens, int64 ``[B, L, N]``: see `read`. None for one that reads hidden states alone.
            state: What the layer remembers of the positions before: a window, which is read first and then moved past
                these positions in place; or the contents of one, ``[B, *window_shape]``, which are only read.
            active: Bool ``[B, L]``; where False (padding, dead tokens) the update is 0, and so is the gate.
            lengths: Positions of each sequence that are real, for chunks padded on the right to unequal lengths. Only
                the state needs to know.
            return_gates: Whether to return the gates too.

        Returns:
            The update, in the hidden state's shape and type; with ``return_gates`` an `EngramOutput`.

        Raises:
            HistoryError: The state holds another number of sequences.
            MismatchError: Shapes that do not fit the configuration.
            RowRangeError: A row number outside the table.
        """
        if memory is None:
            vectors = self.choose(hidden_states)
        else:
            vectors = memory if memory.is_floating_point() else self.read(memory)
        vectors, active = self.heard(vectors, active)
        output = self.respond(hidden_states, vectors, state, active, lengths)
        return output if return_gates else output.update

    def heard(self, vectors: Tensor, active: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Leave out what does not count as written: see ``occupancy`` of `EngramConfig`.

        Args:
            vectors: Memory vectors ``[B, L, M]``, with zeros where a row was never written.
            active: Bool ``[B, L]``; None where all positions are active.

        Returns:
            The vectors, with zeros in place of all that does not count, and the active positions that have anything
            else than zeros.
        """
        config = self.config
        if config.occupancy == "none":
            return vectors, active
        if config.occupancy == "ngrams":
            rows = vectors.unflatten(-1, (len(config.orders), config.num_heads, config.head_dim))
            is_written = (rows != 0).any(-1).all(-1)
            vectors = rows.masked_fill(~is_written[..., None, None], 0).flatten(-3)
            speaks = is_written.any(-1)
        else:
            speaks = (vectors != 0).any(-1)
        return vectors, speaks if active is None else speaks & active.to(speaks.device, torch.bool)

    @abc.abstractmethod
    def respond(
        self, hidden_states: Tensor, vectors: Tensor, state: State, active: Tensor | None, lengths: Lengths
    ) -> EngramOutput:
        """Do the work of `forward` with memory vectors ``[B, L, M]``."""

    @abc.abstractmethod
    def reset_parameters(self) -> None:
        """Initialize everything but the table."""

    @property
    @abc.abstractmethod
    def window_shape(self) -> tuple[int, int]:
        """Earlier positions that decoding keeps for this layer (0 for none), and numbers of each."""

    @classmethod
    @abc.abstractmethod
    def count_parameters(cls, config: EngramConfig) -> int:
        """Count the numbers in one layer besides its table."""

    @classmethod
    @abc.abstractmethod
    def count_flops(cls, config: EngramConfig) -> int:
        """Count the floating-point operations of one token's forward pass through one layer.

        A multiplication and an addition count as two. Reading rows and hashing count as none.
        """

    @classmethod
    def count_kept(cls, config: EngramConfig) -> int:
        """Count what one layer keeps of the training text (see `prepare`), as numbers of four bytes."""
        return 0

    @classmethod
    def count_numbers_read(cls, config: EngramConfig) -> int:
        """Count the numbers of the table that one layer reads for a token."""
        return config.memory_dim

    def prepare(self, spec: HashSpec, tokens: Any) -> None:
        """Take from the training text what the layer has to know before training; most layers take nothing.

        It is kept in buffers, so that a checkpoint has it. ``spec`` is the model's hash, bound to its token map;
        ``tokens`` are the raw tokens of the text, of which slices are taken, ``[N]``.
        """

    def choose(self, hidden_states: Tensor) -> Tensor:
        """Find what to read by the hidden states ``[B, L, S, D]`` or ``[B, L, D]``; return what `respond` takes.

        Raises:
            MismatchError: This is no layer that does that.
        """
        raise MismatchError(f"the layer {self.config.layer!r} does not find what it reads by itself; pass the rows")

    def new_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, max_rollback: int | None = 0
    ) -> RollingWindow:
        """Start the decode state of this layer alone for a batch of sequences, on the layer's device.

        It has the type of the layer's weights unless told otherwise. ``max_rollback`` positions can be taken back; None
        means all.
        """
        weight = next(self.parameters())
        width, size = self.window_shape
        return RollingWindow(
            batch_size,
            width,
            item_shape=(size,),
            fill=0,
            dtype=dtype or weight.dtype,
            device=weight.device,
            max_rollback=max_rollback,
        )

    def require_table(self) -> Table:
        """Return the table; a MismatchError if there is none."""
        if self.table is None:
            raise MismatchError("this layer was built without a table; pass embeddings, or build it with table=...")
        return self.table

    def read(self, rows: Tensor) -> Tensor:
        """Gather rows, int64 ``[B, L, H]``, and lay the heads side by side: memory vectors ``[B, L, M]``.

        They have the table's type, and ``layer(hidden, layer.read(rows))`` equals ``layer(hidden, rows)``.

        A layer that reads tokens overrides this. It is given int64 ``[B, L, N]``: what each position sees at the
        distances 0 to N - 1, where N is the highest order, as canonical tokens (raw ones where the configuration says
        ``token_map="raw"``); -1 where it sees nothing.

        Raises:
            RowRangeError: A row number outside the table.
            MismatchError: Another number of heads than the configuration's, or no table.
        """
        table = self.require_table()
        if rows.shape[-1] != self.config.num_heads_total:
            raise MismatchError(
                f"row numbers hold {rows.shape[-1]} heads, the layer reads {self.config.num_heads_total} "
                f"({len(self.config.orders)} orders x {self.config.num_heads}); they come from another HashSpec"
            )
        embeddings: Tensor = table.gather(rows)
        if self.config.signs == "hashed":
            embeddings = embeddings * row_signs(rows, self.config.num_heads).unsqueeze(-1).to(embeddings)
        return embeddings.flatten(-2)


def build_layer(config: EngramConfig, table: Table | None = None) -> MemoryLayer:
    """Build the layer that a configuration names; the arguments are those of `MemoryLayer`."""
    layer: MemoryLayer = layer_class(config.layer)(config, table)
    return layer


def row_signs(rows: Tensor, num_heads: int) -> Tensor:
    """Draw +1 or -1 for every row read, int64 ``[..., H]``, from the row number of the next head of the same order.

    Orders are outermost in H. Two N-grams that meet in one head have unrelated rows in the next, so their signs are
    unrelated too, and nothing but the row numbers is needed to know them.

    Source: random signs on hashed rows, KellerJordan/modded-nanogpt #299; the rule for drawing them is ours.
    """
    next_head = rows.unflatten(-1, (-1, num_heads)).roll(-1, dims=-1).flatten(-2)
    return 1 - 2 * (next_head & 1)
