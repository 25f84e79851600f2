"""What a sample of RULER is, and how it is made to fill a length."""

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

from engram_lm.errors import ConfigError
from engram_lm.tokenizing import begin, beginning_tokens

_FIRST_STEP = 16
"""Units of haystack that are added first, to see how many tokens a unit has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
    """A sample whose haystack can still have any size."""

    write: Callable[[int], str]
    """Writes the text up to and with the question, with as many units of haystack as it is given. The units are words,
    lines or documents; a longer text has the same needles."""
    prefix: str
    """The beginning of the answer, which is given to the model."""
    answers: tuple[str, ...]
    """What the model should say."""
    least: int = 0
    """Units that the haystack has at least."""
    most: int | None = None
    """Units that there are; None where there is no end to them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One question with the text that answers it."""

    index: int
    """Its number in its task, from 0."""
    text: str
    """Instruction, haystack and question."""
    prefix: str
    """The beginning of the answer, which follows the text after a space."""
    answers: tuple[str, ...]
    """What the model should say."""
    length: int
    """Tokens that were asked for: of text, prefix and the answer's room together."""
    num_tokens: int
    """Tokens that it has, with as many for the answer as may be generated; at most ``length``."""

    @property
    def prompt(self) -> str:
        """Everything that the model is given, for a model without a chat template."""
        return f"{self.text} {self.prefix}"


def sample_chance(task: str, seed: int, index: int) -> random.Random:
    """Make the random numbers of a sample. They depend on nothing else, so a limit changes no sample."""
    return random.Random(f"{task}/{seed}/{index}")


def fit(draft: Draft, tokenizer: Any, *, task: str, index: int, length: int, answer_tokens: int) -> Sample:
    """Give a draft the most haystack with which it is not longer than it may be.

    Tokens are counted as the model reads them, with what its tokenizer puts before a text.

    Args:
        draft: The sample without its size.
        tokenizer: The model's tokenizer.
        task: Name of the task, for messages.
        index: Number of the sample.
        length: Tokens that text and answer may have together.
        answer_tokens: Tokens that may be generated for the answer.

    Raises:
        ConfigError: Even the smallest haystack is too long.
    """
    beginning = beginning_tokens(tokenizer)

    def count(units: int) -> int:
        prompt = f"{draft.write(units)} {draft.prefix}"
        tokens = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        return len(begin(beginning, tokens)) + answer_tokens

    units, tokens = draft.least, count(draft.least)
    if tokens > length:
        raise ConfigError(
            f"a sample of {task} has at least {tokens} tokens with the {answer_tokens} of its answer, and {length} "
            "were asked for; ask for longer samples"
        )
    # What a unit has on average says how many fit. That is nearly right at once, because text of one kind has nearly
    # the same number of tokens everywhere; the bounds make sure of the rest.
    first, least_tokens, step = units, tokens, _FIRST_STEP
    too_many = None if draft.most is None else draft.most + 1
    while tokens < length and step > 0 and (too_many is None or units + 1 < too_many):
        guess = units + step if too_many is None else min(units + step, too_many - 1)
        found = count(guess)
        per_unit = max((found - least_tokens) / (guess - first), 0.01)
        if found <= length:
            units, tokens = guess, found
            step = int((length - tokens) / per_unit)
        else:
            too_many = guess
            step = max(1, guess - units - math.ceil((found - length) / per_unit))
    return Sample(
        index=index,
        text=draft.write(units),
        prefix=draft.prefix,
        answers=draft.answers,
        length=length,
        num_tokens=tokens,
    )
