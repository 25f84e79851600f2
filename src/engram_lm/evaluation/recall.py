"""Recall against reading, with memory on and off: what is lost of either without the memory."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from engram_lm.evaluation.benchmarks import run_tasks
from engram_lm.evaluation.diagnostics.measure import MEMORY_OFF, MEMORY_ON
from engram_lm.evaluation.suppressing import find_memories, suppressed
from engram_lm.evaluation.tasks import TaskItem
from engram_lm.page.number_text import spread_text

MEASURES = ("acc", "exact_match", "answer_bits")
"""Share of right choices; share of answers that greedy decoding gives; bits of the right answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FamilyAnswers:
    """How a model answered a family of questions, with its memory and without."""

    num_questions: int
    """Questions of the family."""
    chance: float
    """Share of right choices if one guesses."""
    scores: dict[str, dict[str, dict[str, float | None]]]
    """By condition and measure: ``value``, its ``standard_error``, and, where memory is off, the ``difference`` to the
    value with memory and its ``difference_error``, from the differences question by question. None where an answer is
    not a number."""


def recall_and_reading(
    model: Any,
    tokenizer: Any,
    items: Sequence[TaskItem],
    *,
    batch_size: int | None = None,
    max_length: int | None = None,
    on_progress: Callable[[int, int], None] = lambda num_done, num_requests: None,
) -> dict[str, FamilyAnswers]:
    """Ask questions, twice where the model has memory: with it, and with it suppressed.

    Args:
        model: As for `run_tasks`.
        tokenizer: Its tokenizer.
        items: Questions with choices, as from `recall_questions`.
        batch_size: Sequences at a time; found by itself where None.
        max_length: Tokens that the model sees at most; what its configuration says where None.
        on_progress: Called with the numbers of requests that are done and that there are, in each of the rounds.

    Returns:
        By family.

    Raises:
        MissingExtraError: lm-evaluation-harness is not installed.
        DataError: A question does not fit into the model.
    """
    has_memory = bool(find_memories(model))
    rounds = {MEMORY_ON: False, MEMORY_OFF: True} if has_memory else {"model": False}
    answers: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for name, off in rounds.items():
        with suppressed(model) if off else contextlib.nullcontext():
            results = run_tasks(
                model,
                tokenizer,
                [tuple(items)],
                batch_size=batch_size,
                max_length=max_length,
                on_progress=on_progress,
            )
        answers[name] = {family: _measured(samples) for family, samples in results.raw["samples"].items()}
    families = {}
    for family, first in answers[next(iter(rounds))].items():
        own = [item for item in items if item.family == family]
        families[family] = FamilyAnswers(
            num_questions=len(own),
            chance=float(np.mean([1 / len(item.choices) for item in own])),
            scores={
                name: {measure: _score(found[family][measure], first[measure], name) for measure in MEASURES}
                for name, found in answers.items()
            },
        )
    return families


def _measured(samples: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Take each measure of each question, in the order of the questions."""
    ordered = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    return {
        "acc": np.array([sample["acc"] for sample in ordered], float),
        "exact_match": np.array([sample["exact_match"] for sample in ordered], float),
        "answer_bits": np.array([sample["answer_loss"][0] / math.log(2) for sample in ordered]),
    }


def _score(values: np.ndarray, first: np.ndarray, name: str) -> dict[str, float | None]:
    found = dict(zip(("value", "standard_error"), _mean(values), strict=True))
    if name == MEMORY_OFF:
        found |= dict(zip(("difference", "difference_error"), _mean(values - first), strict=True))
    return found


def _mean(values: np.ndarray) -> tuple[float | None, float | None]:
    if not np.isfinite(values).all():
        return None, None
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def print_recall(found: Mapping[str, FamilyAnswers]) -> None:
    """Print a table of the families, with standard errors."""
    shown = Table(box=box.SIMPLE_HEAD, caption_justify="left")
    conditions = list(next(iter(found.values())).scores)
    off = MEMORY_OFF in conditions
    for column in ("family", "measure", *conditions, *(["off − on"] * off)):
        shown.add_column(column, justify="left" if column in ("family", "measure") else "right")
    for family, answers in found.items():
        for measure in MEASURES:
            scores = [answers.scores[name][measure] for name in conditions]
            cells = [spread_text(score["value"], score["standard_error"]) for score in scores]
            if off:
                cells.append(spread_text(scores[-1]["difference"], scores[-1]["difference_error"], signed=True))
            shown.add_row(family if measure == MEASURES[0] else "", measure, *cells)
    shown.caption = "; ".join(
        f"{family}: {answers.num_questions:,} questions, guessing gives acc {answers.chance:.2f}"
        for family, answers in found.items()
    )
    Console().print(shown)
