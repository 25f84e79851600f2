"""The smallest models: what the arms of a study share, and what they cost."""

import dataclasses
import json

import pytest
import torch
from tests.studies.test_study import some_text

from engram_lm.errors import ConfigError
from engram_lm.studies.budget import check_budget, price
from engram_lm.studies.micro_models import MicroModelFlags
from engram_lm.studies.rates import FIRST_SEED, RatesStudy
from engram_lm.studies.study import Arm, Budget, Study
from engram_lm.studies.text_flags import like
from engram_lm.training.assembly import find_tokenizer, open_text
from engram_lm.training.build import build_model, model_config
from engram_lm.training.distribution import Ranks
from engram_lm.training.recipe import Recipe


@pytest.fixture
def flags(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text").mkdir()
    for number in range(300):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number} {some_text(200 + number)}")
    return MicroModelFlags(data=(tmp_path / "text",), vocab_size=300, tokens=16_384)


def built(recipe, tokenizer):
    return build_model(recipe, model_config(recipe, tokenizer), tokenizer, Ranks())


@pytest.mark.parametrize("size", ["100k", "500k", "2m"])
@pytest.mark.parametrize("num_experts", [64, 128])
def test_a_budget_is_divided_at_every_ratio(size, num_experts):
    flags = MicroModelFlags(size=size)
    ratios = (1.0, 0.9, 0.75, 0.5, 0.25, 0.1, 0.0)
    arms = tuple(
        Arm(name=f"r{ratio}", title="", recipe=flags.recipe(flags.allocated(ratio, num_experts=num_experts)))
        for ratio in ratios
    )
    budget = Budget(equal=("active", "total", "bytes", "flops"))
    costs = check_budget(Study(name="ratios", question="", arms=arms, budget=budget))
    assert costs["r1.0"].active == pytest.approx({"100k": 1e5, "500k": 5e5, "2m": 2e6}[size], rel=0.05)
    assert arms[0].recipe.model.preset == f"moe-micro-{size}" and not arms[0].recipe.model.memory


def test_memory_in_the_dense_backbone_adds_memory_and_nothing_else():
    flags = MicroModelFlags()
    dense, memory = (price(flags.recipe(flags.model(family))) for family in ("dense", "dense_engram"))
    own = flags.config("engram").memory_config
    assert memory.total - dense.total == own.num_parameters()
    assert memory.active - dense.active == own.layer_parameters() + own.memory_dim
    deeper = flags.model("dense_engram", backbone={"num_hidden_layers": 5}, memory={"layers": (1, 3)})
    assert not model_config(flags.recipe(deeper)).has_experts
    assert Recipe.from_dict(flags.recipe(deeper).to_dict()) == flags.recipe(deeper), "a recipe file holds it"


def test_arms_begin_with_the_same_weights_and_read_the_same_text(flags, tmp_path):
    flags.prepare(tmp_path)
    first = flags.model("moe")
    recipes = [flags.recipe(first)]
    recipes += [flags.recipe(flags.allocated(ratio, like=like(first))) for ratio in (0.75, 0.25)]
    recipes += [flags.recipe(flags.model("dense_engram", like=like(first)))]
    tokenizer = find_tokenizer(recipes[0], tmp_path / "tokenizer")
    models = [built(recipe, tokenizer) for recipe in recipes]
    weights = [dict(model.named_parameters()) for model in models]
    for other in weights[1:]:
        shared = [name for name in weights[0] if name in other]
        assert len(shared) > 10
        for name in shared:
            common = tuple(slice(0, min(pair)) for pair in zip(weights[0][name].shape, other[name].shape, strict=True))
            assert torch.equal(weights[0][name][common], other[name][common]), name
    texts = [open_text(recipe, tokenizer) for recipe in recipes]
    assert len({text.digest for text in texts}) == 1, "one packing serves all arms"
    assert len(list((tmp_path / "cache/engram-lm/shards").glob("*/index.json"))) == 1
    assert texts[0].held_out is not None and texts[0].texts["validation"].tokens.size


def test_documents_held_out_do_not_depend_on_the_study_and_validation_is_beside_them(flags, tmp_path):
    names = [flags.prepare_tokenizer(tmp_path / study) for study in ("one", "two")]
    assert names[0] == names[1] != []
    folders = [next((tmp_path / study).glob("tokenizer-*")) for study in ("one", "two")]
    tokenizers = [(folder / "tokenizer.json").read_bytes() for folder in folders]
    assert tokenizers[0] == tokenizers[1]
    tokenizer = find_tokenizer(flags.recipe(flags.model("dense")), folders[0])
    text = open_text(flags.recipe(flags.model("dense")), tokenizer)
    held_out, validation = (tokenizer.decode(part) for part in (text.held_out, text.texts["validation"].tokens))
    trained = tokenizer.decode(text.train[:])
    assert held_out[:2000] not in trained and validation[:2000] not in trained
    assert held_out[:2000] not in validation and validation[:2000] not in held_out


def test_rates_are_compared_on_validation_text_with_seeds_that_no_other_study_has(flags, tmp_path):
    rates = RatesStudy(
        data=flags.data,
        vocab_size=300,
        tokens=4096,
        families=("dense", "dense_engram"),
        lrs=(0.01,),
        table_lr_multipliers=(5.0, 15.0),
        out=tmp_path / "rates",
    )
    assert rates.run() == 0
    result = json.loads((tmp_path / "rates/result.json").read_text())
    assert list(result["arms"]) == ["dense-0.01", "dense_engram-0.01-x5", "dense_engram-0.01-x15"]
    for name, arm in result["arms"].items():
        run = json.loads((tmp_path / "rates/seed-0" / name / "result.json").read_text())
        loss = arm["runs"][0]["measures"]["validation_loss"]
        assert loss == run["texts"]["validation"]["loss"] != run["held_out"]["loss"]
        recipe = Recipe.read(tmp_path / "rates/seed-0" / name / "recipe.toml")
        assert recipe.train.seed == FIRST_SEED and recipe.optimizer.lr == 0.01
    losses = [arm["runs"][0]["measures"]["validation_loss"] for arm in result["arms"].values()]
    assert len(set(losses)) == 3, "a rate of tables that changes nothing would be none"
    more = dataclasses.replace(rates, families=("dense_engram",), lrs=(0.01, 0.02)).study()
    assert [arm.name[len("dense_engram-") :] for arm in more.arms] == ["0.01-x5", "0.01-x15", "0.02-x5"]


def test_impossible_rates_are_refused():
    with pytest.raises(ConfigError, match="--lr must be a finite number above 0"):
        MicroModelFlags(lr=0.0)
    assert dataclasses.replace(MicroModelFlags(), lr=0.5).optimizer.lr == 0.5
