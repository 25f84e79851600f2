"""What an adapter does in a forward pass of its model: one hash for all layers, one update before each chosen one."""

import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from engram_lm.adapt.decode_state import MemoryState, cached_tokens, start_state, state_of
from engram_lm.adapt.padding import real_positions
from engram_lm.errors import ConfigError, HistoryError, MismatchError
from engram_lm.hashing import HashSpec
from engram_lm.memory.config import EngramConfig
from engram_lm.memory.layer import EngramLayer, EngramOutput
from engram_lm.tables import Table

__all__ = ["ForwardPass", "table_name"]

# Dimension key: B batch, L length, D hidden, H heads of all orders.

_SHARED = "shared"


class _Step(NamedTuple):
    """What one forward pass of the model hands from its beginning to its layers."""

    tokens: Tensor
    codes: Tensor
    active: Tensor
    rows: dict[int, Tensor]


class ForwardPass(nn.Module):
    """The hooks of `engram_lm.MemoryAdapter`, and what they hand each other.

    Args:
        config: Geometry and options.
        spec: The hash, with its token map.
        name: Which adapter of the model this is.
    """

    layers: nn.ModuleDict
    memory_tables: nn.ModuleDict

    def __init__(self, config: EngramConfig, spec: HashSpec, name: str) -> None:
        super().__init__()
        self.config, self.spec, self.name = config, spec, name
        self.enabled = True
        """Whether the model reads this memory. May be switched at any time, but not in the middle of a cache."""
        self.max_rollback = 64
        """Tokens that ``crop`` of a cache can take back without being told beforehand, as assisted decoding does. The
        convolution's window of each layer keeps as many positions more, for each sequence."""
        self.row_map: Callable[[int, Tensor], Tensor] | None = None
        """For controls: called with a block and the rows ``[B, L, H]`` that its N-grams hash to, int64; the rows it
        returns, of that shape, are read instead, so that a permuted hash or shuffled rows need no other code."""
        # What its state in a cache is called: another adapter of this name must not take it for its own.
        self._cache_key = f"{name}:{uuid.uuid4().hex}"
        self._step: _Step | None = None
        self._state_of_step: MemoryState | None = None
        self._outer_tokens: Tensor | None = None

    @property
    def tables(self) -> dict[str, Table]:
        """The tables by the block that reads them, or one called ``shared``."""
        return {**dict(self.memory_tables.items()), **self.__dict__["_tables_apart"]}

    def _before_outer(self, names: tuple[str, ...], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Remember the tokens: a multimodal wrapper hands embeddings on, and not what they were made of."""
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if given.get("input_ids") is not None:
            self._outer_tokens = given["input_ids"]

    def _after_outer(self, module: nn.Module, args: Any, output: Any) -> None:
        self._outer_tokens = None

    def _before_text_model(self, names: tuple[str, ...], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Hash the tokens once for all layers, and move the history past them."""
        if not self.enabled:
            return
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        tokens = given.get("input_ids")
        tokens = self._outer_tokens if tokens is None else tokens
        if tokens is None:
            raise ConfigError(
                "memory is addressed by tokens, and this forward pass has inputs_embeds without input_ids; pass "
                "input_ids, or compute it without memory inside `with adapter.disabled():`"
            )
        cache = None if _runs_twice(module) else _find_cache(args, kwargs)
        codes = self._encode(tokens, given.get("attention_mask"), given.get("position_ids"), cache)
        state = None if cache is None else self._state(cache, tokens)
        rows = self.spec.rows_for_layers(codes, None if state is None else state.history)
        by_block = {block: rows[layer] for block, layer in zip(self.spec.blocks, self.spec.layers, strict=True)}
        if self.row_map is not None:
            by_block = {block: self._mapped(block, numbers) for block, numbers in by_block.items()}
        tables = self.tables
        for block, numbers in by_block.items():
            table = tables[table_name(self.spec, block)]
            if table.reads_ahead:
                table.prefetch(numbers)
        if state is not None:
            state.advance(codes)
        self._state_of_step = state
        self._step = _Step(tokens, codes, codes >= 0, by_block)

    def _after_text_model(self, module: nn.Module, args: Any, output: Any) -> None:
        self._forget_step()

    def _before_layer(self, block: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Add the update to the hidden states that a decoder layer is about to read."""
        if not self.enabled:
            return None
        step = self._step
        if step is None:
            raise ConfigError(
                "a decoder layer is computed outside of a forward pass of its model, so memory does not know its "
                "tokens; switch it off with `with adapter.disabled():`. Activation checkpointing that computes hooks a "
                "second time cannot be used: take model.gradient_checkpointing_enable() and transformers 5.23 or newer"
            )
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[:2] != step.tokens.shape:
            raise MismatchError(
                f"{tuple(step.tokens.shape)} tokens were given and {tuple(hidden.shape[:2])} positions are computed; "
                "memory needs a token for each position (prompt tuning adds positions without one)"
            )
        layer: EngramLayer = self.layers[str(block)]  # type: ignore[assignment]
        weight = layer.key_value.weight
        state = self._state_of_step
        if state is None and not _runs_twice(module) and (cache := _find_cache(args, kwargs)) is not None:
            # A cache that the model has made for itself after its tokens were hashed; there was nothing before them.
            state = self._state_of_step = start_state(cache, self._cache_key, self.spec, step.tokens, self.max_rollback)
            state.advance(step.codes)
        window = None
        if state is not None and self.config.conv_context:
            window = state.window(block, self.config, weight.device, weight.dtype)
        # Where layers are spread over devices, the hidden states come from the device before.
        update = layer(hidden.to(weight.device), step.rows[block], window, active=step.active.to(weight.device))
        if isinstance(update, EngramOutput):  # a hook of the layer has asked for its gates
            update = update.update
        hidden = hidden + update.to(hidden.device)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _mapped(self, block: int, rows: Tensor) -> Tensor:
        assert self.row_map is not None
        mapped = self.row_map(block, rows)
        if mapped.shape != rows.shape or mapped.dtype != rows.dtype:
            raise MismatchError(
                f"row_map was given rows {tuple(rows.shape)} of {rows.dtype} for layer {block} and returned "
                f"{tuple(mapped.shape)} of {mapped.dtype}; it must keep shape and type"
            )
        return mapped

    def _encode(self, tokens: Tensor, mask: Any, positions: Any, cache: Cache | None) -> Tensor:
        real = real_positions(mask, tokens, cache)
        # Models have rows for ids that no tokenizer makes, up to a round number. Those are no text.
        known = tokens < self.spec.num_tokens
        real = known if real is None else known & real.to(known.device)
        if not self.spec.looks_at_positions:
            positions = None
        elif positions is None:
            past = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None] + past
        codes: Tensor = self.spec.encode(tokens.masked_fill(~known, 0), attention_mask=real, position_ids=positions)
        return codes

    def _state(self, cache: Cache, tokens: Tensor) -> MemoryState:
        """Find the state of a cache, which must have seen what the cache has seen."""
        state, held = state_of(cache, self._cache_key), cached_tokens(cache)
        if state is not None and state.seen == 0 and state.batch_size != tokens.shape[0]:
            state = None  # a cache that was reset may go on with another batch
        seen = 0 if state is None else state.seen
        if held is not None and seen is not None and held != seen:
            raise HistoryError(
                f"the cache holds {held} tokens, of which the memory {self.name!r} has seen {seen}: it was filled "
                "before the memory was attached or enabled, or by something else; start with an empty cache"
            )
        if state is None:
            state = start_state(cache, self._cache_key, self.spec, tokens, self.max_rollback)
        if state.batch_size != tokens.shape[0]:
            raise HistoryError(
                f"the cache holds memory of {state.batch_size} sequences, this step has {tokens.shape[0]}; use the "
                "cache's batch_repeat_interleave, batch_select_indices or reorder_cache to follow the batch"
            )
        return state

    def _forget_step(self) -> None:
        self._step = self._state_of_step = None


def table_name(spec: HashSpec, block: int) -> str:
    """Name of the table that a block reads."""
    return _SHARED if spec.shared_table else str(block)


def _find_cache(args: Any, kwargs: dict[str, Any]) -> Cache | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)


def _runs_twice(module: nn.Module) -> bool:
    """Whether gradient checkpointing computes a module a second time; it then drops the cache as well."""
    return module.training and bool(getattr(module, "gradient_checkpointing", False))
