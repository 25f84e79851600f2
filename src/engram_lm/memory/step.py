"""One forward pass seen from the memory: tokens → codes → rows → tables asked for rows → windows.

Knows nothing of transformers: the reference model, attached memory and serving engines all begin here. A step is a
value that travels with the call, so that two calls at once never see each other.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from engram_lm.errors import MismatchError
from engram_lm.hashing import HashSpec
from engram_lm.memory.decode_state import DecodeState, LayerWindow
from engram_lm.memory.registry import Reads
from engram_lm.tables import Table

_LOG = logging.getLogger(__name__)

# Dimension key: B batch, L length, W context (highest order - 1), H heads of all orders.

RowMap = Callable[[int, Tensor], Tensor]
"""Called with a block and the rows ``[B, L, H]`` that its N-grams hash to; returns the rows to read instead."""


@dataclasses.dataclass(frozen=True, eq=False)
class PackedRow:
    """Several sequences in one row, which memory reads with gaps between them, so that none sees the one before.

    A gap is as long as memory looks back, and its positions are dead.
    """

    places: Tensor
    """Where each token of the row stands once there are gaps, int64 ``[L]``."""
    length: int
    """Length of the row with its gaps."""

    @classmethod
    def of(cls, ends: Tensor, length: int, look_back: int) -> "PackedRow":
        """Lay out a row of ``length`` tokens.

        ``ends`` are the ends of its sequences after a 0, as flash attention takes them (``cu_seq_lens_q``); memory
        looks back ``look_back`` positions.
        """
        tokens = torch.arange(length, device=ends.device)
        sequence = torch.bucketize(tokens, ends[1:].to(tokens), right=True)
        return cls(tokens + look_back * sequence, length + look_back * max(0, len(ends) - 2))

    def spread(self, values: Tensor) -> Tensor:
        """Put zeros into the gaps of values ``[1, L, ...]``."""
        wide = values.new_zeros((1, self.length, *values.shape[2:]))
        return wide.index_copy(1, self.places.to(values.device), values)

    def gather(self, values: Tensor) -> Tensor:
        """Take values that have gaps back to ``[1, L, ...]``."""
        return values.index_select(1, self.places.to(values.device))


@dataclasses.dataclass(frozen=True, eq=False)
class MemoryStep:
    """What one forward pass hands from its beginning to its memory layers."""

    codes: Tensor
    """Codes of the tokens, int64 ``[B, L]``; -1 at dead positions."""
    active: Tensor
    """Bool ``[B, L]``; False where memory adds nothing."""
    rows: Mapping[int, Tensor]
    """Block → row numbers, int64 ``[B, L, H]``, in the order in which blocks run; for layers that read tokens, the
    tokens ``[B, L, N]`` (`HashSpec.seen_tokens`). Empty where layers read neither."""
    state: DecodeState | None = None
    """What earlier steps left; None where there is no cache."""
    packed: PackedRow | None = None
    """How several sequences share the row; codes, rows and ``active`` then have gaps."""

    def window(self, block: int) -> LayerWindow | None:
        """Return what the layer of a block takes as its state."""
        return None if self.state is None else self.state.window(block)


def begin_step(
    spec: HashSpec,
    tables: Mapping[int, Table | None],
    tokens: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    state: DecodeState | None = None,
    context: Tensor | None = None,
    checked: bool = True,
    row_map: RowMap | None = None,
    packed: PackedRow | None = None,
    reads: Reads = "rows",
) -> MemoryStep:
    """Hash the tokens once for all blocks, ask the tables for their rows, and move the history past the tokens.

    An engine that decodes requests of unequal lengths side by side hands T tokens in as a batch of T sequences of
    length 1, each with the codes that came before it as ``context``, and gives each layer its own context likewise
    (see `EngramLayer.forward`). With ``checked=False`` nothing depends on the data and nothing waits for the host.

    Args:
        spec: The hash, bound to its token map.
        tables: Block → the table that it reads, in the order in which blocks run. Tables that read ahead begin here.
        tokens: Raw ids, int64 ``[B, L]``.
        attention_mask: ``[B, L]``; 0 marks dead positions, such as padding.
        position_ids: ``[B, L]``; where they do not increase a segment starts, if the hash looks at them.
        state: What earlier steps left; read, then moved past these tokens.
        context: Codes of the tokens before, int64 ``[B, W]``, where there is no ``state``; None is the start.
        checked: Whether tokens outside the vocabulary are refused. Otherwise they count as dead.
        row_map: For controls: chooses the rows that are read instead of those that were hashed.
        packed: How several sequences share the row, where they do; there is then one row, and no ``state``.
        reads: What the layers are handed.

    Returns:
        The step.

    Raises:
        HistoryError: State or context hold another number of sequences.
        MismatchError: The mask, the positions or the mapped rows have another shape.
        TokenError: A token is outside the vocabulary (``checked``).
    """
    if packed is not None:
        real = torch.ones_like(tokens) if attention_mask is None else attention_mask
        tokens, attention_mask = packed.spread(tokens), packed.spread(real)
        position_ids = None if position_ids is None else packed.spread(position_ids)
    encode = spec.encode if checked else spec.encode_unchecked
    codes: Tensor = encode(tokens, attention_mask=attention_mask, position_ids=position_ids)
    context = context if state is None else state.history.values
    rows: dict[int, Tensor] = {}
    if reads == "tokens":
        rows = dict.fromkeys(spec.blocks, spec.seen_tokens(codes, context))
    elif reads == "rows":
        by_layer = spec.rows_for_layers(codes, context)
        rows = {block: by_layer[layer] for block, layer in zip(spec.blocks, spec.layers, strict=True)}
        if row_map is not None:
            rows = {block: _mapped(row_map, block, numbers) for block, numbers in rows.items()}
        for block, table in tables.items():
            if table is not None and table.reads_ahead:
                table.prefetch(rows[block])
    if state is not None:
        state.advance(codes)
    return MemoryStep(codes, codes >= 0, rows, state, packed)


def packed_row(ends: Any, tokens: Tensor, look_back: int) -> PackedRow | None:
    """Lay out a row of which ``cu_seq_lens_q`` says that several sequences share it; None where it says nothing.

    Raises:
        MismatchError: The tokens ``[B, L]`` are not one row, or the sequences do not fill it.
    """
    if not isinstance(ends, Tensor) or len(ends) <= 2:
        return None
    if tokens.shape[0] != 1 or int(ends[-1]) != tokens.shape[1]:
        raise MismatchError(
            f"cu_seq_lens_q says that sequences in one row end at {ends.tolist()[1:]}, the tokens are "
            f"{tuple(tokens.shape)}; pass one row that ends where the last of them does"
        )
    return PackedRow.of(ends.to(tokens.device), tokens.shape[1], look_back)


def follow_vocabulary(spec: HashSpec, num_tokens: int) -> HashSpec:
    """Return the spec for a model whose embedding has `num_tokens` rows, and log a warning if it has grown."""
    assert spec.token_map is not None
    if num_tokens > spec.token_map.num_tokens:
        _LOG.warning(
            "the embedding has grown from %d tokens to %d: memory hashes each new one as a token of its own, which has "
            "to be trained",
            spec.token_map.num_tokens,
            num_tokens,
        )
    return spec.covering(num_tokens)


def _mapped(row_map: RowMap, block: int, rows: Tensor) -> Tensor:
    mapped = row_map(block, rows)
    if mapped.shape != rows.shape or mapped.dtype != rows.dtype:
        raise MismatchError(
            f"row_map was given rows {tuple(rows.shape)} of {rows.dtype} for layer {block} and returned "
            f"{tuple(mapped.shape)} of {mapped.dtype}; it must keep shape and type"
        )
    return mapped
