"""What decoding keeps for an adapter, inside the model's own cache: the token history and each convolution's window.

The state lives in transformers' `Cache` object, whatever kinds of layers that has, so that everything `generate` does
to a cache (beam reorder, repeat, select, roll back, reset) reaches it.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from engram_lm.errors import HistoryError
from engram_lm.hashing import HashSpec, TokenHistory
from engram_lm.memory.config import EngramConfig
from engram_lm.memory.state import ConvolutionState

__all__ = ["MemoryState", "cached_tokens", "start_state", "state_of"]

_STATES = "_engram_states"


class MemoryState:
    """One adapter's state for a batch of sequences.

    Args:
        spec: The adapter's hash.
        batch_size: Sequences.
        device: Where tokens are.
        max_rollback: Tokens that can be taken back unless more are recorded; storage of fixed size and address.
    """

    def __init__(self, spec: HashSpec, batch_size: int, device: torch.device, *, max_rollback: int) -> None:
        self.max_rollback: int | None = max_rollback
        self.history = TokenHistory(spec, batch_size, device=device, max_rollback=max_rollback)
        self.windows: dict[int, ConvolutionState] = {}
        self.seen: int | None = 0
        """Tokens since the start; None where they could not be counted (inside ``torch.compile``)."""

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return self.history.batch_size

    def window(self, block: int, config: EngramConfig, device: torch.device, dtype: torch.dtype) -> ConvolutionState:
        """The window of a layer's convolution before this step; started empty on first use."""
        if block not in self.windows:
            self.windows[block] = ConvolutionState(
                config, self.batch_size, device=device, dtype=dtype, max_rollback=self.max_rollback
            )
        return self.windows[block]

    def advance(self, codes: Tensor) -> None:
        """Move the history past a step's codes, ``[B, L]``. Windows are moved by their layers, after this."""
        self.history.advance_codes(codes)
        if torch.compiler.is_compiling():
            self.seen = None  # a number that changes with every step would be compiled anew for each
        elif self.seen is not None:
            self.seen += codes.shape[1]

    def record(self) -> None:
        """Keep everything from here on, so that any number of tokens can be taken back."""
        self.max_rollback = None
        for state in self._all:
            state.record()

    def rollback(self, count: int) -> None:
        """Take back the last ``count`` tokens; where everything was recorded, then keep what the next step needs.

        Raises:
            HistoryError: They are not held any more. Nothing has changed then.
        """
        if self.seen is not None and count >= self.seen:
            self.reset()
            return
        try:
            self.history.rollback(count)  # it holds as many as the windows do, so it is the one that refuses
        except HistoryError as error:
            raise HistoryError(
                f"crop takes back {count} tokens, more than the memory's state of this cache still holds "
                f"(adapter.max_rollback was {self.max_rollback} when it was started); set adapter.max_rollback higher "
                "and begin with a new cache, or call activate_past_recording() on a cache that has been used"
            ) from error
        for window in self.windows.values():
            window.rollback(count)
        self.trim()
        if self.seen is not None:
            self.seen -= count

    def trim(self) -> None:
        """Give up what was recorded and only taking back would need."""
        for state in self._all:
            state.trim()

    def reorder(self, index: Tensor) -> None:
        """Follow the beams."""
        for state in self._all:
            state.reorder(index)

    def select(self, index: Tensor) -> None:
        """Keep some sequences."""
        for state in self._all:
            state.select(index)

    def repeat(self, repeats: int) -> None:
        """Repeat every sequence."""
        self.history = self.history.fork(repeats)
        self.windows = {block: window.fork(repeats) for block, window in self.windows.items()}  # type: ignore[misc]

    def reset(self) -> None:
        """Forget everything; in place where storage is fixed."""
        if self.max_rollback is None:
            # What was before a recording began is no fill, and a window's own reset goes back to it.
            history = self.history
            self.history = TokenHistory(history.spec, self.batch_size, device=history.codes.device, max_rollback=None)
            self.windows = {}
        for state in self._all:
            state.reset()
        self.seen = 0

    @property
    def _all(self) -> list[TokenHistory | ConvolutionState]:
        return [self.history, *self.windows.values()]


class _MemoryCache(Cache):
    """What is mixed into the class of a cache that holds state of adapters."""

    _engram_states: dict[str, MemoryState]

    def activate_past_recording(self) -> None:
        """Keep everything from here on, so that `crop` can take any number of tokens back."""
        super().activate_past_recording()
        for state in self._engram_states.values():
            state.record()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens.

        Raises:
            HistoryError: They are not held any more. Nothing has changed then.
        """
        # A positive number is what older releases of transformers call the length that is left.
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(0, int(self.get_seq_length()) - tokens_to_remove)
        # Whoever holds least is asked first, so that a refusal comes before anything has changed.
        for state in sorted(self._engram_states.values(), key=lambda state: state.max_rollback or 0):
            if count:
                state.rollback(count)
            else:
                state.trim()
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        super().reorder_cache(beam_idx)
        for state in self._engram_states.values():
            state.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        super().batch_repeat_interleave(repeats)
        for state in self._engram_states.values():
            state.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        super().batch_select_indices(indices)
        for state in self._engram_states.values():
            state.select(indices)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        for state in self._engram_states.values():
            state.reset()


def state_of(cache: Cache, key: str) -> MemoryState | None:
    """Return the state that a cache holds for an adapter, by the adapter's key; None where it has none yet."""
    states: dict[str, MemoryState] = cache.__dict__.get(_STATES, {})
    return states.get(key)


@torch.compiler.disable
def start_state(cache: Cache, key: str, spec: HashSpec, tokens: Tensor, max_rollback: int) -> MemoryState:
    """Give a cache an empty state for an adapter.

    The cache stays the object it is; its class becomes a subclass of what it was, which moves the state along.

    Args:
        cache: Any cache of transformers.
        key: The adapter's key.
        spec: Its hash.
        tokens: Of the step that is about to be computed, ``[B, L]``; gives batch size and device.
        max_rollback: Tokens that `crop` may take back although the cache was not told to record: it may have been told
            before it had a state to hear of it.
    """
    state = MemoryState(spec, tokens.shape[0], tokens.device, max_rollback=max_rollback)
    # Sliding windows remember that they were told to record; layers that keep everything anyway do not.
    if any(getattr(layer, "record_past", False) for layer in cache.layers):
        state.record()
    if not isinstance(cache, _MemoryCache):
        cache.__class__ = _with_memory(type(cache))
        cache.__dict__[_STATES] = {}
    cache.__dict__[_STATES][key] = state
    return state


def cached_tokens(cache: Cache) -> int | None:
    """Count the tokens that a cache holds; None where that cannot be told without waiting for a device."""
    if torch.compiler.is_compiling():
        return None
    try:
        length: Any = cache.get_seq_length()
    except (ValueError, AttributeError, IndexError):  # of caches that do not count
        return None
    if isinstance(length, Tensor):
        return int(length) if length.device.type == "cpu" else None
    return int(length)


def _with_memory(kind: type) -> type:
    if kind not in _KINDS:
        _KINDS[kind] = type(f"Memory{kind.__name__}", (_MemoryCache, kind), {})
    return _KINDS[kind]


_KINDS: dict[type, type] = {}
