"""Scores short answers, as PopQA and TriviaQA do."""

import json
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation + "，。！？、；：“”‘’（）《》·")


def normalized(text: str) -> str:
    """Write an answer in lower case without articles, punctuation and repeated space, as SQuAD compares answers."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def possible(doc: Mapping[str, Any]) -> list[str]:
    """Return the right answers to a question of PopQA, which are JSON in its file."""
    answers = doc["possible_answers"]
    return list(json.loads(answers) if isinstance(answers, str) else answers)


def first_possible(doc: Mapping[str, Any]) -> str:
    """Return the answer that an example of PopQA shows."""
    return possible(doc)[0]


def holds_possible(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score an answer to a question of PopQA: whether it is right, and whether it holds a right one (its authors')."""
    right = [one for one in map(normalized, possible(doc)) if one]
    given = normalized(results[0])
    return {"exact_match": float(given in right), "answer_in_text": float(any(one in given for one in right))}


def first_alias(doc: Mapping[str, Any]) -> str:
    """Return the answer that an example shows."""
    return str(doc["answers"][0])


def is_alias(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score an answer: whether it is one of the right ones."""
    return {"exact_match": float(normalized(results[0]) in map(normalized, doc["answers"]))}
