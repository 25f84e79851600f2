"""How a model answers the questions of task files, by family: for analyses and studies, which ask again and again."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engram_lm.errors import DataError
from engram_lm.evaluation.benchmarks import run_tasks
from engram_lm.evaluation.tasks import TaskItem
from engram_lm.files import only_finite


@dataclasses.dataclass(frozen=True)
class FamilyScore:
    """How a model answered a family of questions; `engram_lm.evaluation.family_tasks` says what is measured."""

    family: str
    """Name of the family."""
    num_items: int
    """Number of questions."""
    exact_match: float
    """Share of questions whose answer greedy decoding gives."""
    answer_loss: float
    """Mean nats per token of the right answers; NaN where one is not a number."""
    accuracy: float | None
    """Share of questions with choices whose right choice has the highest log-probability; None without choices."""
    chance: float | None
    """Accuracy of guessing among the choices."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values; None stands for values that are not a number."""
        values: dict[str, Any] = only_finite(dataclasses.asdict(self))
        return values


def score_tasks(
    model: Any,
    tokenizer: Any,
    items: Sequence[TaskItem],
    *,
    batch_size: int | None = None,
    on_progress: Callable[[int, int], None] = lambda num_done, num_requests: None,
) -> Mapping[str, FamilyScore]:
    """Ask a model questions.

    Args:
        model: An `EngramForCausalLM` or any causal language model of transformers, with memory attached or without.
        tokenizer: Its tokenizer.
        items: The questions.
        batch_size: Sequences at a time; found by itself where None.
        on_progress: Called with the numbers of answers that are scored and that there are.

    Returns:
        The score of each family by its name, in the order in which they first occur.

    Raises:
        MissingExtraError: lm-evaluation-harness is not installed.
        DataError: There are no questions, or one does not fit into the model; it names the question.
    """
    if not items:
        raise DataError("there are no questions to ask")
    results = run_tasks(model, tokenizer, [tuple(items)], batch_size=batch_size, on_progress=on_progress)
    scores = {}
    for family, result in results.tasks.items():
        num_choices = [len(item.choices) for item in items if item.family == family and item.choices]
        scores[family] = FamilyScore(
            family=family,
            num_items=result.num_questions,
            exact_match=result.scores["exact_match"].value,
            answer_loss=result.scores["answer_loss"].value,
            accuracy=result.scores["acc"].value if num_choices else None,
            chance=sum(1 / number for number in num_choices) / len(num_choices) if num_choices else None,
        )
    return scores
