"""The budget solver: experts and rows in whole numbers that come to the same model size."""

import dataclasses

import pytest

from engram_lm.errors import ConfigError
from engram_lm.memory import EngramConfig
from engram_lm.model import EngramLMConfig
from engram_lm.planning.budget import allocate
from engram_lm.planning.sizes import expert_parameters, model_sizes

RATIOS = [0.0, 0.25, 0.4, 0.5, 0.75, 0.9, 0.95]


def built(config, found):
    """Sizes of a model configured with what the solver found."""
    memory = None if found.memory is None else found.memory.to_dict()
    name = {"moe-27b": "engram-27b"}.get(config, config.replace("moe", "engram"))
    if memory is None:
        return model_sizes(EngramLMConfig.preset(config, **found.backbone), context=8)
    return model_sizes(EngramLMConfig.preset(name, memory=memory, **found.backbone), context=8)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", ["moe-nano", "moe-tiny", "moe-27b"])
def test_total_and_active_parameters_match_those_of_experts_alone(name, ratio):
    moe = EngramLMConfig.preset(name)
    memory = EngramLMConfig.preset(name.replace("moe", "engram")).memory_config
    found = allocate(moe, ratio, memory)
    reference, sizes = model_sizes(moe, context=8), built(name, found)
    assert (sizes.without_vocabulary, sizes.active) == (found.total, found.active)
    assert sizes.without_vocabulary == pytest.approx(reference.without_vocabulary, rel=0.005)
    assert sizes.active == pytest.approx(reference.active, rel=0.005)
    experts = sizes.routed_experts - sizes.chosen_experts
    assert experts / reference.sparse == pytest.approx(ratio, abs=0.51 / (moe.n_routed_experts - 6))
    assert found.ratio == pytest.approx(experts / sizes.sparse)


def test_the_paper_s_division_is_found_again():
    """Table 5: 72 experts become 55 and 2,262,400 rows per head, at a ratio of 74.3 %."""
    moe, engram = EngramLMConfig.preset("moe-27b"), EngramLMConfig.preset("engram-27b")
    found = allocate(moe, 0.743, engram.memory_config)
    assert found.num_experts == 55
    assert found.rows_per_head == pytest.approx(2_262_400, rel=0.005)
    assert allocate(engram, 0.743).moe_num_experts == 72  # its own sparse budget is that of 72 experts


def test_the_presets_are_what_the_solver_finds():
    for size in ("nano", "tiny", "small"):
        engram = EngramLMConfig.preset(f"engram-{size}")
        found = allocate(EngramLMConfig.preset(f"moe-{size}"), 0.75, engram.memory_config)
        assert found.backbone == {
            "n_routed_experts": engram.n_routed_experts,
            "intermediate_size": engram.intermediate_size,
        }
        assert found.memory == engram.memory_config


def test_a_budget_in_parameters_is_rounded_to_whole_experts():
    moe = EngramLMConfig.preset("moe-nano")
    found = allocate(moe, 1.0, sparse_parameters=int(10.3 * expert_parameters(moe)))
    assert (found.num_experts, found.rows_per_head, found.memory) == (16, 0, None)
    assert found.total_difference == found.active_difference == 0


@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.3, 0.75])
@pytest.mark.parametrize(
    ("experts", "groups", "allowed"), [(64, 4, 4), (65, 5, 5), (64, 8, 8), (64, 16, 4), (64, 8, 2)]
)
def test_groups_of_experts_stay_whole_and_large_enough(experts, groups, allowed, ratio):
    fields = {"n_routed_experts": experts, "n_group": groups, "topk_group": allowed}
    found = allocate(
        EngramLMConfig.preset("moe-nano", **fields), ratio, EngramLMConfig.preset("engram-nano").memory_config
    )
    memory = found.memory.to_dict()
    EngramLMConfig.preset("engram-nano", memory=memory, **{**fields, **found.backbone})  # is accepted
    assert abs(found.total_difference) < 0.005 and abs(found.active_difference) < 0.005


@pytest.mark.parametrize("name", ["engram-nano", "engram-tiny", "engram-27b"])
def test_a_model_with_memory_is_found_again_at_its_own_ratio(name):
    config = EngramLMConfig.preset(name)
    sizes = model_sizes(config, context=8)
    experts = sizes.routed_experts - sizes.chosen_experts
    found = allocate(config, experts / sizes.sparse)
    assert found.backbone == {
        "n_routed_experts": config.n_routed_experts,
        "intermediate_size": config.intermediate_size,
    }
    assert found.rows_per_head == pytest.approx(config.memory_config.rows_per_head, rel=0.005)
    assert found.active == sizes.active


def test_the_experts_alone_behind_a_preset_with_memory_are_the_moe_preset():
    moe = EngramLMConfig.preset("moe-tiny")
    found = allocate(EngramLMConfig.preset("engram-tiny"), 1.0)
    assert found.backbone == {"n_routed_experts": moe.n_routed_experts, "intermediate_size": moe.intermediate_size}


def test_shared_tables_have_twice_the_rows():
    moe, memory = EngramLMConfig.preset("moe-tiny"), EngramLMConfig.preset("engram-tiny").memory_config
    shared = allocate(moe, 0.75, dataclasses.replace(memory, tables="shared"))
    assert shared.rows_per_head == pytest.approx(2 * allocate(moe, 0.75, memory).rows_per_head, rel=0.005)
    assert abs(shared.total_difference) < 0.005


def test_what_cannot_be_met_is_refused_with_the_reason():
    moe = EngramLMConfig.preset("moe-27b")
    memory = EngramLMConfig.preset("engram-27b").memory_config
    for ratio in (-0.1, 1.1, float("nan"), "0.5", True):
        with pytest.raises(ConfigError, match="from 0 to 1"):
            allocate(moe, ratio, memory)
    for tolerance in (0.0, float("nan")):
        with pytest.raises(ConfigError, match="tolerance"):
            allocate(moe, 0.5, memory, tolerance=tolerance)
    with pytest.raises(ConfigError, match="sparse_parameters"):
        allocate(moe, 0.5, memory, sparse_parameters=float("nan"))
    with pytest.raises(ConfigError, match="reach past the model's 30 blocks"):
        allocate(moe, 0.5, dataclasses.replace(memory, layers=(1, 99)))
    with pytest.raises(ConfigError, match="this model needs 4 of 2560"):
        allocate(moe, 0.5, dataclasses.replace(memory, num_streams=1))
    with pytest.raises(ConfigError, match="one number of rows for all orders"):
        allocate(moe, 0.5, dataclasses.replace(memory, rows_per_head=(1000, 500)))
    with pytest.raises(ConfigError, match="no leading dense blocks to pay"):
        allocate(EngramLMConfig.preset("moe-nano", first_k_dense_replace=0), 0.5,
                 EngramLMConfig.preset("engram-nano").memory_config)  # fmt: skip
    # Two heads of wide rows: the next prime is some rows away, and each is 96 numbers.
    few = dataclasses.replace(EngramLMConfig.preset("engram-tiny").memory_config, num_heads=1)
    with pytest.raises(ConfigError, match=r"the nearest total is .* a prime number"):
        allocate(EngramLMConfig.preset("moe-tiny"), 0.54, few, tolerance=1e-5)
    wide = EngramConfig(hidden_size=128, num_streams=4, memory_dim=64, layers=(0, 1, 2, 3))
    with pytest.raises(ConfigError, match="one row in each of their heads"):
        allocate(EngramLMConfig.preset("moe-nano", first_k_dense_replace=0), 0.98, wide)
    with pytest.raises(ConfigError, match=r"rounds to all 72 experts .* highest below 1 is 0\.98"):
        allocate(moe, 0.999, memory)
    with pytest.raises(ConfigError, match="leaves no expert beyond"):
        allocate(moe, 0.5, memory, sparse_parameters=1000)
    with pytest.raises(ConfigError, match="hidden_size"):
        allocate(moe, 0.5, EngramConfig(hidden_size=64, memory_dim=64))
