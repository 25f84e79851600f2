"""Task files: questions with one right answer, for any causal language model.

A task file is JSON lines, one question per line::

    {"id": "capital-1", "family": "recall", "prompt": "The capital of France is", "choices": [" Rome", " Paris"],
     "answer": 1}
    {"id": "copy-7", "family": "reading", "prompt": "Ann has 3 keys. Ann has", "answer": " 3"}

An answer follows the prompt letter for letter, so it usually begins with a space. If there are choices, the answer is
one of them, or its index from 0.
"""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path

from engram_lm.errors import DataError
from engram_lm.files import read_text, replacing

_FIELDS = ("id", "family", "prompt", "answer", "choices")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskItem:
    """One question."""

    id: str
    """Name, unique among all questions."""
    family: str
    """Group of questions over which scores are averaged."""
    prompt: str
    """Text before the answer."""
    answer: str
    """The right continuation of the prompt."""
    choices: tuple[str, ...] = ()
    """Continuations to choose from, the right one among them; empty for a question without choices."""

    def __post_init__(self) -> None:
        for name in ("id", "family", "prompt", "answer"):
            value = getattr(self, name)
            if not isinstance(value, str) or (not value and name != "prompt"):
                raise DataError(f"{name} of a task is a text that is not empty, not {value!r:.80}")
        if not self.choices:
            return
        if any(not isinstance(choice, str) or not choice for choice in self.choices):
            raise DataError(f"choices of task {self.id!r:.80} are texts that are not empty")
        if len(self.choices) < 2 or len(set(self.choices)) != len(self.choices):
            raise DataError(f"task {self.id!r:.80} has {len(self.choices)} choices; give at least 2, all different")
        if self.answer not in self.choices:
            raise DataError(
                f"the answer {self.answer!r:.80} of task {self.id!r:.80} is none of its choices; spell it as there, "
                "spaces included, or give its index from 0"
            )


def read_tasks(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> tuple[TaskItem, ...]:
    """Read task files.

    Args:
        paths: One file, or several; ids must be unique over all of them. A missing ``id`` becomes the file's name and
            the line, a missing ``family`` the file's name. Empty lines are skipped.

    Raises:
        DataError: A file cannot be read, is empty, or holds a line that is not a question (the message names it).
    """
    files = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    items: dict[str, TaskItem] = {}
    for path in map(Path, files):
        before = len(items)
        try:
            lines = read_text(path).split("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"it is not UTF-8: {error}"
            raise DataError(f"cannot read the task file {path}: {reason}") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            item = _read_item(line, place, path.stem, number)
            if item.id in items:
                raise DataError(f"{place}: there is a question {item.id!r:.80} before; give each its own id")
            items[item.id] = item
        if len(items) == before:
            raise DataError(f"{path} holds no questions; a task file has one JSON object per line")
    if not items:
        raise DataError("there is no task file to read; name at least one")
    return tuple(items.values())


def write_tasks(path: str | os.PathLike[str], items: Iterable[TaskItem]) -> None:
    """Write a task file from which `read_tasks` reads the same questions.

    Raises:
        OSError: The file cannot be written.
    """
    with replacing(path) as aside, aside.open("w", encoding="utf-8") as file:
        for item in items:
            fields = {name: getattr(item, name) for name in _FIELDS}
            if not item.choices:
                del fields["choices"]
            file.write(json.dumps(fields) + "\n")


def _read_item(line: str, place: str, name: str, number: int) -> TaskItem:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{place}: a question is a JSON object with prompt and answer, not {value!r:.80}")
    for key in value:
        if key not in _FIELDS:
            raise DataError(f"{place}: a question has no field {key!r:.80}; there are {', '.join(_FIELDS)}")
    for key in ("prompt", "answer"):
        if key not in value:
            raise DataError(f"{place}: the question has no {key}")
    choices, answer = value.get("choices", []), value["answer"]
    if not isinstance(choices, list):
        raise DataError(f"{place}: choices are a list of texts, not {choices!r:.80}")
    if type(answer) is int and choices:
        if not 0 <= answer < len(choices):
            raise DataError(f"{place}: the answer is choice {answer}, there are {len(choices)}, counted from 0")
        answer = choices[answer]
    try:
        return TaskItem(
            id=value.get("id", f"{name}-{number}"),
            family=value.get("family", name),
            prompt=value["prompt"],
            answer=answer,
            choices=tuple(choices),
        )
    except (DataError, TypeError) as error:  # TypeError: a choice that cannot be hashed
        raise DataError(f"{place}: {error}") from error
