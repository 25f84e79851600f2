"""Weights → findings: when the memory fires, on what, and what it does to the layers behind it.

Reading order: ``subject.py`` (one view of any model), ``recording.py`` and ``reading.py`` (one pass over a text for
all analyses), then the analyses: ``gates.py`` (the gate of every token of a short text, and the N-gram that opened it),
``gate_scores.py`` (what each order adds to it), ``gate_statistics.py`` and ``ngram_table.py`` (averages over a long
text), ``colored_text.py`` (gates as colors).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engram.analysis.colored_text import colored_gates, colored_html
    from engram.analysis.gate_statistics import GateAverages, GateFindings, GateStatistics, average_gates
    from engram.analysis.gates import GateTrace, Ngram, NgramGate, gate_trace, strongest
    from engram.analysis.reading import Analysis, NotApplicable, Reading, read_text
    from engram.analysis.subject import Subject, find_subject, group_by_tokenizer
    from engram.analysis.suppression import Condition, SuppressionEffect, suppressed, suppression_effect

_MODULES = {
    "Analysis": "reading",
    "Condition": "suppression",
    "GateAverages": "gate_statistics",
    "GateFindings": "gate_statistics",
    "GateStatistics": "gate_statistics",
    "GateTrace": "gates",
    "Ngram": "gates",
    "NgramGate": "gates",
    "NotApplicable": "reading",
    "Reading": "reading",
    "Subject": "subject",
    "SuppressionEffect": "suppression",
    "average_gates": "gate_statistics",
    "colored_gates": "colored_text",
    "colored_html": "colored_text",
    "find_subject": "subject",
    "gate_trace": "gates",
    "group_by_tokenizer": "subject",
    "read_text": "reading",
    "strongest": "gates",
    "suppressed": "suppression",
    "suppression_effect": "suppression",
}

__all__ = [
    "Analysis",
    "Condition",
    "GateAverages",
    "GateFindings",
    "GateStatistics",
    "GateTrace",
    "Ngram",
    "NgramGate",
    "NotApplicable",
    "Reading",
    "Subject",
    "SuppressionEffect",
    "average_gates",
    "colored_gates",
    "colored_html",
    "find_subject",
    "gate_trace",
    "group_by_tokenizer",
    "read_text",
    "strongest",
    "suppressed",
    "suppression_effect",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"engram.analysis.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
