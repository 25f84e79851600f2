"""The memory layers that a configuration can name. A rival layer is one file and one line here."""

import importlib
from typing import Any

from engram_lm.errors import ConfigError, suggestion

LAYERS: dict[str, str] = {
    "engram": "engram_lm.memory.layer.EngramLayer",
    "over_encoding": "engram_lm.memory.over_encoding.OverEncodingLayer",
}
"""Name of a layer in `EngramConfig.layer` → where its class is. It is imported when it is built or priced."""


def check_layer(name: object) -> None:
    """Refuse a name that no layer has, by a ConfigError with the nearest one."""
    if not isinstance(name, str) or name not in LAYERS:
        raise ConfigError(f"there is no memory layer {name!r}; {suggestion(name, LAYERS)}")


def layer_class(name: str) -> Any:
    """Return the class of a layer, an `engram_lm.memory.interface.MemoryLayer`."""
    module, _, attribute = LAYERS[name].rpartition(".")
    return getattr(importlib.import_module(module), attribute)
