"""The memory layers that a configuration can name. A rival layer is one file and one line here."""

import importlib
from typing import TYPE_CHECKING

from engram_lm.errors import ConfigError, suggestion

if TYPE_CHECKING:
    from engram_lm.memory.config import EngramConfig
    from engram_lm.memory.interface import MemoryLayer
    from engram_lm.tables import Table

__all__ = ["LAYERS", "build_layer", "check_layer", "layer_class"]

LAYERS: dict[str, str] = {"engram": "engram_lm.memory.layer.EngramLayer"}
"""Name of a layer in `EngramConfig.layer` → where its class is. It is imported when it is built or priced."""


def check_layer(name: object) -> None:
    """Refuse a name that no layer has, by a ConfigError with the nearest one."""
    if not isinstance(name, str) or name not in LAYERS:
        raise ConfigError(f"there is no memory layer {name!r}; {suggestion(name, LAYERS)}")


def layer_class(name: str) -> "type[MemoryLayer]":
    """Return the class of a layer."""
    module, _, attribute = LAYERS[name].rpartition(".")
    found: type[MemoryLayer] = getattr(importlib.import_module(module), attribute)
    return found


def build_layer(config: "EngramConfig", table: "Table | None" = None) -> "MemoryLayer":
    """Build the layer that a configuration names; the arguments are those of `MemoryLayer`."""
    return layer_class(config.layer)(config, table)
