"""The study of scaling: tables of equal bytes on one backbone, the slopes fitted to them, and a whole tiny study."""

import json
import types

import numpy as np
import pytest
from tests.studies.test_study import some_text

from engram_lm.errors import ConfigError
from engram_lm.memory import EngramConfig
from engram_lm.studies.budget import check_budget
from engram_lm.studies.scaling import WITHOUT, ScalingStudy, figures, published, scaling_finding
from engram_lm.studies.study import TrainedArm
from engram_lm.training.dry_run import priced_config


@pytest.mark.parametrize("size", ["100k", "2m"])
def test_layers_differ_at_a_size_by_what_reads_the_table_alone(size):
    study = ScalingStudy(size=size).study()
    costs = check_budget(study)
    assert len(study.arms) == 1 + 6 * 3
    backbone = costs[WITHOUT].total
    for rows in ScalingStudy.rows:
        arms = {layer: one for one in study.arms for layer, _, of in [one.name.partition("-")] if of == str(rows)}
        assert set(arms) == {"engram", "bigrams", "over_encoding"} and len({arm.group for arm in arms.values()}) == 1
        configs = {name: priced_config(arm.recipe).memory_config for name, arm in arms.items()}
        # As many rows of the same width are read, of as many numbers in all.
        assert len({(one.num_heads_total, one.head_dim) for one in configs.values()}) == 1
        sizes = [one.table_parameters() for one in configs.values()]
        assert max(sizes) / min(sizes) < 1.001
        assert configs["bigrams"].orders == (2,) and configs["over_encoding"].layers == (0,)
        one = EngramConfig.from_dict({**configs["engram"].to_dict(), "rows_per_head": rows})
        assert costs[f"engram-{rows}"].total == backbone + one.num_parameters()
    smallest, largest = (study.arms[place].x for place in (1, -1))
    assert largest / smallest == pytest.approx(1024, rel=0.05) and (size != "100k" or smallest < 0.4e6)


def measured(command, loss_of):
    """A study's result, had its arms had these losses."""
    study, chance = command.study(), np.random.default_rng(0)
    seeds = []
    for number in range(3):
        of_seed, arms = chance.normal(scale=0.02), {}
        for arm in study.arms:
            loss = loss_of(arm) + of_seed + chance.normal(scale=0.001)
            arms[arm.name] = TrainedArm(
                arm=arm, seed=number, folder=command.folder, result={"held_out": {"loss": loss}}
            )
            arms[arm.name].__dict__["records"] = []
        seeds.append(arms)
    return json.loads(json.dumps(command.measure(seeds, types.SimpleNamespace(study=study))))


def test_slopes_of_known_lines_are_found_with_their_bend_and_saturation():
    def loss_of(arm):
        decades = 0.0 if arm.x is None else np.log10(arm.x)
        if arm.name.startswith("engram"):
            return 5 - 0.09 * decades
        if arm.name.startswith("bigrams"):
            return 5 - 0.06 * min(decades, 7.0)  # nothing is gained beyond 10 MB
        return 5.02 - 0.09 * decades if arm.x else 5.0

    result = measured(ScalingStudy(tokens=1_000_000), loss_of)
    lines = result["lines"]
    low, high = lines["engram"]["slope"]["interval"]
    assert low < -0.09 < high and high - low < 0.006
    low, high = lines["engram"]["bend"]["interval"]
    assert low < 0 < high
    assert lines["bigrams"]["bend"]["interval"][0] > 0
    last = lines["bigrams"]["steps"][-1]
    assert last["interval"][0] < 0 < last["interval"][1] and last["rows"] == [320_000, 1_280_000]
    assert last["tokens_per_row"] == pytest.approx(1_000_000 / (320_000 * 1_280_000) ** 0.5)
    assert result["arms"]["over_encoding-20000"]["summary"]["loss"]["difference"]["mean"] == pytest.approx(
        0.02, abs=0.003
    )
    finding = scaling_finding(result)
    assert "Ten times the bytes change the loss of Engram by −0.09" in finding.headline.replace("-", "−")
    slopes, steps, losses = finding.tables
    assert len(slopes.rows) == 3 + len(published()) and len(steps.rows) == 15 and len(losses.rows) == 19
    assert figures(result)


def test_impossible_sweeps_are_refused():
    for options in ({"rows": ()}, {"rows": (1,)}, {"rows": (97, 97)}, {"layers": ()}, {"seeds": 0}):
        with pytest.raises(ConfigError):
            ScalingStudy(**options)
    for rates in ((15.0,), (15.0, 15.0, 0.0), (15.0, float("nan"), 1.0)):
        with pytest.raises(ConfigError, match="--layer-rates"):
            ScalingStudy(layer_rates=rates)


def test_a_rate_of_its_own_changes_the_recipes_of_that_layer_alone():
    same, own = (
        {arm.name: arm.recipe for arm in ScalingStudy(layer_rates=rates).study().arms} for rates in ((), (15, 15, 1))
    )
    changes = {name: recipe.differences(same[name].to_dict()) for name, recipe in own.items()}
    assert all(bool(found) == name.startswith("over_encoding") for name, found in changes.items())
    assert changes["over_encoding-1250"] == ["optimizer.table_lr_multiplier is 1, was 15.0"]
    result = measured(ScalingStudy(layer_rates=(15, 15, 1), rows=(1_250, 5_000)), lambda arm: 5.0)
    assert "15 for bigrams alone, 1 for OverEncoding" in scaling_finding(result).detail


def test_a_whole_study_is_trained(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(some_text(400) for _ in range(12)))
    options = {"out": tmp_path / "out", "data": (text,), "vocab_size": 300, "tokens": 4096, "seeds": 1}
    with pytest.raises(ConfigError, match="equal total"):  # the projections weigh too much beside so small a table
        ScalingStudy(**options, rows=(97,)).run()
    assert not (tmp_path / "out").exists()
    assert ScalingStudy(**options, rows=(1_999, 7_993), mode="one_by_one").run() == 0
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert len(result["arms"]) == 7 and all(arm["runs"][0]["loss"] for arm in result["arms"].values())
    assert result["lines"]["over_encoding"]["slope"]["interval"] is None
    assert "paper: Engram" in (tmp_path / "out/report.html").read_text()
    assert not list((tmp_path / "out/seed-0/engram-7993/checkpoints").glob("*"))
