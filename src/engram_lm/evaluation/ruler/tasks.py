"""The thirteen tasks by name, and the samples of each."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from engram_lm.errors import ConfigError, DataError, check_whole, suggestion
from engram_lm.evaluation.ruler.essay import Essay, default_essay, read_essay
from engram_lm.evaluation.ruler.lists import common_words, frequent_words
from engram_lm.evaluation.ruler.needles import NEEDLES, variable_tracking
from engram_lm.evaluation.ruler.questions import QuestionSet, read_hotpotqa, read_squad
from engram_lm.evaluation.ruler.sample import Draft, Sample, fit, sample_chance
from engram_lm.evaluation.ruler.scoring import string_match_all, string_match_part

NAMES = (*NEEDLES, "vt", "cwe", "fwe", "qa_1", "qa_2")
"""The tasks, in the order of the publication."""
DEFAULT_LENGTH = 4096
DEFAULT_SAMPLES = 500
"""Samples of each task and length, as published."""

_ANSWER_TOKENS = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
_NEEDLE_TOKENS = 128
QUESTION_FILES = {"qa_1": "dev-v2.0.json", "qa_2": "hotpot_dev_distractor_v1.json"}
"""The published file that each task with questions needs."""
_QUESTION_READERS: dict[str, Callable[[Path], QuestionSet]] = {"qa_1": read_squad, "qa_2": read_hotpotqa}
_ESSAYS = ("essays", "essays.txt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RulerData:
    """What samples are made of that this library does not write itself.

    In the folder of a person it is ``dev-v2.0.json`` (SQuAD 2.0), ``hotpot_dev_distractor_v1.json`` (HotpotQA), and
    ``essays.txt`` or a folder ``essays`` of text files.
    """

    folder: Path | None = None
    """Folder with what a person brings; None for what can be made without."""

    def essay(self) -> Essay:
        """The prose that needles are hidden in; that of `default_essay` where there is none in the folder."""
        found = next((path for name in _ESSAYS if self.folder and (path := self.folder / name).exists()), None)
        return default_essay() if found is None else read_essay(found)

    def questions(self, task: str) -> QuestionSet:
        """The questions and documents of ``qa_1`` or ``qa_2``.

        Raises:
            DataError: They are not there, or cannot be read.
        """
        name = QUESTION_FILES[task]
        if self.folder is None or not (path := self.folder / name).is_file():
            where = "a folder named with --task-data" if self.folder is None else str(self.folder)
            raise DataError(f"ruler_{task} needs the published file {name} in {where}; it cannot be made")
        return _QUESTION_READERS[task](path)

    def essay_digest(self, task: str) -> str | None:
        """Names the prose of a task, for what is written about its samples; None where it uses none."""
        return self.essay().digest if task in NEEDLES and NEEDLES[task].haystack == "essay" else None


def answer_tokens(task: str) -> int:
    """Tokens that a model may generate for an answer of a task."""
    return _ANSWER_TOKENS.get(task, _NEEDLE_TOKENS)


def score(task: str, answer: str, references: Sequence[str]) -> float:
    """Check an answer as the task does; from 0 to 1."""
    return (string_match_part if task in QUESTION_FILES else string_match_all)(answer, references)


def make_samples(
    task: str,
    tokenizer: Any,
    *,
    length: int = DEFAULT_LENGTH,
    num_samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
    data: RulerData | None = None,
) -> Iterator[Sample]:
    """Write the samples of a task.

    A sample depends on task, seed, index, length, tokenizer and data alone: fewer samples are the first ones of more,
    on any machine. Its needles and answers do not depend on the tokenizer.

    Args:
        task: One of `NAMES`.
        tokenizer: The tokenizer of the model that will be asked.
        length: Tokens that a sample and its answer may have together. Samples fill it as far as their haystack can be
            cut: to a word, a line or a document.
        num_samples: How many.
        seed: Which ones, at least 0.
        data: Where questions and essays come from.

    Raises:
        ConfigError: There is no such task, or a sample of it does not fit into the length.
        DataError: Its data are not there.
    """
    if task not in NAMES:
        raise ConfigError(f"RULER has no task {task!r}; {suggestion(task, NAMES)}")
    check_whole(at_least=1, length=length, num_samples=num_samples)
    check_whole(at_least=0, seed=seed)
    draft = _drafting(task, length, seed, data or RulerData())
    for index in range(num_samples):
        yield fit(draft(index), tokenizer, task=task, index=index, length=length, answer_tokens=answer_tokens(task))


def _drafting(task: str, length: int, seed: int, data: RulerData) -> Callable[[int], Draft]:
    """What drafts the samples of a task by their index."""
    if task in NEEDLES:
        needles = NEEDLES[task]
        essay = data.essay()
        return lambda index: needles.draft(sample_chance(task, seed, index), essay)
    if task in QUESTION_FILES:
        questions = data.questions(task)
        return lambda index: questions.draft(sample_chance(task, seed, index), index)
    write = {"vt": variable_tracking, "cwe": common_words, "fwe": frequent_words}[task]
    return lambda index: write(sample_chance(task, seed, index), length)
