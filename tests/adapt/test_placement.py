"""Where memory is read, said in words."""

import pytest
from tests.adapt.small_models import TOKENIZER, small_model

import engram_lm
from engram_lm.adapt.placement import resolve_layers
from engram_lm.errors import ConfigError


def test_words_become_the_layers_of_the_paper_and_are_kept_as_numbers():
    assert resolve_layers(["early", "middle"], 30) == (1, 14)  # the paper's 2 and 15, counted from 1
    assert resolve_layers(("late", 3), 30) == (22, 3)
    assert resolve_layers("middle", 1) == resolve_layers("early", 1) == resolve_layers("late", 1) == (0,)
    for depth in range(1, 70):
        for word in ("early", "middle", "late"):
            assert 0 <= resolve_layers(word, depth)[0] < depth
    adapter = engram_lm.attach(
        small_model(), TOKENIZER, layers=["late", "early"], num_heads=2, memory_dim=32, rows_per_head=97
    )
    assert adapter.config.layers == (2, 1) and adapter.config.to_dict()["layers"] == [2, 1]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["erly"], "did you mean 'early'"), (["early", 1], "named once"), ([3], "3 decoder layers, from 0"),
        ([-1], "3 decoder layers"), ([True], "3 decoder layers"), ([1.0], "3 decoder layers"),
    ],
)  # fmt: skip
def test_what_is_no_layer_is_refused(layers, message):
    with pytest.raises(ConfigError, match=message):
        engram_lm.attach(small_model(), TOKENIZER, layers=layers, num_heads=2, memory_dim=32, rows_per_head=97)
