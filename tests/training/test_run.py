"""A whole run: what its folder holds, and that a stop at any moment changes nothing."""

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from tests.small_model import TEXT

from engram_lm.cli import main
from engram_lm.errors import CheckpointError, ConfigError, DataError, MismatchError, RunFolderError
from engram_lm.model import EngramForCausalLM
from engram_lm.training.assembly import find_tokenizer, open_text
from engram_lm.training.checkpoints import read_facts
from engram_lm.training.data.batches import Batches
from engram_lm.training.distribution import Ranks
from engram_lm.training.metrics import Metrics, read_metrics
from engram_lm.training.progress import RunProgress
from engram_lm.training.recipe import Recipe
from engram_lm.training.recipe_file import write_toml
from engram_lm.training.run import Run

STEPS = 12


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(12):
        (folder / f"{number}.txt").write_text(f"Text {number}. " + TEXT[number * 37 :], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def table(text, cache, **changes):
    backbone = {
        "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "kv_lora_rank": 16, "v_head_dim": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "intermediate_size": 48, "moe_intermediate_size": 16,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "num_streams": 2,
    }  # fmt: skip
    sections = {
        "model": {"preset": "engram-nano", "backbone": backbone, "memory": {"memory_dim": 16, "rows_per_head": 61}},
        "tokenizer": {"vocab_size": 280},
        "data": {"sources": [str(text)], "cache": str(cache), "sequence_length": 24, "held_out": 0.2},
        "train": {"num_steps": STEPS, "batch_size": 4, "dtype": "float32", "device": "cpu"},
        "optimizer": {"lr": 3e-3},
        "evaluation": {"every": 5, "max_tokens": 400},
        "checkpoint": {"every": 4},
        "log": {"details_every": 3, "tensorboard": "no", "wandb": "no"},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        sections.setdefault(section, {})[key] = value
    return sections


def run(out, sections, ranks=None, **options):
    progress = RunProgress(Console(stderr=True), silent=True)
    return Run(Recipe.from_dict(sections), out, ranks or Ranks(), progress=progress, **options).execute()


def measured(out):
    """What does not depend on how fast this machine was."""
    timings = {"seconds", "tokens_per_second", "model_tflops", "mfu"}
    return [
        {name: value for name, value in line.items() if name not in timings}
        for line in read_metrics(out / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def whole(text, cache, tmp_path_factory):
    """A run that nothing stopped."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(out, table(text, cache))
    return out


def weights(out):
    return EngramForCausalLM.from_pretrained(out / "model").state_dict()


def assert_same(out, whole):
    assert measured(out) == measured(whole)
    expected = weights(whole)
    for name, value in weights(out).items():
        assert torch.equal(value, expected[name]), name


def test_a_run_leaves_a_folder_that_says_everything(whole):
    lines = measured(whole)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert [line["step"] for line in lines if "held_out" in line] == [5, 10, 12]
    assert [line["step"] for line in lines if "tables" in line] == [3, 6, 9, 12]
    details = lines[2]
    assert set(details["grad_norms"]) == set(details["update_norms"]) == {"matrices", "decayed", "plain", "tables"}
    assert 0 < details["tables"]["1"]["occupancy"] <= 1 and details["expert_load"]
    assert 0 < lines[-1]["held_out"]["gates"]["1"]["mean"] < 1
    result = json.loads((whole / "result.json").read_text())
    assert result["num_steps"] == STEPS and result["held_out"] == lines[-1]["held_out"] and not result["interrupted"]
    assert sorted(path.name for path in (whole / "checkpoints").glob("step-*")) == ["step-00000008", "step-00000012"]
    assert (whole / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert Recipe.read(whole / "recipe.toml").train.num_steps == STEPS


def test_a_model_of_our_own_with_occupancy_stops_goes_on_and_is_read_from_every_tier(text, cache, tmp_path):
    memory = {"memory_dim": 16, "rows_per_head": 4999, "occupancy": "rows"}
    sections = table(text, cache, model__memory=memory)
    whole = run(tmp_path / "whole", sections)
    run(tmp_path / "stopped", sections, stop_after=5)
    again = run(tmp_path / "stopped", sections, resume=True)
    assert_same(tmp_path / "stopped", tmp_path / "whole")
    assert again["held_out"] == whole["held_out"]
    name = "model.memory_tables.1.weight"
    written = (weights(tmp_path / "whole")[name] != 0).any(-1)
    assert 0 < written.sum() < len(written) // 2
    ids = torch.randint(2, 280, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        resident = EngramForCausalLM.from_pretrained(tmp_path / "whole" / "model")
        expected = resident(input_ids=ids).logits
        mapped = EngramForCausalLM.from_pretrained(tmp_path / "whole" / "model", table_tier="mmap")
        assert torch.equal(mapped(input_ids=ids).logits, expected)
        # In training mode unwritten rows have their first numbers again, and saving leaves them out.
        assert not torch.equal(resident.train()(input_ids=ids).logits, expected)
        resident.save_pretrained(tmp_path / "again")
        mapped = EngramForCausalLM.from_pretrained(tmp_path / "again", table_tier="mmap")
        assert torch.equal(mapped(input_ids=ids).logits, expected)


def test_the_model_of_a_run_can_be_used_and_evaluated(whole, text, capsys):
    assert main(["eval", str(whole / "model"), "--data", str(text), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] < 5 and "diagnostics" not in found
    command = ["eval", str(whole / "model"), "--data", str(text), "--diagnostics", "--sequence-length", "16"]
    assert main([*command, "--json"]) == 0
    read = capsys.readouterr()
    diagnostics = json.loads(read.out)["diagnostics"]
    assert diagnostics["reference"] == f"the training text of {whole.name}" and diagnostics["reference"] in read.err
    assert diagnostics["models"] == ["memory on", "memory off"]
    assert "ngrams_2" in diagnostics["divisions"]
    assert main([*command, "--reference", str(text)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "rare" in printed and f"counted in {text.name}" in printed
    assert main(["generate", str(whole / "model"), "--prompt", "the cat", "--max-new-tokens", "4"]) == 0


def test_a_run_that_stops_and_goes_on_is_the_run_that_did_not(whole, text, cache, tmp_path):
    first = run(tmp_path / "run", table(text, cache), stop_after=6)
    assert first["num_steps"] == 6 and not first["interrupted"]
    # Written after the last checkpoint, as by a process that was killed: these steps are taken again.
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 0.0}\n{"step": 8, "lo')
    run(tmp_path / "run", table(text, cache), resume=True)
    assert_same(tmp_path / "run", whole)


def test_runs_that_take_steps_in_turn_are_the_runs_that_they_are_alone(text, cache, tmp_path):
    # Dropout draws random numbers in every step.
    sections = table(text, cache, train__num_steps=4)
    sections["model"] = {**sections["model"], "backbone": {**sections["model"]["backbone"], "attention_dropout": 0.2}}
    other = {**sections, "train": {**sections["train"], "seed": 1}}
    run(tmp_path / "alone", sections)
    with (
        Run(Recipe.from_dict(sections), tmp_path / "a").open() as a,
        Run(Recipe.from_dict(other), tmp_path / "b").open() as b,
    ):
        while not a.done:
            record, values = a.step()
            assert values["step"] == record.step == a.num_steps_done
            torch.rand(3)
            b.step()
        assert b.done and a.finish()["held_out"] == a.held_out and b.finish()["num_steps"] == 4
    assert_same(tmp_path / "a", tmp_path / "alone")
    assert measured(tmp_path / "b") != measured(tmp_path / "a")


def test_held_out_loss_is_measured_along_the_way_and_on_other_texts(text, cache, tmp_path):
    sections = table(text, cache, train__num_steps=6, data__validation=0.2, evaluation__points=2)
    sections["evaluation"] |= {"start": True, "curve_tokens": 50}
    sections["evaluation"]["texts"] = [{"name": "known", "sources": [str(text / "3.txt")], "max_tokens": 60}]
    result = run(tmp_path / "run", sections)
    lines = measured(tmp_path / "run")
    assert [line["step"] for line in lines if "held_out" in line] == [0, 2, 4, 6]
    assert [line["held_out"]["num_tokens"] for line in lines if "held_out" in line][:3] == [50] * 3
    assert [tokens for tokens, _ in result["curve"]] == [0, 2 * 96, 4 * 96, 6 * 96]
    assert result["curve"][-1][1] == lines[-1]["curve_loss"] != result["held_out"]["loss"]
    assert result["held_out"]["num_tokens"] > 50 and set(result["texts"]) == {"validation", "known"}
    assert result["texts"]["known"]["num_tokens"] == 60 and result["texts"]["known"]["bits_per_byte"] > 0
    # Text to choose by and text to measure on are different.
    opened = open_text(
        Recipe.from_dict(sections), find_tokenizer(Recipe.from_dict(sections), tmp_path / "run/tokenizer")
    )
    assert opened.held_out[:20].tolist() != opened.texts["validation"].tokens[:20].tolist()
    again = run(tmp_path / "stopped", sections, stop_after=3)
    assert again["texts"] == {} and [tokens for tokens, _ in again["curve"]] == [0, 2 * 96]
    assert run(tmp_path / "stopped", sections, resume=True)["curve"] == result["curve"]


def test_a_model_begins_with_the_numbers_of_another_and_its_tables_can_be_frozen(text, cache, tmp_path):
    sections = table(text, cache, train__num_steps=1, optimizer__lr=1e-30, optimizer__weight_decay=0.0)
    run(tmp_path / "first", sections)
    first = weights(tmp_path / "first")
    own = sections["model"]
    wide = {**own["backbone"], "intermediate_size": 64}
    like = [{"preset": own["preset"], "backbone": own["backbone"], "memory": own["memory"]}]
    sections["model"] = {"preset": "moe-nano", "backbone": wide, "like": like}
    run(tmp_path / "twin", sections)
    for name, value in weights(tmp_path / "twin").items():
        given = first[name]
        if name.endswith("e_score_correction_bias"):  # moved by a fixed amount
            continue
        torch.testing.assert_close(value[tuple(map(slice, given.shape))], given, rtol=0, atol=1e-20, msg=name)
    moved = {**own["memory"], "layers": [0]}
    sections["model"] = {**own, "memory": moved, "like": [{**like[0], "part": "memory"}], "frozen_tables": True}
    sections["optimizer"] = {"lr": 1e-1}
    run(tmp_path / "moved", {**sections, "train": {**sections["train"], "num_steps": 2}})
    found = weights(tmp_path / "moved")
    rows = found["model.memory_tables.0.weight"], first["model.memory_tables.1.weight"]
    torch.testing.assert_close(*rows, rtol=0, atol=1e-20)
    sections["model"]["like"] = [{"preset": "moe-nano", "backbone": own["backbone"], "part": "memory"}]
    with pytest.raises(ConfigError, match="cannot be paired"):
        run(tmp_path / "none", sections)


def test_a_run_that_keeps_no_checkpoint_leaves_its_model(text, cache, tmp_path):
    sections = table(text, cache, train__num_steps=2, checkpoint__keep_last=0)
    result = run(tmp_path / "run", sections)
    assert weights(tmp_path / "run") and not (tmp_path / "run" / "checkpoints").exists()
    assert run(tmp_path / "run", sections, resume=True) == result


SCRIPT = """
import sys, pathlib, json
from tests.training.test_run import run
run(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), resume=sys.argv[3] == "resume")
"""


def start(out, sections, resume):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    arguments = [sys.executable, "-c", SCRIPT, str(out), json.dumps(sections), "resume" if resume else "new"]
    return subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.timeout(300)
def test_killed_at_any_moment_a_run_goes_on_from_its_last_complete_checkpoint(whole, text, cache, tmp_path):
    sections = table(text, cache, checkpoint__every=1)
    out, randomness = tmp_path / "run", random.Random(0)
    for attempt in range(3):
        process = start(out, sections, resume=attempt > 0)
        deadline = time.monotonic() + 90
        seen = len(read_metrics(out / "metrics.jsonl")) if (out / "metrics.jsonl").exists() else 0
        while process.poll() is None and time.monotonic() < deadline:
            if (out / "metrics.jsonl").exists() and len(read_metrics(out / "metrics.jsonl")) != seen:
                break
            time.sleep(0.01)
        time.sleep(randomness.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    run(out, sections, resume=True)
    assert_same(out, whole)


def test_a_signal_ends_a_run_after_a_checkpoint(whole, text, cache, tmp_path):
    out, sections = tmp_path / "run", table(text, cache, checkpoint__every=0, train__num_steps=5000)
    process = start(out, sections, resume=False)
    while process.poll() is None and not ((out / "metrics.jsonl").exists() and read_metrics(out / "metrics.jsonl")):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    (checkpoint,) = (out / "checkpoints").glob("step-*")
    assert int(checkpoint.name.removeprefix("step-")) == len(read_metrics(out / "metrics.jsonl"))


def test_folders_and_recipes_of_others_are_left_alone(whole, text, cache, tmp_path):
    with pytest.raises(RunFolderError, match="go on with it with --resume"):
        run(whole, table(text, cache))
    with pytest.raises(MismatchError, match=r"optimizer.lr is 0.5, was 0.003"):
        run(whole, table(text, cache, optimizer__lr=0.5), resume=True)
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(RunFolderError, match="not a training run"):
        run(tmp_path, table(text, cache), resume=True)
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_text_that_changed_is_not_trained_on_by_a_run_that_goes_on(text, cache, tmp_path):
    mine = tmp_path / "text"
    mine.mkdir()
    for path in text.iterdir():
        (mine / path.name).write_bytes(path.read_bytes())
    run(tmp_path / "run", table(mine, cache), stop_after=2)
    (mine / "0.txt").write_text("Something else. " * 200)
    with pytest.raises(MismatchError, match=r"the text is not what it was.* packs text differently"):
        run(tmp_path / "run", table(mine, cache), resume=True)


def test_a_damaged_checkpoint_is_named_and_nothing_is_trained(text, cache, tmp_path):
    run(tmp_path / "run", table(text, cache), stop_after=2)
    (data,) = (tmp_path / "run" / "checkpoints" / "step-00000002").glob("*.safetensors")
    whole = bytearray(data.read_bytes())
    whole[-5] ^= 1
    data.write_bytes(whole)
    with pytest.raises(CheckpointError, match=str(data.name)):
        run(tmp_path / "run", table(text, cache), resume=True)


def test_training_goes_on_from_weights_of_another_run(whole, text, cache, tmp_path):
    sections = table(text, cache)
    sections["model"], sections["tokenizer"] = {"weights": str(whole / "model")}, {}
    run(tmp_path / "more", sections, stop_after=1)
    first = measured(tmp_path / "more")[0]["loss"]
    assert first < measured(whole)[0]["loss"] - 0.5


def test_too_little_text_is_said(cache, tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(8):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number} short")
    with pytest.raises(DataError, match="sequence"):
        run(tmp_path / "run", table(tmp_path / "text", cache, data__sequence_length=200, data__held_out=0.5))


def test_metrics_are_nested_numbers_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    metrics = Metrics(tmp_path / "metrics.jsonl", tensorboard="yes")
    metrics.write({"step": 1, "loss": 2.0, "held_out": {"loss": float("nan")}})
    metrics.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0, "held_out": {"loss": None}}]
    assert list((tmp_path / "tensorboard").iterdir())


def test_the_command_line_explains_itself(text, cache, tmp_path, capsys):
    recipe = tmp_path / "mine.toml"
    recipe.write_text("[train]\nnum_steps = 3\n")
    assert main(["train", "--keys"]) == 0
    keys = capsys.readouterr().out
    assert "--train.num-steps" in keys and "--optimizer.table-lr-multiplier" in keys and "--data.sources" in keys
    assert main(["train", str(recipe), "--train.num_step", "4"]) == 1
    assert "did you mean 'train.num_steps'?" in capsys.readouterr().err
    assert main(["train"]) == 1
    assert "name a recipe" in capsys.readouterr().err
    assert main(["train", str(recipe), "--dry-run", "--world-size", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["world_size"] == 4 and found["bill"]["parameters"]["total"] > 1e6
    assert found["recipe"]["train"]["num_steps"] == 3
    assert main(["train", str(recipe), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "num_steps = 3" in said
    bars = said.split("memory of a process: ")[1].splitlines()[1:]
    shares = [float(line.split("%")[0].split()[-1]) for line in bars if "%" in line]
    assert sum(shares) == pytest.approx(100, abs=1)  # the parts alone, not their total beside them
    assert not any(line.split()[:1] == ["total"] for line in bars)


def torchrun(num_ranks, arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return subprocess.run(
        [*command, "-m", "engram_lm", "train", *map(str, arguments)], env=environment, capture_output=True, text=True
    )


def run_on_rank(rank, out, sections, options):
    """What `run` does, as one of the processes of a group."""
    ranks = Ranks(rank, dist.get_world_size(), 0, torch.device("cpu"), dist.group.WORLD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The command leaves this one out as well.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        return run(Path(out), sections, ranks=ranks, **options)


@pytest.mark.parametrize("backbone", ["ddp", "fsdp2"])
def test_several_processes_train_the_model_that_one_does(backbone, whole, text, cache, rank_pools, tmp_path):
    sections = table(text, cache, parallel__backbone=backbone)
    out = str(tmp_path / "run")
    if backbone == "ddp":
        recipe = tmp_path / "mine.toml"
        recipe.write_text(write_toml(sections))
        two = torchrun(2, [recipe, "--out", out, "--max-steps", 5])
        assert two.returncode == 0 and "Warning" not in two.stderr, two.stderr
    else:
        rank_pools(2).run(run_on_rank, out, sections, {"stop_after": 5})
    # 4 sequences over 3 processes: one has two of them.
    rank_pools(3).run(run_on_rank, out, sections, {"resume": True, "stop_after": 9})
    run(tmp_path / "run", sections, resume=True)
    found, expected = measured(tmp_path / "run"), measured(whole)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=2e-3)
    assert [line["grad_norm"] for line in found] == pytest.approx([line["grad_norm"] for line in expected], rel=2e-2)
    for line, other in zip(found, expected):
        if "tables" in line:
            assert line["tables"]["1"]["occupancy"] == other["tables"]["1"]["occupancy"]
            assert line["update_norms"] == pytest.approx(other["update_norms"], rel=2e-2)
        if "held_out" in line:
            assert line["held_out"]["loss"] == pytest.approx(other["held_out"]["loss"], rel=2e-3)
            assert line["held_out"]["gates"]["1"] == pytest.approx(other["held_out"]["gates"]["1"], rel=2e-2)


@pytest.mark.timeout(200)
def test_a_mistake_that_one_process_meets_ends_all_with_its_words(text, cache, tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text(write_toml(table(text, cache, train__batch_size=1)))
    ended = torchrun(2, [recipe, "--out", tmp_path / "run"])
    assert ended.returncode == 1 and "a batch of 1 cannot be divided over 2 ranks" in ended.stderr
    assert "engram_lm/training" not in ended.stderr  # no traceback of ours, only torchrun's


def test_a_run_that_failed_before_its_first_step_is_begun_anew(text, cache, tmp_path):
    wrong = table(text, cache, tokenizer__vocab_size=270)
    wrong["model"]["backbone"] = {**wrong["model"]["backbone"], "num_hidden_layer": 3}
    with pytest.raises(ConfigError, match="'num_hidden_layer'; did you mean 'num_hidden_layers'"):
        run(tmp_path / "run", wrong)
    wrong["model"]["backbone"] = {"num_hidden_layers": "two"}
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        run(tmp_path / "run", wrong)
    run(tmp_path / "run", table(text, cache), stop_after=1)
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["vocab_size"] == 280


def test_a_run_that_has_ended_says_the_same_when_it_is_asked_to_go_on(text, cache, tmp_path):
    out = tmp_path / "run"
    first = run(out, table(text, cache, train__num_steps=2))
    written = (out / "result.json").read_bytes()
    assert run(out, table(text, cache, train__num_steps=2), resume=True) == first
    assert (out / "result.json").read_bytes() == written and first["held_out"]["loss"] > 0
    for path in (out / "model").iterdir():
        path.unlink()  # as after a kill while the model was written
    again = run(out, table(text, cache, train__num_steps=2), resume=True)
    assert again["held_out"] == first["held_out"] and weights(out)


def test_two_processes_do_not_train_in_one_folder(text, cache, tmp_path):
    out = tmp_path / "run"
    run(out, table(text, cache), stop_after=1)
    with (out / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunFolderError, match="another process is training"):
            run(out, table(text, cache), resume=True)


def test_details_are_written_in_steps_of_their_own_and_few_lines_are_plotted(text, cache, tmp_path):
    run(tmp_path / "a", table(text, cache, log__every=4), stop_after=4)
    assert [line["step"] for line in measured(tmp_path / "a")] == [3, 4]
    run(tmp_path / "b", table(text, cache, log__every=10), stop_after=1)
    assert measured(tmp_path / "b") == []


def test_a_full_disk_is_said_once_and_the_lines_before_it_stay(tmp_path):
    code = """
import resource, signal, sys, pathlib
from engram_lm.errors import RunFolderError
from engram_lm.training.metrics import Metrics
path = pathlib.Path(sys.argv[1])
metrics = Metrics(path)
metrics.write({"step": 1, "loss": 1.0})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, resource.RLIM_INFINITY))
try:
    metrics.write({"step": 2, "loss": 2.0})
except RunFolderError:
    metrics.close()
    sys.exit(7)
"""
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "metrics.jsonl")], stderr=subprocess.PIPE)
    assert ended.returncode == 7, ended.stderr
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]


@pytest.mark.timeout(200)
def test_what_every_process_has_a_copy_of_counts_once_and_all_of_their_choices_count(text, cache, rank_pools, tmp_path):
    sections = table(text, cache, log__details_every=1)
    sections["model"] = {**sections["model"], "memory": {**sections["model"]["memory"], "table_gradient": "dense"}}
    run(tmp_path / "one", sections, stop_after=1)
    (expected,) = measured(tmp_path / "one")
    for backbone in ("ddp", "fsdp2"):
        divided = {**sections, "parallel": {"backbone": backbone}}
        rank_pools(2).run(run_on_rank, str(tmp_path / backbone), divided, {"stop_after": 1})
        (found,) = measured(tmp_path / backbone)
        assert found["tables"]["1"]["occupancy"] == expected["tables"]["1"]["occupancy"]
        # The first step's choices are of the same first weights.
        assert found["expert_load"] == expected["expert_load"]


def test_a_run_is_no_model_and_a_damaged_tokenizer_no_tokenizer(whole, text, cache, tmp_path):
    sections = table(text, cache)
    with pytest.raises(ConfigError, match="is a run; its model is in"):
        run(tmp_path / "a", {**sections, "model": {"weights": str(whole)}, "tokenizer": {}})
    (tmp_path / "tokenizer").mkdir()
    for path in (whole / "tokenizer").iterdir():
        (tmp_path / "tokenizer" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot load the tokenizer"):
        run(tmp_path / "b", {**sections, "tokenizer": {"path": str(tmp_path / "tokenizer")}})
    sections["model"] = {**sections["model"], "backbone": {"hidden_act": "gulu"}}
    with pytest.raises(ConfigError, match=r"hidden_act is one of .*'gulu'"):
        run(tmp_path / "c", sections)


def test_of_one_document_the_end_is_held_out(cache, tmp_path):
    (tmp_path / "one.txt").write_text(TEXT)
    sections = table(tmp_path / "one.txt", cache, data__held_out=0.1, train__num_steps=2)
    result = run(tmp_path / "run", sections)
    recipe = Recipe.from_dict(sections)
    text = open_text(recipe, find_tokenizer(recipe, tmp_path / "run" / "tokenizer"))
    whole = text.train[:]
    assert text.num_tokens + len(text.held_out) == len(whole) and "held out" in text.about
    assert (whole[text.num_tokens :] == text.held_out).all() and list(text.held_out_ends) == [len(text.held_out)]
    # What is held out is in no sequence, however long one trains.
    batches = Batches(text.train, 4, 24, 0, num_tokens=text.num_tokens)
    assert max(batches.sequences(step).max() for step in range(60)) == (text.num_tokens - 1) // 24 - 1
    assert result["held_out"]["step"] == 2


def test_text_to_evaluate_on_may_be_named_or_left_out(text, cache, tmp_path):
    (tmp_path / "other.txt").write_text("Another text altogether: 1, 2, 3. " * 40)
    sections = table(text, cache, data__held_out_sources=[str(tmp_path / "other.txt")], train__num_steps=1)
    named = run(tmp_path / "named", sections)
    assert named["held_out"]["num_tokens"] > 100
    none = run(tmp_path / "none", table(text, cache, data__held_out=0.0, train__num_steps=1))
    assert none["held_out"] is None and "held_out" not in measured(tmp_path / "none")[0]


def test_a_run_goes_on_by_the_name_of_its_folder(text, cache, tmp_path, capsys):
    out = tmp_path / "run"
    run(out, table(text, cache), stop_after=1)
    assert main(["train", str(out), "--resume", "--max-steps", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_steps"] == 2


def test_a_run_goes_on_in_the_type_that_it_was_begun_in(text, cache, tmp_path, monkeypatch):
    sections = table(text, cache, train__dtype="auto")
    monkeypatch.setattr("engram_lm.training.job.best_dtype", lambda device: "bfloat16")
    run(tmp_path / "run", sections, stop_after=1)
    monkeypatch.setattr("engram_lm.training.job.best_dtype", lambda device: "float32")
    run(tmp_path / "run", sections, resume=True, stop_after=2)
    assert read_facts(tmp_path / "run" / "checkpoints" / "step-00000002")["dtype"] == "bfloat16"
