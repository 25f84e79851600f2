"""The studies by name, the most valuable first. A study is one file and one line here.

``engram-lm study NAME`` and ``engram-lm study all`` share these lines; see ``every_study.py`` for what the order means.
"""

import importlib
from collections.abc import Mapping
from typing import Any

STUDIES: Mapping[str, tuple[str, str]] = {
    "allocation": ("engram_lm.studies.allocation:AllocationStudy", "how much of a sparse budget should be memory"),
    "scaling": ("engram_lm.studies.scaling:ScalingStudy", "how far a larger table lowers the loss, for three layers"),
    "ablations": ("engram_lm.studies.ablations:AblationStudy", "what each part of the memory is worth"),
    "mechanism": (
        "engram_lm.studies.mechanism.study:MechanismStudy",
        "how many layers memory saves, and what it holds",
    ),
    "suppression": ("engram_lm.studies.suppression.study:SuppressionStudy", "what is still known without memory"),
    "long_context": ("engram_lm.studies.long_context.study:LongContextStudy", "does memory help to read far back"),
    "rivals": ("engram_lm.studies.rivals.study:RivalsStudy", "what else could be done with the bytes of memory"),
    "layers": ("engram_lm.studies.layers.study:LayersStudy", "is there a better layer than the paper's"),
    "writing": ("engram_lm.studies.writing.study:WritingStudy", "should rows be written while a model runs"),
    "rates": ("engram_lm.studies.rates:RatesStudy", "which learning rates suit micro models"),
}
"""For each study, the module and class of its command, and what it asks, in a line."""


def command_class(place: str) -> type[Any]:
    """Import the class of a study's command from its place, as in ``package.module:Class``."""
    module, _, name = place.partition(":")
    found: type[Any] = getattr(importlib.import_module(module), name)
    return found
