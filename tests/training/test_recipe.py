"""Recipes: every key is checked, flags replace what the file says, what is written is read back as it was."""

import tomllib
from pathlib import Path

import pytest
import torch

from engram_lm.errors import ConfigError, MismatchError
from engram_lm.model import EngramForCausalLM
from engram_lm.training.dry_run import dry_run, priced_config
from engram_lm.training.recipe import Recipe
from engram_lm.training.recipe_file import divide, override, write_toml

RECIPES = sorted(
    path for path in (Path(__file__).parents[2] / "recipes").glob("*.toml") if not path.name.startswith("adapt")
)
SMALL = "[train]\nnum_steps = 3\n"


def recipe(text=SMALL, *overrides):
    return Recipe.from_dict(override(tomllib.loads(text), overrides))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_written_in_full_is_read_back_as_it_was(path):
    one = Recipe.read(path)
    again = Recipe.from_dict(tomllib.loads(write_toml(one.to_dict())))
    assert again == one
    again.check_resumable(one.to_dict())


def test_flags_replace_what_the_file_says():
    one = recipe(
        SMALL + "batch_size = 4\n",
        "--train.batch-size", "8", "--optimizer.lr=1e-4", "--model.memory.rows_per_head", "500",
        "--data.sources", '["a.txt", {path = "b.jsonl", field = "body"}]', "--model.preset", "moe-nano",
    )  # fmt: skip
    assert (one.train.batch_size, one.optimizer.lr, one.model.memory) == (8, 1e-4, {"rows_per_head": 500})
    assert [source.path for source in one.data.sources] == ["a.txt", "b.jsonl"]
    assert one.data.sources[1].field == "body" and one.model.preset == "moe-nano"
    assert recipe(SMALL, "--data.sources", "text.txt").data.sources[0].path == "text.txt"


@pytest.mark.parametrize(
    ("text", "flags", "words"),
    [
        ("[train]\nnum_step = 3\n", [], "unknown key train.num_step; did you mean 'train.num_steps'"),
        ("[trian]\nnum_steps = 3\n", [], "unknown key trian; did you mean 'train'"),
        ("", [], "lacks train"),
        ("[train]\n", [], "lacks train.num_steps"),
        ("[train]\nnum_steps = 0\n", [], r"\[train\] .*num_steps >= 1"),
        ("[train]\nnum_steps = 1.5\n", [], "train.num_steps is a whole number, not 1.5"),
        ("[train]\nnum_steps = true\n", [], "train.num_steps is a whole number, not True"),
        (SMALL, ["--optimizer.lr", "nan"], "lr"),
        (SMALL, ["--optimizer.lr", "fast"], "optimizer.lr is a number, not 'fast'"),
        (SMALL, ["--train.dtype", "bfloat"], "did you mean 'bfloat16'"),
        (SMALL, ["--train"], "neither a flag of engram-lm train nor a key"),
        (SMALL, ["--train.seed"], "needs a value"),
        (SMALL, ["--train.seed.x", "1"], "not a section|whole number"),
        (SMALL, ["--data", "x"], "neither a flag"),
        ("[model]\nconfig = 'a'\nweights = 'b'\n" + SMALL, [], "keep one of them"),
    ],
)
def test_mistakes_are_answered_with_their_place(text, flags, words):
    with pytest.raises(ConfigError, match=words):
        recipe(text, *flags)


def test_a_recipe_may_be_saved_by_any_editor_and_name_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "a.toml"
    path.write_bytes(
        b'\xef\xbb\xbf[data]\r\nsources = ["~/notes"]\r\ncache = "~/cache"\r\n[train]\r\nnum_steps = 1\r\n'
    )
    recipe = Recipe.read(path)
    assert (recipe.data.sources[0].path, recipe.data.cache) == (str(tmp_path / "notes"), tmp_path / "cache")
    assert Recipe.read(path, ["--data.cache", "~/other"]).data.cache == tmp_path / "other"


def test_a_file_that_is_no_toml_is_named(tmp_path):
    (tmp_path / "bad.toml").write_text("[train\n")
    with pytest.raises(ConfigError, match=r"bad.toml is not TOML.*line 1"):
        Recipe.read(tmp_path / "bad.toml")
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        Recipe.read(tmp_path / "none.toml")


def test_a_run_goes_on_with_its_own_recipe_only():
    saved = recipe().to_dict()
    same = ("--log.every", "7", "--parallel.backbone", "fsdp2", "--train.micro_batch_size", "1")
    recipe(SMALL, *same).check_resumable(saved)
    with pytest.raises(MismatchError, match=r"train.seed is 1, was 0.*optimizer.lr is 0.5, was "):
        recipe(SMALL, "--optimizer.lr", "0.5", "--train.seed", "1").check_resumable(saved)
    with pytest.raises(MismatchError, match=r"model.memory.rows_per_head is 500, was not given"):
        recipe(SMALL, "--model.memory.rows_per_head", "500").check_resumable(saved)


def test_text_of_every_kind_survives_a_recipe():
    for value in ('quo"te', "back\\slash", "new\nline", "ünïcode \x7f \x01", "", "[a]"):
        one = recipe(SMALL + f"[model.memory]\n{write_toml({'x': value})}")
        assert one.model.memory == {"x": value}
        assert Recipe.from_dict(tomllib.loads(write_toml(one.to_dict()))) == one


def test_keys_may_stand_before_the_recipe_on_a_command_line():
    arguments = ["--train.num_steps", "4", "mine.toml", "--out", "runs/a.b", "--optimizer.lr=-1", "--x.y", "--resume"]
    rest, keys = divide(arguments)
    assert rest == ["mine.toml", "--out", "runs/a.b", "--resume"]
    assert keys == ["--train.num_steps", "4", "--optimizer.lr=-1", "--x.y"]
    with pytest.raises(ConfigError, match=r"--x\.y needs a value"):
        override({}, keys)


def test_a_seed_that_torch_cannot_take_is_refused():
    with pytest.raises(ConfigError, match="seed from 0 to"):
        Recipe.from_dict({"train": {"num_steps": 1, "seed": 2**63}})


def test_a_dry_run_prices_the_vocabulary_of_the_tokenizer_that_will_be_trained():
    def priced(size):
        recipe = Recipe.from_dict({"train": {"num_steps": 1}, "tokenizer": {"vocab_size": size}})
        return dry_run(recipe, 1)["bill"]["parameters"]["backbone"]

    assert priced(1000) - priced(900) == 100 * 128  # the head is the embedding


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_planned_and_built_without_memory_for_it(path):
    one = Recipe.read(path)
    found = dry_run(one, 64 if "paper" in path.stem else 2)
    config = priced_config(one)
    with torch.device("meta"):
        model = EngramForCausalLM(config)
    model.tie_weights()
    assert found["bill"]["parameters"]["total"] == sum(parameter.numel() for parameter in model.parameters())
    if "paper" in path.stem:
        vocabulary = config.vocab_size * config.hidden_size  # counted once by the paper, tied or not
        paper = {"paper-27b": 26.7e9, "paper-40b": 39.5e9}[path.stem]
        assert found["bill"]["parameters"]["total"] - vocabulary == pytest.approx(paper, rel=2e-3)
        # 1280 x 4096 x 50,000: the paper's 262 B tokens.
        assert found["num_tokens"] == 262_144_000_000
    assert {"table_rows", "table_optimizer", "total"} <= set(found["bill"]["memory"])
    assert (found["bill"]["tables_sent"]["total"] > 0) is (config.memory is not None)
