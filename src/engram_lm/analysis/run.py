"""All parts of an analysis over one text: one pass over it for each model, and the passes of the parts' own."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from engram_lm.analysis.part import AnalyzeOptions, Entry, Work, load_parts
from engram_lm.analysis.protocol import Analysis
from engram_lm.analysis.reading import bytes_needed, bytes_per_token, read_text
from engram_lm.analysis.subject import Subject, group_by_tokenizer
from engram_lm.errors import ConfigError, DataError
from engram_lm.training.data.documents import Document, tokenize

_LONGEST = 512
"""Tokens in a window, at most, unless its length was chosen."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Findings:
    """What was found."""

    parts: dict[str, list[Entry]]
    """For each part what it found, an entry for each group of models that it looked at together."""
    texts: list[dict[str, Any]]
    """For each vocabulary: ``models``, the ``num_tokens`` they read, whether these are ``all`` tokens of the text, and
    the ``length`` of a window."""
    page_only: dict[str, dict[str, Any]]
    """For each part what it shows on the page alone, by model."""


def analyze(
    subjects: Sequence[Subject],
    documents: Sequence[Document],
    options: AnalyzeOptions,
    *,
    on_stage: Callable[[str, int], None] = lambda stage, total: None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Findings:
    """Look at models in all the ways that were asked for.

    Models of one vocabulary read the text together, token by token, and models of the next vocabulary after them. If a
    part does not apply to some models, the reason is reported and the other parts run.

    Raises:
        DataError: The text has no tokens.
        ConfigError: A window does not fit into the budget, or is longer than what a model can see.
    """
    parts = load_parts(options.parts)
    findings = Findings(parts={part.name: [] for part in parts}, texts=[], page_only={part.name: {} for part in parts})
    groups = group_by_tokenizer(subjects)
    for group in groups:
        tokens, whole = _tokens(documents, group[0].tokenizer, options.max_tokens)
        trained = [getattr(subject.model.config, "max_position_embeddings", None) for subject in group]
        limits = [limit for limit in (*trained, *(subject.max_length for subject in group)) if limit]
        length = min(options.length or min(_LONGEST, *map(int, limits), _LONGEST), len(tokens))
        work = Work(
            subjects=group, tokens=tokens, options=options, length=length, on_stage=on_stage, on_progress=on_progress
        )
        analyses = {name: analysis for part in parts for name, analysis in part.analyses(work).items()}
        work = dataclasses.replace(work, length=_window(work, list(analyses.values())))
        findings.texts.append(work.entry(num_tokens=len(tokens), all=whole, length=work.length))
        found: dict[str, Any] = {}
        if analyses:
            on_stage(f"reading with {', '.join(subject.name for subject in group)}", len(tokens))
            found = read_text(
                group,
                tokens,
                analyses,
                length=work.length,
                budget_bytes=options.window_bytes,
                max_batch_size=options.batch_size,
                on_progress=on_progress,
            )
        for part in parts:
            findings.parts[part.name] += part.conclude(work, found)
            findings.page_only[part.name] |= part.page_only(work, found)
    for part in parts:
        findings.parts[part.name] += part.across(groups)
    return findings


def _window(work: Work, analyses: Sequence[Analysis]) -> int:
    """Find how many tokens the models see at once: as many as the budget allows, unless the length was chosen."""
    options, length = work.options, work.length
    if not analyses:
        return length
    if options.length is None:
        left = options.window_bytes - sum(analysis.held_bytes(work.subjects) for analysis in analyses)
        length = max(1, min(length, left // max(1, bytes_per_token(work.subjects, analyses))))
    needed = bytes_needed(work.subjects, analyses, length)
    if needed > options.window_bytes:
        # `read_text` would refuse this too, but it knows only of its own half of the budget. The pool of CKA grows with
        # the budget, up to a quarter of that half.
        enough = -(-8 * needed // 3 // (1 << 20))
        raise ConfigError(
            f"a window of {length} token{'s' * (length > 1)} does not fit into a budget of {options.budget_bytes:,} "
            f"bytes; {enough} MiB are enough (--memory-mib {enough}), or choose a shorter window, fewer parts or fewer "
            "models"
        )
    return length


def _tokens(documents: Sequence[Document], tokenizer: Any, max_tokens: int | None) -> tuple[np.ndarray, bool]:
    """Tokenize as much of the text as is read: int32 ``[num_tokens]``, and whether that is all of it."""
    pieces: list[np.ndarray] = []
    done = 0
    for piece in tokenize(documents, tokenizer):
        pieces.append(piece)
        done += len(piece)
        if max_tokens is not None and done > max_tokens:
            break
    tokens = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
    if not len(tokens):
        raise DataError("the text has no tokens, so there is nothing to analyze; pass a text of at least one token")
    return tokens[:max_tokens], max_tokens is None or len(tokens) <= max_tokens
