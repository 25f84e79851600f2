"""What decoding keeps: keys and values, and for a block with memory its convolution window and the token history.

The state lives in the layers of transformers' own `Cache`, so that everything `generate` does to a cache (beam reorder,
repeat, select, roll back, reset) reaches it.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from engram_lm.errors import HistoryError, MismatchError
from engram_lm.hashing import HashSpec, TokenHistory
from engram_lm.memory.config import EngramConfig
from engram_lm.memory.state import ConvolutionState
from engram_lm.model.config import MEMORY_LAYER_TYPE

if TYPE_CHECKING:
    from engram_lm.model.config import EngramLMConfig

__all__ = ["MemoryDynamicLayer", "MemoryStaticLayer", "memory_layer"]


class _MemoryState:
    """The part that both kinds of cache layer share."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.record_past = False
        self.history: TokenHistory | None = None
        self.window: ConvolutionState | None = None

    def token_history(self, spec: HashSpec, batch_size: int, device: torch.device) -> TokenHistory:
        """The tokens before this step; started empty on first use."""
        if self.history is None:
            self.history = TokenHistory(spec, batch_size, device=device, max_rollback=self._max_rollback)
        return self.history

    def convolution_state(
        self, config: EngramConfig, batch_size: int, device: torch.device, dtype: torch.dtype
    ) -> ConvolutionState:
        """The convolution's window before this step; started empty on first use."""
        if self.window is None:
            self.window = ConvolutionState(
                config, batch_size, device=device, dtype=dtype, max_rollback=self._max_rollback
            )
        return self.window

    @property
    def _max_rollback(self) -> int | None:
        return None if self.record_past else 0

    @property
    def _states(self) -> list[TokenHistory | ConvolutionState]:
        return [state for state in (self.history, self.window) if state is not None]

    def activate_past_recording(self) -> None:
        """Keep everything from here on, so that `crop` can take tokens back (assisted decoding asks for it)."""
        self.record_past = True
        for state in self._states:
            state.record()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens, then keep no more than the next step needs.

        Raises:
            HistoryError: Nothing was recorded that could be taken back. Nothing has changed then.
        """
        if tokens_to_remove and self._states and not self.record_past:
            raise HistoryError(
                "this cache keeps no more of the past than the next token needs; call activate_past_recording() on it "
                "before the tokens that may have to be taken back"
            )
        super().crop(tokens_to_remove)  # type: ignore[misc]
        for state in self._states:
            state.rollback(abs(tokens_to_remove))
            state.trim()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        for state in self._states:
            state.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.history = None if self.history is None else self.history.fork(repeats)
        self.window = None if self.window is None else self.window.fork(repeats)  # type: ignore[assignment]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        for state in self._states:
            state.select(indices)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()  # type: ignore[misc]
        for state in self._states:
            state.reset()


class MemoryDynamicLayer(_MemoryState, DynamicLayer):
    """A growing cache layer of a block that reads memory. ``DynamicCache(config=model.config)`` makes it."""

    _layer_type = MEMORY_LAYER_TYPE


class MemoryStaticLayer(_MemoryState, StaticLayer):
    """A cache layer of fixed size and address. ``StaticCache(config=model.config, max_cache_len=...)`` makes it."""

    _layer_type = MEMORY_LAYER_TYPE


def memory_layer(cache: Cache, block: int, config: "EngramLMConfig") -> MemoryDynamicLayer | MemoryStaticLayer:
    """Find the cache layer of a block with memory.

    An empty ``DynamicCache()`` made without a configuration is given the layers it lacks.

    Raises:
        MismatchError: The cache was made for another model.
    """
    if not cache.layers and cache.layer_class_to_replicate is DynamicLayer:
        cache.layers = [
            MemoryDynamicLayer() if layer_type == MEMORY_LAYER_TYPE else DynamicLayer()
            for layer_type in config.layer_types or ()
        ]
    layer = cache.layers[block] if block < len(cache.layers) else None
    if not isinstance(layer, MemoryDynamicLayer | MemoryStaticLayer):
        raise MismatchError(
            f"block {block} reads memory, but its cache layer is {type(layer).__name__}; "
            "make the cache with DynamicCache(config=model.config) or StaticCache(config=model.config, ...)"
        )
    return layer
