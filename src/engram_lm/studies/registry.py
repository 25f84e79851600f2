"""The studies by name. A new study is one file and one line here."""

__all__ = ["STUDIES"]

STUDIES = {
    "suppression": (
        "engram_lm.studies.suppression.study:SuppressionStudy",
        "what a model still knows, and still reads, with its memory suppressed",
    ),
    "depth": (
        "engram_lm.studies.depth.study:DepthStudy",
        "at which block memory helps most, and how many layers it saves",
    ),
}
"""For each study, module and class of its command, and what it asks in a line."""
