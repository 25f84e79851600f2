"""The quickstart from end to end on a small corpus: what it compares, what it leaves behind, how it ends."""

import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import engram_lm
from engram_lm.cli import main
from engram_lm.studies import text_flags
from engram_lm.studies.quickstart import run as run_module
from engram_lm.studies.quickstart.run import Quickstart
from engram_lm.studies.study import with_seed
from engram_lm.training import recipe_trainer as trainer_module
from engram_lm.training.build import build_model, model_config
from engram_lm.training.data.documents import read_documents, split_documents
from engram_lm.training.data.tokenizer import train_tokenizer
from engram_lm.training.distribution import Ranks

NAMES = ["Alexander the Great", "Diana Princess of Wales", "Isaac Newton", "Ada Lovelace", "Marie Curie"]
SMALL = ["--vocab-size", "300", "--hidden-size", "32", "--blocks", "2", "--sequence-length", "64", "--batch-size", "4"]
SMALL += ["--memory-dim", "32", "--rows-per-head", "500", "--dtype", "float32"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(30):
        lines = [
            f"{NAMES[(number + i) % 5]} met {NAMES[(number * i) % 5]} in the year {1000 + i + 60 * number}."
            for i in range(60)
        ]
        (folder / f"{number}.txt").write_text("\n".join(lines))
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    return folder


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "quickstart"
    status = main(
        [
            "quickstart",
            "--data",
            str(corpus),
            "--out",
            str(out),
            "--tokens",
            "6000",
            "--seeds",
            "2",
            "--controls",
            *SMALL,
        ]
    )
    assert status == 0
    return out


def test_the_run_folder_holds_everything_and_is_a_checkpoint(run, capsys):
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "result.json", "metrics.jsonl"}
    assert names >= {"report.html", "curves.png", "samples.txt", "twin"}
    model = AutoModelForCausalLM.from_pretrained(run)
    tokenizer = AutoTokenizer.from_pretrained(run)
    assert type(model) is engram_lm.EngramForCausalLM
    model.check_tokenizer(tokenizer)
    assert AutoModelForCausalLM.from_pretrained(run / "twin").config.memory is None
    assert main(["generate", str(run), "--prompt", "Ada", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("Ada")


def test_the_result_says_what_was_compared_and_the_figures_agree(run, corpus):
    result = json.loads((run / "result.json").read_text())
    arms = result["arms"]
    assert list(arms) == ["memory", "twin", "random_table", "wide"] and result["seeds"] == [0, 1]
    assert result["data"]["skipped"] == {"binary": 1} and result["data"]["files"] == 30
    assert arms["memory"]["flops_per_token"] == pytest.approx(arms["twin"]["flops_per_token"], rel=0.005)
    assert arms["wide"]["parameters"]["total"] == pytest.approx(arms["memory"]["parameters"]["total"], rel=0.01)
    gains = [t["loss"] - m["loss"] for m, t in zip(arms["memory"]["runs"], arms["twin"]["runs"], strict=True)]
    assert result["difference"]["per_seed"] == gains and result["difference"]["std"] > 0
    for arm in arms.values():
        for one in arm["runs"]:
            assert one["tokens"] == 23 * 4 * 64 and one["loss"] < 5.5
            assert one["held_out_curve"][-1][0] == one["tokens"]
            # Here the held-out text is shorter than what a point of the curve is measured on.
            assert one["held_out_curve"][-1][1] == pytest.approx(one["loss"])
    assert {"processor", "cores"} <= set(result["machine"]) and "torch" in result["versions"]
    assert result["command"] and not result["interrupted"]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2 * 4 * 23
    assert {(line["arm"], line["seed"]) for line in metrics} == {(arm, seed) for arm in arms for seed in (0, 1)}


def built(study, seed):
    """The models of a study before training, by name."""
    tokenizer = train_tokenizer([" ".join(NAMES) * 20], 300)
    recipes = {arm.name: with_seed(arm, seed) for arm in study.arms}
    return {
        name: build_model(recipe, model_config(recipe, tokenizer), tokenizer, Ranks())
        for name, recipe in recipes.items()
    }


def test_the_result_and_the_page_say_which_tokens_cost_how_much(run):
    result = json.loads((run / "result.json").read_text())
    found = result["diagnostics"]
    assert found["models"] == ["with memory", "memory off", "without memory"]
    assert found["total"]["num_tokens"] == min(16_384, result["data"]["held_out_tokens"] - 1)
    assert found["reference_tokens"] == result["data"]["train_tokens"]
    loss = result["arms"]["memory"]["runs"][0]["loss"]  # of all held-out tokens
    assert found["total"]["bits"]["with memory"]["per_token"] == pytest.approx(loss / math.log(2), rel=0.02)
    page = (run / "report.html").read_text()
    assert "Bits by kind of token" in page and "3-gram before" in page


def test_seeds_differ_in_their_weights_and_in_their_batches(run):
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = {line["seed"]: line["loss"] for line in metrics if line["arm"] == "twin" and line["step"] == 1}
    assert first[0] != first[1]
    study = Quickstart(hidden_size=32, blocks=2).study()
    assert not torch.equal(*(built(study, seed)["twin"].lm_head.weight for seed in (0, 1)))


def test_minutes_decide_how_many_tokens_are_trained_on(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "estimated_seconds", lambda study: 600.0)
    options = ["--data", str(corpus), "--out", str(tmp_path / "run"), "--tokens", "6000", *SMALL, "--json"]
    assert main(["quickstart", *options, "--minutes", "2"]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert (settings["tokens"], settings["num_steps"]) == (1200, 5)
    assert main(["quickstart", "--minutes", "0"]) == 2
    assert "--minutes must be more than 0" in capsys.readouterr().err


def test_every_seed_has_its_own_order_of_batches(corpus, tmp_path, monkeypatch):
    seeds = []
    batches = trainer_module.Batches
    monkeypatch.setattr(
        trainer_module, "Batches", lambda *given, **options: seeds.append(given[3]) or batches(*given, **options)
    )
    call = ["quickstart", "--data", str(corpus), "--out", str(tmp_path / "run"), "--tokens", "256", "--seeds", "2"]
    assert main([*call, *SMALL]) == 0
    assert seeds == [0, 0, 1, 1]


def test_held_out_files_reach_neither_the_tokenizer_nor_training(corpus, tmp_path, monkeypatch):
    seen, packed = [], []
    monkeypatch.setattr(
        text_flags, "train_tokenizer", lambda texts, size: train_tokenizer(seen.extend(texts) or seen, size)
    )
    batches = trainer_module.Batches

    def watched(tokens, *rest, **options):
        packed.append(tokens[0 : len(tokens)])
        return batches(tokens, *rest, **options)

    monkeypatch.setattr(trainer_module, "Batches", watched)
    out = tmp_path / "run"
    assert main(["quickstart", "--data", str(corpus), "--out", str(out), "--tokens", "300", *SMALL]) == 0
    train, held_out = split_documents(read_documents([corpus]))
    assert seen == [file.text for file in train]
    text = AutoTokenizer.from_pretrained(out).decode(packed[0])
    assert held_out and not [file.name for file in held_out if file.text in text]
    assert all(file.text in text for file in train)


def test_the_flags_reach_the_training(corpus, tmp_path, monkeypatch):
    options = []
    trainer = trainer_module.Trainer
    monkeypatch.setattr(
        trainer_module, "Trainer", lambda *given, **rest: options.append(given[2:4]) or trainer(*given, **rest)
    )
    call = ["quickstart", "--data", str(corpus), "--out", str(tmp_path / "run"), "--tokens", "512", *SMALL]
    assert main([*call, "--lr", "0.001", "--table-lr-multiplier", "7"]) == 0
    found = {(optimizer.lr, optimizer.table_lr_multiplier, steps.num_steps) for steps, optimizer in options}
    assert found == {(0.001, 7.0, 2)}


def test_a_seed_that_was_cut_short_is_not_averaged_with_whole_ones(corpus, tmp_path, monkeypatch):
    interrupts = []
    init = run_module.Interrupt.__init__
    monkeypatch.setattr(run_module.Interrupt, "__init__", lambda self: init(self) or interrupts.append(self))
    steps = []
    step = trainer_module.Trainer.step

    def counted(self, **options):
        steps.append(1)
        interrupts[0].asked = len(steps) > 14  # two arms of six steps, then the second seed's second step
        return step(self, **options)

    monkeypatch.setattr(trainer_module.Trainer, "step", counted)
    out = tmp_path / "run"
    call = ["quickstart", "--data", str(corpus), "--out", str(out), "--tokens", "1536", "--seeds", "3", *SMALL]
    assert main(call) == 130
    result = json.loads((out / "result.json").read_text())
    assert result["interrupted"] and result["seeds"] == [0]
    assert [one["num_steps"] for one in result["arms"]["memory"]["runs"]] == [6]


def test_what_was_trained_survives_a_failure_while_writing(corpus, tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_module, "save_pictures", fail)
    out = tmp_path / "run"
    assert main(["quickstart", "--data", str(corpus), "--out", str(out), "--tokens", "300", *SMALL]) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said
    (left,) = tmp_path.iterdir()
    assert str(left) in said.replace("\n", "")
    assert AutoModelForCausalLM.from_pretrained(left) is not None


def test_eval_of_the_run_gives_the_loss_that_it_reports(run, corpus, capsys, tmp_path):
    _, held_out = split_documents(read_documents([corpus]))
    for document in held_out:
        (tmp_path / document.name).write_text(document.text)
    assert main(["eval", str(run), "--data", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    result = json.loads((run / "result.json").read_text())
    # The files come in another order, which moves the borders of the sequences.
    assert printed["loss"] == pytest.approx(result["arms"]["memory"]["runs"][0]["loss"], abs=0.02)


def test_all_arms_start_from_the_same_weights_where_they_have_the_same():
    arms = built(Quickstart(hidden_size=32, blocks=2, memory_layers=(1,), controls=True).study(), 3)
    weights = dict(arms["memory"].named_parameters())
    for name in ("twin", "wide"):
        for key, value in arms[name].named_parameters():
            common = tuple(slice(0, min(a, b)) for a, b in zip(weights[key].shape, value.shape, strict=True))
            assert torch.equal(value[common], weights[key][common])
            if value.shape != weights[key].shape:
                assert value.flatten()[-1] != 0  # the extra width is initialized too
    frozen = dict(arms["random_table"].named_parameters())
    assert all(torch.equal(frozen[key], value) for key, value in weights.items())
    assert [key for key, value in frozen.items() if not value.requires_grad] == ["model.memory_tables.1.weight"]


def test_an_earlier_run_is_kept_and_other_folders_are_left_alone(run, corpus, tmp_path, capsys):
    call = ["quickstart", "--data", str(corpus), "--tokens", "300", "--json", *SMALL]
    out = tmp_path / "a"
    assert main([*call, "--out", str(out)]) == 0
    first = json.loads((out / "result.json").read_text())
    assert json.loads(capsys.readouterr().out) == first
    assert main([*call, "--out", str(out)]) == 0
    assert json.loads((tmp_path / "a-1" / "result.json").read_text()) == first
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    capsys.readouterr()
    for path, message in (("mine", "not a run"), ("file", "is a file")):
        assert main([*call, "--out", str(tmp_path / path)]) == 1
        assert message in capsys.readouterr().err
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a", "a-1", "file", "mine"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--data", "EMPTY"], 1, "no text in"),
        (["--data", "SHORT", "--sequence-length", "512"], 1, "--sequence-length"),
        (["--data", "/nowhere"], 1, "neither a file nor a folder"),
        (["--out", "/proc/quickstart"], 1, "--out"),
        (["--seeds", "0"], 2, "--seeds"),
        (["--hidden-size", "33"], 2, "multiple of 32"),
        (["--memory-layers", "9"], 2, "reach past"),
        (["--vocab-size", "10"], 2, "258"),
        (["--memory-dim", "33"], 2, "nearest that does is 32"),
        (["--memory-layers", "1", "1"], 2, "distinct"),
        (["--lr", "0"], 2, "--lr"),
        (["--lr", "nan"], 2, "--lr"),
        (["--out", "."], 1, "--out"),
        (["--device", "nonsense"], 1, "--device"),
    ],
    ids=str,
)
def test_bad_input_ends_with_a_message_and_leaves_nothing(
    arguments, status, message, tmp_path, corpus, capsys, monkeypatch
):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "SHORT").mkdir()
    for number in range(2):
        (tmp_path / "SHORT" / str(number)).write_text(f"hello {number}\n" * 12)
    monkeypatch.chdir(tmp_path)
    call = ["quickstart", "--data", str(corpus), "--out", str(tmp_path / "out"), "--tokens", "300", *SMALL]
    arguments = [str(tmp_path / one) if one.isupper() else one for one in arguments]
    assert main([*call, *arguments]) == status
    assert message in " ".join(capsys.readouterr().err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["EMPTY", "SHORT"]


def training_process(corpus, out):
    """A quickstart in a process of its own that would train for hours, and has begun to."""
    call = [sys.executable, "-m", "engram_lm", "quickstart", "--data", str(corpus), "--out", str(out), *SMALL]
    process = subprocess.Popen(
        [*call, "--tokens", "50000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(engram_lm.__file__).parents[1])},
    )
    deadline = time.time() + 60
    metrics = f".{out.name}.*/work/seed-0/twin/metrics.jsonl"
    while time.time() < deadline and not [path for path in out.parent.glob(metrics) if path.stat().st_size > 1000]:
        time.sleep(0.1)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_saves_what_was_trained_and_says_so(corpus, tmp_path, number):
    out = tmp_path / "run"
    process = training_process(corpus, out)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted after step" in stderr and "interrupted" in stdout
    result = json.loads((out / "result.json").read_text())
    assert result["interrupted"] and result["arms"]["memory"]["runs"][0]["tokens"] < 50_000_000
    assert AutoModelForCausalLM.from_pretrained(out) is not None and (out / "report.html").is_file()


def test_a_killed_run_leaves_no_folder_that_looks_complete(corpus, tmp_path):
    out = tmp_path / "run"
    process = training_process(corpus, out)
    process.kill()
    process.communicate(timeout=60)
    assert not out.exists()
