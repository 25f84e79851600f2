"""A fact that a model should know, or no longer know, in several wordings; and the file that lists facts.

``old_answer`` and ``neighbors`` change nothing in a fit, and no command reads them; ``benchmarks/facts.py`` does.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

from engram_lm.errors import ConfigError, DataError, suggestion
from engram_lm.files import read_text

_MOST_FACTS = 100_000
_LONGEST_TEXT = 20_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactEdit:
    """One fact: prompts that differ in wording alone, and the answer that all of them should get.

    Raises:
        ConfigError: A field has another type, a text is empty or far too long, or the subject is missing from a prompt
            or has spaces around it.
    """

    prompt: str
    """The fact's main wording, up to its answer, such as ``"The capital of Elbonia is"``. It names the fact: no two
    facts have the same."""
    answer: str
    """What should follow, with the space before it, such as ``" Mudville"``."""
    subject: str = ""
    """What the fact is about, as it stands in the prompt and in each paraphrase, such as ``"Elbonia"``. Where it is
    empty, the fact lies in the last tokens of each wording, and other wordings will not find it."""
    paraphrases: tuple[str, ...] = ()
    """Other wordings that the answer should follow. Those that repeat the prompt or each other are dropped."""
    old_answer: str | None = None
    """What the model says now; the benchmark compares the two."""
    neighbors: tuple[str, ...] = ()
    """Prompts about other subjects, whose answers should stay as they are; the benchmark counts those that change."""
    forget: bool = False
    """Whether the answer should no longer be given, in place of being given."""

    def __post_init__(self) -> None:
        for name in ("paraphrases", "neighbors"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise ConfigError(f"{name} is a list of texts, not {value!r:.100}")
            object.__setattr__(self, name, tuple(value))
        for name in ("prompt", "answer", "subject", "old_answer", *("paraphrases", "neighbors")):
            value = getattr(self, name)
            for text in value if isinstance(value, tuple) else (value,):
                if (name, text) in (("subject", ""), ("old_answer", None), ("old_answer", "")):
                    continue
                if not isinstance(text, str) or not text.strip() or len(text) > _LONGEST_TEXT:
                    raise ConfigError(
                        f"{name} holds {text!r:.100}; expected a text that is not empty, of at most {_LONGEST_TEXT} "
                        "characters"
                    )
        if type(self.forget) is not bool:
            raise ConfigError(f"forget is true or false, not {self.forget!r:.100}")
        if self.subject != self.subject.strip():
            raise ConfigError(f"the subject {self.subject!r:.100} begins or ends with a space; leave that out")
        others = dict.fromkeys(text for text in self.paraphrases if text != self.prompt)
        object.__setattr__(self, "paraphrases", tuple(others))
        for text in self.wordings:
            if self.subject not in text:
                raise ConfigError(
                    f"the subject {self.subject!r:.100} is not in the wording {text!r:.200}; every prompt and "
                    "paraphrase names it, spelled alike"
                )

    @property
    def wordings(self) -> tuple[str, ...]:
        """The prompt and its paraphrases."""
        return (self.prompt, *self.paraphrases)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are set, as JSON values."""
        fields = dataclasses.fields(self)
        found = {field.name: getattr(self, field.name) for field in fields}
        kept = {name: value for name, value in found.items() if value not in ((), "", None, False)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Read what `to_dict` wrote, or a line of a file of facts.

        Raises:
            ConfigError: It is no object, lacks a key, has an unknown one, or a value is impossible.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, Mapping):
            raise ConfigError(f'a fact is an object such as {{"prompt": ..., "answer": ...}}, not {values!r:.100}')
        if unknown := [key for key in values if key not in names]:
            raise ConfigError(f"a fact has no {unknown[0]!r:.100}; {suggestion(str(unknown[0]), names)}")
        if missing := [name for name in ("prompt", "answer") if name not in values]:
            raise ConfigError(f"the fact lacks its {missing[0]!r}")
        return cls(**values)


def read_fact_edits(path: str | os.PathLike[str]) -> tuple[FactEdit, ...]:
    """Read a file of facts: JSON Lines, an object with the fields of `FactEdit` in each line.

    Raises:
        DataError: The file is not UTF-8, holds no fact or too many, or a line is no fact, or contradicts another.
        OSError: The file cannot be read.
    """
    facts: list[FactEdit] = []
    try:
        text = read_text(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error!s:.200}); save it as UTF-8") from error
    # splitlines() would also divide at characters that may stand inside a JSON text, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            facts.append(FactEdit.from_dict(json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: {error!s:.500}") from error
        if len(facts) > _MOST_FACTS:
            raise DataError(f"{path} holds more than {_MOST_FACTS} facts; divide it into several files")
    if not facts:
        raise DataError(f'{path} holds no facts; write one a line, such as {{"prompt": "...", "answer": " ..."}}')
    try:
        check_distinct(facts)
    except ConfigError as error:
        raise DataError(f"{path}: {error}") from error
    return tuple(facts)


def check_distinct(facts: Sequence[FactEdit]) -> None:
    """Refuse, by a `ConfigError`, two facts of one prompt."""
    seen: dict[str, str] = {}
    for fact in facts:
        if (other := seen.get(fact.prompt)) is not None:
            what = (
                "stands twice" if other == fact.answer else f"has the answers {other!r:.100} and {fact.answer!r:.100}"
            )
            raise ConfigError(f"the prompt {fact.prompt!r:.200} {what}; keep one fact for each prompt")
        seen[fact.prompt] = fact.answer
