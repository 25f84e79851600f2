"""The parts of ``engram-lm analyze``: a line for each, in the order of the report."""

from collections.abc import Mapping

PARTS: Mapping[str, str] = {
    "gates": "engram_lm.analysis.gates.part:GatesPart",
    "lens": "engram_lm.analysis.lens:LensPart",
    "cka": "engram_lm.analysis.cka.part:CkaPart",
    "suppression": "engram_lm.analysis.suppression:SuppressionPart",
    "rows": "engram_lm.analysis.rows.part:RowsPart",
}
"""The name of each part (of ``--parts`` and in results), and its class, a `engram_lm.analysis.part.Part`."""
