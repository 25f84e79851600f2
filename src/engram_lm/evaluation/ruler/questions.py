"""Questions about documents among many that do not answer them: ``qa_1`` (SQuAD) and ``qa_2`` (HotpotQA)."""

import dataclasses
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from engram_lm.errors import DataError
from engram_lm.evaluation.ruler.sample import Draft
from engram_lm.files import read_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A question, the answers that are right, and the documents that it needs."""

    question: str
    """The question."""
    answers: tuple[str, ...]
    """Answers, any of which is right."""
    needed: tuple[int, ...]
    """Numbers of the documents that it needs."""
    near: tuple[int, ...] = ()
    """Numbers of documents of the same article, which are the first to be put beside them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionSet:
    """Questions about a set of documents."""

    documents: tuple[str, ...]
    """The documents, all different, in order of their text."""
    questions: tuple[Question, ...]
    """The questions, in the order of their file; at least one."""

    def draft(self, chance: random.Random, index: int) -> Draft:
        """Put the documents of a question among others; after the last question comes the first again."""
        asked = self.questions[index % len(self.questions)]
        taken = {*asked.needed, *asked.near}
        others = [number for number in range(len(self.documents)) if number not in taken]
        # Nearest first, as published: what a shorter sample has, a longer one has too.
        order = [*chance.sample(asked.near, len(asked.near)), *chance.sample(others, len(others))]
        shuffling = chance.getrandbits(64)

        def write(size: int) -> str:
            chosen = [*asked.needed, *order[:size]]
            random.Random(shuffling).shuffle(chosen)
            documents = (f"Document {place}:\n{self.documents[one]}" for place, one in enumerate(chosen, start=1))
            instruction = (
                "Answer the question based on the given documents. Only give me the answer and do not output any other "
                "words."
            )
            return (
                f"{instruction}\n\nThe following are given documents.\n\n{chr(10).join(_spaced(documents))}\n\n"
                f"{instruction}\n\nQuestion: {asked.question}"
            )

        return Draft(write=write, prefix="Answer:", answers=asked.answers, most=len(order))


def _spaced(documents: Iterable[str]) -> Iterable[str]:
    for number, document in enumerate(documents):
        if number:
            yield ""
        yield document


def read_squad(path: Path) -> QuestionSet:
    """Read the file of SQuAD 2.0, ``dev-v2.0.json``; questions without an answer are left out.

    Raises:
        DataError: It cannot be read, or is not such a file.
    """

    def read(value: Any) -> list[tuple[str, list[str], list[str], list[str]]]:
        found = []
        for article in value["data"]:
            texts = [paragraph["context"] for paragraph in article["paragraphs"]]
            for paragraph in article["paragraphs"]:
                near = [text for text in texts if text != paragraph["context"]]
                for one in paragraph["qas"]:
                    if not one.get("is_impossible", False):
                        answers = [answer["text"] for answer in one["answers"]]
                        found.append((one["question"], answers, [paragraph["context"]], near))
        return found

    return _question_set(path, read, "a file of SQuAD (dev-v2.0.json)")


def read_hotpotqa(path: Path) -> QuestionSet:
    """Read the file of HotpotQA, ``hotpot_dev_distractor_v1.json``; all its ten documents belong to a question.

    Raises:
        DataError: It cannot be read, or is not such a file.
    """

    def read(value: Any) -> list[tuple[str, list[str], list[str], list[str]]]:
        return [
            (one["question"], [one["answer"]], [f"{title}\n{''.join(parts)}" for title, parts in one["context"]], [])
            for one in value
        ]

    return _question_set(path, read, "a file of HotpotQA (hotpot_dev_distractor_v1.json)")


def _question_set(path: Path, read: Any, what: str) -> QuestionSet:
    try:
        found = read(json.loads(read_text(path)))
        texts = sorted({text for _, _, needed, near in found for text in (*needed, *near)})
        numbers = {text: number for number, text in enumerate(texts)}
        questions = tuple(
            Question(
                question=str(question),
                answers=tuple(dict.fromkeys(map(str, answers))),
                needed=tuple(dict.fromkeys(numbers[text] for text in needed)),
                near=tuple(dict.fromkeys(numbers[text] for text in near)),
            )
            for question, answers, needed, near in found
            if answers
        )
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is not {what}: {type(error).__name__} {error}") from error
    if not questions:
        raise DataError(f"{path} has no question with an answer; give {what}")
    return QuestionSet(documents=tuple(texts), questions=questions)
