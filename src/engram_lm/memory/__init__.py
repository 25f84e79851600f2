"""Rows and hidden state → update of the hidden state: the Engram layer.

Reading order: ``config.py`` (the choices, and what they cost), ``interface.py`` and ``registry.py`` (what a layer is,
and which there are), ``layer.py`` (the Engram layer), ``gate.py`` and ``convolution.py`` (its two ideas),
``reference.py`` (its plain twin), ``over_encoding.py`` (a rival), ``step.py`` (one forward pass, from tokens to rows
and windows), ``decode_state.py`` (what decoding remembers), ``formats/`` (memory from and for the checkpoints of
others).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engram_lm.memory.config import EngramConfig
    from engram_lm.memory.formats.checkpoint import PublishedMemory, read_memory, write_memory
    from engram_lm.memory.interface import EngramOutput
    from engram_lm.memory.layer import EngramLayer

__all__ = [
    "EngramConfig",
    "EngramLayer",
    "EngramOutput",
    "PublishedMemory",
    "read_memory",
    "write_memory",
]

_MODULES = {
    "EngramConfig": "engram_lm.memory.config",
    "EngramLayer": "engram_lm.memory.layer",
    "EngramOutput": "engram_lm.memory.interface",
    "PublishedMemory": "engram_lm.memory.formats.checkpoint",
    "read_memory": "engram_lm.memory.formats.checkpoint",
    "write_memory": "engram_lm.memory.formats.checkpoint",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that a configuration can be priced without loading torch.
    if name in _MODULES:
        import importlib

        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
