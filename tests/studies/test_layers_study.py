"""The study of layers: its arms, its verdict on made-up losses, and a whole tiny study of every candidate."""

import json
import types

import numpy as np
import pytest
from tests.studies.test_study import some_text

from engram_lm.errors import ConfigError, RunFolderError
from engram_lm.studies.budget import arm_cost, check_budget
from engram_lm.studies.candidates import REFERENCE
from engram_lm.studies.layers.arms import CANDIDATES
from engram_lm.studies.layers.study import LayersStudy, layers_finding
from engram_lm.studies.layers.verdict import best_three
from engram_lm.studies.study import TrainedArm
from engram_lm.training.dry_run import priced_config


@pytest.mark.parametrize("size", ["100k", "500k", "2m"])
def test_every_candidate_has_the_bytes_of_the_paper_s_layer(size):
    command = LayersStudy(size=size)
    study = command.study()
    costs = check_budget(study)
    assert [arm.name for arm in study.arms] == [
        one.name
        for one in CANDIDATES
        if size != "100k" or one.name != "block_2"  # it has two blocks
    ]
    memories = {arm.name: priced_config(arm.recipe).memory_config for arm in study.arms}
    for arm in study.arms:
        if not arm.is_control:
            assert costs[arm.name].bytes == pytest.approx(costs[REFERENCE].bytes, rel=0.006), arm.name
            assert arm_cost(arm).flops == pytest.approx(costs[REFERENCE].flops, rel=0.06), arm.name
    assert memories["rows_3_1"].rows_per_head == (30_000, 10_000)
    assert memories["unigrams"].orders == (1, 2, 3) and memories["unigrams"].rows_per_head[0] == 4096
    assert memories["unigrams"].head_dim == memories[REFERENCE].head_dim
    # What the filter takes is missing in the table.
    bits = memories["back_off"].option("filter_bits")
    paid = memories[REFERENCE].table_parameters() - memories["back_off"].table_parameters()
    assert paid == pytest.approx(bits / 32, rel=0.01) and bits / 32 == pytest.approx(
        command.reference.table_parameters() / 16, rel=0.01
    )


def test_single_tokens_have_as_many_rows_as_the_vocabulary_of_the_study():
    study = LayersStudy(arms=("unigrams", "orders_1_2"), vocab_size=8192).study()
    orders = {arm.name: priced_config(arm.recipe).memory_config for arm in study.arms}
    assert [orders[name].rows_per_head[0] for name in ("unigrams", "orders_1_2")] == [8192, 8192]


def test_twins_of_equal_operations_are_named_by_what_they_are_twins_of():
    names = [arm.name for arm in LayersStudy(equal_flops=True).study().arms]
    twins = [name for name in names if name.endswith("-flops")]
    assert twins and "block_2" not in names
    losses = {name: {"summary": {"loss": {"mean": 4.0}}, "is_control": False, "runs": []} for name in twins}
    assert best_three({"arms": losses}) == [name.removesuffix("-flops") for name in twins[:3]]


def made_up(loss_of, *, seeds=5, noise=0.002, **flags):
    """A study's result, had its arms had these losses."""
    command, chance = LayersStudy(seeds=seeds, **flags), np.random.default_rng(0)
    study, found = command.study(), []
    for number in range(seeds):
        of_seed, arms = chance.normal(scale=0.02), {}
        for arm in study.arms:
            loss = 4.5 + loss_of.get(arm.name, 0.0) + of_seed + chance.normal(scale=noise)
            trained = TrainedArm(arm=arm, seed=number, folder=command.folder, result={"held_out": {"loss": loss}})
            trained.__dict__["records"] = []
            arms[arm.name] = trained
        found.append(arms)
    return json.loads(json.dumps(command.measure(found, types.SimpleNamespace(study=study))))


def test_a_winner_beats_the_paper_s_layer_and_bigrams_by_three_standard_errors():
    arms = ("bigrams", "rows_3_1", "back_off", "sink")
    result = made_up({"bigrams": -0.02, "rows_3_1": -0.03, "back_off": -0.021, "sink": -0.01}, arms=arms)
    verdict = result["verdict"]
    assert verdict["winners"] == ["rows_3_1"] and set(verdict["candidates"]) == {"rows_3_1", "back_off", "sink"}
    pair = verdict["candidates"]["rows_3_1"]["settings"][0]
    assert pair["to_engram"]["difference"] == pytest.approx(-0.03, abs=0.004)
    assert pair["to_bigrams"]["difference"] == pytest.approx(-0.01, abs=0.004)
    # Paired differences of two arms with this noise, over five seeds.
    assert pair["to_engram"]["standard_error"] == pytest.approx(0.002 * (2 / 5) ** 0.5, rel=0.5)
    assert pair["to_engram"]["ratio"] == pytest.approx(
        pair["to_engram"]["difference"] / pair["to_engram"]["standard_error"]
    )
    # Better than the paper's layer is not enough.
    close = verdict["candidates"]["back_off"]["settings"][0]
    assert close["to_engram"]["ratio"] < -3 < close["to_bigrams"]["ratio"]
    finding = layers_finding(result)
    assert "in this setting: bytes 3 : 1" in finding.headline
    assert [row[0] for row in finding.tables[0].rows] == ["bytes 3 : 1", "longest match", "orders and a sink"]
    assert [row[-1] for row in finding.tables[0].rows] == ["yes", "no", "no"]


def test_a_winner_must_win_beside_too(tmp_path):
    arms = ("bigrams", "rows_3_1", "sink")
    first = made_up({"rows_3_1": -0.02, "sink": -0.03}, arms=arms, tokens=2_000_000)
    assert first["verdict"]["winners"] == ["sink", "rows_3_1"]
    (tmp_path / "result.json").write_text(json.dumps(first))
    result = made_up({"rows_3_1": -0.02, "sink": 0.0}, arms=arms, size="500k", beside=(tmp_path,))
    assert result["verdict"]["winners"] == ["rows_3_1"]
    assert result["verdict"]["settings"] == [
        "500k, 1.00 M tokens, 5 seeds from 0",
        "100k, 2.00 M tokens, 5 seeds from 0",
    ]
    assert "in every setting: bytes 3 : 1" in layers_finding(result).headline
    with pytest.raises(ConfigError, match="of another result"):
        LayersStudy(tokens=2_000_000, beside=(tmp_path,)).study()
    (tmp_path / "result.json").write_text(json.dumps({**first, "study": "rivals"}))
    with pytest.raises(RunFolderError, match="no result of the study layers"):
        LayersStudy(beside=(tmp_path,)).study()


@pytest.mark.parametrize(("seeds", "arms"), [(2, ("bigrams", "sink", "slots")), (5, ("sink", "slots"))])
def test_few_seeds_or_no_bigrams_are_a_screening(seeds, arms):
    result = made_up({"sink": -0.5, "slots": -0.4}, seeds=seeds, arms=arms)
    assert not result["verdict"]["winners"]
    finding = layers_finding(result)
    assert "screening" in finding.headline and "--arms bigrams sink slots" in finding.detail


def test_none_is_a_result_too():
    result = made_up({"bigrams": -0.02}, arms=("bigrams", "sink"))
    assert layers_finding(result).headline.startswith("No candidate is 3 standard errors better")


def test_seeds_begin_where_they_are_told_and_the_first_weights_are_shared():
    study = LayersStudy(first_seed=100, arms=("sink",)).study()
    recipes = [study.recipe_of(arm, 1) for arm in study.arms]
    assert [recipe.train.seed for recipe in recipes] == [101, 101]
    assert recipes[1].model.like[-1].part == "memory"
    tuned = LayersStudy(first_seed=100, arms=("sink",), tune=(5, 50)).study()
    assert [arm.name for arm in tuned.arms] == ["engram-x5", "engram-x50", "sink-x5", "sink-x50"]
    assert tuned.recipe_of(tuned.arms[0], 0).train.seed not in (0, 100)
    with pytest.raises(ConfigError, match="--first-seed"):
        LayersStudy(first_seed=-1)


def test_every_candidate_is_trained_and_measured(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(some_text(400) for _ in range(12)))
    options = {"data": (text,), "vocab_size": 300, "tokens": 4096, "seeds": 1, "rows_per_head": 1_999}
    assert LayersStudy(**options, out=tmp_path / "out", mode="one_by_one").run() == 0
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert all(arm["runs"][0]["loss"] for arm in result["arms"].values())
    assert len(result["arms"]) == len(CANDIDATES) - 1
    assert "screening" in (tmp_path / "out/report.html").read_text()
