"""All analyses of some models over one text: one pass over it for each model, and the passes that suppression needs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from engram_lm.analysis.budget import bytes_per_token
from engram_lm.analysis.cka.cka import Cka
from engram_lm.analysis.gates.averages import GateFindings, GateStatistics
from engram_lm.analysis.gates.passages import Passages, PassageTraces
from engram_lm.analysis.gates.phrases import Phrase, frequent_phrases
from engram_lm.analysis.gates.trace import GateTrace
from engram_lm.analysis.lens.lens import LogitLens
from engram_lm.analysis.reading import Analysis, NotApplicable, read_text
from engram_lm.analysis.rows.report import compression_and_heads, neighbours_of_frequent
from engram_lm.analysis.rows.usage import RowUse
from engram_lm.analysis.subject import Subject, group_by_tokenizer
from engram_lm.analysis.suppression.effect import conditions, suppression_effect
from engram_lm.errors import ConfigError, DataError
from engram_lm.evaluation.tasks import TaskItem
from engram_lm.training.data.batches import pack
from engram_lm.training.data.corpus import Document

__all__ = ["PARTS", "AnalyzeOptions", "Findings", "analyze"]

_PASSAGES = "passages"
"""Goes with the gates."""
PARTS = ("gates", "lens", "cka", "suppression", "rows")
"""What can be looked at, in the order of the report."""

_DOCUMENTS_AT_ONCE = 64
_LONGEST = 512
_ENOUGH_FOR_LENS = 16_384
"""Positions after which the lens begins to skip some; the head costs as much for each layer as for the whole model."""
_ENOUGH_FOR_CKA = 32_768
"""The same for CKA."""
_MINIBATCH = 256
"""Positions that CKA compares with each other."""
_LARGEST_POOL = 32 * _MINIBATCH


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalyzeOptions:
    """What is looked at, and how much of the text."""

    parts: tuple[str, ...] = PARTS
    """Of `PARTS`."""
    length: int | None = None
    """Tokens a model sees at once; what it was trained with where None, 512 at most."""
    max_tokens: int | None = None
    """Read only so many tokens, from the start."""
    suppression_tokens: int = 16_384
    """Tokens of the text that go through the suppressed models, once for each way of suppressing."""
    budget_bytes: int = 1 << 30
    """Bytes of what is kept at once: half for the models' hidden states and predictions (see `read_text`), a quarter
    for counts of N-grams, a quarter for counts of rows. What a forward pass itself needs comes on top."""
    batch_size: int = 16
    """Windows at a time, at most."""
    items: tuple[TaskItem, ...] = ()
    """Questions for the suppressed models, beside the loss."""

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            what = f"no {unknown[0]!r} among them" if unknown else "name at least one"
            raise ConfigError(f"the parts of an analysis are {', '.join(PARTS)}; {what}")
        for name in ("length", "max_tokens", "suppression_tokens", "budget_bytes", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is at least 1, not {value}")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Findings:
    """What was found."""

    parts: dict[str, list[dict[str, Any]]]
    """By part, an entry for each group of models that was looked at together: ``models`` (their names), and ``result``
    (plain values) or ``not_applicable`` (why there is none)."""
    texts: list[dict[str, Any]]
    """For each vocabulary: ``models``, ``num_tokens`` that were read, whether that is ``all`` of them, ``length``."""
    traces: dict[str, tuple[GateTrace, ...]]
    """By model with gates, some passages of the text."""
    phrases: dict[str, tuple[Phrase, ...]]
    """By model with gates, N-grams of the text."""


def analyze(
    subjects: Sequence[Subject],
    documents: Sequence[Document],
    options: AnalyzeOptions,
    *,
    on_stage: Callable[[str, int], None] = lambda stage, total: None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Findings:
    """Look at models in all the ways that were asked for.

    Models of one vocabulary read the text together, token by token; those of another one read it after them. A part
    that does not apply to some models is named with the reason, and the others run.

    Args:
        subjects: The models; names are unique.
        documents: The text.
        options: What to look at.
        on_stage: Called with what begins, and how much there is to do (tokens, or ways of suppressing).
        on_progress: Called with how much of it has just been done.

    Raises:
        DataError: The text has no tokens.
        ConfigError: A window does not fit into the budget, or is longer than what a model can see.
    """
    findings = Findings(parts={part: [] for part in options.parts}, texts=[], traces={}, phrases={})
    groups = group_by_tokenizer(subjects)
    for group in groups:
        tokens, whole = _tokens(documents, group[0].tokenizer, options.max_tokens)
        analyses, length = _analyses(group, tokens, options)
        names = [subject.name for subject in group]
        findings.texts.append({"models": names, "num_tokens": len(tokens), "all": whole, "length": length})
        if analyses:
            _check_budget(group, analyses, length, options)
            on_stage(f"reading with {', '.join(names)}", len(tokens))
            results = read_text(
                group,
                tokens,
                analyses,
                length=length,
                budget_bytes=_window_budget(options),
                max_batch_size=options.batch_size,
                on_progress=on_progress,
            )
            _keep(results, group, tokens, analyses, findings)
        if "suppression" in options.parts:
            for subject in group:
                _suppress(subject, tokens, length, options, findings, on_stage, on_progress)
    if "cka" in options.parts and len(groups) > 1:
        sizes = "; ".join(
            f"{', '.join(one.name for one in group)}: {len(group[0].tokenizer)} tokens, {group[0].vocabulary_digest}"
            for group in groups
        )
        reason = f"models of different vocabularies have no tokens in common to be compared at ({sizes})"
        findings.parts["cka"].append({"models": [subject.name for subject in subjects], "not_applicable": reason})
    return findings


def _keep(
    results: dict[str, Any],
    group: list[Subject],
    tokens: np.ndarray,
    analyses: dict[str, Analysis],
    findings: Findings,
) -> None:
    names = [subject.name for subject in group]
    for part, result in results.items():
        if part == _PASSAGES:
            if isinstance(result, PassageTraces):
                findings.traces.update(result.traces)
            continue
        entry: dict[str, Any] = {"models": names}
        if isinstance(result, NotApplicable):
            findings.parts[part].append({**entry, "not_applicable": result.reason})
            continue
        entry["result"] = result.to_dict()
        findings.parts[part].append(entry)
        if isinstance(result, GateFindings):
            statistics = analyses[part]
            assert isinstance(statistics, GateStatistics)
            for subject in group:
                if subject.name in result.models:
                    entries = statistics.entries(subject.name)
                    findings.phrases[subject.name] = frequent_phrases(entries, subject.tokenizer)
        elif part == "rows":
            readers = [subject for subject in group if subject.memories]
            entry["result"]["compression"] = compression_and_heads(readers[0], tokens).to_dict()
            entry["result"]["neighbours"] = {
                subject.name: [one.to_dict() for one in neighbours_of_frequent(subject, tokens)] for subject in readers
            }


def _analyses(group: list[Subject], tokens: np.ndarray, options: AnalyzeOptions) -> tuple[dict[str, Analysis], int]:
    """What looks on, and how many tokens the models shall see at once: as many as fit, unless that was said."""
    num_tokens, parts = len(tokens), options.parts
    analyses: dict[str, Analysis] = {}
    if "gates" in parts:
        counted = max(1, options.budget_bytes // 4 // max(map(_ngram_bytes, group)))
        analyses["gates"] = GateStatistics(max_ngrams=min(counted, 1 << 20))
    if "lens" in parts:
        analyses["lens"] = LogitLens(one_in=max(1, num_tokens // _ENOUGH_FOR_LENS))
    if "cka" in parts:
        position = sum((one.num_layers + 1) * one.num_streams * one.hidden_size * one.dtype.itemsize for one in group)
        pool = max(_MINIBATCH, _window_budget(options) // 4 // position)
        analyses["cka"] = Cka(
            one_in=max(1, num_tokens // _ENOUGH_FOR_CKA), minibatch_size=_MINIBATCH, pool_size=min(pool, _LARGEST_POOL)
        )
    if "rows" in parts:
        analyses["rows"] = RowUse(tokens, max_bytes=max(1, options.budget_bytes // 4))
    length = min(options.length or _window(group), num_tokens)
    if options.length is None and analyses:
        left = _window_budget(options) - sum(analysis.held_bytes(group) for analysis in analyses.values())
        length = max(1, min(length, left // max(1, bytes_per_token(group, list(analyses.values())))))
    if "gates" in parts:
        analyses[_PASSAGES] = Passages(num_tokens, length=length)
    return analyses, length


def _window_budget(options: AnalyzeOptions) -> int:
    """Bytes for what is kept of the windows: half of all; the rest is for counts of N-grams and of rows."""
    return max(1, options.budget_bytes // 2)


def _check_budget(group: list[Subject], analyses: dict[str, Analysis], length: int, options: AnalyzeOptions) -> None:
    """Say how much is enough where one window does not fit: the error of `read_text` knows of its own half only."""
    looking = list(analyses.values())
    needed = length * bytes_per_token(group, looking) + sum(analysis.held_bytes(group) for analysis in looking)
    if needed > _window_budget(options):
        # The pool of CKA grows with the budget, to a quarter of the windows' half.
        enough = -(-8 * needed // 3 // (1 << 20))
        raise ConfigError(
            f"a window of {length} token{'s' * (length > 1)} does not fit into a budget of {options.budget_bytes:,} "
            f"bytes; {enough} MiB are enough (--memory-mib {enough}), or choose a shorter window, fewer parts or fewer "
            "models"
        )


def _ngram_bytes(subject: Subject) -> int:
    """Bytes of an N-gram in `GateStatistics`, while it merges."""
    num_gates = sum(memory.config.num_streams for memory in subject.memories.values())
    return 2 * (64 + 8 * (num_gates + len(subject.memories)))


def _suppress(
    subject: Subject,
    tokens: np.ndarray,
    length: int,
    options: AnalyzeOptions,
    findings: Findings,
    on_stage: Callable[[str, int], None],
    on_progress: Callable[[int], None],
) -> None:
    found: dict[str, Any] = {"models": [subject.name]}
    if not subject.memories:
        findings.parts["suppression"].append({**found, "not_applicable": "it has no memory"})
        return
    if len(tokens) < 2:
        reason = "a loss needs a text of at least two tokens"
        findings.parts["suppression"].append({**found, "not_applicable": reason})
        return
    chosen = conditions(subject)
    on_stage(f"suppressing memory of {subject.name}", len(chosen))
    effect = suppression_effect(
        subject,
        subject.tokenizer,
        items=options.items,
        tokens=tokens[: options.suppression_tokens + 1],
        chosen=chosen,
        length=length,
        batch_size=options.batch_size,
        on_progress=lambda condition: on_progress(1),
    )
    num_tokens = min(len(tokens) - 1, options.suppression_tokens)
    findings.parts["suppression"].append({**found, "result": {**effect.to_dict(), "num_tokens": num_tokens}})


def _tokens(documents: Sequence[Document], tokenizer: Any, max_tokens: int | None) -> tuple[np.ndarray, bool]:
    """Tokenize as much of the text as is read: int32 ``[num_tokens]``, and whether it is all."""
    pieces: list[np.ndarray] = []
    done = 0
    for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        piece = pack(documents[start : start + _DOCUMENTS_AT_ONCE], tokenizer)
        pieces.append(piece)
        done += len(piece)
        if max_tokens is not None and done > max_tokens:
            break
    tokens = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
    if not len(tokens):
        raise DataError("the text has no tokens, so there is nothing to analyze; pass a text of at least one token")
    return tokens[:max_tokens], max_tokens is None or len(tokens) <= max_tokens


def _window(group: list[Subject]) -> int:
    """Find how many tokens all models were made to see at once."""
    lengths = [subject.max_length or _LONGEST for subject in group]
    lengths += [int(getattr(subject.model.config, "max_position_embeddings", None) or _LONGEST) for subject in group]
    return min(_LONGEST, *lengths)
