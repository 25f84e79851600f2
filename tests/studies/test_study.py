"""The shape of a study: a few lines are enough for a new one, and the runner trains it however it is asked to."""

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from engram_lm.cli import main
from engram_lm.errors import ConfigError, RunFolderError
from engram_lm.page.number_text import count_text
from engram_lm.studies.budget import check_budget, price
from engram_lm.studies.command import StudyCommand
from engram_lm.studies.result import study_result
from engram_lm.studies.study import Arm, Budget, Measure, Study, TrainedArm
from engram_lm.studies.summary import paired_difference, paired_p_value, seeds_note
from engram_lm.tables.byte_size import byte_size
from engram_lm.training.recipe import Recipe

WORDS = ("the", "memory", "of", "a", "table", "reads", "rows", "while", "attention", "turns", "over", "long", "text")


def some_text(num_words=3000):
    chance = random.Random(0)
    return " ".join(chance.choice(WORDS) + ("." if chance.random() < 0.1 else "") for _ in range(num_words))


def tiny_recipe(text, preset, **train):
    backbone = {"num_hidden_layers": 2, "first_k_dense_replace": 2, "hidden_size": 32, "num_attention_heads": 2}
    return Recipe.from_dict(
        {
            "model": {"preset": preset, "backbone": {**backbone, "intermediate_size": 48, "num_streams": 1}}
            | ({"memory": {"layers": [1], "memory_dim": 32, "rows_per_head": 97}} if "engram" in preset else {}),
            "tokenizer": {"vocab_size": 300},
            "data": {"sources": [str(text)], "sequence_length": 32, "held_out": 0.1},
            "train": {"num_steps": 6, "batch_size": 4, "dtype": "float32", "device": "cpu", **train},
            "checkpoint": {"every": 2, "asynchronous": False},
            "log": {"details_every": 0, "peak_tflops": 1.0, "tensorboard": "no"},
        }
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whether(StudyCommand):
    """A whole new study: what its flags are, and what they compare."""

    name = "whether"
    text: str = __file__
    rate: float = 4e-3

    def study(self):
        arms = []
        for name, preset, rate in (("without", "dense-nano", 4e-3), ("with", "engram-nano", self.rate)):
            recipe = tiny_recipe(self.text, preset, max_skipped_steps=0)
            recipe = dataclasses.replace(recipe, optimizer=dataclasses.replace(recipe.optimizer, lr=rate))
            arms.append(Arm(name=name, title=f"{name} memory", recipe=recipe, x=len(arms)))
        return Study(name=self.name, question="Does memory help?", arms=tuple(arms), seeds=self.seeds)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(some_text().split(". ")))
    return path


@pytest.fixture(scope="module")
def study(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "interleaved"
    assert Whether(out=out, text=str(text), seeds=2, mode="interleaved").run() == 0
    return out


def losses(out):
    result = json.loads((out / "result.json").read_text())
    return {name: [run["measures"] for run in arm["runs"]] for name, arm in result["arms"].items()}


def test_a_few_lines_are_a_study_with_a_result_pictures_and_a_page(study):
    result = json.loads((study / "result.json").read_text())
    assert result["format"] == "engram.study.1" and result["seeds"] == [0, 1] and result["machine"]
    assert [run["num_steps"] for arm in result["arms"].values() for run in arm["runs"]] == [6] * 4
    difference = result["arms"]["with"]["summary"]["loss"]["difference"]
    found = losses(study)
    assert difference["per_seed"] == [
        a["loss"] - b["loss"] for a, b in zip(found["with"], found["without"], strict=True)
    ]
    assert found["with"][0] != found["with"][1]
    page = (study / "report.html").read_text()
    assert "Does memory help?" in page and "too few to tell" in page and "data:image/png;base64," in page
    assert len(result["diagnostics"]["models"]) == 3 and "Bits by kind of token" in page
    for name, arm in result["arms"].items():
        cost = price(Recipe.from_dict(arm["recipe"]))
        cells = (count_text(cost.total), count_text(cost.active), byte_size(cost.bytes), count_text(cost.flops))
        assert "What each arm costs" in page and all(f"<td>{cell}" in page for cell in cells), name
    assert (study / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", ["one_by_one", "processes"])
def test_every_mode_gives_the_same_numbers(study, text, tmp_path, mode):
    assert Whether(out=tmp_path, text=str(text), seeds=2, mode=mode).run() == 0
    assert losses(tmp_path) == losses(study)


def test_an_arm_can_be_trained_alone_by_the_recipe_beside_it(study, tmp_path, capsys):
    assert main(["train", str(study / "seed-1/with.toml"), "--out", str(tmp_path / "alone"), "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["held_out"]["loss"] == losses(study)["with"][1]["loss"]


def test_what_is_finished_is_not_trained_again_and_seeds_can_be_added(text, tmp_path):
    command = Whether(out=tmp_path / "first", text=str(text), seeds=1)
    assert command.run() == 0
    models = [tmp_path / place / "seed-0/with/model/model.safetensors" for place in ("first", "moved")]
    before = models[0].stat().st_mtime_ns
    assert dataclasses.replace(command, seeds=2, resume=True).run() == 0
    assert models[0].stat().st_mtime_ns == before and len(losses(tmp_path / "first")["with"]) == 2
    # Nor is it in another place.
    (tmp_path / "first").rename(tmp_path / "moved")
    assert dataclasses.replace(command, out=tmp_path / "moved", seeds=2, resume=True).run() == 0
    assert models[1].stat().st_mtime_ns == before and len(losses(tmp_path / "moved")["with"]) == 2


def test_another_recipe_of_an_arm_invalidates_that_arm_alone(study, text, tmp_path, capsys):
    command = Whether(out=tmp_path, text=str(text), seeds=2, rate=0.02)
    assert command.run() == 0
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("seed-*/without/*") if path.is_file()}
    before = losses(tmp_path)
    capsys.readouterr()
    assert dataclasses.replace(command, rate=4e-3, resume=True).run() == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "trained again: with of seed 0, with of seed 1 (optimizer.lr is 0.004, was 0.02)" in said
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert losses(tmp_path) == losses(study) != before, "as if it had been so from the beginning"
    kept = json.loads((tmp_path / "seed-1/with.earlier/result.json").read_text())
    assert kept["held_out"]["loss"] == before["with"][1]["loss"]
    with pytest.raises(RunFolderError, match="holds the study whether"):
        Twice(out=tmp_path, text=str(text), resume=True).run()


class Twice(Whether):
    """The same model under two names, and under a third one with another budget."""

    name = "twice"
    unequal = False
    left_out = ""

    def study(self):
        recipe = tiny_recipe(self.text, "engram-nano", max_skipped_steps=0)
        longer = tiny_recipe(self.text, "engram-nano", num_steps=7)
        arms = [("one", recipe), ("other", recipe)] + [("longer", longer)] * self.unequal
        return Study(
            name=self.name,
            question="Are they equal?",
            arms=tuple(Arm(name=name, title=name, recipe=recipe) for name, recipe in arms if name != self.left_out),
            budget=Budget(equal=("tokens",)),
            seeds=1,
        )


def folders(out):
    return [path.name for path in sorted((out / "seed-0").iterdir()) if path.is_dir()]


def test_an_arm_that_comes_before_one_of_the_same_recipe_takes_over_what_it_trained(text, tmp_path):
    command = Twice(out=tmp_path, text=str(text), resume=True)
    command.left_out = "one"
    assert command.run() == 0
    stamp = (tmp_path / "seed-0/other/metrics.jsonl").stat().st_mtime_ns
    assert Twice(out=tmp_path, text=str(text), resume=True).run() == 0
    assert folders(tmp_path) == ["other"] and set(losses(tmp_path)) == {"one", "other"}
    assert (tmp_path / "seed-0/other/metrics.jsonl").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("mode", ["interleaved", "one_by_one"])
def test_arms_with_one_recipe_are_trained_once_and_have_the_same_numbers(text, tmp_path, mode):
    assert Twice(out=tmp_path, text=str(text), mode=mode).run() == 0
    found = losses(tmp_path)
    assert found["one"] == found["other"]
    assert folders(tmp_path) == ["one"]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["arms"]["other"]["summary"]["loss"]["difference"]["per_seed"] == [0.0]


def test_a_study_whose_budget_cannot_be_met_writes_and_trains_nothing(text, tmp_path, monkeypatch):
    monkeypatch.setattr(Twice, "unequal", True)
    with pytest.raises(ConfigError, match="equal tokens, but longer has 896 and one 768"):
        Twice(out=tmp_path / "none", text=str(text)).run()
    assert not (tmp_path / "none").exists()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", ["interleaved", "processes"])
def test_an_arm_that_diverges_is_a_result_and_does_not_end_the_others(text, tmp_path, mode):
    command = Whether(out=tmp_path, text=str(text), seeds=1, mode=mode, rate=1e30)
    assert command.run() == 0
    result = json.loads((tmp_path / "result.json").read_text())
    (diverged,), (other,) = (result["arms"][name]["runs"] for name in ("with", "without"))
    assert "lower the learning rate" in diverged["failed"] and diverged["measures"] == {}
    assert other["failed"] is None and math.isfinite(other["measures"]["loss"])
    assert result["arms"]["with"]["summary"]["loss"]["difference"]["mean"] is None
    assert "1 diverged" in (tmp_path / "report.html").read_text()
    metrics = (tmp_path / "seed-0/with/metrics.jsonl").stat()
    assert dataclasses.replace(command, resume=True).run() == 0
    assert (tmp_path / "seed-0/with/metrics.jsonl").stat() == metrics


def wait_for_training(process, out):
    """Wait until a process has trained a first step, which takes minutes where others compute too."""
    deadline = time.monotonic() + 240
    while not any(path.stat().st_size for path in out.glob("seed-0/*/metrics.jsonl")):
        if time.monotonic() > deadline or process.poll() is not None:
            process.kill()
            pytest.fail(f"it did not begin to train (exit status {process.wait()})")
        time.sleep(0.01)


SCRIPT = """
import pathlib, sys
from tests.studies.test_study import Whether
sys.exit(Whether(out=pathlib.Path(sys.argv[1]), text=sys.argv[2], seeds=2, mode=sys.argv[3]).run())
"""


@pytest.mark.timeout(600)  # starts processes, which take their time where others compute too
@pytest.mark.parametrize(("mode", "number"), [("processes", signal.SIGINT), ("interleaved", signal.SIGKILL)])
def test_a_study_that_was_stopped_goes_on_to_the_same_numbers(study, text, tmp_path, mode, number):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            SCRIPT,
            out,
            text,
            mode,
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_training(process, out)
    process.send_signal(number)
    said = process.communicate(timeout=120)[1]
    if number == signal.SIGINT:
        assert process.returncode == 130 and "--resume" in said
    assert not (out / "result.json").exists()
    assert Whether(out=out, text=str(text), seeds=2, mode=mode, resume=True).run() == 0
    assert losses(out) == losses(study)


def killed(command, number):
    """Run a study in a process that dies when it writes, renames or removes a file for the n-th time."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == signal.SIGKILL
    seen = 0

    def watch(event, arguments):
        nonlocal seen
        writes = event == "open" and isinstance(arguments[1], str) and not set("wax+").isdisjoint(arguments[1])
        if writes or event in ("os.rename", "os.remove", "os.mkdir"):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        torch.set_num_threads(1)
        sys.addaudithook(watch)
        os._exit(command.run())
    finally:
        os._exit(1)


@pytest.mark.timeout(600)
def test_a_study_that_is_killed_again_and_again_comes_to_the_same_numbers(study, text, tmp_path):
    command = Whether(out=tmp_path, text=str(text), seeds=2, mode="interleaved", resume=True)
    chance, kills = random.Random(0), 0
    while kills < 100 and killed(command, chance.randrange(1, 160)):
        kills += 1
    assert 5 < kills < 100
    assert losses(tmp_path) == losses(study)


def test_help_and_dry_run_show_the_question_the_arms_and_what_they_cost(text, tmp_path, capsys):
    assert Whether(out=tmp_path / "none", text=str(text), dry_run=True, json=True).run() == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["question"] == "Does memory help?" and plan["seeds"] == 3 and plan["estimated_seconds"] > 0
    recipe = tiny_recipe(text, "engram-nano")
    assert plan["arms"]["with"]["tokens"] == 6 * 4 * 32 and plan["arms"]["with"]["total"] == price(recipe).total
    assert not (tmp_path / "none").exists()
    with pytest.raises(SystemExit) as ended:
        Whether.from_arguments(["--help"], "engram-lm study whether")
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(part in shown for part in ("--dry-run", "Does memory help?", "without memory", "3 seeds"))


def test_a_budget_that_the_arms_do_not_share_is_refused_before_anything_is_trained(text):
    arms = Whether(text=str(text)).study().arms
    tied = Study(name="tied", question="?", arms=arms, budget=Budget(equal=("tokens",)))
    assert list(check_budget(tied)) == ["without", "with"]
    with pytest.raises(ConfigError, match="equal total, but with has"):
        check_budget(dataclasses.replace(tied, budget=Budget(equal=("tokens", "total"))))
    control = dataclasses.replace(arms[1], is_control=True)
    check_budget(dataclasses.replace(tied, arms=(arms[0], control), budget=Budget(equal=("total",))))
    apart = dataclasses.replace(arms[1], group="larger")
    check_budget(dataclasses.replace(tied, arms=(arms[0], apart), budget=Budget(equal=("total",))))


def test_arms_are_compared_with_the_first_of_their_group(text, tmp_path):
    arms = Whether(text=str(text)).study().arms
    losses = iter((3.0, 2.0, 5.0, 4.5))
    measure = Measure(name="loss", title="loss", unit="nats", of=lambda trained: next(losses))
    both = tuple(dataclasses.replace(arm, name=arm.name + group, group=group) for group in "ab" for arm in arms)
    study = Study(name="groups", question="?", arms=both, measures=(measure,))
    (tmp_path / "metrics.jsonl").write_text("")
    seed = {arm.name: TrainedArm(arm=arm, seed=0, folder=tmp_path, result={}) for arm in both}
    found = study_result(study, [seed])["arms"]
    differences = {name: arm["summary"]["loss"].get("difference", {}).get("mean") for name, arm in found.items()}
    assert differences == {"withouta": None, "witha": -1.0, "withoutb": None, "withb": -0.5}


def test_impossible_studies_are_refused(text):
    arm = Whether(text=str(text)).study().arms[0]
    for options in ({"arms": ()}, {"arms": (arm, arm)}, {"arms": (arm,), "seeds": 0}, {"arms": (arm,), "measures": ()}):
        with pytest.raises(ConfigError):
            Study(**{"name": "none", "question": "?", **options})


@pytest.mark.parametrize("num_pairs", [2, 3, 4, 5, 8, 9])
def test_the_p_value_is_what_integrating_students_density_gives(num_pairs):
    differences = [0.3 + math.sin(3 * number) for number in range(num_pairs)]
    freedom = num_pairs - 1
    t = np.mean(differences) / (np.std(differences, ddof=1) / num_pairs**0.5)
    angles = np.linspace(-np.pi / 2, np.pi / 2, 1_000_001)  # t = sqrt(freedom) * tan(angle): no tail is cut off
    density = np.cos(angles) ** (freedom - 1)
    expected = density[np.abs(angles) > abs(np.arctan(t / freedom**0.5))].sum() / density.sum()
    assert paired_p_value(differences) == pytest.approx(expected, abs=1e-5)
    assert paired_p_value([-value for value in differences]) == pytest.approx(expected, abs=1e-5)


def test_differences_are_paired_by_seed_and_few_seeds_claim_nothing():
    found = paired_difference({0: 2.9, 1: 3.8, 2: 1.0}, {0: 3.0, 1: 4.0, 2: None})
    assert found["per_seed"] == pytest.approx([-0.1, -0.2]) and found["mean"] == pytest.approx(-0.15)
    assert found["p_value"] == paired_p_value(found["per_seed"])
    assert paired_p_value([1.0]) is None and paired_p_value([2.0, 2.0]) is None
    assert "too few" in seeds_note(2) and "too few" not in seeds_note(3)
