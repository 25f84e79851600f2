"""Weights → findings: when the memory fires, on what, and what it does to the layers behind it.

Reading order: ``subject.py`` (one view of any model), ``protocol.py``, ``recording.py`` and ``reading.py`` (one pass
over a text for all analyses), then the analyses: ``gates/``, ``lens.py``, ``cka/``, ``suppression.py`` and ``rows/``.
Each has a ``Part``, which says how its findings are summarized, drawn and shown. ``registry.py`` lists the parts, and
``run.py`` runs them all.
"""

from engram_lm.analysis.cka.cka import Cka
from engram_lm.analysis.gates.averages import GateStatistics
from engram_lm.analysis.gates.trace import GateTrace, colored_gates, colored_html, gate_trace, strongest
from engram_lm.analysis.lens import LogitLens
from engram_lm.analysis.part import AnalyzeOptions
from engram_lm.analysis.protocol import Analysis, ModelFindings, NotApplicable, Reading
from engram_lm.analysis.reading import look, read_text
from engram_lm.analysis.rows.collisions import collision_study
from engram_lm.analysis.rows.neighbours import nearest_ngrams, nearest_rows
from engram_lm.analysis.rows.usage import RowUse
from engram_lm.analysis.run import analyze
from engram_lm.analysis.subject import Subject, find_subject, group_by_tokenizer
from engram_lm.analysis.suppression import suppression_effect
from engram_lm.evaluation.suppressing import suppressed

__all__ = [
    "Analysis",
    "AnalyzeOptions",
    "Cka",
    "GateStatistics",
    "GateTrace",
    "LogitLens",
    "ModelFindings",
    "NotApplicable",
    "Reading",
    "RowUse",
    "Subject",
    "analyze",
    "collision_study",
    "colored_gates",
    "colored_html",
    "find_subject",
    "gate_trace",
    "group_by_tokenizer",
    "look",
    "nearest_ngrams",
    "nearest_rows",
    "read_text",
    "strongest",
    "suppressed",
    "suppression_effect",
]
