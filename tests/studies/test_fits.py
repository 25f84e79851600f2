"""Fitted quantities are those of known curves, and their intervals hold the truth as often as they say."""

import numpy as np
import pytest

from engram_lm.studies.fits import (
    arm_losses,
    bend,
    best_share,
    difference,
    estimate,
    estimate_text,
    lowest_of_parabola,
    slope,
)
from engram_lm.studies.published_sweeps import ALLOCATION, SCALING

SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def test_quantities_of_known_curves_are_found_exactly():
    x = np.array(SHARES)
    losses = np.stack([2 * (x - 0.3) ** 2 + seed for seed in range(2)])
    assert estimate(losses, lowest_of_parabola(SHARES)).value == pytest.approx(0.3)
    assert estimate(losses, bend(SHARES)).value == pytest.approx(4)
    assert estimate(losses, difference(0, 3)).value == pytest.approx(2 * (0.2**2 - 0.3**2))
    assert estimate(3 - 0.09 * x[None], slope(SHARES)).value == pytest.approx(-0.09)
    inside = np.array(SHARES[:-1])
    logs = 5 - 0.2 * np.log(2 + 62 * inside) - 0.1 * np.log(62 * (1 - inside))
    best = estimate(logs[None], best_share(SHARES[:-1], num_chosen=2, num_experts=64)).value
    curve = np.linspace(0.001, 0.999, 999)
    scanned = curve[np.argmin(-0.2 * np.log(2 + 62 * curve) - 0.1 * np.log(62 * (1 - curve)))]
    assert best == pytest.approx(scanned, abs=2e-3)


def test_an_optimum_at_the_edge_is_said_to_be_there():
    x = np.array(SHARES)
    assert estimate(((x - 2) ** 2)[None], lowest_of_parabola(SHARES)).value == 1.0
    assert estimate((-((x - 0.4) ** 2))[None], lowest_of_parabola(SHARES)).value == 1.0
    assert estimate((-((x - 0.6) ** 2))[None], lowest_of_parabola(SHARES)).value == 0.0


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_intervals_hold_the_truth_as_often_as_they_say(num_seeds):
    """Seeds differ by far more than arms do, as they do in training, and that widens nothing."""
    chance, x = np.random.default_rng(0), np.array(SHARES)
    truth, held, widths = 0.3, [], []
    for number in range(200):
        noise = chance.normal(scale=0.002, size=(num_seeds, len(x))) + chance.normal(scale=0.05, size=(num_seeds, 1))
        found = estimate(0.1 * (x - truth) ** 2 + noise, lowest_of_parabola(SHARES), seed=number)
        low, high = found.interval
        held.append(low <= truth <= high)
        widths.append(high - low)
    assert 0.91 <= np.mean(held) <= 0.985
    assert np.median(widths) < 0.12


def test_one_seed_has_no_interval_and_differences_of_sweeps_have_one():
    x = np.array(SHARES)
    alone = estimate(((x - 0.3) ** 2)[None], lowest_of_parabola(SHARES))
    assert alone.interval is None and estimate_text(alone.to_dict()) == "0.30" and estimate_text(None) == "–"
    noise = np.random.default_rng(1).normal(scale=1e-3, size=(3, len(x)))
    one = estimate((x - 0.3) ** 2 + noise, lowest_of_parabola(SHARES), seed=1)
    two = estimate((x - 0.5) ** 2 + noise[::-1], lowest_of_parabola(SHARES), seed=2)
    low, high = two.minus(one).interval
    assert low < 0.2 < high and high - low > max(b - a for a, b in (one.interval, two.interval))
    assert alone.minus(one).interval is None


def test_seeds_without_a_loss_are_left_out():
    def arm(*losses):
        return {"runs": [{"seed": seed, "measures": {"loss": loss}} for seed, loss in enumerate(losses)]}

    result = {"seeds": [0, 1, 2], "arms": {"a": arm(1.0, None, 3.0), "b": arm(2.0, 2.0, float("nan"))}}
    assert arm_losses(result, ["a", "b"]).tolist() == [[1.0, 2.0]]
    assert arm_losses({**result, "seeds": [1]}, ["a", "b"]) is None


def test_the_papers_points_give_the_numbers_that_the_paper_states():
    """The drawn parabolas are lowest at 72.5 % and 73.8 %; the drawn line falls by 0.02839 per decade of slots."""
    for (shares, losses), vertex in zip(ALLOCATION.values(), (0.725, 0.738), strict=True):
        assert estimate(np.array([losses]), lowest_of_parabola(shares)).value == pytest.approx(vertex, abs=0.006)
    slots, losses = SCALING["Engram"]
    assert estimate(np.array([losses]), slope(np.log10(slots))).value == pytest.approx(-0.0284, abs=3e-4)
    slots, losses = SCALING["OverEncoding"]
    assert estimate(np.array([losses]), slope(np.log10(slots))).value == pytest.approx(-0.0302, abs=1e-3)
