"""``engram-lm study NAME``: what every study has in common from its flags to its page."""

import dataclasses
import json
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import tyro
from rich.console import Console
from transformers.utils import logging as transformers_logging

from engram_lm.files import write_atomically
from engram_lm.page.figure import save_pictures
from engram_lm.studies.budget import Cost, check_budget, cost_table, estimated_seconds
from engram_lm.studies.page import Section, render_study
from engram_lm.studies.progress import StudyProgress
from engram_lm.studies.result import ARM_COLUMNS, arm_rows, result_table, study_result
from engram_lm.studies.runner import Mode, Runner
from engram_lm.studies.study import Study, TrainedArm
from engram_lm.studies.study_folder import take_folder
from engram_lm.studies.summary import headline, seeds_note
from engram_lm.training.interrupts import Interrupt
from engram_lm.training.run_folder import command_line, commit, run_facts, to_json

__all__ = ["Finding", "StudyCommand", "Trained"]

_LONG_SECONDS = 60.0
"""Estimated time from which arms are trained in parallel processes unless another mode is asked for."""
_RESULT, _PAGE = "result.json", "report.html"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """What a study has when all its arms are trained."""

    study: Study
    """The study."""
    costs: Mapping[str, Cost]
    """What each arm costs, by name."""
    seeds: Sequence[Mapping[str, TrainedArm]]
    """For each seed, its arms by name."""
    runner: Runner
    """What trained them; it gives the text."""
    progress: StudyProgress
    """What people see."""
    interrupt: Interrupt
    """Tells when to stop."""

    def stop_if_asked(self, amount: int = 0) -> None:
        """End what is measured after a signal; everything that was trained is kept.

        Raises:
            KeyboardInterrupt: A signal has come.
        """
        if self.interrupt.asked:
            raise KeyboardInterrupt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """What a page says of a result."""

    headline: str
    """What came out."""
    detail: str
    """What to know about the numbers."""
    tables: Sequence[Section]
    """Tables of numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyCommand:
    """Ask a question of several models that differ in one thing.

    A study inherits from this and says in `study` what is compared. Everything else can stay as it is here.
    """

    name: ClassVar[str] = "study"
    """What stands behind ``engram-lm study``."""
    result_format: ClassVar[str] = "engram.study.1"
    """Format of ``result.json``."""
    free: ClassVar[tuple[str, ...]] = ()
    """Flags of its own that may change when the study goes on, because no trained model depends on them."""
    decided_by: ClassVar[str] = "options"
    """Where the settings come from, for the message that says they differ."""

    out: Path | None = None
    """Folder of the study; runs/NAME unless given."""
    seeds: int = 3
    """Repetitions with other first weights and another order of the text."""
    mode: Literal["auto", "interleaved", "one_by_one", "processes"] = "auto"
    """How to divide the work: all arms of a seed in turn, step by step; one arm after the other; or parallel processes
    of one thread each, which is the fastest. auto takes processes for what lasts longer than about a minute."""
    resume: bool = False
    """Go on with the study in the folder; what is trained is not trained again."""
    dry_run: bool = False
    """Say what the study costs and check its budget, and train nothing."""
    json: bool = False
    """Print the result as JSON instead of a table."""

    @classmethod
    def from_arguments(cls, arguments: Sequence[str], prog: str) -> Self:
        """Parse a command line. Help also shows the question, the arms and what they cost by default."""
        try:
            return tyro.cli(cls, prog=prog, args=list(arguments), config=(tyro.conf.FlagCreatePairsOff,))
        except SystemExit as ended:
            if not ended.code:
                cls()._plan()
            raise

    # What a study says about itself ------------------------------------------------------------------------------

    def study(self) -> Study:
        """The study that these flags ask for."""
        raise NotImplementedError

    def prepare(self, out: Path) -> None:
        """Write what the arms are trained on, where that is not text that exists already."""

    def settings(self) -> dict[str, Any]:
        """What the trained models depend on, as JSON can hold it."""
        free = {field.name for field in dataclasses.fields(StudyCommand)} | set(self.free)
        return {name: plain_setting(value) for name, value in vars(self).items() if name not in free}

    def measure(self, trained: Trained) -> dict[str, Any]:
        """Measure what was trained: the result without the facts of the run and the settings."""
        return study_result(trained.study, trained.costs, trained.seeds)

    def tables(self, result: Mapping[str, Any]) -> Iterable[Any]:
        """What is printed of a result: renderables of ``rich``."""
        return result_table(result)

    def finding(self, result: Mapping[str, Any]) -> Finding:
        """What the page says of a result."""
        tables = [
            (about["title"].capitalize(), ARM_COLUMNS, arm_rows(result, name))
            for name, about in result["measures"].items()
        ]
        return Finding(headline=headline(result), detail=seeds_note(len(result["seeds"])), tables=tables)

    # What all studies do -----------------------------------------------------------------------------------------

    def run(self) -> int:
        """Do all of it.

        Returns:
            Exit status: 0, or 130 after an interruption (``--resume`` goes on then).

        Raises:
            ConfigError: An arm is impossible, or the arms do not share the budget.
            RunFolderError: The folder is something else's, cannot be written, or what is in it is damaged.
            MismatchError: The study was begun with other options.
            DataError: There is too little text.
        """
        if self.dry_run:
            return self._plan()
        study = self.study()
        costs = check_budget(study)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        started, made_at = time.time(), commit()
        progress = StudyProgress(Console(stderr=True))
        out = self.folder.expanduser().resolve()
        settings = self.settings()
        may_change = [name for name in self.free if name in settings]
        with take_folder(out, settings, resume=self.resume, may_change=may_change, decided_by=self.decided_by):
            found = self._train(study, costs, out, progress)
            if found is None:
                return 130
            facts = {"format": self.result_format, **run_facts(started, made_at)}
            result = {**facts, "settings": settings | self._free_settings(), **found}
            files = self._write(result, study, out)
        if self.json:
            print(to_json(result), end="")
        else:
            console = Console()
            for table in self.tables(result):
                console.print(table)
            for path in files:
                console.print(f"  {path}", highlight=False, soft_wrap=True)
        return 0

    def _train(
        self, study: Study, costs: Mapping[str, Cost], out: Path, progress: StudyProgress
    ) -> dict[str, Any] | None:
        """Train and measure the arms; None where a signal came first."""
        try:
            with Interrupt() as interrupt:
                self.prepare(out)
                runner = Runner(study, out, mode=self._mode(study, costs), progress=progress, interrupt=interrupt)
                outcome = runner.run()
                if outcome.interrupted:
                    raise KeyboardInterrupt
                return self.measure(
                    Trained(
                        study=study,
                        costs=costs,
                        seeds=outcome.seeds,
                        runner=runner,
                        progress=progress,
                        interrupt=interrupt,
                    )
                )
        except KeyboardInterrupt:
            again = command_line()
            progress.note(f"interrupted; go on with: {again}{'' if '--resume' in shlex.split(again) else ' --resume'}")
            return None

    @property
    def folder(self) -> Path:
        """The folder of the study."""
        return self.out or Path("runs") / self.name

    def _free_settings(self) -> dict[str, Any]:
        return {name: plain_setting(getattr(self, name)) for name in ("seeds", *self.free)}

    def _mode(self, study: Study, costs: Mapping[str, Cost]) -> Mode:
        if self.mode != "auto":
            return self.mode
        seconds = estimated_seconds(study, costs)
        return "processes" if seconds is not None and seconds > _LONG_SECONDS else "one_by_one"

    def _write(self, result: Mapping[str, Any], study: Study, out: Path) -> list[Path]:
        """Write pictures and page, and then the result, each of them whole."""
        pictures = study.figures(result)
        files = save_pictures(pictures, out)
        said = self.finding(result)
        page = render_study(
            question=study.question,
            headline=said.headline,
            detail=said.detail,
            tables=said.tables,
            pictures={picture.title: path for picture, path in zip(pictures, files, strict=True)},
            result=result,
        )
        write_atomically(out / _PAGE, page)
        write_atomically(out / _RESULT, to_json(result))
        return [out / _RESULT, out / _PAGE, *files]

    def _plan(self) -> int:
        """Print the question, the arms, and what they cost."""
        study = self.study()
        costs = check_budget(study)
        seconds = estimated_seconds(study, costs)
        if self.json:
            arms = {arm.name: {"title": arm.title, **dataclasses.asdict(costs[arm.name])} for arm in study.arms}
            plan = {"study": study.name, "question": study.question, "seeds": study.seeds, "arms": arms}
            print(json.dumps({**plan, "budget": dataclasses.asdict(study.budget), "estimated_seconds": seconds}))
            return 0
        console = Console()
        console.print(f"\n{study.question}")
        console.print(cost_table(study, costs))
        flops = study.seeds * sum(cost.flops for cost in costs.values())
        equal = ", ".join(study.budget.equal)
        console.print(
            f"{len(study.arms)} arms, {study.seeds} seed{'s' * (study.seeds > 1)}, {flops:.2g} operations"
            + ("" if seconds is None else f", very roughly {max(seconds, 1) / 60:.1f} minutes on this machine")
            + (f"; equal within {study.budget.tolerance:.1%}: {equal}" if equal else ""),
            highlight=False,
        )
        return 0


def plain_setting(value: Any) -> Any:
    """A flag's value as JSON can hold it."""
    if isinstance(value, tuple):
        return [plain_setting(item) for item in value]
    return str(value) if isinstance(value, Path) else value
