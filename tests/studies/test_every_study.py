"""All studies by one command: what fits is run, what does not is said, and a killed or exhausted run goes on."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
from tests.studies.test_study import Whether, losses, wait_for_training

from engram_lm.cli import VERBS
from engram_lm.errors import ConfigError
from engram_lm.studies.every_study import EveryStudy, Step, _plan, _slowness
from engram_lm.studies.registry import STUDIES
from engram_lm.training.run_folder import to_json

HERE = "tests.studies.test_every_study"
CHILD = f"import sys; from {HERE} import run_child; sys.exit(run_child(*sys.argv[1:]))"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Impossible(Whether):
    """A study that fails."""

    def measure(self, seeds, runner):
        raise ConfigError("there is nothing to measure")


def run_child(name, *flags):
    command = {"whether": Whether, "impossible": Impossible}[name]
    try:
        return command.from_arguments(flags, name).run()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Both(EveryStudy):
    """Two tiny studies in place of the real ones."""

    registry = {"impossible": (f"{HERE}:Impossible", ""), "whether": (f"{HERE}:Whether", "")}

    def child(self, name, flags):
        return [sys.executable, "-c", CHILD, name, *flags]


@pytest.fixture(autouse=True)
def path_of_children(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


def test_the_most_valuable_seeds_that_fit_come_first_and_seeds_are_whole():
    wanted = [Step(study=name, seeds=seed, seconds=cost) for name, cost in (("a", 5), ("b", 2)) for seed in (1, 2, 3)]
    planned, left_out = _plan(wanted, 13)
    assert [(step.study, step.seeds) for step in planned] == [("a", 1), ("a", 2), ("b", 1)]
    assert [(step.study, step.seeds) for step in left_out] == [("a", 3), ("b", 2), ("b", 3)]
    assert _plan(wanted, 100) == (wanted, [])


def test_seeds_are_priced_by_what_earlier_ones_took():
    def run(study, took, status=0):
        return {"study": study, "estimated": 10.0, "took": took, "status": status}

    runs = [run("a", 30.0), run("a", 50.0), run("b", 10.0), run("b", 1.0, status=130)]
    assert _slowness("a", runs) == 4 and _slowness("b", runs) == 1 and _slowness("c", runs) == 3
    assert _slowness("a", []) == 1


@pytest.mark.timeout(600)  # starts processes, which take their time where others compute too
def test_what_the_hours_do_not_hold_is_left_out_and_a_stopped_run_goes_on(tmp_path, capfd):
    command = Both(out=tmp_path / "all", budget_hours=1 / 3600, seeds=1, studies=("whether",), json=True)
    assert command.run() == 0
    (left,) = json.loads(capfd.readouterr().out)["left_out"]
    assert left["study"] == "whether" and not (tmp_path / "all/whether/result.json").exists()

    script = f"import sys; from {HERE} import Both; from pathlib import Path; sys.exit("
    script += "Both(out=Path(sys.argv[1]), seeds=1, studies=('whether',)).run())"
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path / "all"])
    wait_for_training(process, tmp_path / "all/whether")
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 130

    capfd.readouterr()
    assert dataclasses.replace(command, budget_hours=1, studies=()).run() == 1  # one fails, and the other is run
    said = capfd.readouterr()
    summary = json.loads(said.out)
    assert "nothing to measure" in said.err and summary["failed"] == ["impossible"]
    assert [run["status"] for run in summary["runs"]][-2:] == [1, 0] and summary["left_out"] == []
    assert Whether(out=tmp_path / "alone", seeds=1).run() == 0
    assert losses(tmp_path / "all/whether") == losses(tmp_path / "alone")
    capfd.readouterr()
    assert dataclasses.replace(command, seeds=2, budget_hours=1, json=False, dry_run=True).run() == 0
    shown = capfd.readouterr().out.splitlines()
    assert [line.split().count("1") for line in shown if "whether" in line] == [2]  # a seed that was run, one planned


def test_hours_that_hold_no_seed_at_all_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="not enough for one seed"):
        Both(out=tmp_path / "none", budget_hours=1e-9).run()
    assert not (tmp_path / "none").exists()
    for options in ({"budget_hours": 0.0}, {"budget_hours": float("nan")}, {"seeds": 0}, {"studies": ("none",)}):
        with pytest.raises(ConfigError):
            EveryStudy(**options)


def test_seeds_of_a_result_count_only_where_it_has_the_same_settings(tmp_path):
    command = Both(out=tmp_path, seeds=3, studies=("whether",))
    place = tmp_path / "whether/result.json"
    place.parent.mkdir()

    def seeds_wanted(settings):
        place.write_text(to_json({"seeds": [0, 1], **settings}))
        return [step.seeds for step in command._wanted({"whether": 1.0}, tmp_path, [])]

    own = Whether(seeds=2).settings()
    assert seeds_wanted({"settings": own}) == [3]
    for other in ({"settings": {**own, "rate": 1e-3}}, {"settings": {**own, "more": 1}}, {"settings": None}, {}):
        assert seeds_wanted(other) == [1, 2, 3]


def test_one_registry_serves_the_command_line_and_all():
    studies, _ = VERBS["study"]
    assert studies.keys() == STUDIES.keys() | {"all"} and EveryStudy.registry is STUDIES
    costs = EveryStudy()._costs()
    assert list(costs) == list(STUDIES) and all(seconds > 0 for seconds in costs.values())
