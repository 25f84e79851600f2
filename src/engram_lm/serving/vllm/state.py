"""What memory keeps of each token: one row in vLLM's own paged cache, beside the keys and values of the token.

What vLLM does to a token's slot, it does to this row: a prefix that two requests share, a request that is preempted, a
draft that is rejected and written over, a connector that moves blocks to another machine.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from engram_lm.memory.cache_row import MemoryRow

# Dimension key: T tokens of all requests side by side, D hidden, S streams, N tokens in a block of the cache.


@dataclasses.dataclass(frozen=True, eq=False)
class Slots:
    """Places in the cache."""

    number: Tensor
    """Number of the slot, counted through all blocks, int64 ``[T]`` or ``[T, n]``."""
    exists: Tensor | None = None
    """Bool of the same shape: whether there is such a token; None where all exist."""


class MemoryState(AttentionLayerBase):
    """The rows of one memory layer. vLLM takes it for an attention layer and gives it its share of the cache.

    Args:
        name: Its name, which holds the number of its block and no other number.
        row: What a row holds.
        vllm_config: vLLM's configuration.
    """

    def __init__(self, name: str, row: MemoryRow, vllm_config: VllmConfig) -> None:
        self.name, self.row = name, row
        # vLLM asks each layer that has a cache for this tensor.
        self.kv_cache = torch.tensor([])
        known = vllm_config.compilation_config.static_forward_context
        if name in known:
            raise ValueError(f"two layers are called {name}")
        known[name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Return what tells this layer where the tokens of a forward pass lie."""
        return MemoryBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """Return what a token takes in the cache."""
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.row.num_bytes,
            head_size_v=0,
            dtype=torch.uint8,
        )

    @property
    def block_size(self) -> int:
        """Tokens N in a block, as block tables count them."""
        return self.kv_cache.shape[2]

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Take the rows, ``[blocks, 1, N, bytes]``; called again whenever vLLM allocates them anew."""
        self.kv_cache = kv_cache
        row, rows = self.row, kv_cache.squeeze(1)
        if rows.is_contiguous():
            # One index finds a row. Blocks that vLLM has padded need two.
            rows = rows.view(-1, row.num_bytes)
        values = rows[..., : row.num_values * row.dtype.itemsize]
        self._values = values.view(row.dtype)
        self._scales = rows[..., row.scales_start : row.code_start].view(torch.float32)
        self._codes = rows[..., row.code_start : row.code_start + 4].view(torch.int32) if row.holds_code else None

    def write(self, slots: Slots, value: Tensor, scales: Tensor) -> None:
        """Store values ``[T, D]`` and scales, float32 ``[T, S]``."""
        _put(self._values, slots, value.to(self._values.dtype))
        _put(self._scales, slots, scales)

    def read(self, slots: Slots) -> tuple[Tensor, Tensor]:
        """Return values ``[T, n, D]`` and scales, float32 ``[T, n, S]``.

        Where there is no such token, the scales are 0 and the value is that of the slot that is named instead.
        """
        value, scales = _take(self._values, slots), _take(self._scales, slots)
        if slots.exists is not None:
            scales = scales.masked_fill(~slots.exists.unsqueeze(-1), 0)
        return value, scales

    def write_codes(self, slots: Slots, codes: Tensor) -> None:
        """Store codes, int64 ``[T]``, see `engram_lm.hashing.codes`."""
        assert self._codes is not None
        _put(self._codes, slots, codes.to(torch.int32).unsqueeze(-1))

    def read_codes(self, slots: Slots) -> Tensor:
        """Return codes, int64 ``[T, n]``; -1 where there is no such token."""
        assert self._codes is not None and slots.exists is not None
        codes = _take(self._codes, slots).squeeze(-1).long()
        return codes.masked_fill(~slots.exists, -1)


def _take(held: Tensor, slots: Slots) -> Tensor:
    """Copy rows out of ``[slots, n]`` or ``[blocks, N, n]``."""
    if held.dim() == 2:
        # Copies whole rows; indexing with several tensors would copy number by number.
        return held.index_select(0, slots.number.flatten()).unflatten(0, slots.number.shape)
    return held[slots.number // held.shape[1], slots.number % held.shape[1]]


def _put(held: Tensor, slots: Slots, rows: Tensor) -> None:
    """Copy rows ``[T, n]`` into ``[slots, n]`` or ``[blocks, N, n]``."""
    if held.dim() == 2:
        held[slots.number] = rows
    else:
        held[slots.number // held.shape[1], slots.number % held.shape[1]] = rows


@dataclasses.dataclass(frozen=True, eq=False)
class MemoryMetadata:
    """Where the tokens of one forward pass lie in the cache."""

    num_tokens: int
    """Tokens T that are real; a GPU may pad them."""
    query_ends: Tensor
    """Where each request ends among the tokens, ``[requests]``."""
    block_table: Tensor
    """Numbers of the blocks of each request, in order, ``[requests, blocks]``."""
    slot_mapping: Tensor
    """Slot of each token, counted through all blocks; -1 at padding."""

    def slots(self) -> Slots:
        """Return the places of the tokens; padding is sent to the first block, which is nobody's."""
        return Slots(self.slot_mapping[: self.num_tokens].long().clamp(min=0))

    def slots_before(self, positions: Tensor, distances: Tensor, block_size: int) -> Slots:
        """Return the places of the tokens at some distances before each, or of a request's first where there is none.

        Args:
            positions: Position of each token in its request, int64 ``[T]``.
            distances: How far back, int64 ``[n]``.
            block_size: Tokens in a block.
        """
        tokens = torch.arange(self.num_tokens, device=positions.device)
        request = torch.searchsorted(self.query_ends.long(), tokens, right=True).clamp(max=len(self.block_table) - 1)
        earlier = positions[: self.num_tokens, None] - distances
        exists = earlier >= 0
        earlier = earlier.clamp(min=0)
        blocks = self.block_table[request].gather(1, earlier // block_size).long()
        return Slots(blocks * block_size + earlier % block_size, exists)


class MemoryMetadataBuilder(AttentionMetadataBuilder[MemoryMetadata]):
    """Keeps, of what vLLM knows of a forward pass, what memory needs."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> MemoryMetadata:
        """Build the metadata of one forward pass."""
        common = common_attn_metadata
        return MemoryMetadata(
            common.num_actual_tokens,
            common.query_start_loc[1 : common.num_reqs + 1],
            common.block_table_tensor,
            common.slot_mapping,
        )


class MemoryBackend(AttentionBackend):
    """What vLLM asks for where it expects an attention kernel: only the builder of metadata is ours to give."""

    @staticmethod
    def get_name() -> str:
        """Name of the backend."""
        return "ENGRAM_MEMORY"

    @staticmethod
    def get_impl_cls() -> Any:
        """There is no kernel."""
        raise NotImplementedError("memory is no attention")

    @staticmethod
    def get_builder_cls() -> type[MemoryMetadataBuilder]:
        """Return the builder of metadata."""
        return MemoryMetadataBuilder
