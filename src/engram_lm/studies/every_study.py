"""``engram-lm study all``: as many whole seeds of the studies, the most valuable first, as fit a budget of hours."""

import contextlib
import dataclasses
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from rich import box
from rich.console import Console
from rich.table import Table

from engram_lm.errors import ConfigError, RunFolderError, check_flags
from engram_lm.files import read_json, user_path, write_atomically
from engram_lm.studies.budget import check_budget, estimated_seconds
from engram_lm.studies.registry import STUDIES, command_class
from engram_lm.training.interrupts import Interrupt
from engram_lm.training.run_folder import commit, hold_folder, run_facts, to_json

_MARK = "studies.json"
_POLL_SECONDS = 0.2
_HOUR = 3600.0
_NO_FAILURE = (0, 130, -signal.SIGINT)
"""How a study ends that was finished or stopped; the last is one that had not begun to train."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One more seed of a study."""

    study: str
    """Which study."""
    seeds: int
    """Seeds that it has afterwards."""
    seconds: float
    """What it takes, as estimated before."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EveryStudy:
    """Run the studies that fit a number of hours, and say which were left out and what they would cost.

    Studies come in the order of their value, and each gets whole seeds, up to --seeds, as long as the next one fits.
    How long a seed takes is estimated from its operations at first, and then from the seeds that were run here. Every
    study keeps its result, page and models in its own folder below --out; what is trained is not trained again, so
    the same command with more hours, or after any interruption, goes on where the last one ended. Seeds of a result
    that was made with other settings, such as another text, do not count.

    Examples::

        engram-lm study all --budget-hours 6
        engram-lm study all --budget-hours 2 --data corpus/ --dry-run
    """

    budget_hours: float = 6.0
    """Hours that all of it may take."""
    out: Path = Path("runs/studies")
    """Folder of all studies; each has a folder of its name in it."""
    seeds: int = 3
    """Seeds of each study at most; a difference cannot be told from chance with fewer than 3."""
    studies: tuple[str, ...] = ()
    """Studies to choose from, in this order; all of them, the most valuable first, unless given."""
    data: tuple[Path, ...] = ()
    """Text files or folders for those studies that train on any text, instead of the Python standard library."""
    dry_run: bool = False
    """Say what would be run and what would be left out, and run nothing."""
    json: bool = False
    """Print the summary as JSON instead of a table."""

    registry: ClassVar[Mapping[str, tuple[str, str]]] = STUDIES

    def __post_init__(self) -> None:
        check_flags(self, "seeds")
        if not 0 < self.budget_hours < math.inf:
            raise ConfigError(f"--budget-hours must be a finite number above 0, not {self.budget_hours}")
        for name in self.studies:
            if name not in self.registry:
                raise ConfigError(f"there is no study {name!r}; choose from {', '.join(self.registry)}")

    def run(self) -> int:
        """Do all of it; return the exit status: 0, 1 where a study failed, or 130 after an interruption."""
        costs, out = self._costs(), user_path(self.out).resolve()
        runs = _earlier_runs(out)
        planned, left_out = _plan(self._wanted(costs, out, runs), self._budget)
        if self.dry_run:
            self._show((planned, left_out), runs)
            return 0
        if left_out and not planned:
            least = min(left_out, key=lambda step: step.seconds)
            raise ConfigError(
                f"--budget-hours {self.budget_hours:g} is not enough for one seed of any study: the shortest, "
                f"{least.study}, takes about {least.seconds / _HOUR:.2g} hours"
            )
        started, made_at, status = time.time(), commit(), 0
        with hold_folder(out, _MARK, kind="a folder of studies", work="at work"):
            write_atomically(out / _MARK, to_json({"runs": runs}))
            failed: set[str] = set()
            with Interrupt() as interrupt:
                while planned and not interrupt.asked:
                    step = planned[0]
                    _say(f"{step.study}: seed {step.seeds} of {self.seeds}, about {step.seconds / _HOUR:.2f} hours")
                    ended, seconds = self._run(step, out, started + self._budget, interrupt)
                    runs.append(
                        {**dataclasses.asdict(step), "estimated": costs[step.study], "took": seconds, "status": ended}
                    )
                    if ended not in _NO_FAILURE:
                        failed.add(step.study)
                    write_atomically(out / _MARK, to_json({"runs": runs}))
                    left = self._budget - (time.time() - started)
                    wanted = [one for one in self._wanted(costs, out, runs) if one.study not in failed]
                    planned, left_out = _plan(wanted, left)
            status = 130 if interrupt.asked else 1 if failed else 0
            summary = {"runs": runs, "failed": sorted(failed), **run_facts(started, made_at)}
            summary["left_out"] = [dataclasses.asdict(step) for step in (*planned, *left_out)]
            write_atomically(out / _MARK, to_json(summary))
        self._show(([], [*planned, *left_out]), runs, summary)
        return status

    @property
    def _budget(self) -> float:
        return self.budget_hours * _HOUR

    def child(self, name: str, flags: Sequence[str]) -> list[str]:
        """The command that runs a study in a process of its own, which leaves its memory behind."""
        return [sys.executable, "-m", "engram_lm", "study", name, *flags]

    def _flags(self, name: str, command: type[Any], folder: Path, seeds: int) -> dict[str, Any]:
        known = {field.name for field in dataclasses.fields(command)}
        data = {"data": self.data} if self.data and "data" in known else {}
        return {"out": folder / name, "seeds": seeds, **data}

    def _costs(self) -> dict[str, float]:
        """Estimate the seconds of one seed of each study; all budgets are checked before anything is trained."""
        found = {}
        for name in self.studies or self.registry:
            command = command_class(self.registry[name][0])
            study = command(**self._flags(name, command, user_path(self.out), 1)).study()
            check_budget(study)
            seconds = estimated_seconds(study)
            if seconds is None:
                raise ConfigError(f"how long the study {name} takes can only be estimated for a CPU")
            found[name] = seconds
        return found

    def _wanted(self, costs: Mapping[str, float], out: Path, runs: Sequence[Mapping[str, Any]]) -> list[Step]:
        """All seeds that are not there yet, study by study, priced by what earlier ones took."""
        steps = []
        for name, seconds in costs.items():
            command = command_class(self.registry[name][0])
            done = _seeds_done(out / name, command(**self._flags(name, command, out, 1)).settings())
            seconds *= _slowness(name, runs)
            steps += [Step(study=name, seeds=seed + 1, seconds=seconds) for seed in range(done, self.seeds)]
        return steps

    def _run(self, step: Step, out: Path, deadline: float, interrupt: Interrupt) -> tuple[int, float]:
        """Run one seed; at the deadline, or when this process is asked to stop, it saves and ends."""
        command = command_class(self.registry[step.study][0])
        flags = self._flags(step.study, command, out, step.seeds)
        words = ["--resume", "--out", str(flags["out"]), "--seeds", str(step.seeds)]
        words += ["--data", *map(str, self.data)] if "data" in flags else []
        begun = time.monotonic()
        # A signal to the terminal reaches only this process, which passes it on. What a study prints goes to stderr, 2.
        process = subprocess.Popen(self.child(step.study, words), stdout=2, start_new_session=True)
        asked = False
        try:
            while process.poll() is None:
                if not asked and (interrupt.asked or time.time() > deadline):
                    asked = True
                    process.send_signal(signal.SIGINT)
                time.sleep(_POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        return process.returncode, time.monotonic() - begun

    def _show(
        self,
        plan: tuple[Sequence[Step], Sequence[Step]],
        runs: Sequence[Mapping[str, Any]],
        summary: Mapping[str, Any] | None = None,
    ) -> None:
        """Print what was run, what would be, and what is left out."""
        planned, left_out = plan
        if self.json:
            steps = {"planned": planned, "left_out": left_out}
            print(to_json(summary or {name: [dataclasses.asdict(one) for one in part] for name, part in steps.items()}))
            return
        table = Table("Study", box=box.SIMPLE_HEAD)
        for title in ("Seeds run", "Seeds planned", "Seeds left out"):
            table.add_column(title, justify="right")
        done = [Step(study=run["study"], seeds=0, seconds=run["took"]) for run in runs if run["status"] == 0]
        for name in self.studies or self.registry:
            table.add_row(name, *(_amount(name, part) for part in (done, planned, left_out)))
        Console().print(table)
        if left_out:
            hours = sum(step.seconds for step in left_out) / _HOUR
            print(f"What was left out takes about {hours:.1f} hours more; the same command goes on with it.")


def _plan(wanted: Sequence[Step], seconds: float) -> tuple[list[Step], list[Step]]:
    """Divide what is wanted into what fits and what does not; of a study, later seeds wait for earlier ones."""
    planned, left_out, over = list[Step](), list[Step](), set[str]()
    for step in wanted:
        if step.study in over or step.seconds > seconds:
            over.add(step.study)
            left_out.append(step)
        else:
            planned.append(step)
            seconds -= step.seconds
    return planned, left_out


def _amount(name: str, steps: Sequence[Step]) -> str:
    """How many steps are of a study, and how long they take."""
    seconds = [step.seconds for step in steps if step.study == name]
    return f"{len(seconds)} in {sum(seconds) / _HOUR:.2f} h" if seconds else ""


def _slowness(name: str, runs: Sequence[Mapping[str, Any]]) -> float:
    """How much longer seeds took than was estimated: of this study, or else of all, or else as long."""
    whole = [run for run in runs if run["status"] == 0]
    for some in ([run for run in whole if run["study"] == name], whole):
        if estimated := sum(run["estimated"] for run in some):
            return float(sum(run["took"] for run in some) / estimated)
    return 1.0


def _earlier_runs(out: Path) -> list[dict[str, Any]]:
    """The seeds that were run in a folder of studies before, with the time they took."""
    if not (out / _MARK).is_file():
        return []
    return list(read_json(out / _MARK, error=RunFolderError, advice="name another folder with --out")["runs"])


def _seeds_done(folder: Path, settings: Mapping[str, Any]) -> int:
    """Seeds of a study's result, if its settings but for their number are these; 0 where none can be read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        # As a file gives them back, which knows no difference between a list and a tuple.
        wanted = json.loads(to_json(settings))
        return len(result["seeds"]) if {**result["settings"], "seeds": 0} == {**wanted, "seeds": 0} else 0
    return 0


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
