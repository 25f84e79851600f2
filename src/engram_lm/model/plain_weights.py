"""The weights of a module under the names that its file has, whatever other libraries have put around its parts.

peft puts a layer of its own in the place of ours and keeps ours inside, torch.compile does the same, and a
parametrization keeps something else in the place of a weight. Names and values that a state dict then holds are not
those that a loader knows. Everything that is written as a checkpoint of memory goes through `plain_weights` first.
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from engram_lm.errors import ConfigError
from engram_lm.tables.occupancy import TrainedTable

# The names under which others keep the module whose place they take: torch.compile, peft's layers (LoRA, DoRA, IA3, …),
# peft's modules_to_save, and torch's activation checkpointing.
_PEFT = ("base_layer", "original_module")
_KEPT_AS = ("_orig_mod", *_PEFT, "_checkpoint_wrapped_module")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_NAMES_SHOWN = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """Where a weight of a plain module lies now."""

    owner: nn.Module
    """The module that has it."""
    attribute: str
    """What it is called there."""
    name: str
    """Its name in the state dict of the whole, if nothing parametrizes it."""

    @property
    def is_parametrized(self) -> bool:
        """Whether the weight is computed from other ones."""
        return is_parametrized(self.owner, self.attribute)

    @property
    def value(self) -> Tensor:
        """The weight, without its history; of a table that is trained, as files hold it."""
        if isinstance(self.owner, TrainedTable) and self.attribute == "weight":
            return self.owner.saved_weight()
        value: Tensor = getattr(self.owner, self.attribute).detach()
        return value


@dataclasses.dataclass(frozen=True, eq=False)
class PlainWeights:
    """What `plain_weights` finds."""

    weights: dict[str, Tensor]
    """The weights by the names that were asked for."""
    unknown: tuple[str, ...]
    """Names in the module's state dict that were not asked for and belong to nothing that was put around a part."""


def plain_weights(module: nn.Module, expected: Mapping[str, Tensor]) -> PlainWeights:
    """Collect the weights of a module as a loader expects them, without what was put around its parts.

    Adapters of peft that are not merged are left out, as peft keeps them in files of its own. A parametrized weight has
    the value that is computed with. Quantized tensors that can undo their quantization do so.

    Args:
        module: The module.
        expected: Every name that its loader expects, with a tensor of the right shape (of any device, also meta).

    Raises:
        ConfigError: A weight is not there any more, has another shape, or cannot be written as ordinary numbers.
    """
    weights: dict[str, Tensor] = {}
    known: list[str] = []
    for name, like in expected.items():
        place = find_weight(module, name)
        value = place.value
        if type(value) not in (Tensor, nn.Parameter) and not value.is_meta:
            value = _dequantized(name, value)
        if value.shape != like.shape or (like.is_floating_point() and value.dtype not in _FLOATS):
            raise ConfigError(
                f"the weight {name} is {list(value.shape)} of {value.dtype}, and what reads the file expects "
                f"{list(like.shape)} of {like.dtype} or another floating-point type; save before the model is quantized"
            )
        weights[name] = value
        # torch's activation checkpointing takes itself out of the names of a state dict.
        known += [name, place.name, f"{place.name.removesuffix(place.attribute)}parametrizations.{place.attribute}."]
    known += [f"{name}." if name else "" for name in under_peft(module)]
    beginnings = tuple(name for name in known if not name or name.endswith("."))
    names = set(known)
    unknown = (name for name in module.state_dict() if name not in names and not name.startswith(beginnings))
    return PlainWeights(weights, tuple(unknown))


def refuse_unknown(what: str, names: tuple[str, ...]) -> None:
    """Refuse, with a `ConfigError`, weights that no loader of ``what`` would read."""
    if names:
        raise ConfigError(
            f"{what} has weights that could not be loaded again: {', '.join(names[:_NAMES_SHOWN])}; remove what was "
            "added to it, or merge it, before it is saved"
        )


def find_weight(module: nn.Module, name: str) -> Place:
    """Find a weight by the name that it has in the plain module.

    Raises:
        ConfigError: It is not there, or peft's adapters are merged into it and still there.
    """
    *parts, attribute = name.split(".")
    owner, path = _unwrapped(module, "")
    for part in parts:
        inner = owner._modules.get(part)
        if inner is None:
            raise _lost(name, owner)
        owner, path = _unwrapped(inner, f"{path}{part}.")
    place = Place(owner, attribute, path + attribute)
    if attribute not in owner._parameters and attribute not in owner._buffers and not place.is_parametrized:
        raise _lost(name, owner)
    if not isinstance(getattr(owner, attribute), Tensor):
        raise _lost(name, owner)
    return place


def under_peft(module: nn.Module) -> list[str]:
    """List the parts of a module in whose place peft has put something of its own, by their names."""
    return [name for name, part in module.named_modules() if any(kept in part._modules for kept in _PEFT)]


def _unwrapped(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    while (kept := next((name for name in _KEPT_AS if name in module._modules), None)) is not None:
        inner = module._modules[kept]
        assert inner is not None
        if getattr(module, "merged", False):
            raise ConfigError(
                f"peft has merged its adapters into {path.removesuffix('.')} and keeps them there too, so they would "
                "be added twice when both are loaded; call merge_and_unload() of the peft model, or unmerge_adapter()"
            )
        module, path = inner, f"{path}{kept}."
    return module, path


def _lost(name: str, owner: nn.Module) -> ConfigError:
    return ConfigError(
        f"the weight {name} is no longer there as a parameter: its module is now a {type(owner).__name__}, or computes "
        "the weight from others. What would be written could not be loaded again: save before it is replaced, or undo "
        "the replacement (torch.nn.utils.remove_weight_norm, for example)"
    )


def _dequantized(name: str, value: Tensor) -> Tensor:
    try:
        plain = value.dequantize()
    except Exception as error:  # Each library of quantization has errors of its own.
        raise ConfigError(
            f"the weight {name} is a {type(value).__name__}, which cannot be written as ordinary numbers "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__:.100}); save before it is quantized "
            "or divided"
        ) from error
    return plain.detach()
