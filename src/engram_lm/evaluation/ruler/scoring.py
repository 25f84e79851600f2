"""How answers are checked, as published.

Source: NVIDIA/RULER, ``scripts/eval/synthetic/constants.py`` and ``scripts/eval/evaluate.py``; these give shares where
those give percent. EleutherAI/lm-evaluation-harness averages over the references in ``string_match_part`` too, so its
numbers for questions with several references are lower than published ones.
"""

import re
from collections.abc import Sequence

_UNPRINTABLE = re.compile(r"[\x00-\x1f]")


def string_match_all(answer: str, references: Sequence[str]) -> float:
    """Share of the references, at least one, that occur in an answer, whatever their case."""
    found = _found(answer, references)
    return sum(found) / len(found)


def string_match_part(answer: str, references: Sequence[str]) -> float:
    """1.0 if any reference occurs in an answer, whatever its case, otherwise 0.0."""
    return float(any(_found(answer, references)))


def _found(answer: str, references: Sequence[str]) -> list[bool]:
    read = _UNPRINTABLE.sub("\n", answer.strip()).strip().lower()
    return [reference.lower() in read for reference in references]
