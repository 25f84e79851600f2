"""One forward pass of an engine seen from the memory: requests of any length side by side, and state in the cache."""

import dataclasses
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context

from engram_lm.errors import ConfigError
from engram_lm.hashing import HashSpec
from engram_lm.memory.cache_row import memory_rows
from engram_lm.memory.interface import MemoryLayer
from engram_lm.memory.layer import EngramLayer
from engram_lm.memory.step import begin_step
from engram_lm.serving.vllm.lost_rows import Owners, read_or_note
from engram_lm.serving.vllm.state import MemoryMetadata, MemoryState, Slots
from engram_lm.tables import Table

# Dimension key: T tokens of all requests side by side, D hidden, S streams, W context (highest order - 1),
# M memory width, H heads of all orders.


@dataclasses.dataclass(frozen=True, eq=False)
class Places:
    """Where the tokens of one forward pass lie in the cache of one layer, and those that it reads of earlier ones."""

    tokens: Slots
    """The tokens themselves, ``[T]``."""
    taps: Slots
    """The tokens that the taps of the convolution read, ``[T, taps - 1]``."""


@dataclasses.dataclass(frozen=True, eq=False)
class StagedRows:
    """What was hashed and read before a forward pass, see `engram_lm.serving.vllm.staging`: the first T of each."""

    vectors: Mapping[int, Tensor]
    """Block → memory vectors, ``[at least T, 1, M]``."""
    active: Tensor
    """Bool ``[at least T, 1]``; False where memory adds nothing."""
    codes: Tensor
    """Codes of the tokens, int64 ``[at least T]``."""


@dataclasses.dataclass(frozen=True, eq=False)
class MemoryPass:
    """What one forward pass hands from its beginning to its memory layers."""

    layers: Mapping[int, EngramLayer]
    """Block → its memory layer."""
    states: Mapping[int, MemoryState]
    """Block → its state in the cache."""
    active: Tensor
    """Bool ``[T, 1]``; False where memory adds nothing."""
    rows: Mapping[int, Tensor]
    """Block → row numbers, int64 ``[T, 1, H]``; empty where the rows were read before the pass."""
    vectors: Mapping[int, Tensor]
    """Block → memory vectors ``[T, 1, M]`` that were read before the pass."""
    places: Mapping[int, Places]
    """Block → where its state lies; empty while vLLM measures memory and there is no cache."""
    owners: Owners
    """Whose the tokens are."""

    def update(self, block: int, hidden_states: Tensor) -> Tensor:
        """Compute what the memory of a block adds to hidden states ``[T, D]`` or ``[T, S, D]``; of their shape."""
        layer = self.layers[block]
        vectors = self.vectors.get(block)
        if vectors is None:
            vectors = read_or_note(layer, self.rows[block], self.owners)
        vectors, active = layer.heard(vectors, self.active)
        value, gates = layer.weigh(hidden_states.unsqueeze(1), vectors, active)
        if not layer.config.kernel_size:
            update = layer.refine(value, gates)
            return update.reshape(hidden_states.shape).to(hidden_states.dtype)
        scales = layer.convolution_scales(value, gates)
        earlier_value = earlier_scales = None
        places = self.places.get(block)
        if places is not None:
            state, count = self.states[block], len(places.tokens.number)
            state.write(places.tokens, value[:count, 0], scales[:count, 0])
            earlier_value, earlier_scales = state.read(places.taps)
            if count < len(value):
                # A GPU may pad the tokens; nobody reads the updates of padding.
                spare = (0, 0, 0, 0, 0, len(value) - count)
                earlier_value, earlier_scales = F.pad(earlier_value, spare), F.pad(earlier_scales, spare)
        update = layer.refine(value, gates, scales, earlier_value, earlier_scales, active=active)
        return update.reshape(hidden_states.shape).to(hidden_states.dtype)


class ServedMemory:
    """The memory layers of one model inside vLLM, with their states in its cache.

    Used by our own model and by memory added to other models. All layers have one geometry, that of one
    `engram_lm.EngramConfig`.

    Args:
        layers: Block → its memory layer, in the order in which blocks run.
        prefix: Of the names of the states, which go on with ``.BLOCK.memory``.
        dtype: Type of the hidden states.
        vllm_config: vLLM's configuration.

    Raises:
        ConfigError: A layer of another kind, which keeps another state.
    """

    def __init__(
        self, layers: Mapping[int, MemoryLayer], *, prefix: str, dtype: torch.dtype, vllm_config: VllmConfig
    ) -> None:
        self.layers: dict[int, EngramLayer] = {}
        for block, layer in layers.items():
            if not isinstance(layer, EngramLayer) or layer.config.layer != "engram":
                raise ConfigError(f"vLLM serves the layer 'engram', not {layer.config.layer!r}")
            self.layers[block] = layer
        rows = memory_rows(next(iter(self.layers.values())).config, self.layers, dtype)
        self.states = {block: MemoryState(f"{prefix}.{block}.memory", row, vllm_config) for block, row in rows.items()}
        self._first = next(iter(self.layers))
        self._taps = next(iter(self.layers.values())).tap_distances
        self.spec: HashSpec | None = None
        self._distances: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def bind(self, spec: HashSpec, tables: Mapping[int, Table]) -> None:
        """Take the hash, bound to its token map, and the table of each block."""
        self.spec = spec
        for block, layer in self.layers.items():
            layer.table = tables[block]

    @property
    def first_state(self) -> MemoryState:
        """The state of the first block with memory, which also holds the codes of tokens."""
        return self.states[self._first]

    def begin(self, tokens: Tensor, positions: Tensor, staged: StagedRows | None = None) -> MemoryPass:
        """Hash the tokens for all blocks and ask the tables for their rows; ids outside the vocabulary are dead.

        Args:
            tokens: Ids of the tokens of all requests, ``[T]``.
            positions: Their positions in their requests, ``[T]``.
            staged: What was hashed and read before, where the engine does so.
        """
        assert self.spec is not None, "the checkpoint has not been loaded"
        tokens = tokens.long()
        look_back, taps = self._distances_on(tokens.device)
        metadata = self._metadata()
        places: dict[int, Places] = {}
        for block, known in metadata.items():
            size = self.states[block].block_size
            same = [other for other in places if metadata[other].block_table is known.block_table]
            places[block] = (
                places[same[0]] if same else Places(known.slots(), known.slots_before(positions, taps, size))
            )
        codes = self.spec.encode_unchecked(tokens[:, None])[:, 0] if staged is None else staged.codes
        context = tokens.new_full((len(tokens), self.spec.context), -1)
        owners = Owners("", tokens.new_empty(0), tokens.new_empty(0))
        if metadata:
            first, known = self.first_state, metadata[self._first]
            # Written before others are read: a token may look back at one of the same forward pass.
            first.write_codes(places[self._first].tokens, codes[: known.num_tokens])
            if staged is None:
                before = known.slots_before(positions, look_back, first.block_size)
                context[: known.num_tokens] = first.read_codes(before)
            owners = Owners(first.name, known.query_ends, known.slot_mapping[: known.num_tokens])
        if staged is not None:
            vectors = {block: each[: len(tokens)] for block, each in staged.vectors.items()}
            return MemoryPass(self.layers, self.states, staged.active[: len(tokens)], {}, vectors, places, owners)
        tables = {block: layer.table for block, layer in self.layers.items()}
        step = begin_step(self.spec, tables, tokens[:, None], context=context, checked=False)
        return MemoryPass(self.layers, self.states, step.active, step.rows, {}, places, owners)

    def _metadata(self) -> dict[int, MemoryMetadata]:
        """Where tokens lie, for each block with a state; empty while vLLM measures memory."""
        by_name = get_forward_context().attn_metadata
        if by_name is None:
            return {}
        assert isinstance(by_name, dict), "microbatches are refused"
        return {block: by_name[state.name] for block, state in self.states.items()}

    def _distances_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """How far back codes are read, farthest first, and how far the taps of the convolution, on a device."""
        if device not in self._distances:
            assert self.spec is not None
            self._distances[device] = (
                torch.arange(self.spec.context, 0, -1, device=device),
                torch.tensor(self._taps, dtype=torch.int64, device=device),
            )
        return self._distances[device]
