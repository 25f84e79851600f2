"""Conditional memory for language models: huge hashed N-gram tables, looked up in O(1) and gated by context.

The names of ``__all__`` are the whole public surface; everything else is private by convention. Each one is loaded when
it is first used, so ``import engram_lm`` costs milliseconds and imports neither torch nor transformers.

The data moves in one direction, and the folders follow it::

    text ──tokenizer──▶ tokens ──hashing──▶ row numbers ──tables──▶ rows ──memory──▶ update ──model──▶ logits
"""

import importlib
from typing import TYPE_CHECKING

from engram_lm import registration

if TYPE_CHECKING:
    from engram_lm.adapt import MemoryAdapter, RowPatch, attach
    from engram_lm.hashing import HashSpec, TokenHistory, TokenMap
    from engram_lm.memory import EngramConfig, EngramLayer
    from engram_lm.model import EngramForCausalLM, EngramLMConfig
    from engram_lm.tables import Table, open_table

__version__ = "0.1.0"

__all__ = [
    "EngramConfig",
    "EngramForCausalLM",
    "EngramLMConfig",
    "EngramLayer",
    "HashSpec",
    "MemoryAdapter",
    "RowPatch",
    "Table",
    "TokenHistory",
    "TokenMap",
    "attach",
    "open_table",
]

_MODULES = {
    "EngramConfig": "engram_lm.memory",
    "EngramForCausalLM": "engram_lm.model",
    "EngramLMConfig": "engram_lm.model",
    "EngramLayer": "engram_lm.memory",
    "HashSpec": "engram_lm.hashing",
    "MemoryAdapter": "engram_lm.adapt",
    "RowPatch": "engram_lm.adapt",
    "Table": "engram_lm.tables",
    "TokenHistory": "engram_lm.hashing",
    "TokenMap": "engram_lm.hashing",
    "attach": "engram_lm.adapt",
    "open_table": "engram_lm.tables",
}


def __getattr__(name: str) -> object:
    """Load a public name on first use."""
    if name not in _MODULES:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; its public names are {', '.join(__all__)}"
        )
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


registration.prepare()
