"""``engram-lm study layers``: is there a better layer than the paper's, at equal bytes?"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from engram_lm.errors import ConfigError, RunFolderError
from engram_lm.files import read_json, user_path
from engram_lm.studies.candidate_report import candidate_finding
from engram_lm.studies.candidates import Candidate, CandidateStudy
from engram_lm.studies.layers.arms import CANDIDATES, CONTROL
from engram_lm.studies.layers.verdict import best_three, verdict, verdict_table, verdict_words
from engram_lm.studies.page import Finding
from engram_lm.studies.runner import Runner
from engram_lm.studies.study import Arm, Study, TrainedArm, with_seed
from engram_lm.training.recipe import Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayersStudy(CandidateStudy):
    """Look for a better layer than the paper's: many candidates at equal bytes, then the best three again.

    All candidates are screened with few tokens and seeds that no result uses, such as --first-seed 100 --seeds 2. The
    three of the lowest losses are trained again with other seeds and more tokens, beside the paper's layer and bigrams
    alone: --arms bigrams NAME NAME NAME --seeds 5. That is repeated with four times the tokens and at a second size,
    each in a folder of its own, and --beside names the folders of the earlier ones. A candidate wins if it is three
    standard errors better than the paper's layer and than bigrams alone in all of them.

    Examples::

        engram-lm study layers --dry-run
        engram-lm study layers --data corpus/ --first-seed 100 --seeds 2 --out runs/screening
        engram-lm study layers --data corpus/ --arms bigrams rows_3_1 back_off sink --seeds 5 --tokens 15000000
    """

    name: ClassVar[str] = "layers"
    candidates: ClassVar[Sequence[Candidate]] = CANDIDATES
    question: ClassVar[str] = "Is there a better layer than the paper's, at equal bytes?"

    first_seed: int = 0
    """The seed of the first repetition; the others follow it."""
    beside: tuple[Path, ...] = ()
    """Folders of this study at other sizes or with other numbers of tokens, in which a winner must win as well."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first_seed < 0:
            raise ConfigError(f"--first-seed must be at least 0, not {self.first_seed}")

    @property
    def _setting(self) -> dict[str, Any]:
        return {"size": self.size, "tokens": self.tokens, "first_seed": self.first_seed}

    def _others(self) -> list[Mapping[str, Any]]:
        """The results of the folders beside this one."""
        found: list[Mapping[str, Any]] = []
        settings: list[Any] = [self._setting]
        for path in self.beside:
            place = user_path(path) / "result.json"
            result = read_json(place, error=RunFolderError, advice="name the folder of a finished study with --beside")
            if result.get("study") != self.name:
                raise RunFolderError(f"{place} holds no result of the study {self.name}")
            if result.get("setting") in settings:
                raise ConfigError(f"{place} has the size, tokens and first seed of another result; leave one out")
            settings.append(result.get("setting"))
            found.append(result)
        return found

    def study(self) -> Study:
        """The paper's layer, bigrams alone and the chosen candidates."""
        if self.tune:
            return super().study()
        self._others()  # refused now, and not when everything is trained
        first = self.first_seed

        def recipe_of(arm: Arm, seed: int) -> Recipe:
            return with_seed(arm, first + seed)

        return dataclasses.replace(super().study(), recipe_of=recipe_of, finding=layers_finding)

    def measure(self, seeds: Sequence[Mapping[str, TrainedArm]], runner: Runner) -> dict[str, Any]:
        """Compare every candidate with the paper's layer and with bigrams alone, here and beside."""
        result = super().measure(seeds, runner)
        if self.tune:
            return result
        result["setting"] = self._setting
        return {**result, "verdict": verdict([result, *self._others()])}


def layers_finding(result: Mapping[str, Any]) -> Finding:
    """Say the verdict, and rank all candidates."""
    found, ranking = result["verdict"], candidate_finding(result)
    detail = ranking.detail
    if not found["enough"]:
        detail += (
            f" The best three, to be tried again on other seeds: --arms {' '.join([CONTROL, *best_three(result)])}."
        )
    return Finding(headline=verdict_words(found), detail=detail, tables=[verdict_table(found), *ranking.tables])
