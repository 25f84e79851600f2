"""The study of ablations: arms that differ from the reference in one thing, and noise that is told from differences."""

import dataclasses
import json
from typing import get_args

import numpy as np
import pytest
from tests.studies.test_study import some_text

from engram_lm.cli import main
from engram_lm.errors import ConfigError
from engram_lm.studies.ablations import (
    AGAIN,
    REFERENCE,
    AblationStudy,
    Group,
    ablation_finding,
    differences,
    figures,
    group_of,
)
from engram_lm.studies.budget import check_budget
from engram_lm.studies.published_sweeps import ABLATIONS
from engram_lm.training.build import build_model, model_config
from engram_lm.training.data.tokenizer import train_tokenizer
from engram_lm.training.distribution import Ranks
from engram_lm.training.dry_run import priced_config


@pytest.fixture(scope="module")
def arms():
    return {arm.name: arm for arm in AblationStudy(vocab_size=300).study().arms}


def test_every_group_has_arms_and_the_tables_are_equally_large(arms):
    assert {group_of(name) for name in arms} == {REFERENCE, *get_args(Group)} and next(iter(arms)) == REFERENCE
    assert set(ABLATIONS) <= set(arms)
    chosen = AblationStudy(groups=("gate", "orders")).study().arms
    assert {group_of(arm.name) for arm in chosen} == {REFERENCE, "gate", "orders"}
    costs = check_budget(AblationStudy(vocab_size=300).study())
    assert len({costs[name].tokens for name in arms}) == 1
    tables = {name: priced_config(arm.recipe).memory_config for name, arm in arms.items()}
    wanted = tables[REFERENCE].table_parameters()
    for name, config in tables.items():
        if name not in ("controls-none", "controls-rows", "streams-one_none"):
            assert config.table_parameters() == pytest.approx(wanted, rel=0.02), name


def test_an_arm_differs_from_the_reference_in_what_it_says(arms):
    first = arms[REFERENCE].recipe
    config = priced_config(first)
    assert config.num_streams == 4 and config.memory_config.orders == (2, 3) and config.memory_layers == (1,)
    assert config.memory_config.gate == "signed_sqrt" and config.memory_config.kernel_size == 4
    for name, arm in arms.items():
        different = {words.split(" is ")[0] for words in arm.recipe.differences(first.to_dict())}
        if group_of(name) in ("gate", "token_map", "convolution", "orders", "heads"):
            field = {"token_map": "token_map", "convolution": "kernel_size", "heads": "num_heads"}
            wanted = field.get(group_of(name), group_of(name))
            assert different == {f"model.memory.{wanted}"}, (name, different)
        elif group_of(name) in ("rate", "optimizer"):
            wanted = {"rate": "table_lr_multiplier", "optimizer": "tables"}[group_of(name)]
            assert different == {f"optimizer.{wanted}"}
    assert not arms[AGAIN].recipe.differences(first.to_dict())
    study = AblationStudy().study()
    by_name = {arm.name: arm for arm in study.arms}
    seeds = {name: study.recipe_of(by_name[name], 0).train.seed for name in (REFERENCE, AGAIN, "gate-none")}
    assert seeds[REFERENCE] == seeds["gate-none"] != seeds[AGAIN]


def test_arms_begin_with_the_same_weights(arms):
    tokenizer = train_tokenizer([some_text()], 300)
    built = {
        name: build_model(arms[name].recipe, model_config(arms[name].recipe, tokenizer), tokenizer, Ranks())
        for name in (REFERENCE, "gate-none", "orders-1-2-3", "streams-single", "layers-two", "token_map-raw")
    }
    first = dict(built[REFERENCE].named_parameters())
    for name, model in built.items():
        for key, weight in model.named_parameters():
            if "memory" not in key:
                assert weight.equal(first[key]), (name, key)
    assert (
        built["gate-none"]
        .model.layers[1]
        .memory.key_value.weight.equal(built[REFERENCE].model.layers[1].memory.key_value.weight)
    )
    assert built["gate-none"].tables["1"].weight.equal(built[REFERENCE].tables["1"].weight)
    assert built["token_map-raw"].hash_spec.token_map.is_identity
    assert built[REFERENCE].hash_spec.vocab_size < built["token_map-raw"].hash_spec.vocab_size


def made_result(noise, effects, *, num_seeds=4, seed=0):
    """A result whose arms have an effect on top of the noise of runs and of seeds."""
    chance = np.random.default_rng(seed)
    shared = chance.normal(0, 0.05, num_seeds)
    arms = {}
    for name, effect in effects.items():
        own = chance.normal(0, 0.05, num_seeds) if name == AGAIN else shared
        values = 4 + effect + own + chance.normal(0, noise, num_seeds)
        runs = [{"seed": number, "measures": {"loss": value}, "failed": None} for number, value in enumerate(values)]
        difference = {"mean": 0.0, "std": 0.01, "per_seed": [0.0], "p_value": None}
        arms[name] = {
            "title": name, "is_control": name == "controls-none", "runs": runs, "cost": {"bytes": 100, "flops": 100},
            "summary": {"loss": {"mean": float(values.mean()), "std": 0.01, "difference": difference}},
        }  # fmt: skip
    measures = {"loss": {"title": "held-out loss", "unit": "nats per token"}}
    return {"arms": arms, "seeds": list(range(num_seeds)), "measures": measures}


def test_an_equal_arm_is_within_the_noise_and_a_different_one_is_not():
    effects = {
        REFERENCE: 0.0,
        "controls-none": 0.3,
        "controls-hash": 0.0,
        AGAIN: 0.0,
        "gate-none": 0.02,
        "heads-2": 0.0,
    }
    held = dict.fromkeys(effects, 0)
    for seed in range(40):
        result = made_result(0.002, effects, seed=seed)
        found = differences(result)
        for name, one in found.items():
            low, high = one["interval"]
            held[name] += low <= effects[name] <= high
        assert found["gate-none"]["interval"][0] > 0 and found["controls-none"]["interval"][0] > 0
    assert all(held[name] >= 33 for name in effects if name != REFERENCE), held
    finding = ablation_finding(result | {"differences": found})
    assert finding.headline.startswith("Worse than the reference: gate-none (+0.0") and "none" in finding.headline
    assert "differs from itself with another hash by" in finding.detail
    row = next(row for row in finding.tables[0].rows if row[0] == "gate-none")
    assert row[3] == "+0.0046" and row[4:] == ["+0.0%", "+0.0%"], "the paper's difference and the costs"
    (picture,) = figures(result | {"differences": found})
    assert picture.name == "ablations"
    few = made_result(0.002, effects, num_seeds=2)
    assert "too few seeds" in ablation_finding(few | {"differences": differences(few)}).headline


def test_an_arm_that_diverged_has_no_difference_and_does_not_spoil_the_others():
    effects = {REFERENCE: 0.0, "gate-none": 0.02, "rate-100": 0.0}
    result = made_result(0.002, effects)
    result["arms"]["rate-100"]["runs"][1] |= {"measures": {}, "failed": "diverged"}
    assert set(differences(result)) == {"gate-none"}
    assert len(ablation_finding(result | {"differences": differences(result)}).tables[0].rows) == 2


def test_one_command_trains_the_chosen_groups(tmp_path, capsys):
    (tmp_path / "text").mkdir()
    for number in range(60):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number} {some_text(200)[number:]}")
    call = ["study", "ablations", "--data", str(tmp_path / "text"), "--out", str(tmp_path / "out"), "--seeds", "2"]
    call += ["--groups", "gate", "token_map", "--tokens", "512", "--batch-size", "2", "--sequence-length", "32"]
    call += ["--vocab-size", "300", "--rows-per-head", "97", "--dtype", "float32", "--mode", "one_by_one"]
    assert main([*call, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["differences"]) == {"gate-plain", "gate-none", "token_map-raw"}
    losses = {name: [run["loss"] for run in arm["runs"]] for name, arm in result["arms"].items()}
    value = np.mean(losses["gate-none"]) - np.mean(losses[REFERENCE])
    assert result["differences"]["gate-none"]["value"] == pytest.approx(value)
    assert (tmp_path / "out/ablations.png").read_bytes().startswith(b"\x89PNG")
    # Another group is added; what is trained stays.
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("seed-*/*/model/model.safetensors")}
    call[call.index("token_map")] = "convolution"
    assert len(stamps) == 8 and main([*call, "--resume"]) == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_impossible_ablations_are_refused():
    with pytest.raises(ConfigError, match="--groups names at least one group"):
        AblationStudy(groups=())
    with pytest.raises(ConfigError, match="--streams"):
        AblationStudy(streams=0)
    one = AblationStudy(streams=1).study()
    assert not any(group_of(arm.name) == "streams" for arm in one.arms)
    assert dataclasses.replace(one, seeds=1)
