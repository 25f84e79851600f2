"""`engram-lm adapt` from end to end on a small model: what it compares, what it leaves behind, how it goes on."""

import json
import math
import shutil
import signal

import numpy as np
import pytest
import torch
from rich.console import Console
from tests.adapt.small_models import TEXT, TOKENIZER, small_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from engram_lm import MemoryAdapter
from engram_lm.cli import main
from engram_lm.errors import ConfigError, DataError, MismatchError, RunFolderError
from engram_lm.studies.adaptation.bench import Bench
from engram_lm.studies.adaptation.diagnostics import measure_tasks
from engram_lm.studies.adaptation.recipe import AdaptationRecipe, ArmOptions, TaskOptions
from engram_lm.studies.adaptation.run import Adaptation
from engram_lm.training.held_out import held_out_loss
from engram_lm.training.job import Job
from engram_lm.training.progress import RunProgress
from engram_lm.training.recipe import Recipe

ALL_ARMS = [
    "memory",
    "lora",
    "memory_lora",
    "full",
    "random_table",
    "permuted_hash",
    "one_row",
    "embeddings",
    "transfer",
]
CONTROLS = ("random_table", "permuted_hash", "one_row", "embeddings")
NAMES = ["Alexander", "Diana", "Isaac", "Ada", "Marie"]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A base model, a domain of many documents and a text that the base may know."""
    folder = tmp_path_factory.mktemp("material")
    small_model("llama").save_pretrained(folder / "base")
    TOKENIZER.save_pretrained(folder / "base")
    (folder / "domain").mkdir()
    for number in range(60):
        lines = [f"{NAMES[(number + i) % 5]} met {NAMES[(number * i) % 5]} in {1000 + i + number}." for i in range(12)]
        (folder / "domain" / f"{number}.txt").write_text("\n".join(lines))
    (folder / "old.txt").write_text(TEXT)
    (folder / "older.txt").write_text(TEXT.upper())
    questions = [{"query": "the cat sat on", "choices": ["the mat", "a rat"], "gold": n % 2} for n in range(6)]
    (folder / "cats.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "cats.yaml").write_text(
        f"task: cats\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'cats.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{query}}'\ndoc_to_choice: choices\n"
        "doc_to_target: gold\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return folder


@pytest.fixture(scope="module")
def table(material):
    return {
        "base": {"model": str(material / "base")},
        "data": {
            "domain": [str(material / "domain")],
            "retained": [str(material / "old.txt")],
            "retained_held_out": 0,
            "held_out": 0.1,
            "validation": 0.1,
            "held_out_tokens": 600,
            "retained_tokens": 300,
            "sequence_length": 32,
            "cache": str(material / "shards"),
        },
        "memory": {"layers": [0, 2], "occupancy": "none", "num_heads": 2, "rows_per_head": 199, "transfer_tokens": 600},
        "train": {
            "num_steps": 24,
            "batch_size": 4,
            "seeds": 2,
            "dtype": "float32",
            "device": "cpu",
            "curve_points": 2,
            "curve_tokens": 200,
        },
        "rates": {"memory": [1e-2, 1e-5], "lora": 1e-2, "memory_lora": 1e-2, "full": 3e-3},
        "arms": {"names": ALL_ARMS},
    }


def changed(table, **sections):
    return AdaptationRecipe.from_dict({**table, **{name: {**table[name], **keys} for name, keys in sections.items()}})


def adaptation(recipe, out, *, resume=False, progress=None):
    silent = RunProgress(Console(stderr=True), silent=True)
    return Adaptation(recipe, out, resume=resume, progress=progress or silent)


def recipe_file(table, path):
    from engram_lm.training.recipe_file import write_toml

    path.write_text(write_toml(table))
    return path


@pytest.fixture(scope="module")
def run(material, table):
    out = material / "runs" / "all"
    assert main(["adapt", str(recipe_file(table, material / "all.toml")), "--out", str(out), "--json"]) == 0
    return out


@pytest.fixture(scope="module")
def result(run):
    return json.loads((run / "result.json").read_text())


def test_every_arm_and_seed_is_measured_against_the_base(result):
    assert list(result["arms"]) == ALL_ARMS and not result["interrupted"]
    before = result["before"]
    for name, arm in result["arms"].items():
        assert [one["seed"] for one in arm["runs"]] == [0, 1]
        losses = [one["domain"]["loss"] for one in arm["runs"]]
        if name not in CONTROLS:
            assert max(losses) < before["domain"]["loss"] - 0.05, name
        assert arm["summary"]["domain_mean"] == pytest.approx(np.mean(losses))
        assert arm["summary"]["domain_std"] == pytest.approx(np.std(losses, ddof=1))
        forgotten = np.mean([one["retained"]["loss"] for one in arm["runs"]]) - before["retained"]["loss"]
        assert arm["summary"]["forgetting_mean"] == pytest.approx(forgotten)
        assert losses[0] != losses[1]
        assert len(arm["runs"][0]["curve"]) == 4 and arm["runs"][0]["curve"][-1][0] == arm["num_tokens"]


def test_all_arms_train_with_as_many_operations_as_memory(result):
    arms = result["arms"]
    budget = arms["memory"]["training_flops"]
    for arm in arms.values():
        assert abs(arm["training_flops"] - budget) <= arm["flops_per_token"] * 4 * 32
    assert arms["full"]["num_steps"] < arms["memory"]["num_steps"] == 24
    assert arms["transfer"]["preparation_flops"] > 0 and arms["transfer"]["num_steps"] < 24
    assert arms["random_table"]["num_trainable"] == arms["memory"]["num_trainable_outside_tables"]
    assert arms["memory"]["num_trainable"] > 2 * arms["memory"]["num_trainable_outside_tables"]
    assert arms["full"]["num_trainable"] == result["base"]["num_parameters"]


def test_a_rate_is_chosen_on_validation_text_and_kept_for_the_other_seeds(run, result):
    arm = result["arms"]["memory"]
    assert arm["lr"] == 1e-2 and [trial["lr"] for trial in arm["trials"]] == [1e-2, 1e-5]
    assert arm["trials"][0]["validation"]["loss"] < arm["trials"][1]["validation"]["loss"]
    assert arm["trials"][1]["retained"]["loss"] != arm["trials"][0]["retained"]["loss"]
    assert {one["lr"] for one in arm["runs"]} == {1e-2}
    for other in (*CONTROLS, "transfer"):
        assert result["arms"][other]["lr"] == 1e-2 and len(result["arms"][other]["trials"]) == 1
    names = {path.name for path in (run / "runs").glob("memory-*.json")}
    assert names == {"memory-0-0.01.json", "memory-0-1e-05.json", "memory-1.json"}


def test_the_memory_that_is_left_behind_gives_the_recorded_loss(material, run, result):
    model = AutoModelForCausalLM.from_pretrained(material / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(material / "base")
    MemoryAdapter.from_pretrained(model, run / "adapter", tokenizer=tokenizer)
    recipe = AdaptationRecipe.read(run / "recipe.toml")
    text = Bench(recipe, RunProgress(Console(stderr=True), silent=True)).text
    found = held_out_loss(model, text.held_out, length=32)
    assert found.loss == pytest.approx(result["arms"]["memory"]["runs"][0]["domain"]["loss"], abs=1e-6)
    assert {path.name for path in run.iterdir()} >= {"recipe.toml", "result.json", "report.html", "adapter", "runs"}
    assert (run / "runs" / "memory_lora-1" / "lora" / "adapter_model.safetensors").is_file()
    for name in ("random_table-0", "full-0"):
        kept = {path.name for path in (run / "runs" / name).iterdir()}
        assert "recipe.toml" in kept and not kept & {"memory", "lora", "model", "checkpoints"}
    # A run can be done again alone.
    assert Recipe.read(run / "runs" / "memory-1" / "recipe.toml").train.seed == 1


def test_memory_switched_off_or_misaddressed_is_measured_and_looked_into(result):
    before = result["before"]
    for name in ("memory", "random_table", "permuted_hash", "one_row", "transfer"):
        one = result["arms"][name]["runs"][0]
        assert one["memory_off"]["domain"]["loss"] == before["domain"]["loss"]
        assert one["rows_shuffled"]["domain"]["loss"] != one["domain"]["loss"]
        gates = one["gates"]["2"]
        assert gates["p10"] <= gates["p50"] <= gates["p90"] and 0 < gates["share_above_half"] <= 1
        assert (one["collisions"] is None) is (name in ("permuted_hash", "one_row"))
        assert (one["occupancy"] is None) is (name == "random_table")
        assert one["bits"]["models"] == ["memory on", "memory off"]
    memory = result["arms"]["memory"]["runs"][0]
    on, off = memory["bits"]["total"]["bits"].values()
    assert on["per_token"] == pytest.approx(memory["domain"]["loss"] / math.log(2), rel=1e-6)
    assert off["per_token"] == pytest.approx(before["domain"]["loss"] / math.log(2), rel=1e-6)
    assert off["more"] == pytest.approx(off["per_token"] - on["per_token"], rel=1e-6)
    assert memory["rows_shuffled"]["domain"]["loss"] > memory["domain"]["loss"] + 0.02
    assert memory["collisions"]["0"]["ngrams_per_row"] > 1
    # Each row that a step has read has been trained, and no other.
    assert 0.1 < memory["occupancy"]["0"] <= memory["collisions"]["0"]["rows_hit"] / (result["memory"]["num_rows"] / 2)
    both = result["arms"]["memory_lora"]["runs"][0]
    assert both["memory_off"]["domain"]["loss"] < before["domain"]["loss"]  # LoRA is still there
    assert result["arms"]["lora"]["runs"][0]["gates"] is None is result["arms"]["lora"]["runs"][0]["bits"]


def test_what_says_nothing_of_the_ngram_gains_less(result):
    means = {name: arm["summary"]["domain_mean"] for name, arm in result["arms"].items()}
    assert all(means["memory"] < means[control] for control in CONTROLS)


class SignalAtStep(RunProgress):
    """Sends this process a signal at a step of the second run."""

    def training(self, done, num_steps, **options):
        self.num_runs = getattr(self, "num_runs", 0) + 1
        context = super().training(done, num_steps, **options)
        if self.num_runs != 2:
            return context
        return _Raising(context)


class _Raising:
    def __init__(self, context):
        self.context = context

    def __enter__(self):
        show = self.context.__enter__()

        def raising(record, held_out):
            if record.step == 3:
                signal.raise_signal(signal.SIGTERM)
            show(record, held_out)

        return raising

    def __exit__(self, *error):
        return self.context.__exit__(*error)


def test_a_run_that_is_stopped_goes_on_with_the_first_unfinished_arm(material, table, run, result, capsys):
    out = material / "runs" / "stopped"
    recipe = changed(table, arms={"names": ["full", "lora"]}, train={"seeds": 1})
    progress = SignalAtStep(Console(stderr=True), silent=True)
    stopped = adaptation(recipe, out, progress=progress).execute()
    assert stopped["interrupted"] and not stopped["arms"]["lora"]["runs"]
    assert json.loads((out / "result.json").read_text())["interrupted"]
    first = (out / "runs" / "full-0.json").stat().st_mtime_ns
    with pytest.raises(RunFolderError, match="--resume"):
        adaptation(recipe, out).execute()
    with pytest.raises(MismatchError, match=r"rates.lora is .* was "):
        adaptation(changed(table, rates={"lora": 1e-3}), out, resume=True).execute()
    assert main(["adapt", str(out), "--resume"]) == 0
    assert "full fine-tuning" in capsys.readouterr().out.lower()
    went_on = json.loads((out / "result.json").read_text())
    assert not went_on["interrupted"] and (out / "runs" / "full-0.json").stat().st_mtime_ns == first
    for name in ("full", "lora"):
        # As of the run that was never stopped, where other arms came before.
        one, other = went_on["arms"][name]["runs"][0], result["arms"][name]["runs"][0]
        assert (one["domain"], one["retained"], one["curve"]) == (other["domain"], other["retained"], other["curve"])


def test_resuming_does_without_the_folder_of_a_finished_run(table, tmp_path, capsys):
    out, names = tmp_path / "run", {"names": ["memory"]}
    rates, train = {"memory": 1e-2}, {"seeds": 1, "num_steps": 2, "look_inside": False}
    recipe = changed(table, arms=names, train=train, rates=rates)
    first = adaptation(recipe, out).execute()
    shutil.rmtree(out / "runs" / "memory-0")
    again = adaptation(recipe, out, resume=True, progress=RunProgress()).execute()
    assert "adapter/ stays as it is" in " ".join(capsys.readouterr().err.split())
    assert again["arms"]["memory"]["runs"] == first["arms"]["memory"]["runs"] and (out / "adapter").is_dir()
    shutil.rmtree(out / "adapter")
    adaptation(recipe, out, resume=True, progress=RunProgress()).execute()
    assert "delete" in capsys.readouterr().err and not (out / "adapter").exists()


def test_several_old_texts_and_benchmarks_are_measured_before_and_after(material, table, tmp_path):
    pytest.importorskip("lm_eval")
    recipe = changed(
        {**table, "tasks": {"names": ["cats"], "limit": 4, "data": str(material)}},
        data={"retained": [str(material / "old.txt"), str(material / "older.txt")]},
        arms={"names": ["lora"]},
        train={"seeds": 1, "num_steps": 2, "look_inside": False},
    )
    result = adaptation(recipe, tmp_path / "run").execute()
    before, (run,) = result["before"], result["arms"]["lora"]["runs"]
    for found in (before, run):
        assert list(found["texts"]) == ["old.txt", "older.txt"]
        assert found["retained"]["loss"] == pytest.approx(np.mean([one["loss"] for one in found["texts"].values()]))
        # The same answer to all questions is right every second time.
        assert found["tasks"]["cats"]["value"] == 0.5 and found["tasks"]["cats"]["right"] in ("0101", "1010")
    assert run["texts"]["old.txt"] != before["texts"]["old.txt"] and run["gates"] is None
    assert result["data"]["retained"] == "old.txt, older.txt"


def test_a_group_counts_as_its_own_score_or_else_as_its_tasks(material):
    pytest.importorskip("lm_eval")
    (material / "tasks" / "animals.yaml").write_text(
        "group: animals\ntask: [cats]\naggregate_metric_list: [{metric: acc}]\n"
    )
    (material / "tasks" / "pets.yaml").write_text("group: pets\ntask: [cats]\n")
    (material / "tasks" / "all.yaml").write_text("group: all_of_them\ntask: [animals]\n")
    model = small_model("llama")
    for name, counted in {"animals": "animals", "pets": "cats", "all_of_them": "animals"}.items():
        found = measure_tasks(model, TOKENIZER, TaskOptions(names=(name,), limit=2, data=material))
        assert list(found) == [counted]
        assert found[counted]["value"] == 0.5 and found[counted]["higher_is_better"] is True


def test_a_rate_that_is_far_too_high_loses_and_ends_nothing(material, table, tmp_path):
    names = {"names": ["full"]}
    recipe = changed(table, arms=names, train={"seeds": 1, "num_steps": 16}, rates={"full": [1e30, 1e-4]})
    result = adaptation(recipe, tmp_path / "run").execute()
    arm = result["arms"]["full"]
    assert arm["lr"] == 1e-4 and len(arm["runs"]) == 1
    assert arm["trials"][0]["lr"] == 1e30 and arm["trials"][0]["validation"] is None
    again = adaptation(recipe, tmp_path / "run", resume=True).execute()
    assert again["arms"]["full"]["trials"] == arm["trials"]
    with pytest.raises(DataError, match="lower the learning rate"):
        adaptation(changed(table, arms=names, rates={"full": 1e30}), tmp_path / "other").execute()


def test_a_seed_that_diverges_is_told_of_and_ends_nothing(table, tmp_path, monkeypatch):
    step = Job.step

    def spoiled(job):
        found = step(job)
        if job.recipe.train.seed == 1:
            with torch.no_grad():
                next(job.model.parameters()).fill_(float("nan"))
        return found

    monkeypatch.setattr(Job, "step", spoiled)
    recipe = changed(table, arms={"names": ["full"]}, train={"seeds": 3, "num_steps": 3})
    study = adaptation(recipe, tmp_path / "run")
    arm = study.execute()["arms"]["full"]
    assert [run["seed"] for run in arm["runs"]] == [0, 1, 2] and "loss is nan" in arm["runs"][1]["failed"]
    kept = [arm["runs"][seed]["domain"]["loss"] for seed in (0, 2)]
    assert arm["summary"]["domain_mean"] == pytest.approx(sum(kept) / 2)
    assert "(2 of 3 seeds)" in (tmp_path / "run" / "report.html").read_text()
    assert adaptation(recipe, tmp_path / "run", resume=True).execute()["arms"]["full"]["runs"] == arm["runs"]


def test_resuming_with_another_base_or_text_is_refused(material, table):
    out = material / "runs" / "moved"
    recipe = changed(table, arms={"names": ["lora"]}, train={"seeds": 1, "num_steps": 2})
    adaptation(recipe, out).execute()
    domain = material / "domain" / "0.txt"
    text = domain.read_text()
    domain.write_text(text + "\nAnd so on.")
    try:
        with pytest.raises(MismatchError, match="text is"):
            adaptation(recipe, out, resume=True).execute()
    finally:
        domain.write_text(text)
        shutil.rmtree(out)


def test_mistakes_are_answered_with_the_way_out(table, material, tmp_path, capsys):
    path = str(recipe_file(table, tmp_path / "recipe.toml"))

    def said(*arguments):
        assert main(["adapt", *arguments]) == 1
        return capsys.readouterr().err

    assert "did you mean 'memory.layers'" in said(path, "--memory.layer", "[1]")
    assert "--data.domain" in said(path, "--data.domain", "[]", "--out", str(tmp_path / "a"))
    assert "3 decoder layers, from 0" in said(path, "--memory.layers", "[3]", "--out", str(tmp_path / "b"))
    assert "engram-lm train recipes/base-cpu.toml" in said(
        path, "--base.model", "nowhere", "--out", str(tmp_path / "c")
    )
    assert "data.validation" in said(path, "--data.validation", "0", "--out", str(tmp_path / "d"))
    assert "there are" in said(path, "--lora.targets", "['wq']", "--out", str(tmp_path / "e"))
    other = shutil.copytree(material / "base", tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens([*(f"<{number}>" for number in range(100)), *NAMES])  # names stand in the domain
    tokenizer.save_pretrained(other)
    assert "outside the vocabulary of 320" in said(path, "--base.model", str(other), "--out", str(tmp_path / "f"))
    rows = ("--memory.rows_per_head", "1000000000000")
    assert "no room on cpu for a table" in said(path, *rows, "--out", str(tmp_path / "g"))
    assert "either num_steps or epochs" in said(path, "--train.epochs", "2")
    assert "engram-lm adapt --keys" in said(path, "--steps", "2")
    assert "no recipe.toml" in said(path, "--out", str(material))
    with pytest.raises(ConfigError, match="once"):
        ArmOptions(names=("memory", "memory"))
    assert ArmOptions().with_controls().names == ("memory", "random_table", "permuted_hash", "lora")


def test_the_plan_says_what_each_arm_costs_and_trains_nothing(table, tmp_path, capsys):
    path = recipe_file({**table, "arms": {"names": ["memory"]}, "rates": {}}, tmp_path / "recipe.toml")
    out = tmp_path / "out"
    arguments = ["--controls", "--dry-run", "--json", "--out", str(out), "--train.equal", "tokens"]
    assert main(["adapt", str(path), *arguments]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert list(plan["arms"]) == ["memory", "random_table", "permuted_hash", "lora"] and not out.exists()
    assert {arm["num_steps"] for arm in plan["arms"].values()} == {24}
    for arm in plan["arms"].values():
        # A seed each, from a step that was taken; measuring comes on top.
        assert arm["num_runs"] == 2 and arm["seconds"] == 2 * arm["seconds_per_run"]
        assert 0 < 24 * arm["seconds_per_step"] < arm["seconds_per_run"]
    (out / "runs").mkdir(parents=True)
    for label in ("memory-0", "memory-1", "lora-0"):
        (out / "runs" / f"{label}.json").write_text("{}")
    assert main(["adapt", str(path), "--dry-run", "--out", str(out), "--arms.names", '["memory", "lora"]']) == 0
    said = capsys.readouterr().out
    assert "memory: 2 runs" not in said and "LoRA: 1 run of 25 steps of" in said and "on this machine" in said
    assert main(["adapt", "--keys"]) == 0
    keys = capsys.readouterr().out
    assert "--memory.rows-per-head" in keys and "--data.domain [PATH" in keys and "--data.retained [PATH" in keys
