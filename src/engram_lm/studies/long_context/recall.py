"""How often a model finds a note again, behind haystacks of several lengths."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from engram_lm.adapt.evaluation_mode import evaluating
from engram_lm.studies.long_context.notes import NoteOptions, hide, note

TASKS: Mapping[str, int] = {"single": 1, "several": 8}
"""Needles of a haystack, by task. All are asked for, one after the other; each question has its answer before the next
one is asked, as in the text that models were trained on."""


@torch.no_grad()
def recall(
    model: Any,
    tokenizer: Any,
    options: NoteOptions,
    lines: Sequence[str],
    *,
    lengths: Sequence[int],
    num_haystacks: int,
    seed: int,
    on_progress: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Ask a model for notes.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        options: The keys and values of the text that the model was trained on.
        lines: Lines of code that it was not trained on, which haystacks begin at random places of.
        lengths: Tokens of a haystack with its questions and answers, at most.
        num_haystacks: Haystacks of each task and length.
        seed: Decides haystacks and notes, which are the same for every model with this tokenizer.
        on_progress: Called after each haystack.

    Returns:
        By task and length (as text): ``correct``, the share of answers all of whose tokens are the most likely ones;
        ``error``, the standard error of it over haystacks; ``loss``, the mean loss of an answer in nats, which shows a
        tendency towards the right value before it becomes the most likely one; and ``num_questions``.
    """
    device = next(model.parameters()).device
    found: dict[str, dict[str, dict[str, float]]] = {}
    with evaluating(model):
        for task, num_needles in TASKS.items():
            found[task] = {}
            for length in lengths:
                shares, losses = [], []
                for number in range(num_haystacks):
                    chance = random.Random(f"{seed}/{task}/{length}/{number}")
                    start = chance.randrange(len(lines))
                    hidden = hide(num_needles, options, [*lines[start:], *lines[:start]], length, tokenizer, chance)
                    tokens = tokenizer("".join(f"{line}\n" for line in hidden.lines)).input_ids
                    places: list[list[int]] = []
                    for key, value in hidden.asked:
                        tokens = tokens + tokenizer(note(key)).input_ids
                        answer = tokenizer(f" {value}").input_ids
                        places.append(list(range(len(tokens), len(tokens) + len(answer))))
                        tokens = tokens + answer + tokenizer("\n").input_ids
                    asked = torch.tensor([place for answer in places for place in answer])
                    ids = torch.tensor([tokens], device=device)
                    logits = model(input_ids=ids, use_cache=False, logits_to_keep=(asked - 1).to(device)).logits[0]
                    right = dict(zip(asked.tolist(), (logits.argmax(-1) == ids[0, asked]).tolist(), strict=True))
                    losses.append(float(F.cross_entropy(logits.float(), ids[0, asked], reduction="sum")) / len(places))
                    shares.append(sum(all(right[place] for place in answer) for answer in places) / len(places))
                    on_progress()
                mean = sum(shares) / len(shares)
                variance = sum((share - mean) ** 2 for share in shares) / max(1, len(shares) - 1)
                found[task][str(length)] = {
                    "correct": mean,
                    "error": math.sqrt(variance / len(shares)),
                    "loss": sum(losses) / len(losses),
                    "num_questions": num_needles * num_haystacks,
                }
    return found
