"""The shape of a part of ``engram-lm analyze``: what it looks at, and how it tells what it found."""

import abc
import dataclasses
import importlib
import importlib.resources
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from engram_lm.analysis.protocol import Analysis, NotApplicable
from engram_lm.analysis.registry import PARTS
from engram_lm.analysis.subject import Subject
from engram_lm.errors import ConfigError, check_whole
from engram_lm.evaluation.tasks import TaskItem
from engram_lm.page.figure import Picture

Entry = dict[str, Any]
"""What a part found about some models: ``models`` (their names), and either ``result`` (plain values) or
``not_applicable`` (the reason why there is none)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalyzeOptions:
    """The choices that all parts of an analysis share."""

    parts: tuple[str, ...] = tuple(PARTS)
    """What to look at: names of `PARTS`."""
    length: int | None = None
    """Tokens that a model sees at once, at least 1; None means what the models were trained with, at most 512."""
    max_tokens: int | None = None
    """Tokens to read, from the start of the text, at least 1; None means all of them."""
    suppression_tokens: int = 16_384
    """Tokens of the text that go through the suppressed models, once for each way of suppressing; at least 1."""
    budget_bytes: int = 1 << 30
    """Bytes that may be kept at once: half for hidden states and predictions of the models (see `read_text`), a quarter
    for counts of N-grams, and a quarter for counts of rows. What a forward pass itself needs comes on top."""
    batch_size: int = 16
    """Windows of the text that are read at once, at most; at least 1."""
    items: tuple[TaskItem, ...] = ()
    """Questions to ask the suppressed models, besides measuring their loss."""

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            what = f"{unknown[0]!r} is not one of them" if unknown else "name at least one"
            raise ConfigError(f"the parts of an analysis are {', '.join(PARTS)}; {what}")
        names = ("length", "max_tokens", "suppression_tokens", "budget_bytes", "batch_size")
        check_whole(**{name: getattr(self, name) for name in names})

    @property
    def window_bytes(self) -> int:
        """Bytes for what is kept of the windows that are read at once: half of the budget."""
        return max(1, self.budget_bytes // 2)

    @property
    def count_bytes(self) -> int:
        """Bytes for counts of N-grams, and again for counts of rows: a quarter of the budget each."""
        return max(1, self.budget_bytes // 4)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Work:
    """What a part looks at: models of one vocabulary and the text that they read together."""

    subjects: Sequence[Subject]
    """The models."""
    tokens: np.ndarray
    """The text, integers ``[num_tokens]``."""
    options: AnalyzeOptions
    """The choices that all parts share."""
    length: int
    """Tokens in a window of the text; until the analyses are made, the most that there may be."""
    on_stage: Callable[[str, int], None]
    """To be called with the name of what begins, and how many steps it has."""
    on_progress: Callable[[int], None]
    """To be called with the number of steps just done."""

    def entry(self, **values: Any) -> Entry:
        """Return an entry about all the models."""
        return {"models": [subject.name for subject in self.subjects], **values}


class Part(abc.ABC):
    """One way of looking at models, from what it measures to what stands on the page.

    The methods that tell something get ``result``, the whole analysis in the format ``engram.analysis.1``, of which
    `results` and `by_model` give what this part found. A file ``page.js`` beside the part is the script of its section.
    """

    title: ClassVar[str]
    """What people call it, in remarks and in the summary."""

    def __init__(self, name: str) -> None:
        self.name = name  # its name in the registry

    # Measuring

    def analyses(self, work: Work) -> dict[str, Analysis]:
        """Make what looks on while the models read the text; the names are unique among all parts."""
        return {}

    def conclude(self, work: Work, found: Mapping[str, Any]) -> Iterable[Entry]:
        """Return what was found about the models, given the result of each of `analyses` under its name."""
        result = found[self.name]
        if isinstance(result, NotApplicable):
            return [work.entry(not_applicable=result.reason)]
        return [work.entry(result=self.plain(work, result))]

    def plain(self, work: Work, result: Any) -> dict[str, Any]:
        """Turn the result of the analysis that has the part's own name into plain values."""
        values: dict[str, Any] = result.to_dict()
        return values

    def page_only(self, work: Work, found: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is shown on the page and not kept in the result, by model."""
        return {}

    def across(self, groups: Sequence[Sequence[Subject]]) -> Iterable[Entry]:
        """Return what there is to say about models of different vocabularies, group by group."""
        return ()

    # Telling

    def headline(self, result: Mapping[str, Any]) -> str | None:
        """Return the sentence that should be read first, if this part has one."""
        return None

    def details(self, result: Mapping[str, Any]) -> Iterable[str]:
        """Return sentences that stand below the headline."""
        return ()

    def warnings(self, result: Mapping[str, Any]) -> Iterator[str]:
        """Say of what some values are missing: here, of positions that are NaN or infinite."""
        for entry in result["parts"].get(self.name) or ():
            found = entry.get("result") or {}
            for name, one in {", ".join(entry["models"]): found, **(found.get("models") or {})}.items():
                if one.get("num_not_finite"):
                    yield (
                        f"{self.title} of {name}: {one['num_not_finite']:,} positions are left out because values "
                        "there are NaN or infinite"
                    )

    @abc.abstractmethod
    def summary(self, result: Mapping[str, Any]) -> Iterator[str]:
        """Return lines for the terminal."""

    @abc.abstractmethod
    def picture(self, result: Mapping[str, Any]) -> Picture | None:
        """Return the picture that is saved beside the page; None if there is nothing to draw."""

    @abc.abstractmethod
    def section(self, result: Mapping[str, Any], page_only: Mapping[str, Any]) -> str:
        """Return its sections of the page as HTML, empty if there is nothing to show; see `page_only`."""

    def script_data(self, result: Mapping[str, Any], page_only: Mapping[str, Any]) -> Iterable[Any]:
        """Return what the page's script reads, as plain values."""
        return ()

    def script(self) -> str:
        """Return the script of the section; empty if it has none."""
        file = importlib.resources.files(type(self).__module__.rpartition(".")[0]).joinpath("page.js")
        return file.read_text(encoding="utf-8") if file.is_file() else ""

    def drawn(self, width_inches: float, height_inches: float, draw: Callable[[Any], None]) -> Picture:
        """Return a picture under the part's name."""
        return Picture(name=self.name, title=self.title, size=(width_inches, height_inches), draw=draw)

    # Reading the result

    def results(self, result: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return what this part found, once for each group of models that it applies to."""
        return [entry["result"] for entry in result["parts"].get(self.name) or () if "result" in entry]

    def by_model(self, result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return what this part found about each model, by name."""
        return {name: found for one in self.results(result) for name, found in one["models"].items()}


def load_parts(names: Iterable[str]) -> list[Part]:
    """Make the parts of the registry that are named, in its order."""
    wanted = set(names)
    classes = {name: place.split(":") for name, place in PARTS.items() if name in wanted}
    return [getattr(importlib.import_module(module), kind)(name) for name, (module, kind) in classes.items()]
