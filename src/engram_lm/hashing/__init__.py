"""Tokens to row numbers: canonical tokens, primes, multipliers, the hash specification and decoding history.

Pure and deterministic; knows nothing of tables. Importing this package does not import torch: `TokenHistory` and
`RollingWindow` need it, everything else also works on NumPy arrays alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engram_lm.hashing.codes import Segments
    from engram_lm.hashing.history import TokenHistory
    from engram_lm.hashing.spec import HashSpec
    from engram_lm.hashing.token_map import TokenMap
    from engram_lm.hashing.window import RollingWindow

__all__ = ["HashSpec", "RollingWindow", "Segments", "TokenHistory", "TokenMap"]

_HOME = {
    "HashSpec": "spec",
    "RollingWindow": "window",
    "Segments": "codes",
    "TokenHistory": "history",
    "TokenMap": "token_map",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
