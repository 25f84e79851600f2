"""A configuration prices itself, and refuses what cannot be."""

import json

import pytest
import torch

from engram_lm.errors import ConfigError
from engram_lm.hashing import TokenMap
from engram_lm.memory import EngramConfig, EngramLayer

SMALL = {"hidden_size": 8, "num_heads": 2, "memory_dim": 12, "rows_per_head": 11}


def test_the_paper_s_tables_have_the_paper_s_sizes():
    shape = {"hidden_size": 2560, "layers": (1, 14), "num_streams": 4, "memory_dim": 1280}
    assert EngramConfig(rows_per_head=2_262_400, **shape).table_parameters() == 5_792_338_560
    assert EngramConfig(rows_per_head=7_239_680, **shape).table_parameters() == 18_534_311_360
    one = EngramConfig(rows_per_head=2_262_400, **shape)
    assert one.layer_parameters() == 5 * 1280 * 2560 + 3 * 4 * 2560 + 4 * 4 * 2560
    assert one.table_bytes() == 2 * 5_792_338_560 and one.bytes_read_per_token() == 2 * 2 * 1280


@pytest.mark.parametrize(
    "options",
    [{}, {"num_streams": 3}, {"bias": True}, {"gate": "none"}, {"kernel_size": 0}, {"orders": (2, 3, 4)}],
    ids=str,
)
def test_counted_parameters_are_the_built_layer_s(options):
    config = EngramConfig(**{**SMALL, **options})
    layer = EngramLayer(config)
    assert sum(parameter.numel() for parameter in layer.parameters()) == config.layer_parameters()
    assert config.num_parameters() == config.table_parameters() + config.layer_parameters()


def test_counted_rows_are_the_hash_s_with_own_and_with_shared_tables():
    token_map = TokenMap.identity(100)
    for tables in ("per_layer", "shared"):
        config = EngramConfig(**SMALL, layers=(0, 2, 3), tables=tables)
        spec = config.hash_spec(token_map, pad_token_id=0)
        rows = [spec.num_rows(layer) for layer in spec.layers]
        assert config.num_table_rows() == (tuple(rows) if tables == "per_layer" else (rows[0],))
        assert config.table_parameters() == sum(config.num_table_rows()) * config.head_dim


def test_orders_may_have_rows_of_their_own_which_are_distinct_primes():
    config = EngramConfig(**{**SMALL, "rows_per_head": [53, 11]}, layers=(0, 2))
    assert config.rows_per_head == (53, 11) == config.rows_per_order
    spec = config.hash_spec(TokenMap.identity(100), pad_token_id=0)
    assert spec.primes == ((53, 59, 11, 13), (61, 67, 17, 19))
    assert config.num_table_rows() == tuple(map(sum, spec.primes)) == spec.padded_rows
    assert EngramConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    # Equal numbers are one number, so that a file and a hash are those of before.
    same = EngramConfig(**{**SMALL, "rows_per_head": (11, 11)})
    assert same == EngramConfig(**SMALL) and same.to_dict()["rows_per_head"] == 11


def test_flops_are_those_torch_counts_for_the_matrix_products():
    config = EngramConfig(**{**SMALL, "hidden_size": 64, "memory_dim": 128, "kernel_size": 0, "gate": "none"})
    layer = EngramLayer(config)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        layer(torch.zeros(1, 10, 64), torch.zeros(1, 10, 128))
    assert counter.get_total_flops() == 10 * config.flops_per_token()


def test_a_configuration_survives_json():
    config = EngramConfig(**SMALL, layers=(3, 1), signs="hashed", orders=(2, 4))
    assert EngramConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_dim": 13}, "nearest that does is 12"),
        ({"orders": (0, 2)}, "start at 1"),
        ({"orders": (3, 2)}, "increase"),
        ({"orders": ()}, "orders"),
        ({"layers": (1, 1)}, "distinct"),
        ({"layers": (-1,)}, "counted from 0"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"gate": "sigmoid"}, "'signed_sqrt', 'plain', 'none'"),
        ({"table_std": 0.0}, "value_init='zero'"),
        ({"signs": "hashed", "num_heads": 1, "memory_dim": 12}, "num_heads must be 2"),
        ({"kernel_size": -1}, "kernel_size"),
        ({"dilation": 0}, "dilation"),
        ({"layers": 1}, "layers is a sequence"),
        ({"layers": "12"}, "layers is a sequence"),
        ({"orders": (2.0, 3)}, "orders is a sequence"),
        ({"hidden_size": 8.5}, "whole number"),
        ({"rows_per_head": 100.0}, "rows_per_head"),
        ({"rows_per_head": (11, 0)}, "rows_per_head"),
        ({"rows_per_head": (11, 13, 17)}, r"one for each of the orders \(2, 3\)"),
        ({"norm_eps": float("nan")}, "norm_eps"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"table_std": float("nan")}, "table_std"),
        ({"table_gradient": "both"}, "'sparse', 'dense'"),
    ],
    ids=str,
)
def test_impossible_values_are_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message):
        EngramConfig(**{**SMALL, **change})


def test_an_unknown_key_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'memory_dim'"):
        EngramConfig.from_dict({**SMALL, "memory_dims": 3})
