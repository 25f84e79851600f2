"""One pass over a text for all analyses and all models, window by window, in bounded memory."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_lm.adapt.evaluation_mode import evaluating
from engram_lm.analysis.protocol import WANTS, Analysis, NotApplicable, Reading
from engram_lm.analysis.recording import Recording, not_finite, recording, score_bytes_per_token
from engram_lm.analysis.subject import Subject, find_subjects
from engram_lm.errors import ConfigError, DataError, MismatchError, TokenError, check_whole
from engram_lm.tokenizing import beginning_tokens, text_tokens

# Dimension key: B windows at a time, L length.


@torch.no_grad()
def read_text(
    subjects: Sequence[Subject],
    tokens: Any,
    analyses: Mapping[str, Analysis],
    *,
    length: int,
    budget_bytes: int = 1 << 29,
    max_tokens: int | None = None,
    max_batch_size: int = 16,
    on_progress: Callable[[int], None] = lambda num_tokens: None,
) -> dict[str, Any]:
    """Run a text through models once, and let all analyses look on.

    The text is cut into windows that do not see each other; positions restart in each, and each begins with the tokens
    that the tokenizer puts before a text, if it does (see `engram_lm.tokenizing`). There is one forward pass for
    each model and batch of windows, whatever is asked for. Only statistics are kept, so the text may have any length.

    Args:
        subjects: Models of one vocabulary; see `engram_lm.analysis.subject.group_by_tokenizer`. Each is put back into
            the mode it was in.
        tokens: The text: token ids, integers ``[num_tokens]``, as an array (also a memory-mapped one) or token shards;
            or a string.
        analyses: The analyses, each under the name of its result.
        length: Tokens in a window, with those that begin it; the last window may be shorter.
        budget_bytes: Bytes that may be taken at once, by all models together, for the hidden states, logits and scores
            that the analyses want and for their own scratch. What a forward pass itself needs comes on top.
        max_tokens: Read at most this many tokens, from the start; None reads all.
        max_batch_size: Windows that are read at once, at most.
        on_progress: Called with the number of tokens that all models have just read.

    Returns:
        The result of each analysis under its name; `NotApplicable` if it does not apply.

    Raises:
        DataError: The text has no tokens.
        ConfigError: ``length`` or another number is not positive, a single window is larger than the budget or than
            what a model can see, two models have the same name, or an analysis wants something unknown.
        MismatchError: The models have different tokenizers; the message names both digests.
        TokenError: A token is outside the vocabulary, or the tokens are not integers.
    """
    check_whole(length=length, budget_bytes=budget_bytes, max_batch_size=max_batch_size)
    _check_subjects(subjects, length)
    beginning = beginning_tokens(subjects[0].tokenizer)
    check_whole(at_least=len(beginning) + 1, length=length)
    if isinstance(tokens, str):
        tokens = text_tokens(subjects[0].tokenizer, tokens)
    shape = getattr(tokens, "shape", None)
    if shape is not None and len(shape) != 1:
        raise DataError(f"a text is one row of token ids [num_tokens], got the shape {list(shape)}")
    num_tokens = len(tokens) if max_tokens is None else min(len(tokens), max_tokens)
    if num_tokens < 1 or (beginning and num_tokens == len(beginning) and _begins(tokens, beginning)):
        raise DataError("the text has no tokens, so there is nothing to analyze; pass a text of at least one token")
    results: dict[str, Any] = {}
    running: dict[str, Analysis] = {}
    for name, analysis in analyses.items():
        if unknown := sorted(analysis.wants - WANTS):
            raise ConfigError(f"the analysis {name!r} wants {unknown[0]!r}; known are {', '.join(sorted(WANTS))}")
        reason = analysis.start(subjects)
        if reason is None:
            running[name] = analysis
        else:
            results[name] = NotApplicable(reason)
    batch_size = choose_batch_size(
        subjects, list(running.values()), length=min(length, num_tokens + len(beginning)), budget_bytes=budget_bytes
    )
    with contextlib.ExitStack() as stack:
        if running:
            wants = frozenset[str]().union(*(analysis.wants for analysis in running.values()))
            asked = {"hidden": bool(wants & {"hidden", "predict"}), "order_scores": "order_scores" in wants}
            recordings = []
            for subject in subjects:
                stack.enter_context(evaluating(subject.model))
                recordings.append(stack.enter_context(recording(subject, **asked)))
            batch_size = min(batch_size, max_batch_size)
            for start, windows, places in _windows(tokens, num_tokens, length, batch_size, beginning):
                readings = [
                    _read(subject, record, windows, start, places, wants)
                    for subject, record in zip(subjects, recordings, strict=True)
                ]
                asking = [name for name, analysis in running.items() if "predict" in analysis.wants]
                if start == 0 and asking and (reason := next(filter(None, map(_wrong_prediction, readings)), None)):
                    for name in asking:
                        del running[name]
                        results[name] = NotApplicable(reason)
                for analysis in running.values():
                    analysis.update(readings)
                del readings
                for record in recordings:
                    record.clear()
                on_progress(int((places >= 0).sum()))
    results.update({name: analysis.result() for name, analysis in running.items()})
    return {name: results[name] for name in analyses}


def look(
    models: Any,
    tokenizer: Any,
    text: Any,
    analysis: Analysis,
    *,
    length: int = 512,
    max_tokens: int | None = None,
    adapter: str | None = None,
    budget_bytes: int = 1 << 29,
) -> Any:
    """Let one analysis look on while one or several models read a text, and return its result.

    Args:
        models: A model, or a mapping of names to models of one vocabulary; see `find_subjects`.
        tokenizer: The tokenizer of all of them, or a mapping of names to tokenizers.
        text: See `read_text`.
        analysis: What looks on, such as a `GateStatistics`, `LogitLens`, `Cka` or `RowUse`.
        length: Tokens that a model sees at once.
        max_tokens: Read at most this many tokens; None reads all.
        adapter: Which attached memory to look at, if there are several.
        budget_bytes: See `read_text`.

    Raises:
        MismatchError: The analysis does not apply to the models, or `read_text` or `find_subjects` refuses them.
        ConfigError: A number or a model is impossible.
        DataError: The text has no tokens.

    Example:
        >>> look({"memory": model}, tokenizer, text, GateStatistics()).models["memory"].mean  # doctest: +SKIP
    """
    subjects = find_subjects(models, tokenizer, adapter=adapter)
    found = read_text(
        subjects, text, {"it": analysis}, length=length, max_tokens=max_tokens, budget_bytes=budget_bytes
    )["it"]
    if isinstance(found, NotApplicable):
        names = ", ".join(subject.name for subject in subjects)
        raise MismatchError(f"{type(analysis).__name__} does not apply to {names}: {found.reason}")
    return found


def visible_tokens(codes: Tensor, highest_order: int) -> Tensor:
    """Count the tokens from each position back to the start of its segment, at most ``highest_order``.

    Takes and returns int64 ``[B, L]``: codes of `HashSpec.encode`, and counts, 0 at dead positions.
    """
    places = torch.arange(codes.shape[1], device=codes.device).expand_as(codes)
    blocked = (codes & 1).bool()
    # A look-back stops behind the end of a segment, and behind a dead position, whose code -1 has all bits set.
    blocked[:, 1:] |= (codes[:, :-1] & 2).bool()
    begins = torch.where(blocked, places, 0).cummax(1).values
    return (places - begins + 1).clamp(max=highest_order).masked_fill(codes < 0, 0)


def _read(
    subject: Subject, record: Recording, windows: np.ndarray, start: int, places: np.ndarray, wants: frozenset[str]
) -> Reading:
    """Run one model on some windows."""
    if windows.min() < 0 or windows.max() >= subject.vocab_size:
        raise TokenError(
            f"token ids go from {windows.min()} to {windows.max()}, {subject.name} has {subject.vocab_size}; tokenize "
            "the text with the model's own tokenizer"
        )
    tokens = torch.from_numpy(windows).to(subject.device)
    codes = None
    if subject.spec is not None:
        # An attached memory treats ids that no tokenizer produces as dead, as this does.
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        codes = subject.spec.encode_unchecked(tokens, position_ids=positions)
    options: dict[str, Any] = {"input_ids": tokens, "use_cache": False}
    wanted = bool(wants & {"logits", "predict"})
    if not wanted and subject.keeps_fewer_logits:
        options["logits_to_keep"] = 1
    logits = subject.model(**options).logits
    silent = [block for block in subject.memories if block not in record.gates]
    if silent:
        raise MismatchError(
            f"{subject.name} did not read the memory of block {silent[0]}; it was switched off or detached after the "
            "analysis began"
        )
    nothing = torch.zeros_like(tokens)
    reading = Reading(
        subject=subject,
        tokens=tokens,
        start=start,
        places=places,
        hidden=tuple(record.hidden),
        logits=logits if wanted else None,
        rows=dict(record.rows),
        gates=dict(record.gates),
        order_scores=dict(record.order_scores),
        bias_scores=dict(record.bias_scores),
        active=nothing == 0 if codes is None else codes >= 0,
        visible=nothing if codes is None or subject.spec is None else visible_tokens(codes, subject.spec.orders[-1]),
        codes=codes,
        finite=nothing == 0,
    )
    for tensor in (*reading.hidden, logits if wanted else nothing, *record.gates.values()):
        reading.finite.logical_and_(~not_finite(tensor).to(tokens.device))
    return reading


def _windows(
    tokens: Any, num_tokens: int, length: int, batch_size: int, beginning: tuple[int, ...]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield whole windows in batches, then the shorter rest alone, so without padding.

    Yields the number of tokens read before; windows, int64 ``[B, L]``, each with the beginning; and the places of their
    tokens in the text, in the same shape, -1 for a beginning that is not in it.
    """
    given, width = len(beginning), length - len(beginning)
    own = given if _begins(tokens, beginning) else 0
    whole = own + (num_tokens - own) // width * width
    starts = [*range(own, whole, batch_size * width), *([whole] if whole < num_tokens else [])]
    for start in starts:
        stop = min(start + batch_size * width, whole) if start < whole else num_tokens
        piece = np.asarray(tokens[start:stop])
        if piece.dtype.kind not in "iu" or piece.ndim != 1:
            raise TokenError(f"token ids are integers [num_tokens], got {piece.dtype} {list(piece.shape)}")
        places = np.arange(start, stop).reshape(-1, min(width, stop - start))
        before = np.full((len(places), given), -1)
        if start == own:
            before[0, :own] = np.arange(own)
        first = np.tile(np.array(beginning, dtype=np.int64), (len(places), 1))
        windows = np.concatenate([first, piece.astype(np.int64).reshape(places.shape)], axis=1)
        yield (start - own) // width * length, windows, np.concatenate([before, places], axis=1)


def _begins(tokens: Any, beginning: tuple[int, ...]) -> bool:
    return tuple(np.asarray(tokens[: len(beginning)]).tolist()) == beginning


def _wrong_prediction(reading: Reading) -> str | None:
    """Say why `Subject.predict` does not give the model's own logits; None if it does."""
    subject, logits = reading.subject, reading.logits
    if subject.head is None:
        return f"{subject.name} has no output head"
    assert logits is not None
    own = logits[0].float()
    found = subject.predict(reading.hidden[-1][0]).to(own.device).float()
    keep = reading.finite[0].to(own.device)
    if found.shape != own.shape:
        return f"the head of {subject.name} gives {list(found.shape)}, the model itself {list(own.shape)}"
    if not keep.any():
        return None
    gap = float((found - own)[keep].abs().max())
    # Half precision rounds a logit of 30 to steps of 0.125.
    allowed = (1e-4 if logits.dtype == torch.float32 else 0.03) * max(1.0, float(own[keep].abs().max()))
    if gap <= allowed:
        return None
    return (
        f"the last layer of {subject.name}, its final norm and its head give logits up to {gap:.3g} away from the "
        "model's own, so this model does something behind its layers that the analysis does not know"
    )


def _check_subjects(subjects: Sequence[Subject], length: int) -> None:
    if not subjects:
        raise ConfigError("there is no model to read the text; pass at least one")
    names = [subject.name for subject in subjects]
    if len(set(names)) < len(names):
        raise ConfigError(f"models are told apart by their names, which are {', '.join(names)}; pass name='...'")
    first = subjects[0]
    for subject in subjects:
        if subject.max_length is not None and length > subject.max_length:
            raise ConfigError(
                f"{subject.name} has learned {subject.max_length} positions and cannot see {length} tokens at once; "
                "choose a smaller length"
            )
        if subject.tokenizer is first.tokenizer:
            continue
        if first.vocabulary_digest != subject.vocabulary_digest:
            raise MismatchError(
                f"models that read a text together need one vocabulary: {first.name} has {first.vocabulary_digest}, "
                f"{subject.name} has {subject.vocabulary_digest}; analyze them one after the other"
            )


def bytes_per_token(subjects: Sequence[Subject], analyses: Sequence[Analysis]) -> int:
    """Return the bytes for each token of the windows read at once: what is kept of every model, and scratch."""
    wants = frozenset[str]().union(*(analysis.wants for analysis in analyses))
    kept, splitting = 0, 0
    for subject in subjects:
        size = subject.dtype.itemsize
        if wants & {"hidden", "predict"}:
            kept += (subject.num_layers + 1) * subject.num_streams * subject.hidden_size * size
        if wants & {"logits", "predict"}:
            kept += subject.vocab_size * size
        if "predict" in wants:
            # The check of the first windows predicts once more, one window at a time.
            splitting = max(splitting, 2 * subject.vocab_size * size)
        for memory in subject.memories.values():
            config = memory.config
            kept += 8 * config.num_heads_total + 4 * config.num_streams
            if "order_scores" in wants:
                kept += 4 * config.num_streams * (len(config.orders) + 1)
                splitting = max(splitting, score_bytes_per_token(memory))
    scratch = (analysis.scratch_bytes_per_token(subjects) for analysis in analyses)
    return kept + max(splitting, *scratch, 0)


def bytes_needed(subjects: Sequence[Subject], analyses: Sequence[Analysis], num_tokens: int) -> int:
    """Return the bytes that windows of some tokens together need, with what does not depend on their number."""
    held = sum(analysis.held_bytes(subjects) for analysis in analyses)
    return num_tokens * bytes_per_token(subjects, analyses) + held


def choose_batch_size(
    subjects: Sequence[Subject], analyses: Sequence[Analysis], *, length: int, budget_bytes: int
) -> int:
    """Find how many windows fit into a budget; raises `ConfigError` if not even one does."""
    each = max(1, bytes_per_token(subjects, analyses))
    left = budget_bytes - bytes_needed(subjects, analyses, 0)
    if left < each * length:
        shorter = f"a length of at most {left // each}, " if left >= each else ""
        raise ConfigError(
            f"one window of {length} tokens needs {each * length + budget_bytes - left:,} bytes for what the analyses "
            f"want to see, and the budget is {budget_bytes:,}; choose {shorter}a larger budget, or fewer analyses or "
            "models at a time"
        )
    return left // (each * length)
