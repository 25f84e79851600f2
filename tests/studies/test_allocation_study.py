"""The study of allocation: sweeps of equal budgets, what is fitted to them, and a whole study at a tiny size."""

import json
import types

import numpy as np
import pytest
from tests.studies.test_study import some_text

from engram_lm.errors import ConfigError
from engram_lm.studies.allocation import AllocationStudy, allocation_finding, figures, published
from engram_lm.studies.budget import check_budget
from engram_lm.studies.study import TrainedArm

SWEEPS = {"experts": (64, 128), "sizes": ("100k", "2m"), "ratios": (1.0, 0.95, 0.75, 0.5, 0.25, 0.1, 0.0)}


def test_every_sweep_has_one_budget_and_the_shares_that_were_asked_for():
    study = AllocationStudy(**SWEEPS, token_counts=(1_000_000, 4_000_000)).study()
    costs = check_budget(study)
    groups = {arm.group for arm in study.arms}
    assert len(groups) == 8 and len(study.arms) == 8 * len(SWEEPS["ratios"])
    assert study.arms[0].recipe.model.memory == {} and study.arms[0].x == 1
    for arm in study.arms:
        asked = float(arm.name.rpartition("-")[2])
        assert arm.x == pytest.approx(asked, abs=0.02)
        assert costs[arm.name].tokens == pytest.approx(arm.recipe.train.num_steps * 2048)
        # Experts alone lend their first weights to all, and the first memory lends those of its layer.
        assert len(arm.recipe.model.like) == (1 if asked == 1 else 2)
    sparsities = [costs[arm.name].total / costs[arm.name].active for arm in study.arms if arm.x == 1]
    assert len({round(one) for one in sparsities[:3]}) > 1


def measured(command, loss_of, noise=0.001):
    """A study's result, had its arms had these losses."""
    chance, study = np.random.default_rng(0), command.study()
    seeds = []
    for number in range(3):
        of_seed = chance.normal(scale=0.02)
        arms = {}
        for arm in study.arms:
            loss = loss_of(arm) + of_seed + chance.normal(scale=noise)
            result = {"held_out": {"loss": loss}} if loss < 9 else {}
            failed = None if loss < 9 else "training diverged"
            arms[arm.name] = TrainedArm(arm=arm, seed=number, folder=command.folder, result=result, failed=failed)
            arms[arm.name].__dict__["records"] = []
        seeds.append(arms)
    return command.measure(seeds, types.SimpleNamespace(study=study))


def test_optima_of_known_curves_are_found_with_intervals_and_a_move_is_seen():
    command = AllocationStudy(token_counts=(1_000_000, 4_000_000))
    optima = dict(zip(dict.fromkeys(arm.group for arm in command.study().arms), (0.3, 0.6), strict=True))
    result = json.loads(json.dumps(measured(command, lambda arm: 4 + 0.2 * (arm.x - optima[arm.group]) ** 2)))
    for group, optimum in optima.items():
        found = result["sweeps"][group]["parabola"]
        low, high = found["interval"]
        assert low < optimum < high and high - low < 0.1
        assert result["sweeps"][group]["gain"]["value"] < 0
    (move,) = result["moves"]["parabola"].values()
    assert 0.2 < move["interval"][0] < 0.3 < move["interval"][1] < 0.4
    finding = allocation_finding(result)
    assert "lowest with 25% experts" in finding.headline
    where, moved, losses = finding.tables
    assert [row[0] for row in where.rows][2:] == list(published()) and where.rows[2][1] == "0.85"
    assert len(moved.rows) == 1 and len(losses.rows) == 14
    assert len({row[0] for row in losses.rows}) == 14  # each says which sweep it belongs to
    assert figures(result)


def test_an_arm_that_diverged_is_left_out_of_the_fit():
    command = AllocationStudy()
    result = measured(command, lambda arm: 99 if arm.x == 0 else 4 + 0.2 * (arm.x - 0.5) ** 2)
    (found,) = result["sweeps"].values()
    assert len(found["shares"]) == len(command.ratios) - 1
    assert found["parabola"]["value"] == pytest.approx(0.5, abs=0.05)
    assert allocation_finding(result).tables


@pytest.mark.parametrize("ratios", [(0.5, 0.4, 0.25, 0.1), (0.1, 1.0, 0.25, 0.5, 0.4)])
def test_experts_alone_need_be_neither_first_nor_among_the_shares(ratios):
    def loss(arm):  # 2 of 64 experts are chosen, and 62 may be given up for a table
        experts, table = 2 + 62 * arm.x, 62 * (1 - arm.x)
        return 4 - 0.05 * np.log(experts) - 0.03 * np.log(table) if arm.x < 1 else 4.0

    (found,) = measured(AllocationStudy(ratios=ratios), loss, noise=0)["sweeps"].values()
    assert found["logarithms"]["value"] == pytest.approx((0.05 / 0.08 * 64 - 2) / 62, abs=1e-6)
    assert found["best"] == "100k-64-4000000-rho-0.5" and (found["gain"] is None) == (ratios[0] == 0.5)


def test_a_budget_that_cannot_be_divided_is_refused_before_anything_is_written(tmp_path):
    command = AllocationStudy(out=tmp_path / "none", ratios=(1.0, 0.999))
    with pytest.raises(ConfigError, match="leaves nothing to memory"):
        command.run()
    assert not (tmp_path / "none").exists()
    for options in ({"ratios": (1.0,)}, {"ratios": (1.0, 0.5, 0.5)}, {"experts": ()}, {"token_counts": (0,)}):
        with pytest.raises(ConfigError):
            AllocationStudy(**options)


def test_a_whole_study_is_trained_and_a_share_can_be_added(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(some_text(400) for _ in range(12)))
    options = {"out": tmp_path / "out", "data": (text,), "vocab_size": 300, "tokens": 4096, "seeds": 1}
    assert AllocationStudy(**options, ratios=(1.0, 0.5), mode="one_by_one").run() == 0
    first = tmp_path / "out/seed-0/100k-64-4096-rho-0.5/metrics.jsonl"
    trained = first.stat()
    command = AllocationStudy(**options, ratios=(1.0, 0.75, 0.5), mode="one_by_one", resume=True)
    assert command.run() == 0
    assert first.stat() == trained
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert [arm["x"] for arm in result["arms"].values()] == pytest.approx([1, 0.75, 0.5], abs=0.02)
    assert "paper: 5.7 B" in (tmp_path / "out/report.html").read_text()
    assert (tmp_path / "out/allocation.png").is_file()
