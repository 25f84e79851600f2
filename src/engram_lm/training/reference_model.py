"""What trainers of TRL compare a model with: the same model, its memory included, as it began.

DPO, KTO, GRPO and RLOO load the model to compare with by the name of the base, which knows nothing of attached memory;
with peft they switch off peft's adapters, which leaves memory as far as it has been trained. Both would give another
divergence than the one that is asked for, from the first step or from the second.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from engram_lm.adapt.adapter import CONTAINER, MemoryAdapter, attached_adapters
from engram_lm.adapt.decoder import find_decoder
from engram_lm.errors import ConfigError
from engram_lm.memory.interface import MemoryLayer
from engram_lm.tables import Table

_NAMES = ("ref_model", "teacher_model")
"""What trainers call it, as an attribute and as an argument."""
# What TRL calls the adapter that holds a copy of what peft's adapter was at the beginning.
_PEFT_REFERENCE = "ref"


class References:
    """The memory as it began, for a trainer that has just been made.

    A model that the trainer has loaded by name is given the memory, and the weights, that the trainer's model has now.
    Weights and rows that are not trained are shared, unless the trainer changes its reference (``sync_ref_model``). A
    model that was handed to the trainer is left as it is. Where the trainer switches peft's adapters off instead, a
    copy of the memory takes the place of the memory during such passes, inside of `used`.
    """

    def __init__(self, trainer: Any, given: Mapping[str, Any]) -> None:
        """Supply a trainer's references.

        Args:
            trainer: The trainer, whose ``__init__`` has run.
            given: The arguments that it was made with, by name.

        Raises:
            ConfigError: The model that was loaded by name is not the trainer's.
        """
        self._stand_ins: dict[MemoryAdapter, _StandIn] = {}
        adapters = attached_adapters(trainer.model)
        for name in _NAMES:
            if not hasattr(trainer, name) or given.get(name) is not None:
                continue
            reference = getattr(trainer, name)
            if reference is not None:
                reference = trainer.accelerator.unwrap_model(reference)
                if not attached_adapters(reference):
                    is_fixed = name == "ref_model" and not getattr(trainer.args, "sync_ref_model", False)
                    _complete(reference, trainer.model, adapters, share=is_fixed)
            elif hasattr(trainer.model, "disable_adapter") and getattr(trainer, "beta", None) != 0:
                self._stand_ins = {
                    adapter: _StandIn(trainer.model, adapter)
                    for adapter in adapters.values()
                    if any(parameter.requires_grad for parameter in adapter.parameters())
                }

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Read the memory as it began, inside a ``with`` block, whenever peft's adapters are switched off."""
        before = {adapter: adapter.stand_in for adapter in self._stand_ins}
        try:
            for adapter, stand_in in self._stand_ins.items():
                adapter.stand_in = stand_in
            yield
        finally:
            for adapter, earlier in before.items():
                adapter.stand_in = earlier


@contextlib.contextmanager
def found_as_reference(model: Any) -> Iterator[None]:
    """Let the memory called ``default`` be found as ``ref`` too, inside a ``with`` block.

    TRL copies what peft's adapter ``default`` is at the beginning into one called ``ref``, and takes every parameter
    with ``default`` in its name for a part of it. Those of the memory are then copied onto themselves.
    """
    adapters = attached_adapters(model) if hasattr(model, "peft_config") else {}
    adapter = adapters.get("default")
    if adapter is None or adapter.model is None or _PEFT_REFERENCE in adapters:
        yield
        return
    container: nn.ModuleDict = adapter.model.get_submodule(CONTAINER)  # type: ignore[assignment]
    container[_PEFT_REFERENCE] = adapter
    try:
        yield
    finally:
        del container[_PEFT_REFERENCE]


class _StandIn:
    """Gives the layers that an adapter had at the beginning, while peft's adapters are switched off."""

    def __init__(self, model: nn.Module, adapter: MemoryAdapter) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._layers, _ = _frozen_copy(adapter, share=True)
        # Those of the copy are not switched with the model's.
        self._tuned = next((part for part in model.modules() if isinstance(part, BaseTunerLayer)), None)

    def __call__(self, block: int) -> MemoryLayer | None:
        tuned = self._tuned
        if tuned is None or not (tuned.disable_adapters or _PEFT_REFERENCE in tuned.active_adapters):
            return None
        layer: MemoryLayer = self._layers[str(block)]  # type: ignore[assignment]
        return layer


@torch.no_grad()
def _complete(reference: nn.Module, model: nn.Module, adapters: Mapping[str, MemoryAdapter], *, share: bool) -> None:
    """Give a model that was loaded by name the weights and the memory that another has now."""
    loaded = dict(reference.named_parameters(remove_duplicate=False))
    for name, weight in model.named_parameters(remove_duplicate=False):
        if CONTAINER in name.split(".") or not weight.is_floating_point():
            continue  # memory; or numbers of a quantized matrix, which are as they were loaded
        other = loaded.get(name)
        if other is None or other.shape != weight.shape:
            raise ConfigError(
                f"the trainer has loaded {getattr(model.config, 'name_or_path', '')!r} to compare the model with, and "
                f"it has no {name} of {list(weight.shape)}: the model was changed after it was loaded. Pass a frozen "
                "copy of it as ref_model (copy.deepcopy(model)), or save the model without its memory and load that"
            )
        if share and not weight.requires_grad and (other.dtype, other.device) == (weight.dtype, weight.device):
            other.data = weight.data
        else:
            other.copy_(weight)
    for adapter in adapters.values():
        layers, tables = _frozen_copy(adapter, share=share)
        twin = MemoryAdapter(adapter.config, adapter.spec, tables, name=adapter.name, base=adapter.base)
        twin.layers = layers
        twin.enabled, twin.row_map = adapter.enabled, adapter.row_map
        twin.attach_to(reference, find_decoder(reference, adapter.layer_list))
        twin.requires_grad_(False)


def _frozen_copy(adapter: MemoryAdapter, *, share: bool) -> tuple[nn.ModuleDict, dict[str, Table]]:
    """Copy an adapter's layers and their tables; what does not change may be the same as the adapter's."""
    own: dict[int, Any] = {id(table): table for table in adapter.tables.values() if not isinstance(table, nn.Module)}
    if share:
        own |= {id(parameter): parameter for parameter in adapter.parameters() if not parameter.requires_grad}
    layers, tables = copy.deepcopy((adapter.layers, adapter.tables), own)
    for module in (layers, *tables.values()):
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
    return layers, tables
