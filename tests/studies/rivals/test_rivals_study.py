"""The study of rivals: which arms it has, that they share their bytes, and what it refuses."""

import json
import types

import numpy as np
import pytest

from engram_lm.adapt.attachment import adapter_spec
from engram_lm.errors import ConfigError
from engram_lm.memory import EngramConfig
from engram_lm.studies.budget import arm_cost, check_budget
from engram_lm.studies.candidate_report import candidate_figures, candidate_finding
from engram_lm.studies.candidates import REFERENCE
from engram_lm.studies.rivals.arms import RIVALS
from engram_lm.studies.rivals.study import RivalsStudy
from engram_lm.studies.study import TrainedArm
from engram_lm.training.dry_run import priced_config


@pytest.mark.parametrize("size", ["100k", "500k"])
def test_every_rival_has_the_bytes_of_the_paper_s_layer_and_every_twin_its_operations(size):
    study = RivalsStudy(size=size, equal_flops=True).study()
    costs = check_budget(study)
    first = costs[REFERENCE]
    assert [arm.name for arm in study.arms[: len(RIVALS)]] == [one.name for one in RIVALS]
    for arm in study.arms:
        if not arm.is_control:
            assert costs[arm.name].bytes == pytest.approx(first.bytes, rel=0.02), arm.name
        if arm.name.endswith("-flops") or arm.name == "feed_forward":
            assert costs[arm.name].flops == pytest.approx(first.flops, rel=0.01), arm.name
    frozen, trained = ({one.name: one for one in study.arms}[name].recipe for name in ("frozen_rows", REFERENCE))
    assert frozen.differences(trained.to_dict()) == ["model.frozen_tables is True, was False"]


def test_rates_and_other_texts_reach_their_recipes():
    command = RivalsStudy(arms=("over_encoding",), arm_rates=("engram=7",), other_data=("wiki=here.txt",))
    study = command.study()
    rates = {arm.name: arm.recipe.optimizer.table_lr_multiplier for arm in study.arms}
    assert rates == {REFERENCE: 7.0, "over_encoding": 1.0}
    assert [measure.name for measure in study.measures] == ["loss", "loss_wiki"]
    assert study.arms[1].recipe.evaluation.texts[0].sources[0].path == "here.txt"
    assert priced_config(study.arms[1].recipe).memory_config.layer == "over_encoding"


def test_rates_are_tuned_for_tables_that_are_trained_on_text_and_a_seed_of_no_result():
    study = RivalsStudy(tune=(5, 50), arms=("pkm", "frozen_rows", "none", "scone")).study()
    assert [arm.name for arm in study.arms] == ["engram-x5", "engram-x50", "pkm-x5", "pkm-x50"]
    assert [arm.recipe.optimizer.table_lr_multiplier for arm in study.arms] == [5, 50, 5, 50]
    assert [measure.name for measure in study.measures] == ["validation_loss"]
    assert study.recipe_of(study.arms[0], 0).train.seed > 1000
    twins = RivalsStudy(tune=(0.1234567,), arms=("over_encoding",), equal_flops=True).study().arms
    assert twins[-1].group == "over_encoding-flops"
    assert twins[-1].recipe.optimizer.table_lr_multiplier == 0.1234567


def test_what_an_arm_needs_beside_its_weights_is_priced_with_them():
    arm = RivalsStudy().study().arms[0]
    assert arm_cost(type(arm)(**{**vars(arm), "extra_bytes": 1000})).bytes == arm_cost(arm).bytes + 1000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"arms": ("over_encodin",)}, "did you mean 'over_encoding'"),
        ({"arm_rates": ("engram",)}, "NAME=RATE"),
        ({"arm_rates": ("engram=fast",)}, "finite number above 0, not 'fast'"),
        ({"arm_rates": ("engrm=2",)}, "did you mean 'engram'"),
        ({"other_data": ("a=b", "a=c")}, "each name once"),
    ],
)
def test_impossible_flags_are_refused_in_words(flags, message):
    with pytest.raises(ConfigError, match=message):
        RivalsStudy(**flags)


LOSSES = {"engram": 4.5, "bigrams": 4.48, "memory_plus": 4.4, "over_encoding": 4.55, "none": 4.7, "frozen_rows": 4.69}


def finding_of(tmp_path, *, seeds=3):
    """What the study would say, had its arms had these losses."""
    command = RivalsStudy(arms=tuple(LOSSES), out=tmp_path)
    study, chance = command.study(), np.random.default_rng(0)
    trained = []
    for seed in range(seeds):
        of_seed = chance.normal(scale=0.02)
        arms = {}
        for arm in study.arms:
            loss = LOSSES[arm.name] + of_seed + chance.normal(scale=0.001)
            found = {"held_out": {"loss": loss}}
            arms[arm.name] = TrainedArm(arm=arm, seed=seed, folder=tmp_path / arm.name, result=found)
            arms[arm.name].__dict__["records"] = []
        trained.append(arms)
    result = json.loads(json.dumps(command.measure(trained, types.SimpleNamespace(study=study))))
    return result, candidate_finding(result)


def test_candidates_are_ranked_with_paired_errors_and_what_they_cost(tmp_path):
    result, finding = finding_of(tmp_path)
    ranking = finding.tables[0]
    assert [row[0] for row in ranking.rows] == [
        "Memory+", "bigrams alone", "Engram", "OverEncoding", "random frozen rows (control)", "no memory (control)",
    ]  # fmt: skip
    low, high = (float(part) for part in ranking.rows[1][2].partition("(")[2].rstrip(")").split(" to "))
    assert -0.03 < low < -0.02 < high < -0.01  # the spread of seeds, 0.02, is not in it
    assert ranking.rows[0][5] == "+13.9%" and ranking.rows[2][5] == "+0.0%"
    assert finding.headline.startswith("Better than the paper's layer at equal bytes: Memory+ (−0.1")
    assert "no more operations than the paper's layer takes, bigrams alone has the lowest loss" in finding.detail
    assert "where 14% more operations do not matter, Memory+ has" in finding.detail
    assert [picture.name for picture in candidate_figures(result)] == ["rivals", "rivals_flops"]


def test_too_few_seeds_rank_nobody(tmp_path):
    _, finding = finding_of(tmp_path, seeds=2)
    assert "too few seeds" in finding.headline and "lowest loss" not in finding.detail


def test_a_rival_is_not_attached_to_another_model():
    config = EngramConfig(hidden_size=32, layer="ngram_mean", rows_per_head=1, memory_dim=16)
    with pytest.raises(ConfigError, match="reads no hashed rows and can be part of a model of this library alone"):
        adapter_spec(types.SimpleNamespace(hidden_size=32), None, config)
