"""Rows and hidden state → update of the hidden state: the Engram layer.

Reading order: ``config.py`` (the choices, and what they cost), ``layer.py`` (the layer), ``gate.py`` and
``convolution.py`` (its two ideas), ``state.py`` (what decoding keeps), ``reference.py`` (the plain twin),
``published.py`` and ``publishing.py`` (memory from and for the checkpoints of others).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engram_lm.memory.config import EngramConfig
    from engram_lm.memory.formats.published import PublishedMemory, read_memory
    from engram_lm.memory.formats.publishing import write_memory
    from engram_lm.memory.layer import EngramLayer, EngramOutput
    from engram_lm.memory.state import ConvolutionState

__all__ = [
    "ConvolutionState",
    "EngramConfig",
    "EngramLayer",
    "EngramOutput",
    "PublishedMemory",
    "read_memory",
    "write_memory",
]

_MODULES = {
    "ConvolutionState": "engram_lm.memory.state",
    "EngramConfig": "engram_lm.memory.config",
    "EngramLayer": "engram_lm.memory.layer",
    "EngramOutput": "engram_lm.memory.layer",
    "PublishedMemory": "engram_lm.memory.formats.published",
    "read_memory": "engram_lm.memory.formats.published",
    "write_memory": "engram_lm.memory.formats.publishing",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that a configuration can be priced without loading torch.
    if name in _MODULES:
        import importlib

        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
