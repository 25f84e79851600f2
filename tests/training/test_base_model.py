"""Recipes that start from a pretrained model: memory, LoRA or all weights are trained as any run is."""

import json

import pytest
import torch
from tests.adapt.small_models import TEXT, TOKENIZER, small_model
from tests.training.test_run import measured, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from engram_lm import MemoryAdapter
from engram_lm.cli import main
from engram_lm.errors import ConfigError, MismatchError
from engram_lm.training.assembly import find_tokenizer, open_text
from engram_lm.training.checkpoints.saved_state import SavedState
from engram_lm.training.held_out import held_out_loss
from engram_lm.training.recipe import Recipe
from engram_lm.training.recipe_file import write_toml

MEMORY = {"layers": [0, 2], "num_heads": 2, "rows_per_head": 199}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    small_model("llama").save_pretrained(folder / "base")
    TOKENIZER.save_pretrained(folder / "base")
    (folder / "text").mkdir()
    for number in range(30):
        (folder / "text" / f"{number}.txt").write_text(f"Text {number}. " + TEXT[number * 37 :])
    return folder


def table(material, **sections):
    return {
        "model": {"base": str(material / "base")},
        "data": {"sources": [str(material / "text")], "cache": str(material / "shards"), "sequence_length": 32}
        | {"held_out": 0.2},
        "train": {"num_steps": 6, "batch_size": 4, "dtype": "float32", "device": "cpu"},
        "optimizer": {"backbone": "adamw", "lr": 1e-2, "weight_decay": 0.0},
        "checkpoint": {"every": 2, "asynchronous": False},
        "log": {"tensorboard": "no"},
        **sections,
    }


KINDS = {
    "memory": {"adapter": MEMORY},
    "memory with occupancy": {"adapter": {**MEMORY, "rows_per_head": 4999, "occupancy": "ngrams"}},
    "memory in bfloat16": {"adapter": {**MEMORY, "table_dtype": "bfloat16", "occupancy": "rows"}},
    "memory and LoRA": {"adapter": MEMORY, "lora": {"rank": 2, "dropout": 0.3}},
    "rows of hidden states": {"adapter": {**MEMORY, "initialization": "transfer", "transfer_tokens": 600}},
    "all of it": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_from_a_base_stops_and_goes_on_as_if_it_had_not(kind, material, tmp_path):
    sections = table(material, **KINDS[kind])
    whole = run(tmp_path / "whole", sections)
    run(tmp_path / "stopped", sections, stop_after=3)
    again = run(tmp_path / "stopped", sections, resume=True)
    assert measured(tmp_path / "stopped") == measured(tmp_path / "whole")
    assert again["held_out"] == whole["held_out"]
    lines = measured(tmp_path / "whole")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.05
    written = {path.name for path in (tmp_path / "whole").iterdir()} & {"memory", "lora", "model"}
    parts = {name for name, section in (("memory", "adapter"), ("lora", "lora")) if section in KINDS[kind]}
    assert written == (parts or {"model"})
    tensors = SavedState.read(tmp_path / "whole" / "checkpoints" / "step-00000006").tensors
    assert ("model/model.embed_tokens.weight" in tensors) is (not parts)  # a frozen base is in no checkpoint


@pytest.mark.parametrize("occupancy", ["none", "rows", "ngrams"])
def test_what_a_run_leaves_gives_the_loss_that_it_reports(occupancy, material, tmp_path):
    sections = table(material, adapter={**MEMORY, "occupancy": occupancy})
    result = run(tmp_path / "run", sections)
    recipe = Recipe.from_dict(sections)
    text = open_text(recipe, find_tokenizer(recipe, tmp_path / "run" / "tokenizer"))
    model = AutoModelForCausalLM.from_pretrained(material / "base", dtype=torch.float32)
    adapter = MemoryAdapter.from_pretrained(
        model, tmp_path / "run" / "memory", tokenizer=AutoTokenizer.from_pretrained(material / "base")
    )
    found = held_out_loss(model, text.held_out, length=32)
    assert found.loss == pytest.approx(result["held_out"]["loss"], abs=1e-6)
    trained = sum(parameter.numel() for parameter in adapter.parameters())
    assert result["parameters"]["trained"] == trained > result["parameters"]["tables"] > 0


def test_controls_keep_their_rows_or_read_others(material, tmp_path):
    plain = run(tmp_path / "plain", table(material, adapter=MEMORY))
    frozen = table(material, adapter=MEMORY)
    frozen["model"]["frozen_tables"] = True
    kept = run(tmp_path / "frozen", frozen)
    assert kept["parameters"]["trained"] == plain["parameters"]["trained"] - plain["parameters"]["tables"]
    permuted = run(tmp_path / "permuted", table(material, adapter={**MEMORY, "control": "permuted_hash"}))
    losses = [one["held_out"]["loss"] for one in (plain, kept, permuted)]
    assert len(set(losses)) == 3 and losses[0] == min(losses)


def test_a_run_may_leave_neither_checkpoints_nor_a_model(material, tmp_path):
    sections = table(material, checkpoint={"keep_last": 0, "write_model": False})
    result = run(tmp_path / "run", sections)
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {
        "recipe.toml", "result.json", "metrics.jsonl", "loss.png", "tokenizer", ".lock", ".tokenizer.lock",
    }  # fmt: skip
    assert run(tmp_path / "run", sections, resume=True) == result


def test_another_base_is_refused_on_resume_and_mistakes_are_answered(material, tmp_path, capsys):
    base = tmp_path / "base"
    small_model("llama").save_pretrained(base)
    TOKENIZER.save_pretrained(base)
    sections = table(material, adapter=MEMORY, model={"base": str(base)})
    run(tmp_path / "run", sections, stop_after=2)
    model = small_model("llama")
    with torch.no_grad():
        model.lm_head.weight.add_(1e-3)
    model.save_pretrained(base)
    with pytest.raises(MismatchError, match="base"):
        run(tmp_path / "run", sections, resume=True)
    with pytest.raises(ConfigError, match="3 decoder layers, from 0"):
        run(tmp_path / "a", table(material, adapter={**MEMORY, "layers": [3]}))
    with pytest.raises(ConfigError, match=r"engram-lm train recipes/base-cpu.toml"):
        run(tmp_path / "b", table(material, model={"base": str(tmp_path)}, tokenizer={"path": str(base)}))
    with pytest.raises(ConfigError, match="there are"):
        run(tmp_path / "c", table(material, lora={"rank": 1, "targets": ["wq"]}))
    with pytest.raises(ConfigError, match=r"name it as model.base"):
        Recipe.from_dict(table(material, adapter=MEMORY, model={}))
    path = tmp_path / "recipe.toml"
    path.write_text(write_toml(table(material, adapter=MEMORY)))
    assert main(["train", str(path), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["bill"]["parameters"]["trained"] > 0 and plan["num_steps"] == 6
