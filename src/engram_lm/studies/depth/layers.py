"""What the layers of the trained models do: the logit lens of each, and CKA with the model without memory."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from engram_lm.analysis.cka.cka import Cka
from engram_lm.analysis.cka.maps import CkaFindings
from engram_lm.analysis.lens.lens import LogitLens
from engram_lm.analysis.positions import Positions
from engram_lm.analysis.protocol import Analysis, NotApplicable
from engram_lm.analysis.reading import read_text
from engram_lm.analysis.subject import Subject

__all__ = ["measure_layers"]


def measure_layers(
    subjects: Sequence[Subject],
    tokens: np.ndarray,
    parts: Sequence[str],
    *,
    baseline: str,
    positions: Positions,
    top_k: int,
    length: int,
    max_tokens: int,
    on_progress: Callable[[int], None],
) -> dict[str, Any]:
    """Let all models read a text once, and look at their layers.

    Args:
        subjects: The models, of one tokenizer.
        tokens: The text, integers ``[num_tokens]``.
        parts: Of ``lens`` and ``cka``.
        baseline: Name of the model without memory.
        positions: Where CKA compares hidden states.
        top_k: Layers that a soft alignment averages over.
        length: Tokens the models see at once.
        max_tokens: Tokens that are read, from the start of the text.
        on_progress: Called with the number of tokens just read.

    Returns:
        Plain values by part: for ``lens`` a `LensCurve` of each model, for ``cka`` a `CkaMap` of each but the baseline,
        by name; ``{"not_applicable": reason}`` in place of a part that does not apply.
    """
    known: dict[str, Analysis] = {"lens": LogitLens(), "cka": Cka(baseline=baseline, positions=positions)}
    chosen = {part: known[part] for part in parts}
    found = read_text(subjects, tokens, chosen, length=length, max_tokens=max_tokens, on_progress=on_progress)
    return {part: _by_model(result, top_k) for part, result in found.items()}


def _by_model(result: Any, top_k: int) -> dict[str, Any]:
    if isinstance(result, NotApplicable):
        return result.to_dict()
    if isinstance(result, CkaFindings):
        return {found.column_model: found.to_dict(top_k) for found in result.maps}
    models: dict[str, Any] = result.to_dict()["models"]
    return models
