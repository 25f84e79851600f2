"""How well a model continues prompts with their answers, many at a time."""

# Dimension key: B texts, L tokens of the longest, A tokens of the longest answer, V vocabulary.

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engram_lm.adapt.decoder import argument_names
from engram_lm.adapt.edits.expressions import Wording
from engram_lm.adapt.evaluation_mode import evaluating
from engram_lm.adapt.patchable import PatchableMemory


@dataclasses.dataclass(frozen=True, eq=False)
class AnswerBatch:
    """Texts side by side, padded on the left, so that all answers end in the last column."""

    tokens: Tensor
    """Raw tokens, int64 ``[B, L]``, without the answer's last one, from which nothing is predicted."""
    mask: Tensor
    """1 where there is a token, 0 at padding, int64 ``[B, L]``."""
    answers: Tensor
    """Tokens of the answers, at the right, int64 ``[B, A]``."""
    counted: Tensor
    """Which of them are tokens of the answer, bool ``[B, A]``."""

    @classmethod
    def of(cls, wordings: Sequence[Wording]) -> "AnswerBatch":
        """Put wordings side by side."""
        length = max(len(one.tokens) - 1 for one in wordings)
        width = max(len(one.answer) for one in wordings)
        tokens = torch.zeros(len(wordings), length, dtype=torch.int64)  # padding is masked, so any token will do
        mask = torch.zeros_like(tokens)
        answers = torch.zeros(len(wordings), width, dtype=torch.int64)
        for place, one in enumerate(wordings):
            own = one.tokens[:-1]
            tokens[place, length - len(own) :] = torch.tensor(own)
            mask[place, length - len(own) :] = 1
            answers[place, width - len(one.answer) :] = torch.tensor(one.answer)
        places = torch.arange(width)
        counted = places >= width - torch.tensor([len(one.answer) for one in wordings])[:, None]
        return cls(tokens, mask, answers, counted)


@dataclasses.dataclass(frozen=True)
class AnswerScore:
    """How well one text is continued."""

    loss: float
    """Mean loss of the answer's tokens, nats per token."""
    probability: float
    """Probability of the whole answer."""
    lead: float
    """How far the least certain token of the answer is ahead of the likeliest other one, in nats; negative if behind.
    Above 0 the answer is the greedy continuation."""


def answer_logits(memory: PatchableMemory, batch: AnswerBatch) -> Tensor:
    """Compute the logits that answers are predicted from, float32 ``[B, A, V]``."""
    width = batch.answers.shape[1]
    device = next((p.device for p in memory.model.parameters() if not p.is_meta), torch.device("cpu"))
    known = argument_names(memory.model)
    options: dict[str, Any] = {"use_cache": False, "attention_mask": batch.mask.to(device)}
    if "position_ids" in known:
        options["position_ids"] = (batch.mask.cumsum(-1) - 1).clamp(min=0).to(device)
    if "logits_to_keep" in known:
        options["logits_to_keep"] = width
    head = memory.model.get_output_embeddings()  # type: ignore[operator]
    # The kept positions lie apart in memory, and torch then copies the head's weight once for each text of the batch.
    hook = head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]))
    try:
        logits: Tensor = memory.model(input_ids=batch.tokens.to(device), **options)[0]
    finally:
        hook.remove()
    return logits[:, -width:].float()


def lead_and_loss(logits: Tensor, batch: AnswerBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Compare logits ``[B, A, V]`` with the answers.

    Returns:
        The lead of each token of the answers, ``[B, A]``, +inf where none is counted; the log-probability of each,
        ``[B, A]``, 0 there; and the mean loss of each text, ``[B]``.
    """
    answers, counted = batch.answers.to(logits.device).unsqueeze(-1), batch.counted.to(logits.device)
    own = logits.gather(-1, answers).squeeze(-1)
    with torch.no_grad():
        others = logits.scatter(-1, answers, float("-inf")).amax(-1)
        lead = (own - others).masked_fill(~counted, float("inf"))
    log_probability = (own - logits.logsumexp(-1)).masked_fill(~counted, 0)
    return lead, log_probability, -log_probability.sum(-1) / counted.sum(-1)


@torch.no_grad()
def score_wordings(
    memory: PatchableMemory, wordings: Sequence[Wording], *, texts_at_once: int = 32
) -> list[AnswerScore]:
    """Score wordings, in their order. Texts of like length are computed together."""
    found: list[AnswerScore | None] = [None] * len(wordings)
    order = sorted(range(len(wordings)), key=lambda place: len(wordings[place].tokens))
    with evaluating(memory.model):
        for start in range(0, len(order), texts_at_once):
            places = order[start : start + texts_at_once]
            batch = AnswerBatch.of([wordings[place] for place in places])
            lead, log_probability, loss = lead_and_loss(answer_logits(memory, batch), batch)
            columns = (loss, log_probability.sum(-1).exp(), lead.amin(-1))
            for place, *values in zip(places, *(column.tolist() for column in columns), strict=True):
                found[place] = AnswerScore(*values)
    return [one for one in found if one is not None]
