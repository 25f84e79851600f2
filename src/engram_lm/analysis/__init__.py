"""Weights → findings: when the memory fires, on what, and what it does to the layers behind it.

Reading order: ``subject.py`` (one view of any model), ``recording.py`` and ``reading.py`` (one pass over a text for
all analyses), then the analyses: ``gates.py`` (the gate of every token of a short text, and the N-gram that opened it),
``gate_scores.py`` (what each order adds to it), ``gate_statistics.py`` and ``ngram_table.py`` (averages over a long
text), ``colored_text.py`` (gates as colors); ``rows.py`` (which rows a text reads) with ``ngram_collisions.py``
(which N-grams share them), ``neighbours.py`` (rows and N-grams that are alike) with ``promoted.py`` (what they say).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engram_lm.analysis.alignment import CkaFindings, CkaMap, soft_alignment
    from engram_lm.analysis.all_parts import AnalyzeOptions, Findings, analyze
    from engram_lm.analysis.cka import Cka, layer_similarity
    from engram_lm.analysis.colored_text import colored_gates, colored_html
    from engram_lm.analysis.gate_statistics import GateAverages, GateFindings, GateStatistics, average_gates
    from engram_lm.analysis.gates import GateTrace, Ngram, NgramGate, gate_trace, strongest
    from engram_lm.analysis.lens import LensCurve, LensFindings, LogitLens, logit_lens
    from engram_lm.analysis.neighbours import Neighbours, nearest_ngrams, nearest_rows
    from engram_lm.analysis.ngram_collisions import CollisionStudy, NgramCollisions, collision_study
    from engram_lm.analysis.reading import Analysis, NotApplicable, Reading, read_text
    from engram_lm.analysis.rows import RowFindings, RowUsage, RowUse, row_use
    from engram_lm.analysis.subject import Subject, find_subject, group_by_tokenizer
    from engram_lm.analysis.suppression import Condition, SuppressionEffect, suppressed, suppression_effect

_MODULES = {
    "Analysis": "reading",
    "AnalyzeOptions": "all_parts",
    "Cka": "cka",
    "CkaFindings": "alignment",
    "CkaMap": "alignment",
    "CollisionStudy": "ngram_collisions",
    "Condition": "suppression",
    "Findings": "all_parts",
    "GateAverages": "gate_statistics",
    "GateFindings": "gate_statistics",
    "GateStatistics": "gate_statistics",
    "GateTrace": "gates",
    "LensCurve": "lens",
    "LensFindings": "lens",
    "LogitLens": "lens",
    "Neighbours": "neighbours",
    "Ngram": "gates",
    "NgramCollisions": "ngram_collisions",
    "NgramGate": "gates",
    "NotApplicable": "reading",
    "Reading": "reading",
    "RowFindings": "rows",
    "RowUsage": "rows",
    "RowUse": "rows",
    "Subject": "subject",
    "SuppressionEffect": "suppression",
    "analyze": "all_parts",
    "average_gates": "gate_statistics",
    "collision_study": "ngram_collisions",
    "colored_gates": "colored_text",
    "colored_html": "colored_text",
    "find_subject": "subject",
    "gate_trace": "gates",
    "group_by_tokenizer": "subject",
    "layer_similarity": "cka",
    "logit_lens": "lens",
    "nearest_ngrams": "neighbours",
    "nearest_rows": "neighbours",
    "read_text": "reading",
    "row_use": "rows",
    "soft_alignment": "alignment",
    "strongest": "gates",
    "suppressed": "suppression",
    "suppression_effect": "suppression",
}

__all__ = [
    "Analysis",
    "AnalyzeOptions",
    "Cka",
    "CkaFindings",
    "CkaMap",
    "CollisionStudy",
    "Condition",
    "Findings",
    "GateAverages",
    "GateFindings",
    "GateStatistics",
    "GateTrace",
    "LensCurve",
    "LensFindings",
    "LogitLens",
    "Neighbours",
    "Ngram",
    "NgramCollisions",
    "NgramGate",
    "NotApplicable",
    "Reading",
    "RowFindings",
    "RowUsage",
    "RowUse",
    "Subject",
    "SuppressionEffect",
    "analyze",
    "average_gates",
    "collision_study",
    "colored_gates",
    "colored_html",
    "find_subject",
    "gate_trace",
    "group_by_tokenizer",
    "layer_similarity",
    "logit_lens",
    "nearest_ngrams",
    "nearest_rows",
    "read_text",
    "row_use",
    "soft_alignment",
    "strongest",
    "suppressed",
    "suppression_effect",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"engram_lm.analysis.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
