"""How a cache of transformers carries the decode state of memory: in a layer that also keeps keys and values.

Whatever ``generate`` does to a cache (beam reorder, repeat, select, roll back, reset), it does to each of its layers.
So the first layer is replaced by one that is of the same kind and moves the states along.
"""

import functools
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from engram_lm.errors import HistoryError, MismatchError
from engram_lm.memory.decode_state import DecodeState
from engram_lm.model.config import MEMORY_LAYER_TYPE

CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What the installed transformers calls the cache, among arguments and in outputs; ``cache`` from 5.24 on."""
_OLDER_NAMES = ("past_key_values", "cache_params")
CACHE_NAMES = ("cache", *_OLDER_NAMES, "past_key_value", "layer_past", "state", "mems", "past_buckets_states")
"""Arguments in which models of transformers receive the state of earlier steps."""

MAX_ROLLBACK = 64
"""Tokens that ``crop`` of a cache can take back although the cache was not told to record them. The convolution's
window of each layer keeps as many positions more, for each sequence."""
CONTINUOUS_BATCHING = (
    "continuous batching (generate_batch, transformers serve) packs requests into one row and keeps their state in "
    "pages, which memory cannot follow; use generate, which also takes a padded batch of prompts"
)
# A kind of cache that overrides one of these keeps state outside of its layers.
_WALKS_LAYERS = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices", "crop", "reset")

# What the methods of a layer of unknown kind are called on.
_Layer: Any = object


class MemoryCacheLayer(_Layer):
    """What a cache layer of transformers, its other base, needs so that it also carries the states of memories."""

    # A kind may name the layer type that it stands for, and a subclass that inherits the name would take its place.
    _layer_type: str | None = None
    kind: ClassVar[type]
    """The cache layer of transformers that this one is otherwise."""
    record_past = False
    memory_states: dict[str, DecodeState]
    """The key of a memory → its state."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.memory_states = {}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # A class that was made at run time cannot be found by its name, so it is made again.
        return _empty_layer, (self.kind,), self.__dict__

    def activate_past_recording(self) -> None:
        """Keep everything from here on, so that `crop` can take tokens back (assisted decoding asks for it)."""
        if hasattr(super(), "activate_past_recording"):
            super().activate_past_recording()
        self.record_past = True
        for state in self.memory_states.values():
            state.record()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens, then keep no more than the next step needs.

        Raises:
            HistoryError: They are not held any more. Nothing has changed then.
        """
        # A positive number is what older releases of transformers call the length that is left.
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(0, int(self.get_seq_length()) - tokens_to_remove)
        for state in self.memory_states.values():
            state.check_rollback(count)
        super().crop(tokens_to_remove)
        for state in self.memory_states.values():
            state.rollback(count)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        super().reorder_cache(beam_idx)
        for state in self.memory_states.values():
            state.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        super().batch_repeat_interleave(repeats)
        for state in self.memory_states.values():
            state.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences."""
        super().batch_select_indices(indices)
        for state in self.memory_states.values():
            state.select(indices)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        for state in self.memory_states.values():
            state.reset()


class MemoryDynamicLayer(MemoryCacheLayer, DynamicLayer):
    """The growing kind. ``DynamicCache(config=model.config)`` makes it, and so tells it when recording begins."""

    _layer_type = MEMORY_LAYER_TYPE
    kind = DynamicLayer


class MemoryStaticLayer(MemoryCacheLayer, StaticLayer):
    """The kind of fixed size and address. ``StaticCache(config=model.config, max_cache_len=...)`` makes it."""

    _layer_type = MEMORY_LAYER_TYPE
    kind = StaticLayer


def find_cache(arguments: Mapping[str, Any], names: Collection[str]) -> Cache | None:
    """Find the cache among the arguments of a forward pass, whatever transformers calls it.

    An argument that ``forward`` does not name is swallowed by its ``**kwargs``. The model would then decode without
    what earlier steps left and give other tokens, so such an argument is refused.

    Args:
        arguments: All arguments by name.
        names: Those that ``forward`` names.

    Raises:
        MismatchError: A cache under a name that ``forward`` does not know, two caches, or state of another kind.
    """
    known = [name for name in CACHE_NAMES if name in names] or list(CACHE_NAMES)
    if "cache" in names:
        known += _OLDER_NAMES  # transformers renames them before the model sees them.
    found: Cache | None = None
    for name, value in arguments.items():
        if value is None or not (name in CACHE_NAMES or isinstance(value, Cache)):
            continue
        if not isinstance(value, Cache):
            if type(value).__name__ == "PagedAttentionCache":
                raise MismatchError(CONTINUOUS_BATCHING)
            raise MismatchError(
                f"the state of earlier steps is handed over as {name}, a {type(value).__name__}, which memory cannot "
                "follow; it follows a transformers Cache, such as DynamicCache(config=model.config). To generate "
                "without one, pass use_cache=False"
            )
        if name not in known:
            raise MismatchError(
                f"a {type(value).__name__} is passed as {name}, which this model's forward does not take, so it would "
                f"decode without it; pass it as {known[0]}"
            )
        if found is not None and found is not value:
            raise MismatchError("two different caches are passed to one forward pass; pass one")
        found = value
    return found


def runs_twice(module: nn.Module) -> bool:
    """Whether gradient checkpointing computes a module a second time; it then drops the cache as well."""
    checkpoints = module.training and bool(getattr(module, "gradient_checkpointing", False))
    return checkpoints and torch.is_grad_enabled()


def follow_cache(cache: Cache, key: str, tokens: Tensor, *, context: int, max_rollback: int) -> DecodeState:
    """Find the state that a cache carries for a memory, or give it an empty one.

    Args:
        cache: Any cache of transformers that keeps a list of layers.
        key: Tells memories apart that use the same cache; what messages call it stands before the first colon.
        tokens: Those of the step that is about to be computed, ``[B, L]``.
        context: How many earlier tokens a row depends on (`HashSpec.context`).
        max_rollback: As for `start_state`.

    Raises:
        HistoryError: The cache holds tokens that the memory has not seen, or another number of sequences.
        MismatchError: The cache keeps no list of layers.
    """
    layers: Any = getattr(cache, "layers", None)
    carried = layers and isinstance(layers[0], MemoryCacheLayer)
    state: DecodeState | None = layers[0].memory_states.get(key) if carried else None
    if state is not None and state.seen == 0 and state.batch_size != tokens.shape[0]:
        state = None  # A cache that was reset may go on with another batch.
    held, seen = _tokens_in(cache), 0 if state is None else state.seen
    if held is not None and seen is not None and held != seen:
        raise HistoryError(
            f"the cache holds {held} tokens, of which the memory {key.partition(':')[0]!r} has seen {seen}: it was "
            "filled before the memory was attached or enabled, or by something else; start with an empty cache"
        )
    if state is None:
        state = start_state(cache, key, tokens, context=context, max_rollback=max_rollback)
    if state.batch_size != tokens.shape[0]:
        raise HistoryError(
            f"the cache holds memory of {state.batch_size} sequences, this step has {tokens.shape[0]}; use the cache's "
            "batch_repeat_interleave, batch_select_indices or reorder_cache to follow the batch"
        )
    return state


@torch.compiler.disable
def start_state(cache: Cache, key: str, tokens: Tensor, *, context: int, max_rollback: int) -> DecodeState:
    """Give a cache an empty state for a memory; the arguments are those of `follow_cache`.

    ``max_rollback`` is how many tokens ``crop`` can take back although the cache was not told to record: it may have
    been told before it had a state to hear of it.

    Raises:
        MismatchError: The cache keeps no list of layers, or state outside of them.
    """
    layers: Any = getattr(cache, "layers", None)
    if layers is not None and any(
        getattr(type(cache), name, None) is not getattr(Cache, name) for name in _WALKS_LAYERS
    ):
        raise MismatchError(
            f"a {type(cache).__name__} keeps state outside of its layers and moves it by methods of its own, which the "
            "memory's state would not follow; compute, generate and train with use_cache=False"
        )
    if layers == [] and cache.layer_class_to_replicate is not None:
        layers.append(cache.layer_class_to_replicate())
    if not layers:
        raise MismatchError(
            f"a {type(cache).__name__} keeps no list of layers, one of which could carry the memory's state; make the "
            "cache with DynamicCache(config=model.config) or StaticCache(config=model.config, ...)"
        )
    if not isinstance(layers[0], MemoryCacheLayer):
        layer = _empty_layer(type(layers[0]))
        layer.__dict__.update(layers[0].__dict__, memory_states={})
        layers[0] = layer
    state = DecodeState(tokens.shape[0], context, device=tokens.device, max_rollback=max_rollback)
    # Layers that cannot forget remember that they were told to record; others keep everything anyway.
    if any(getattr(layer, "record_past", False) for layer in layers):
        state.record()
    layers[0].memory_states[key] = state
    return state


def _empty_layer(kind: type) -> Any:
    """Make a layer of a kind that carries states, without anything in it."""
    made: Any = _carrier(kind)
    return made.__new__(made)


@functools.cache
def _carrier(kind: type) -> type:
    for known in (MemoryDynamicLayer, MemoryStaticLayer):
        if known.kind is kind:
            return known
    return type(f"Memory{kind.__name__}", (MemoryCacheLayer, kind), {"kind": kind})


def _tokens_in(cache: Cache) -> int | None:
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
