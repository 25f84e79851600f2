"""The study of mechanism: arms that differ in nothing but where memory is, and one command that compares them."""

import json
import os
import random
import shutil
import signal
import threading
import time

import numpy as np
import pytest
import torch
from tests.analysis.looking import layer_similarity, logit_lens

from engram_lm.analysis.suppression import suppression_effect
from engram_lm.cli import main
from engram_lm.errors import ConfigError
from engram_lm.evaluation.tasks import read_tasks
from engram_lm.planning.sizes import model_sizes
from engram_lm.serving.load import load_model
from engram_lm.studies.mechanism.study import MechanismStudy, default_split
from engram_lm.studies.mechanism.summary import mechanism_finding, summarize
from engram_lm.studies.study import with_seed
from engram_lm.studies.summary import paired_difference, spread
from engram_lm.training.assembly import open_text
from engram_lm.training.build import build_model, model_config
from engram_lm.training.data.tokenizer import train_tokenizer
from engram_lm.training.distribution import Ranks
from engram_lm.training.held_out import held_out_loss
from engram_lm.training.loop import best_dtype
from engram_lm.training.recipe import Recipe

WORDS = ("the", "memory", "of", "a", "table", "reads", "rows", "while", "attention", "turns", "over", "long", "text")
SIZES = {
    "blocks": 3,
    "hidden_size": 32,
    "memory_dim": 32,
    "heads": 4,
    "rows_per_head": 211,
    "vocab_size": 300,
    "sequence_length": 32,
    "batch_size": 4,
    "tokens": 1024,
    "analysis_tokens": 512,
    "streams": 1,
    "people": 4,
    "documents": 40,
    "questions": 4,
}
ARMS = ["baseline", "block-0", "block-1", "block-2", "blocks-1-2"]


def some_text(num_words=6000):
    chance = random.Random(0)
    return " ".join(chance.choice(WORDS) + ("." if chance.random() < 0.1 else "") for _ in range(num_words))


def held_out_tokens(out):
    """What the models of a finished study were judged on, as its recipe says."""
    recipe = Recipe.read(out / "seed-0/baseline.toml")
    return open_text(recipe, load_model(out / "seed-0/baseline/model")[1]).held_out


def as_flags(values):
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def built():
    """All arms before training, by name."""
    study = MechanismStudy(**{**SIZES, "streams": 2}).study()
    tokenizer = train_tokenizer([some_text()], SIZES["vocab_size"])
    recipes = {arm.name: with_seed(arm, 1) for arm in study.arms}
    return {
        name: build_model(recipe, model_config(recipe, tokenizer), tokenizer, Ranks())
        for name, recipe in recipes.items()
    }


def test_arms_start_from_the_same_weights_wherever_they_have_the_same(built):
    assert list(built) == ARMS
    baseline = dict(built["baseline"].named_parameters())
    for name in ARMS[1:]:
        for key, weight in built[name].named_parameters():
            if key in baseline:
                common = tuple(slice(size) for size in weight.shape)
                assert weight.equal(baseline[key][common]), (name, key)
    first, last = built["block-0"], built["block-2"]
    assert first.tables["0"].weight.equal(last.tables["2"].weight)
    assert first.tables["0"].weight.std() > 0.01
    for one, other in zip(
        first.model.layers[0].memory.parameters(), last.model.layers[2].memory.parameters(), strict=True
    ):
        assert one.equal(other)


def test_arms_spend_the_same_operations_and_hold_the_same_table(built):
    sizes = {name: model_sizes(model.config, context=32) for name, model in built.items()}
    wanted = sizes["block-0"]
    for name in ARMS:
        assert sizes[name].flops_per_token == pytest.approx(wanted.flops_per_token, rel=0.02), name
        if name != "baseline":
            assert sizes[name].memory_tables == pytest.approx(wanted.memory_tables, rel=0.1), name
    assert built["blocks-1-2"].config.memory_config.layers == (1, 2)
    assert built["block-1"].config.memory_config.num_streams == built["block-1"].config.num_streams == 2


def test_the_split_and_the_lone_module_stand_where_the_papers_do():
    assert default_split(12) == (1, 5), "layers 2 and 6 of 12, counted from 1"
    assert [default_split(blocks) for blocks in (2, 3, 6)] == [(), (1, 2), (1, 2)]
    assert MechanismStudy(blocks=6).split == (1, 2)
    arms = MechanismStudy(blocks=2, parts=("lens",)).study().arms
    assert [(arm.name, arm.recipe.model.memory.get("layers")) for arm in arms] == [("baseline", None), ("block-1", [1])]


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"blocks": 1}, "--blocks"),
        ({"split": (1, 1)}, "--split"),
        ({"split": (1, 9)}, "--split"),
        ({"memory_dim": 144}, "--memory-dim"),
        ({"hidden_size": 40}, "--hidden-size"),
        ({"streams": 0}, "--streams"),
        ({"parts": ()}, "--parts"),
        ({"top_k": 0}, "--top-k"),
    ],
)
def test_impossible_studies_are_refused(options, flag):
    with pytest.raises(ConfigError, match=flag):
        MechanismStudy(**options)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study that was stopped after its first model, and gone on with."""
    folder = tmp_path_factory.mktemp("mechanism")
    (folder / "text.txt").write_text("\n".join(some_text().split(". ")))
    out = folder / "out"
    call = ["study", "mechanism", "--out", str(out), "--data", str(folder / "text.txt"), *as_flags(SIZES)]

    def stop():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if (out / "seed-0/baseline/result.json").is_file():
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.002)

    stopper = threading.Thread(target=stop)
    stopper.start()
    status = main(call)
    stopper.join()
    assert status == 130
    kept = sorted(path.name for path in (out / "seed-0").iterdir())
    assert "baseline" in kept and "blocks-1-2" not in kept and not (out / "result.json").exists()
    before = (out / "seed-0/baseline/model/model.safetensors").stat().st_mtime_ns
    assert main([*call, "--resume"]) == 0
    assert (out / "seed-0/baseline/model/model.safetensors").stat().st_mtime_ns == before
    return out, call


def test_one_command_trains_every_arm_and_measures_what_it_says(study):
    out, _ = study
    result = json.loads((out / "result.json").read_text())
    (seed,) = result["looks"]
    assert list(result["arms"]) == ARMS and set(seed["cka"]) == set(ARMS[1:])
    for name in ("sweep.png", "lens.png", "cka.png", "retained.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    # The models and the text in the folder give what the result says.
    models = {name: load_model(out / "seed-0" / name / "model")[0] for name in ("baseline", "block-1")}
    tokenizer = load_model(out / "seed-0/block-1/model")[1]
    tokens = held_out_tokens(out)
    (told,) = result["arms"]["block-1"]["runs"]
    assert told["tokens"] == 1024 and told["num_evaluated_tokens"] == len(tokens) - 1
    assert told["dtype"] == best_dtype(torch.device("cpu"))
    assert held_out_loss(models["block-1"], tokens, length=32).loss == pytest.approx(told["loss"], rel=1e-3)
    options = {"length": 32, "max_tokens": 512}
    lens = logit_lens(models, tokenizer, tokens, **options)
    assert seed["lens"]["block-1"]["kl"] == pytest.approx(lens.models["block-1"].kl.tolist(), rel=1e-4)
    (found,) = layer_similarity(models, tokenizer, tokens, positions="word_ends", **options).maps
    assert seed["cka"]["block-1"]["row_model"] == "baseline"
    assert np.array(seed["cka"]["block-1"]["similarity"]) == pytest.approx(found.similarity, rel=1e-4)
    assert seed["cka"]["block-1"]["gain"] == pytest.approx(found.gain(2).tolist(), rel=1e-3)
    # What is asked for is in the text and not in what the loss is measured on.
    items = read_tasks(out / "tasks.jsonl")
    text, held_out = (next(out.glob(f"{name}-*.jsonl")).read_text() for name in ("text", "held-out"))
    recalled = [item for item in items if item.family == "recall"]
    assert len(items) == 12 and all(f"{item.prompt}{item.answer}." in text for item in recalled)
    assert not any(item.prompt in held_out for item in items)
    effect = suppression_effect(models["block-1"], tokenizer, items=items, tokens=tokens, length=32)
    assert seed["suppression"]["block-1"]["effect"]["loss"] == pytest.approx(effect.loss.tolist(), rel=1e-3)
    assert set(seed["suppression"]["baseline"]["scores"]) == {"recall", "recall-reworded", "reading"}
    assert result["summary"]["arms"]["block-1"]["suppression"]["conditions"].keys() >= {"memory on", "zero in block 1"}


def test_a_model_that_is_missing_is_trained_again_to_the_same_loss_and_no_other_is_touched(study, capsys):
    out, call = study
    first = json.loads((out / "result.json").read_text())
    models = {name: out / "seed-0" / name / "model/model.safetensors" for name in ARMS}
    times = {name: model.stat().st_mtime_ns for name, model in models.items()}
    shutil.rmtree(out / "seed-0/block-2")
    assert main([*call, "--resume", "--json"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["arms"]["block-2"]["runs"][0]["loss"] == first["arms"]["block-2"]["runs"][0]["loss"]
    assert second["looks"][0]["lens"] == first["looks"][0]["lens"]
    changed = [
        name for name in ARMS if (out / "seed-0" / name / "model/model.safetensors").stat().st_mtime_ns != times[name]
    ]
    assert changed == ["block-2"]


def test_a_study_is_gone_on_with_only_when_asked_and_a_damaged_result_is_named(study, capsys):
    out, call = study
    assert main(call) == 1
    assert "continue it with --resume" in capsys.readouterr().err
    trained = out / "seed-0/block-0/result.json"
    whole = trained.read_bytes()
    trained.write_bytes(whole[:40])
    assert main([*call, "--resume"]) == 1
    said = capsys.readouterr().err
    assert "result.json is not readable JSON" in said and "trains this model again" in said
    trained.write_bytes(whole)


def test_a_text_that_was_cut_off_is_refused(study, tmp_path, capsys):
    out, call = study
    tokens = max((out / "text").glob("*/train/*.safetensors"), key=lambda path: path.stat().st_size)
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-100])
    assert main([*call, "--resume"]) == 1
    said = "".join(capsys.readouterr().err.split())
    assert f"{tokens}has{len(whole) - 100}bytes,expected{len(whole)};remove" in said, said
    tokens.write_bytes(whole)
    (tmp_path / "letter.txt").write_text("dear reader")
    assert main(["study", "mechanism", "--out", str(tmp_path)]) == 1
    assert "is not a study" in capsys.readouterr().err


def made_result(**losses):
    """A result of two seeds, and what was looked at."""
    blocks = {"baseline": [], "block_0": [0], "block_1": [1], "both": [0, 1]}
    first = dict(enumerate(losses["baseline"]))
    arms = {}
    for name, found in losses.items():
        memory = {"memory": {"layers": blocks[name]}} if blocks[name] else {}
        difference = paired_difference(dict(enumerate(found)), first)
        arms[name] = {
            "title": name,
            "recipe": {"model": memory},
            "summary": {"loss": spread(found) | ({"difference": difference} if memory else {})},
        }
    depths = {"baseline": (3.0, 4.0), "block_0": (2.5, 3.0)}
    curve = {
        "num_layers": 2,
        "memory_blocks": [],
        "relative_depth": [0, 0.5, 1],
        "kl": [2, 1, 0],
        "prediction_depth": 1,
    }
    looks = [{"lens": {name: curve | {"kl_depth": depth[seed]} for name, depth in depths.items()}} for seed in range(2)]
    return {"arms": arms, "seeds": list(range(len(losses["baseline"])))}, looks


def test_the_summary_compares_seed_by_seed_and_names_the_best_single_module():
    result, looks = made_result(baseline=[3.0, 4.0], block_0=[2.9, 3.9], block_1=[2.8, 3.8], both=[2.7, 3.7])
    summary = summarize(result, looks)
    gain = summary["arms"]["block_1"]["gain"]
    assert gain["mean"] == pytest.approx(0.2) and gain["std"] == pytest.approx(0.0, abs=1e-12)
    assert summary["arms"]["block_1"]["loss"]["std"] == pytest.approx(0.5**0.5)
    assert summary["best"] == "block_1" and summary["kept_by_worst"] == pytest.approx(0.5)
    saved = summary["arms"]["block_0"]["lens"]["layers_saved"]
    assert saved["per_seed"] == [0.5, 1.0] and saved["mean"] == 0.75, "without memory it takes as many layers more"
    (table,) = mechanism_finding(result | {"summary": summary}).tables
    assert len(table.rows) == 4 and table.rows[1][-2] == "+0.750 ± 0.354" and table.rows[0][-2] == "–"
    worse = summarize(*made_result(baseline=[3.0], block_0=[3.2], block_1=[3.1]))
    assert worse["kept_by_worst"] is None and worse["arms"]["block_0"]["gain"]["std"] is None
