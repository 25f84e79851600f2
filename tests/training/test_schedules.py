"""The learning rate is a pure function of the step: warm-up, then steps, a cosine, a late fall, or nothing."""

import itertools
import math

import pytest

from engram_lm.errors import ConfigError
from engram_lm.training.schedules import ScheduleOptions, learning_rate_factor


def factors(num_steps, **options):
    return [learning_rate_factor(step, num_steps, ScheduleOptions(**options)) for step in range(num_steps)]


@pytest.mark.parametrize("kind", ["cosine", "step", "wsd", "constant"])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_every_kind_rises_to_one_then_never_rises_again_and_always_moves(kind, final):
    found = factors(200, kind=kind, warmup=20, final=final)
    assert found[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert all(before >= after for before, after in itertools.pairwise(found[19:]))
    assert max(found) == 1 and all(0 < factor <= 1 for factor in found)


def test_the_warm_up_is_a_share_of_the_steps_or_their_number():
    assert factors(100, warmup=0.1) == factors(100, warmup=10)
    assert factors(10, warmup=0)[0] == 1
    assert factors(4, warmup=8, kind="constant") == pytest.approx([1 / 8, 2 / 8, 3 / 8, 4 / 8])


def test_the_paper_s_steps_fall_at_80_and_90_percent():
    found = factors(50_000, kind="step", warmup=2000)
    assert (found[1999], found[39_999], found[40_000], found[44_999], found[45_000], found[-1]) == (
        1, 1, 0.316, 0.316, 0.1, 0.1,
    )  # fmt: skip


def test_the_cosine_is_half_a_cosine_from_one_to_its_end():
    found = factors(110, warmup=10, final=0.2)
    assert found[60] == pytest.approx(0.6)
    assert found[85] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(0.75 * math.pi)))
    assert found[-1] == pytest.approx(0.2, abs=1e-3)


def test_a_stable_rate_falls_only_over_its_last_part():
    found = factors(100, kind="wsd", warmup=10, decay=0.2, final=0.0)
    assert set(found[9:81]) == {1.0} and found[90] == pytest.approx(0.5) and found[99] == pytest.approx(0.05)
    root = factors(100, kind="wsd", warmup=10, decay=20, final=0.0, decay_shape="sqrt")
    assert root[85] == pytest.approx(0.5) and found[85] == pytest.approx(0.75)


def test_steps_after_the_last_have_its_factor():
    for kind in ("cosine", "step", "wsd"):
        options = ScheduleOptions(kind=kind, final=0.0)
        assert learning_rate_factor(500, 100, options) == learning_rate_factor(99, 100, options) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "linear"}, "cosine, step"),
        ({"warmup": -1}, "warmup >= 0"),
        ({"warmup": float("nan")}, "warmup >= 0"),
        ({"warmup": 2.5}, "whole number of steps"),
        ({"final": 1.5}, "final in"),
        ({"step_at": (0.9, 0.8)}, "ascending"),
        ({"step_factors": (0.1,)}, "one of step_factors"),
        ({"step_factors": (0.3, 0.0)}, "step_factors in"),
        ({"decay_shape": "cubic"}, "decay_shape"),
    ],
    ids=str,
)
def test_impossible_schedules_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ScheduleOptions(**options)


def test_steps_before_the_first_are_refused():
    with pytest.raises(ConfigError, match="step >= 0"):
        learning_rate_factor(-1, 10)
