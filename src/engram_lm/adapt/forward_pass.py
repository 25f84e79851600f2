"""What an adapter does in a forward pass of its model: one hash for all layers, one update before each chosen one."""

import dataclasses
import threading
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from engram_lm.adapt.decoder import embedded_tokens
from engram_lm.adapt.trainers import warn_of_trainer
from engram_lm.errors import ConfigError, MismatchError
from engram_lm.hashing import HashSpec
from engram_lm.hashing.token_map import check_tokens
from engram_lm.memory.config import EngramConfig
from engram_lm.memory.interface import EngramOutput, MemoryLayer
from engram_lm.memory.step import MemoryStep, RowMap, begin_step, follow_vocabulary, packed_row
from engram_lm.model.cache import MAX_ROLLBACK, find_cache, follow_cache, runs_twice, start_state
from engram_lm.tables import Table

# Dimension key: B batch, L length of this pass, K keys that attention sees, D hidden, H heads of all orders.


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """One call of the text model, from its beginning to its end."""

    tokens: Tensor | None = None
    step: MemoryStep | None = None
    """None where the memory is switched off."""


class ForwardPass(nn.Module):
    """The hooks of `engram_lm.MemoryAdapter`, and what they hand each other.

    Hooks cannot pass values down through the code of another library's model. So what belongs to one call is kept where
    only the thread that makes the call can see it, from the beginning of the call to its end.
    """

    layers: nn.ModuleDict
    memory_tables: nn.ModuleDict
    _tables_apart: dict[str, Table]

    def __init__(self, config: EngramConfig, spec: HashSpec, name: str) -> None:
        super().__init__()
        self.config, self.spec, self.name = config, spec, name
        self.enabled = True
        """Whether the model reads this memory. May be switched at any time, but not in the middle of a cache."""
        self.max_rollback = MAX_ROLLBACK
        """Tokens that ``crop`` of a new cache can take back without being told beforehand, as assisted decoding does.
        Each memory layer keeps as many positions more, for each sequence."""
        self.row_map: RowMap | None = None
        """For controls: called with a block and the rows ``[B, L, H]`` that its N-grams hash to, int64; the rows it
        returns, of that shape, are read instead, so that a permuted hash or shuffled rows need no other code."""
        self.stand_in: Callable[[int], MemoryLayer | None] | None = None
        """For trainers that compare with an earlier memory: called with a block before it is read; the layer that it
        returns is read instead, with that layer's table, and None means the adapter's own."""
        # What its state in a cache is called: another adapter of this name must not take it for its own.
        self._cache_key = f"{name}:{uuid.uuid4().hex}"
        self._calls = threading.local()
        self._has_looked_at_trainer = False

    def __getstate__(self) -> dict[str, Any]:
        # What other threads and calls see stays with the original.
        return {name: value for name, value in self.__dict__.items() if name != "_calls"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._calls = threading.local()

    @property
    def tables(self) -> dict[str, Table]:
        """The tables by the block that reads them, or one called ``shared``."""
        return {**self.memory_tables, **self._tables_apart}  # type: ignore[dict-item]

    def _before_outer(self, names: tuple[str, ...], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Remember the tokens: a multimodal wrapper hands on embeddings, and not what they were made of."""
        tokens = {**dict(zip(names, args, strict=False)), **kwargs}.get("input_ids")
        if tokens is not None:
            self._calls.outer_tokens = tokens

    def _after_outer(self, module: nn.Module, args: Any, output: Any) -> None:
        self._calls.outer_tokens = None

    def _before_text_model(self, names: tuple[str, ...], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Hash the tokens once for all layers, and move the history past them."""
        if not self.enabled:
            self._calls.call = _Call()
            return
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        tokens = given.get("input_ids")
        tokens = getattr(self._calls, "outer_tokens", None) if tokens is None else tokens
        if tokens is None:
            raise ConfigError(
                "memory is addressed by tokens, and this forward pass has inputs_embeds without input_ids; pass "
                "input_ids alone, also to generate, which hands on embeddings alone where it has both. Without tokens, "
                "compute inside `with adapter.disabled():`"
            )
        is_trained = module.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if is_trained and not self._has_looked_at_trainer:
            self._has_looked_at_trainer = True
            warn_of_trainer(self)
        self._check_vocabulary(module, given.get("input_ids"))
        cache = None if runs_twice(module) else find_cache(given, names)
        positions = _text_positions(given.get("position_ids"))
        if positions is None and self.spec.looks_at_positions:
            past = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None] + past
        mask = _real_positions(given.get("attention_mask"), tokens, cache)
        packed = packed_row(given.get("cu_seq_lens_q"), tokens, self.config.look_back)
        state = None
        if cache is not None and packed is None:
            state = follow_cache(
                cache, self._cache_key, tokens, context=self.spec.context, max_rollback=self.max_rollback
            )
        step = begin_step(
            self.spec,
            {block: self._layer(block).table for block in self.spec.blocks},
            tokens,
            attention_mask=None if mask is None else mask.to(tokens.device),
            position_ids=positions if self.spec.looks_at_positions else None,
            state=state,
            # The model's own embedding refuses what it does not have.
            checked=False,
            row_map=self.row_map,
            packed=packed,
        )
        self._calls.call = _Call(tokens, step)

    def _check_vocabulary(self, module: nn.Module, tokens: Tensor | None) -> None:
        """Hash all tokens that the model embeds, even after its embedding has grown, and refuse one that it does not.

        A wrapper that embeds tokens itself may have ids of images that are no tokens, so those are not looked at.
        """
        rows, token_map = embedded_tokens(module), self.spec.token_map
        assert token_map is not None
        if rows is None or torch.compiler.is_compiling():
            return
        if rows > token_map.num_tokens:
            self.spec = follow_vocabulary(self.spec, rows)
        if tokens is not None and tokens.device.type == "cpu":
            check_tokens(tokens, rows)

    def _after_text_model(self, module: nn.Module, args: Any, output: Any) -> None:
        self._calls.call = None

    def _before_layer(self, block: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Add the update to the hidden states that a decoder layer is about to read."""
        call: _Call | None = getattr(self._calls, "call", None)
        if call is None and self.enabled:
            raise ConfigError(
                "a decoder layer is computed outside of a forward pass of its model, so memory does not know its "
                "tokens; switch it off with `with adapter.disabled():`. Activation checkpointing that computes hooks a "
                "second time cannot be used: take model.gradient_checkpointing_enable() with transformers 5.23 or "
                "newer, or train without it (gradient_checkpointing=False)"
            )
        if call is None or call.step is None or call.tokens is None:
            return None
        step = call.step
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[:2] != call.tokens.shape:
            raise MismatchError(
                f"{tuple(call.tokens.shape)} tokens were given and {tuple(hidden.shape[:2])} positions are computed; "
                "memory needs a token for each position (prompt tuning adds positions without one)"
            )
        carries = step.state is None and step.packed is None
        if carries and not runs_twice(module) and (cache := _made_cache(args, kwargs)) is not None:
            # A cache that the model has made for itself after its tokens were hashed; there was nothing before them.
            state = start_state(
                cache, self._cache_key, call.tokens, context=self.spec.context, max_rollback=self.max_rollback
            )
            state.advance(step.codes)
            step = dataclasses.replace(step, state=state)
            self._calls.call = _Call(call.tokens, step)
        layer = self._layer(block)
        # Where layers are spread over devices, the hidden states come from the device before.
        device = next(layer.parameters()).device
        read = hidden.to(device) if step.packed is None else step.packed.spread(hidden.to(device))
        update = layer(read, step.rows[block], step.window(block), active=step.active)
        if isinstance(update, EngramOutput):  # A hook of the layer has asked for its gates.
            update = update.update
        if step.packed is not None:
            update = step.packed.gather(update)
        hidden = hidden + update.to(hidden.device)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _layer(self, block: int) -> MemoryLayer:
        if self.stand_in is not None and (other := self.stand_in(block)) is not None:
            return other
        layer: MemoryLayer = self.layers[str(block)]  # type: ignore[assignment]
        return layer


def _made_cache(args: Any, kwargs: dict[str, Any]) -> Cache | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)


def _text_positions(positions: Any) -> Any:
    """Find the positions in the text, ``[B, L]``, where a multimodal model counts in several directions.

    Such positions are ``[4, B, L]``, those in the text first, or ``[3, B, L]``: time, height and width. Inside an image
    some of the three stand still or go back, and only another text begins where none of them increases; the positions
    in the text are then counted from there.
    """
    if not isinstance(positions, Tensor) or positions.dim() != 3:
        return positions
    if len(positions) == 4:
        return positions[0]
    grows = (positions[..., 1:] > positions[..., :-1]).any(0)
    first = positions[..., :1].amax(0)
    places = torch.arange(positions.shape[-1], device=positions.device)
    starts = torch.cat([first == 0, ~grows], dim=1)
    last = torch.where(starts, places, 0).cummax(1).values
    return torch.where(starts.cummax(1).values, places - last, places + first)


def _real_positions(mask: Any, tokens: Tensor, cache: Cache | None) -> Tensor | None:
    """Find the positions that are not padding, bool ``[B, L]``; None where every position is real.

    ``generate`` hands over ``[B, past + L]`` with a growing cache, but a mask of pairs ``[B, 1, L, K]`` (bool, or
    floating and added) with a static one, or several of them by kind of attention. In those a real position sees
    itself, and padding does not. The cache says which column of a mask of pairs a position has.

    Raises:
        MismatchError: A mask of another kind, or of another size than the tokens ``[B, L]``.
    """
    sliding = None
    if isinstance(mask, Mapping):
        kind = "full_attention" if "full_attention" in mask else next(iter(mask), None)
        sliding, mask = kind != "full_attention", mask.get(kind)
    if mask is None:
        return None
    batch_size, length = tokens.shape
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= length:
        return mask[:, -length:] != 0
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[2] != length:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise MismatchError(
            f"attention_mask is {found} for tokens {tuple(tokens.shape)}; a model with memory needs "
            "[batch, past + length] with 0 at padding, or a mask of pairs [batch, 1, length, keys]"
        )
    start: Any = mask.shape[-1] - length
    if cache is not None:
        kinds = cache.is_sliding
        layer = kinds.index(sliding) if sliding in kinds else 0
        start = cache.get_seq_length(layer) - cache.get_mask_sizes(length, layer)[1]
    columns = (torch.arange(length, device=mask.device) + start).expand(mask.shape[0], length)
    seen = mask[:, 0].gather(-1, columns.unsqueeze(-1)).squeeze(-1)
    real = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
    return real.expand(batch_size, length)
