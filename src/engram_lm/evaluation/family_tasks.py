"""The questions of task files as tasks of lm-evaluation-harness, one for each family."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task, TaskConfig

from engram_lm.errors import DataError
from engram_lm.evaluation.tasks import TaskItem

Encode = Callable[[str, str], tuple[list[int], list[int]]]


class FamilyTask(Task):
    """The questions of one family.

    Its measures are means over the questions: ``exact_match``, whether greedy decoding from the prompt begins with the
    answer; for questions with choices ``acc``, whether the right one has the highest log-probability, and ``acc_norm``,
    the same with log-probabilities divided by the choices' lengths in UTF-8 bytes; and ``answer_loss``, the mean nats
    per token of all right answers. What a model returns that is not a number counts as wrong, and makes the loss NaN.

    Args:
        family: Its name.
        items: Its questions.
        encode: Tokenizes a prompt and an answer, such as ``HarnessModel.encode_pair``.
        max_length: Tokens that the model sees at most.

    Raises:
        DataError: A question does not fit into the model, or an answer has no tokens.
    """

    VERSION = 1
    OUTPUT_TYPE = "loglikelihood"

    def __init__(self, family: str, items: Sequence[TaskItem], encode: Encode, max_length: int) -> None:
        super().__init__()
        self._config = TaskConfig(task=family, output_type="loglikelihood", num_fewshot=0)
        self._docs = [_doc(item, encode, max_length) for item in items]

    def download(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing; the questions are here."""

    def has_training_docs(self) -> bool:
        """There are only questions."""
        return False

    def has_validation_docs(self) -> bool:
        """There are only questions."""
        return False

    def has_test_docs(self) -> bool:
        """These are the questions."""
        return True

    def test_docs(self) -> list[dict[str, Any]]:
        """Return the questions."""
        return self._docs

    def doc_to_text(self, doc: Mapping[str, Any]) -> str:
        """Return a question's prompt."""
        return str(doc["prompt"])

    def doc_to_target(self, doc: Mapping[str, Any]) -> str:
        """Return a question's right answer."""
        return str(doc["answer"])

    def fewshot_context(self, doc: Mapping[str, Any], *args: Any, **kwargs: Any) -> str:
        """Return a question's prompt, which no examples and no template of a chat are put around."""
        return self.doc_to_text(doc)

    def construct_requests(self, doc: Mapping[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        """Ask for the log-probability of each choice, or of the answer alone."""
        for name in ("apply_chat_template", "chat_template"):
            kwargs.pop(name, None)
        return [
            Instance(request_type="loglikelihood", doc=doc, arguments=(ctx, answer), idx=index, **kwargs)
            for index, answer in enumerate(doc["choices"] or [doc["answer"]])
        ]

    def process_results(self, doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
        """Score the answers to one question."""
        right = doc["choices"].index(doc["answer"]) if doc["choices"] else 0
        nats, greedy = results[right]
        measures: dict[str, Any] = {
            "exact_match": float(greedy and math.isfinite(nats)),
            "answer_loss": (-nats, doc["num_tokens"]),
        }
        if doc["choices"]:
            sums = np.array([value for value, _ in results])
            lengths = [len(choice.encode()) for choice in doc["choices"]]
            finite = bool(np.isfinite(sums).all())
            measures["acc"] = float(finite and int(sums.argmax()) == right)
            measures["acc_norm"] = float(finite and int((sums / lengths).argmax()) == right)
        return measures

    def aggregation(self) -> dict[str, Callable[[list[Any]], float]]:
        """How the scores of questions become those of the family."""
        from lm_eval.api.metrics import mean

        return {"exact_match": mean, "answer_loss": _per_token, "acc": mean, "acc_norm": mean}

    def higher_is_better(self) -> dict[str, bool]:
        """Which scores are better if they are larger."""
        return {"exact_match": True, "answer_loss": False, "acc": True, "acc_norm": True}


def family_tasks(items: Sequence[TaskItem], encode: Encode, max_length: int) -> list[FamilyTask]:
    """Make a task of each family, in the order in which they first occur.

    A family in which only some questions have choices becomes a task whose ``acc`` is over those.
    """
    families: dict[str, list[TaskItem]] = {}
    for item in items:
        families.setdefault(item.family, []).append(item)
    return [FamilyTask(name, members, encode, max_length) for name, members in families.items()]


def _doc(item: TaskItem, encode: Encode, max_length: int) -> dict[str, Any]:
    num_tokens = 0
    for answer in item.choices or (item.answer,):
        try:
            context, scored = encode(item.prompt, answer)
        except DataError as error:
            raise DataError(f"the question {item.id!r:.80}: {error}") from error
        length = len(context) + len(scored)
        if length - 1 > max_length:
            raise DataError(
                f"the question {item.id!r:.80} has {length} tokens with its answer, the model sees {max_length}; "
                "shorten its prompt"
            )
        if answer == item.answer:
            num_tokens = len(scored)
    return {
        "id": item.id,
        "prompt": item.prompt,
        "answer": item.answer,
        "choices": list(item.choices),
        "num_tokens": num_tokens,
    }


def _per_token(values: Sequence[tuple[float, int]]) -> float:
    return sum(nats for nats, _ in values) / sum(number for _, number in values)
