"""Asks a causal language model questions, and scores its answers by family."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engram_lm.adapt.evaluation_mode import evaluating
from engram_lm.errors import DataError
from engram_lm.evaluation.tasks import TaskItem
from engram_lm.hashing.token_map import check_tokens
from engram_lm.tokenizing import begin, beginning_tokens, token_before

_LOGIT_BYTES = 1 << 28
"""Bytes for the logits of a batch; a batch that would need more is cut."""


@dataclasses.dataclass(frozen=True)
class ItemScore:
    """How a model answered one question."""

    id: str
    """The question's id."""
    family: str
    """The question's family."""
    chosen: int | None
    """Index of the choice with the highest log-probability; None without choices, or if one is not a number."""
    chosen_by_length: int | None
    """The same, with each log-probability divided by the choice's length in UTF-8 bytes."""
    correct: bool | None
    """Whether `chosen` is the answer; None without choices."""
    correct_by_length: bool | None
    """Whether `chosen_by_length` is the answer."""
    exact: bool
    """Whether greedy decoding from the prompt begins with the answer."""
    answer_nats: float
    """-log probability of the answer."""
    num_tokens: int
    """Tokens of the answer."""


@dataclasses.dataclass(frozen=True)
class FamilyScore:
    """How a model answered a family of questions. Every ``_error`` is the binomial standard error."""

    family: str
    """Name of the family."""
    num_items: int
    """Number of questions."""
    exact_match: float
    """Share of questions whose answer greedy decoding gives."""
    exact_match_error: float
    """Error of `exact_match`."""
    answer_loss: float
    """Mean nats per token of the right answers; NaN where none is a number."""
    num_choice_items: int
    """Number of questions with choices."""
    accuracy: float | None
    """Share of them whose right choice has the highest log-probability; None without choices."""
    accuracy_error: float | None
    """Error of `accuracy`."""
    accuracy_by_length: float | None
    """The same, with log-probabilities divided by the choices' lengths in bytes."""
    accuracy_by_length_error: float | None
    """Error of `accuracy_by_length`."""
    chance: float | None
    """Accuracy of guessing among the choices."""
    num_not_finite: int
    """Questions for which the model returned something that is not a number; they count as wrong."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values; None stands for values that are not a number."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in dataclasses.asdict(self).items()
        }


@dataclasses.dataclass(frozen=True)
class TaskScores:
    """How a model answered all questions."""

    families: Mapping[str, FamilyScore]
    """By name, in the order in which they first occur."""
    items: tuple[ItemScore, ...]
    """One score for each question, in their order."""

    def to_dict(self) -> dict[str, Any]:
        """The families as plain values."""
        return {"families": {name: family.to_dict() for name, family in self.families.items()}}


@torch.no_grad()
def score_tasks(
    model: Any,
    tokenizer: Any,
    items: Sequence[TaskItem],
    *,
    batch_size: int = 32,
    on_progress: Callable[[int], None] = lambda num_answers: None,
) -> TaskScores:
    """Ask a model questions.

    The score of a choice is its log-probability after the prompt, summed over its tokens. Prompt and choice are
    tokenized together, and the tokens that differ from those of the prompt alone are scored. They begin as the
    tokenizer begins a text (see `engram_lm.tokenizing`). Answers are padded on the right, and the batch changes
    only the rounding.

    Args:
        model: A causal language model of transformers, with or without memory attached; its training flag is put back.
        tokenizer: Its tokenizer.
        items: The questions.
        batch_size: Sequences at a time.
        on_progress: Called with the number of answers just scored.

    Raises:
        DataError: There are no questions, or one is longer than the model's context or cannot be asked (the message
            names it).
        TokenError: The model does not embed a token of a question.

    Source: choices and their normalization by length as in EleutherAI/lm-evaluation-harness (``acc``, ``acc_norm``).
    """
    if not items:
        raise DataError("there are no questions to ask; read a task file with read_tasks")
    if batch_size < 1:
        raise DataError(f"batch_size is the number of sequences computed at a time, at least 1, not {batch_size}")
    text_config = model.config.get_text_config()
    requests = _requests(tokenizer, items, getattr(text_config, "max_position_embeddings", None))
    num_rows = model.get_input_embeddings().num_embeddings
    check_tokens(np.concatenate([request.tokens for request in requests]), num_rows)
    # Choices of one token have the same input, so one pass scores all of them.
    same_input: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        same_input.setdefault(tuple(request.tokens[:-1]), []).append(index)
    answers: list[_Answer | None] = [None] * len(requests)
    # By length, so that there is little padding; the longest first, so that a lack of memory shows at once.
    inputs = sorted(same_input, key=len, reverse=True)
    with evaluating(model):
        while inputs:
            fit = max(1, _LOGIT_BYTES // (4 * len(inputs[0]) * num_rows))
            batch, inputs = inputs[: min(batch_size, fit)], inputs[min(batch_size, fit) :]
            for tokens, logits in zip(batch, _logits(model, batch), strict=True):
                for index in same_input[tokens]:
                    answers[index] = _answer(logits, requests[index])
                on_progress(len(same_input[tokens]))
    by_item: list[list[_Answer]] = [[] for _ in items]
    for request, answer in zip(requests, answers, strict=True):
        assert answer is not None
        by_item[request.item].append(answer)
    scores = tuple(_item_score(item, found) for item, found in zip(items, by_item, strict=True))
    families = {}
    for name in dict.fromkeys(item.family for item in items):
        num_choices = [len(item.choices) for item in items if item.family == name and item.choices]
        families[name] = _family_score(name, [score for score in scores if score.family == name], num_choices)
    return TaskScores(families, scores)


class _Request(NamedTuple):
    """An answer to score."""

    item: int
    """Index of its question."""
    tokens: list[int]
    """Prompt and answer."""
    start: int
    """Where the answer begins in them, at least 1."""


class _Answer(NamedTuple):
    log_probability: float
    exact: bool
    num_tokens: int


def _requests(tokenizer: Any, items: Sequence[TaskItem], context: int | None) -> list[_Request]:
    asked = [(index, item, choice) for index, item in enumerate(items) for choice in item.choices or (item.answer,)]
    beginning, before = beginning_tokens(tokenizer), token_before(tokenizer)
    prompts = tokenizer([item.prompt for _, item, _ in asked], add_special_tokens=False).input_ids
    wholes = tokenizer([item.prompt + choice for _, item, choice in asked], add_special_tokens=False).input_ids
    requests = []
    for (index, item, _), plain_prompt, plain_whole in zip(asked, prompts, wholes, strict=True):
        # A question that spells its beginning is not given a second one.
        prompt, tokens = begin(beginning, plain_prompt), begin(beginning, plain_whole)
        # The last letters of the prompt and the first of the answer may be one token.
        pairs = enumerate(zip(prompt, tokens, strict=False))
        start = next((place for place, (one, other) in pairs if one != other), min(len(prompt), len(tokens)))
        if not start:  # nothing to predict the first token from
            if before is None:
                raise DataError(
                    f"the question {item.id!r:.80} has nothing before its answer, and the tokenizer has no token that "
                    "begins a text; give it a prompt"
                )
            tokens, start = [before, *tokens], 1
        if start == len(tokens):
            raise DataError(f"an answer of the question {item.id!r:.80} has no tokens of its own")
        if context is not None and len(tokens) - 1 > context:
            raise DataError(
                f"the question {item.id!r:.80} has {len(tokens)} tokens with its answer, the model sees {context}; "
                "shorten its prompt"
            )
        requests.append(_Request(index, tokens, start))
    return requests


def _logits(model: Any, inputs: Sequence[tuple[int, ...]]) -> Tensor:
    """Run inputs, the longest first, padded on the right with any token; returns ``[len(inputs), longest, V]``."""
    device = next(model.parameters()).device
    tokens = torch.zeros(len(inputs), len(inputs[0]), dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, read in enumerate(inputs):
        tokens[row, : len(read)], mask[row, : len(read)] = torch.tensor(read), 1
    logits: Tensor = model(input_ids=tokens.to(device), attention_mask=mask.to(device), use_cache=False).logits
    return logits


def _answer(logits: Tensor, request: _Request) -> _Answer:
    targets = torch.tensor(request.tokens[request.start :], device=logits.device)
    predicted = logits[request.start - 1 : len(request.tokens) - 1].float()
    log_probabilities = predicted.log_softmax(-1).gather(1, targets[:, None])
    return _Answer(
        log_probability=float(log_probabilities.double().sum()),
        exact=bool((predicted.argmax(-1) == targets).all()),
        num_tokens=len(targets),
    )


def _item_score(item: TaskItem, answers: Sequence[_Answer]) -> ItemScore:
    right = item.choices.index(item.answer) if item.choices else 0
    chosen = by_length = None
    if item.choices and all(math.isfinite(answer.log_probability) for answer in answers):
        sums = np.array([answer.log_probability for answer in answers])
        chosen = int(sums.argmax())
        by_length = int((sums / [len(choice.encode()) for choice in item.choices]).argmax())
    answer = answers[right]
    return ItemScore(
        id=item.id,
        family=item.family,
        chosen=chosen,
        chosen_by_length=by_length,
        correct=chosen == right if item.choices else None,
        correct_by_length=by_length == right if item.choices else None,
        exact=answer.exact and math.isfinite(answer.log_probability),
        answer_nats=-answer.log_probability,
        num_tokens=answer.num_tokens,
    )


def _family_score(name: str, scores: Sequence[ItemScore], num_choices: Sequence[int]) -> FamilyScore:
    shares: dict[str, Any] = {}
    measures = {"exact_match": "exact", "accuracy": "correct", "accuracy_by_length": "correct_by_length"}
    for measure, field in measures.items():
        known = [value for score in scores if (value := getattr(score, field)) is not None]
        mean = sum(known) / len(known) if known else None
        shares[measure] = mean
        shares[f"{measure}_error"] = None if mean is None else math.sqrt(mean * (1 - mean) / len(known))
    finite = [score for score in scores if math.isfinite(score.answer_nats)]
    num_tokens = sum(score.num_tokens for score in finite)
    return FamilyScore(
        family=name,
        num_items=len(scores),
        **shares,
        answer_loss=sum(score.answer_nats for score in finite) / num_tokens if finite else math.nan,
        num_choice_items=len(num_choices),
        chance=sum(1 / number for number in num_choices) / len(num_choices) if num_choices else None,
        num_not_finite=sum(
            not math.isfinite(score.answer_nats) or (score.correct is not None and score.chosen is None)
            for score in scores
        ),
    )
