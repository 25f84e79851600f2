"""A text model of vLLM with memory before some of its decoder layers, as `engram_lm.attach` adds it elsewhere."""

import functools
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context

from engram_lm.adapt.adapter import CONTAINER
from engram_lm.adapt.decoder import argument_names
from engram_lm.adapt.folder import StoredAdapter
from engram_lm.errors import ConfigError
from engram_lm.memory.interface import build_layer
from engram_lm.model.table_place import table_name
from engram_lm.serving.vllm.adapters import read_adapters
from engram_lm.serving.vllm.memory import MemoryPass, ServedMemory
from engram_lm.serving.vllm.tables import table_place

# Dimension key: T tokens of all requests side by side, D hidden.

_PASSES = "engram_lm"
"""Where vLLM's context of one forward pass holds what our memories computed at its beginning."""
_HIDDEN, _RESIDUAL = "hidden_states", "residual"
_ARGUMENTS = {"positions", "position_ids", _HIDDEN, _RESIDUAL, "llama_4_scaling", "t_cond", "idx", "attn_metadata"}
"""What decoder layers may take. The residual branch is `hidden_states`, or its sum with `residual`, which vLLM adds up
inside the layer."""


@functools.cache
def adapted_class(native: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a model of vLLM with memory."""
    return type(f"Engram{native.__name__}", (Adapted, native), {})


class Adapted(nn.Module):
    """What stands before the class of a model of vLLM. It is run eagerly; see `engram_lm.serving.vllm.config_check`."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._engram_config = vllm_config
        self._engram_stored = read_adapters(vllm_config)
        decoder = decoder_layers(self, vllm_config.model_config.hf_text_config.num_hidden_layers)
        memories = nn.ModuleList(
            nn.ModuleDict({str(block): build_layer(stored.config) for block in stored.spec.blocks}).to(stored.dtype)
            for stored in self._engram_stored
        )
        self.add_module(CONTAINER, memories)
        self._engram_served = [
            # vLLM reads the number of the layer from the name, so another number may not be in it.
            ServedMemory(
                {int(block): layer for block, layer in memory.items()},  # type: ignore[operator]
                prefix=f"{CONTAINER}.{chr(ord('a') + index)}",
                dtype=stored.dtype,
                vllm_config=vllm_config,
            )
            for index, (stored, memory) in enumerate(zip(self._engram_stored, memories, strict=True))
        ]
        for block in sorted({block for stored in self._engram_stored for block in stored.spec.blocks}):
            hook = functools.partial(_before_layer, block, argument_names(decoder[block]))
            decoder[block].register_forward_pre_hook(hook, with_kwargs=True)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        """Hash the tokens of all requests, ``[T]``, and compute what the model computes."""
        assert input_ids is not None, "prompts of embeddings are refused"
        # The context belongs to this forward pass, and hooks cannot be handed anything else.
        get_forward_context().additional_kwargs[_PASSES] = [
            served.begin(input_ids, positions) for served in self._engram_served
        ]
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str] | None:
        """Fill the model from its own checkpoint and the memory from the adapters, and open the tables.

        Raises:
            CheckpointError: A table is missing or malformed.
            MismatchError: A table is not the one that the adapter was made with.
        """
        # A trainer's checkpoint of the whole model holds the memory, too.
        own = ((name, tensor) for name, tensor in weights if not name.startswith(f"{CONTAINER}."))
        loaded = super().load_weights(own)  # type: ignore[misc]
        memories: Any = getattr(self, CONTAINER)
        for stored, layers, served in zip(self._engram_stored, memories, self._engram_served, strict=True):
            layers.load_state_dict(stored.layers)
            served.bind(stored.spec, self._open_tables(stored, next(layers.parameters()).device))
        names = {f"{CONTAINER}.{name}" for name, _ in memories.named_parameters()}
        return None if loaded is None else loaded | names

    def _open_tables(self, stored: StoredAdapter, device: Any) -> dict[int, Any]:
        place = table_place(self._engram_config.additional_config, device)
        tables = stored.open_tables(place, None)
        return {block: tables[table_name(stored.spec, block)] for block in stored.spec.blocks}


def decoder_layers(model: nn.Module, count: int) -> nn.ModuleList:
    """Find the decoder layers of a text model of vLLM: the list of ``count`` layers that take hidden states.

    Raises:
        ConfigError: There is none or there are several, or the layers take something whose meaning is not known here.
    """
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all(_HIDDEN in argument_names(layer) for layer in module)
    ]
    kind = type(model).__name__
    if len(found) != 1:
        raise ConfigError(
            f"vLLM's {kind} has {len(found) or 'no'} lists of {count} layers that take {_HIDDEN}, so it is not known "
            "where memory is to be added; generate with transformers instead"
        )
    for layer in found[0]:
        if unknown := set(argument_names(layer)) - _ARGUMENTS:
            raise ConfigError(
                f"the layers of vLLM's {kind} take {', '.join(sorted(unknown))}, and it is not known what memory would "
                "have to do with that; generate with transformers instead"
            )
    return found[0]


def _before_layer(block: int, names: tuple[str, ...], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Add the updates of a layer's memories to the hidden states ``[T, D]`` that it is about to read."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    hidden, residual = given[_HIDDEN], given.get(_RESIDUAL)
    passes: list[MemoryPass] = get_forward_context().additional_kwargs[_PASSES]
    for step in passes:
        if block in step.layers:
            hidden = hidden + step.update(block, hidden if residual is None else hidden + residual)
    if _HIDDEN in kwargs:
        return args, {**kwargs, _HIDDEN: hidden}
    place = names.index(_HIDDEN)
    return (*args[:place], hidden, *args[place + 1 :]), kwargs
