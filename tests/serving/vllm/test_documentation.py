"""What docs/serving.md says of the cache is what the model takes of it."""

import pathlib
import re

import pytest
import torch

from engram_lm.model import EngramLMConfig
from engram_lm.planning.served_cache import cache_bytes_per_token

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "serving.md"
ROWS = re.findall(r"^\| `(\S+)` \| (float32|bfloat16) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", PAGE.read_text(), re.M)


@pytest.mark.parametrize(("name", "dtype", "total", "memory", "tokens"), ROWS, ids=lambda value: value)
def test_a_line_of_the_table_of_capacity(name, dtype, total, memory, tokens):
    """The formula above the table gives the line, and so does the model."""
    config, num_bytes = EngramLMConfig.preset(name), getattr(torch, dtype).itemsize
    key = config.qk_nope_head_dim + config.qk_rope_head_dim
    sizes = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
    head = next(size for size in sizes if size >= max(key, config.v_head_dim))
    attention = config.num_hidden_layers * 2 * config.num_attention_heads * head * num_bytes
    rows = []
    for index in range(len(config.memory_layers)):
        used = config.hidden_size * num_bytes + 4 * config.num_streams + 4 * (index == 0)
        rows.append(-(-used // 16) * 16)
    expected = [attention + sum(rows), sum(rows), (1 << 30) // (attention + sum(rows))]
    assert [int(each.replace(",", "")) for each in (total, memory, tokens)] == expected
    assert cache_bytes_per_token(config, getattr(torch, dtype)) == (attention, expected[1])


def test_the_table_has_lines():
    assert {name for name, *_ in ROWS} == {"engram-nano", "engram-tiny", "engram-small", "engram-27b"}
