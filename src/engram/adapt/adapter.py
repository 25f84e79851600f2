"""Memory that hangs on a model of somebody else: one hash per forward pass, one update before each chosen layer."""

import contextlib
import functools
import os
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache

from engram.adapt.decode_state import MemoryState, cached_tokens, start_state, state_of
from engram.adapt.decoder import Decoder, argument_names, find_decoder
from engram.adapt.folder import BaseModel, read_adapter, write_adapter
from engram.adapt.padding import real_positions
from engram.errors import ConfigError, HistoryError, MismatchError
from engram.hashing import HashSpec
from engram.memory.config import EngramConfig
from engram.memory.layer import EngramLayer
from engram.model.table_place import TableSource
from engram.tables import Table

__all__ = ["CONTAINER", "MemoryAdapter", "attached_adapters", "table_name"]

# Dimension key: B batch, L length, D hidden, H heads of all orders.

CONTAINER = "engram_adapters"
"""Name of the module that holds a model's adapters, and so what their names in its state dict begin with."""

_SHARED = "shared"


class _Step(NamedTuple):
    """What one forward pass of the model hands from its beginning to its layers."""

    tokens: Tensor
    codes: Tensor
    active: Tensor
    rows: dict[int, Tensor]


class MemoryAdapter(nn.Module):
    """Memory of one name on one model. `engram.attach` and `from_pretrained` make it.

    It is a module of the model it is attached to, so ``model.parameters()``, ``.to()``, ``.train()`` and
    ``.state_dict()`` reach it; its names there begin with ``engram_adapters.NAME.``. So a checkpoint of the model as
    ``Trainer`` writes it, or ``model.save_pretrained(folder)``, holds the adapter beside the model, and loading such a
    folder without the adapter reports its names as unexpected and gives the plain model.

    Nothing is frozen: for training the memory alone, call ``model.requires_grad_(False)`` and then
    ``adapter.requires_grad_(True)`` (peft freezes everything it does not know, too).

    Args:
        config: Geometry and options.
        spec: The hash, with its token map.
        tables: A table for each block (by its number as text), or one called ``shared``.
        name: Which adapter of the model this is.
        base: What the model is that it was made for.
    """

    def __init__(
        self, config: EngramConfig, spec: HashSpec, tables: Mapping[str, Table], *, name: str, base: BaseModel
    ) -> None:
        super().__init__()
        if not name.isidentifier():
            raise ConfigError(f"an adapter's name is made of letters, digits and underscores, not {name!r}")
        self.config, self.spec, self.name, self.base = config, spec, name, base
        self.enabled = True
        """Whether the model reads this memory. May be switched at any time, but not in the middle of a cache."""
        self.max_rollback = 64
        """Tokens that ``crop`` of a cache can take back without being told beforehand, as assisted decoding does. The
        convolution's window of each layer keeps as many positions more, for each sequence."""
        self.memory_tables = nn.ModuleDict(
            {key: table for key, table in tables.items() if isinstance(table, nn.Module)}
        )
        # A table of another tier is neither moved, counted nor saved with the modules.
        self.__dict__["_tables_apart"] = {
            key: table for key, table in tables.items() if not isinstance(table, nn.Module)
        }
        self.layers = nn.ModuleDict(
            {str(block): EngramLayer(config, tables[table_name(spec, block)]) for block in spec.blocks}
        )
        # What its state in a cache is called: another adapter of this name must not take it for its own.
        self._cache_key = f"{name}:{uuid.uuid4().hex}"
        self._handles: list[RemovableHandle] = []
        # The model is no part of the adapter, and must not become one of its modules.
        self.__dict__["_model"] = None
        self._step: _Step | None = None
        self._state_of_step: MemoryState | None = None
        self._outer_tokens: Tensor | None = None

    @property
    def tables(self) -> dict[str, Table]:
        """The tables by the block that reads them, or one called ``shared``."""
        return {**dict(self.memory_tables.items()), **self.__dict__["_tables_apart"]}

    @property
    def model(self) -> nn.Module | None:
        """The model it is attached to; None once detached."""
        return self.__dict__["_model"]

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Let the model compute without this memory inside a ``with`` block."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def detach(self) -> None:
        """Take the memory off the model, which then is exactly what it was. The adapter keeps its weights.

        A model that was compiled with the memory has to be compiled anew. Detaching twice is fine.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []
        model = self.__dict__["_model"]
        self.__dict__["_model"] = None
        self._forget_step()
        if model is not None:
            container = getattr(model, CONTAINER)
            del container[self.name]
            if not len(container):
                del model._modules[CONTAINER]

    def close(self) -> None:
        """Detach, and close the tables that are not parameters."""
        self.detach()
        for table in self.__dict__["_tables_apart"].values():
            table.close()

    def save_pretrained(self, folder: str | os.PathLike[str], *, tables: bool = True) -> None:
        """Write the adapter as a folder: ``config.json``, ``adapter.safetensors`` and ``tables.safetensors``.

        The folder appears whole or not at all.

        Args:
            folder: A new or empty folder.
            tables: Whether to write the tables; without them the adapter is loaded with a ``table_source``. Rows of a
                table that is read from files are copied as they are read.

        Raises:
            ConfigError: A table is on another machine.
            FileExistsError: There is something in the folder.
            OSError: The folder cannot be written.
        """
        write_adapter(
            folder,
            config=self.config,
            spec=self.spec,
            base=self.base,
            layers=self.layers.state_dict(),
            tables=self.tables if tables else {},
        )

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        folder: str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        name: str = "default",
        layer_list: str | None = None,
        table_tier: str | None = None,
        table_source: TableSource | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Attach an adapter that `save_pretrained` wrote to a model of the same kind.

        Args:
            model: The model it was made for.
            folder: The adapter's folder.
            tokenizer: The tokenizer that will be used; it is compared with the one the adapter was made with.
            name: Its name among the model's adapters.
            layer_list: As for `attach`.
            table_tier: ``"device"`` (parameters, trainable), or where rows are read from: ``"mmap"``, ``"file"``,
                ``"host"``, ``"shared"``, ``"http"``, ``"remote"``, ``"auto"``. None: ``"auto"`` with a source, else
                ``"device"``. Logits are the same to the bit.
            table_source: Where tables lie, if not in the folder: as for ``EngramForCausalLM.from_pretrained``.
            dtype: Type of the adapter's numbers; as stored where None.

        Raises:
            CheckpointError: A file is missing, malformed or truncated, or holds other tensors than it should.
            ConfigError: The name is taken, the model has no layer list, or the tier or source are impossible.
            MismatchError: Hidden size, number of layers, vocabulary, tokenizer or tables are not those of the adapter.
        """
        decoder = find_decoder(model, layer_list)
        check_free(model, name)
        stored = read_adapter(folder, hidden_size=decoder.hidden_size, num_layers=len(decoder.layers))
        if tokenizer is not None:
            stored.spec.bind(tokenizer)
        check_vocabulary(stored.spec, decoder)
        device = home(decoder.layers[stored.spec.blocks[0]])
        tables = stored.open_tables(tier=table_tier, source=table_source, dtype=dtype, device=device)
        try:
            adapter = cls(stored.config, stored.spec, tables, name=name, base=stored.base)
            adapter.layers.to(dtype=dtype or stored.dtype)
            adapter.layers.load_state_dict(stored.layers)
            adapter._attach(model, decoder)
        except BaseException:
            for table in tables.values():
                table.close()
            raise
        return adapter

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.name!r}, enabled={self.enabled}, before layers {list(self.spec.blocks)}"

    def _attach(self, model: nn.Module, decoder: Decoder) -> None:
        """Become a module of the model and hook its forward pass."""
        self.train(model.training)
        for block in self.spec.blocks:
            layer = decoder.layers[block]
            self.layers[str(block)].to(home(layer))
        container = model._modules.get(CONTAINER)
        if not isinstance(container, nn.ModuleDict):
            container = nn.ModuleDict()
            model.add_module(CONTAINER, container.train(model.training))
        container[self.name] = self
        self.__dict__["_model"] = model
        # Partials of bound methods, not closures: a copy of the model gets hooks of the copied adapter.
        for module in decoder.outer:
            before = functools.partial(self._before_outer, argument_names(module))
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after_outer, always_call=True))
        text = decoder.text_model
        begin = functools.partial(self._before_text_model, argument_names(text))
        self._handles.append(text.register_forward_pre_hook(begin, with_kwargs=True))
        self._handles.append(text.register_forward_hook(self._after_text_model, always_call=True))
        for block in self.spec.blocks:
            hook = functools.partial(self._before_layer, block)
            self._handles.append(decoder.layers[block].register_forward_pre_hook(hook, with_kwargs=True))

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
        hidden = hidden + update.to(hidden.device)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

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


def attached_adapters(model: nn.Module) -> dict[str, MemoryAdapter]:
    """Return the memory adapters of a model by name, in the order in which they were attached."""
    container = model._modules.get(CONTAINER)
    return {} if container is None else dict(container.items())  # type: ignore[operator]


def table_name(spec: HashSpec, block: int) -> str:
    """Name of the table that a block reads."""
    return _SHARED if spec.shared_table else str(block)


def check_free(model: nn.Module, name: str) -> None:
    """Refuse a name that an adapter of the model has.

    Raises:
        ConfigError: As said.
    """
    if name in attached_adapters(model):
        raise ConfigError(
            f"this model already has a memory adapter called {name!r}; call its detach() first, or attach another "
            "beside it with name='...'"
        )


def check_vocabulary(spec: HashSpec, decoder: Decoder) -> None:
    """Refuse a tokenizer with tokens that the model has no embedding for.

    Raises:
        MismatchError: With both numbers.
    """
    if spec.num_tokens > decoder.vocab_size:
        raise MismatchError(
            f"the tokenizer has {spec.num_tokens} tokens, the model embeds {decoder.vocab_size}; pass the tokenizer "
            "that belongs to the model, or resize its embedding first"
        )


def home(module: nn.Module) -> torch.device:
    """Where a module computes: offloaded weights are on the meta device, and accelerate's hook knows better."""
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is not None:
        return torch.device(device)
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def _find_cache(args: Any, kwargs: dict[str, Any]) -> Cache | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)


def _runs_twice(module: nn.Module) -> bool:
    """Whether gradient checkpointing computes a module a second time; it then drops the cache as well."""
    return module.training and bool(getattr(module, "gradient_checkpointing", False))
