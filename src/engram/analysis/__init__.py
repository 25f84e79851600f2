"""Weights → findings: when the memory fires, and on what.

Reading order: ``gates.py`` (the gate of every token, and the N-gram that opened it).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engram.analysis.gates import GateTrace, Ngram, NgramGate, gate_trace, strongest

__all__ = ["GateTrace", "Ngram", "NgramGate", "gate_trace", "strongest"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("engram.analysis.gates"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
