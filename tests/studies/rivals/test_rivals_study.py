"""The study of rivals: which arms it has, that they share their bytes, and what it refuses."""

import pytest

from engram_lm.errors import ConfigError
from engram_lm.studies.budget import arm_cost, check_budget
from engram_lm.studies.candidates import REFERENCE
from engram_lm.studies.rivals.arms import RIVALS
from engram_lm.studies.rivals.study import RivalsStudy
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
