"""Multipliers of both generators, as DeepSeek-V4.1, the Engram demo and Qwen's PLE use them (docs/paper.md)."""

import pytest

from engram_lm.hashing.multipliers import multiplier_bound, pcg64_multipliers, splitmix64, splitmix64_multipliers

V41_LAYER_1 = (76632096046245, 4839876093313, 35959672319349, 73987337458391)


@pytest.mark.parametrize(
    ("vocab_size", "layer", "multipliers"),
    [
        (99_092, 1, V41_LAYER_1),
        (99_092, 14, (67716810739261, 51510806800915, 30921347202721, 82619226485591)),
        (99_092, 15, (28919099099511, 56020370062535, 53929037264533)),
        (98_627, 1, (76993395940407, 4862694818241, 36129212583461)),
        (98_627, 15, (29055444938695, 56284491166079, 54183298291715)),
    ],
)
def test_pcg64_multipliers_are_the_published_ones(vocab_size, layer, multipliers):
    assert pcg64_multipliers(vocab_size, len(multipliers), layer) == multipliers


def test_a_shorter_draw_is_a_prefix_of_a_longer_one():
    assert pcg64_multipliers(99_092, 3, 1) == V41_LAYER_1[:3]


def test_the_seed_is_added_to_the_layer():
    assert pcg64_multipliers(99_092, 4, 0, seed=10007) == V41_LAYER_1


def test_splitmix64_multipliers_are_qwens():
    assert splitmix64_multipliers(248_320, 3, 0, 1234) == (23703573157769, 20109073645365, 8052911324071)
    assert splitmix64_multipliers(248_320, 3, 0, 1234 + 10007) == splitmix64_multipliers(248_320, 3, 1, 1234)


def test_splitmix64_gives_the_known_first_output_of_seed_zero():
    assert splitmix64(0) == 0xE220A8397B1DCDAF


def test_bounds_are_the_published_ones():
    assert multiplier_bound(99_092) == 46539438283891
    assert multiplier_bound(248_320) == 18571544855136


@pytest.mark.parametrize("vocab_size", [1, 2, 257, 99_092, 2**31])
def test_multipliers_are_odd_and_their_products_stay_in_int64(vocab_size):
    for draw in (pcg64_multipliers(vocab_size, 9, 3), splitmix64_multipliers(vocab_size, 9, 3, 7)):
        assert all(m % 2 == 1 and 0 < m < 2**63 and m * (vocab_size - 1) < 2**63 for m in draw)
