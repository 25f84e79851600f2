"""``engram-lm study NAME``: what every study has in common, from its flags to its page."""

import dataclasses
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import tyro
from rich.console import Console
from transformers.utils import logging as transformers_logging

from engram_lm.errors import RunFolderError
from engram_lm.files import read_json, user_path, write_atomically
from engram_lm.page.figure import save_pictures
from engram_lm.studies.budget import check_budget, cost_table, estimated_seconds
from engram_lm.studies.page import print_finding, render_study, terminal_table
from engram_lm.studies.progress import StudyProgress
from engram_lm.studies.result import arm_diagnostics, study_result
from engram_lm.studies.runner import Mode, Runner
from engram_lm.studies.study import Study, TrainedArm
from engram_lm.training.interrupts import Interrupt
from engram_lm.training.run_folder import command_line, commit, hold_folder, run_facts, to_json

_MARK = "study.json"
_LONG_SECONDS = 60.0
"""Estimated time from which arms are trained in parallel processes unless another mode is asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyCommand:
    """Ask a question of several models that differ in one thing.

    A study inherits from this and says in `study` what is compared. Everything else can stay as it is here.
    """

    name: ClassVar[str] = "study"
    """What stands behind ``engram-lm study``."""
    result_format: ClassVar[str] = "engram.study.1"
    """Format of ``result.json``."""

    out: Path | None = None
    """Folder of the study; runs/NAME unless given."""
    seeds: int = 3
    """Repetitions with other first weights and another order of the text."""
    mode: Literal["auto", "interleaved", "one_by_one", "processes"] = "auto"
    """How to divide the work: all arms of a seed in turn, step by step; one arm after the other; or parallel processes
    of one thread each, which is the fastest. auto takes processes for what lasts longer than about a minute."""
    resume: bool = False
    """Continue the study in the folder. What is trained is not trained again, but for arms whose recipe is another one
    now: change an option, and only the models that it concerns are trained anew."""
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

    # What a study says about itself ----------------------------------------------------------------------------------

    def study(self) -> Study:
        """The study that these flags ask for."""
        raise NotImplementedError

    def prepare(self, out: Path) -> None:
        """Write what the arms are trained on, where that is not text that exists already."""

    def settings(self) -> dict[str, Any]:
        """What decides the study, as JSON can hold it; its result shows it."""
        shared = {field.name for field in dataclasses.fields(StudyCommand)} - {"seeds"}
        return {name: value for name, value in plain_flags(self).items() if name not in shared}

    def measure(self, seeds: Sequence[Mapping[str, TrainedArm]], runner: Runner) -> dict[str, Any]:
        """Make the result, but for the facts of the run and the settings, from the arms of each seed by name.

        The runner that trained them has the study and its text.
        """
        return study_result(runner.study, seeds)

    # What all studies do ---------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Do all of it; return the exit status: 0, or 130 after an interruption (``--resume`` continues then)."""
        if self.dry_run:
            return self._plan()
        study = self.study()
        check_budget(study)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        started, made_at = time.time(), commit()
        progress = StudyProgress()
        out, settings = self.folder, self.settings()
        with hold_folder(out, _MARK, kind="a study", work="at work") as known:
            self._take(known, settings)
            try:
                with Interrupt() as interrupt:
                    self.prepare(out)
                    runner = Runner(study, out, mode=self._mode(study), progress=progress, interrupt=interrupt)
                    outcome = runner.run()
                    if outcome.interrupted:
                        raise KeyboardInterrupt
                    found = self.measure(outcome.seeds, runner)
                    progress.note("measuring bits by kind of token")
                    diagnostics = arm_diagnostics(outcome.seeds[0], runner.text(study.arms[0].recipe))
            except KeyboardInterrupt:
                again = command_line()
                again += "" if "--resume" in shlex.split(again) else " --resume"
                progress.note(f"interrupted; continue with: {again}")
                return 130
            facts = {"format": self.result_format, **run_facts(started, made_at)}
            self._publish({**facts, "settings": settings, **found, "diagnostics": diagnostics}, study)
        return 0

    @property
    def folder(self) -> Path:
        """The folder of the study, absolute."""
        return user_path(self.out or Path("runs") / self.name).resolve()

    def _take(self, known: bool, settings: dict[str, Any]) -> None:
        """Mark the folder as this study's, unless it holds one that must not be continued."""
        if known and not self.resume:
            raise RunFolderError(
                f"{self.folder} holds a study already; continue it with --resume, or name another folder with --out"
            )
        mark = self.folder / _MARK
        earlier = read_json(mark, error=RunFolderError, advice="name another folder with --out") if known else {}
        if (name := earlier.get("study", self.name)) != self.name:
            raise RunFolderError(f"{self.folder} holds the study {name}; name another folder with --out")
        write_atomically(mark, to_json({"study": self.name, **settings}))

    def _mode(self, study: Study) -> Mode:
        if self.mode != "auto":
            return self.mode
        seconds = estimated_seconds(study)
        return "processes" if seconds is not None and seconds > _LONG_SECONDS else "one_by_one"

    def _publish(self, result: dict[str, Any], study: Study) -> None:
        """Write pictures, the page and then the result, each of them whole, and print what came out."""
        out, pictures, finding = self.folder, study.figures(result), study.finding(result)
        finding = dataclasses.replace(finding, tables=[*finding.tables, cost_table(study)])
        files = save_pictures(pictures, out)
        titled = {picture.title: path for picture, path in zip(pictures, files, strict=True)}
        write_atomically(out / "report.html", render_study(study.question, finding, titled, result))
        write_atomically(out / "result.json", to_json(result))
        if self.json:
            print(to_json(result), end="")
            return
        print_finding(finding)
        for path in (out / "result.json", out / "report.html", *files):
            Console().print(f"  {path}", highlight=False, soft_wrap=True)

    def _plan(self) -> int:
        """Print the question, the arms, and what they cost."""
        study = self.study()
        costs, seconds = check_budget(study), estimated_seconds(study)
        if self.json:
            arms = {arm.name: {"title": arm.title, **dataclasses.asdict(costs[arm.name])} for arm in study.arms}
            plan = {"study": study.name, "question": study.question, "seeds": study.seeds, "arms": arms}
            print(json.dumps({**plan, "budget": dataclasses.asdict(study.budget), "estimated_seconds": seconds}))
            return 0
        console = Console()
        console.print(f"\n{study.question}")
        console.print(terminal_table(cost_table(study)))
        words = f"{len(study.arms)} arm{'s' * (len(study.arms) > 1)}, {study.seeds} seed{'s' * (study.seeds > 1)}"
        words += "" if seconds is None else f", very roughly {max(seconds, 1) / 60:.1f} minutes on this machine"
        if study.budget.equal:
            words += f"; equal within {study.budget.tolerance:.1%}: {', '.join(study.budget.equal)}"
        console.print(words, highlight=False)
        return 0


def plain_flags(command: Any) -> dict[str, Any]:
    """The flags of a command as JSON can hold them."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(one) for one in value]
        return str(value) if isinstance(value, Path) else value

    return {field.name: plain(getattr(command, field.name)) for field in dataclasses.fields(command)}
