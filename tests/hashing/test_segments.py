"""What a segment rule accepts."""

import pytest

from engram_lm.errors import ConfigError
from engram_lm.hashing import Segments


@pytest.mark.parametrize(
    "fields", [{"end_tokens": [2]}, {"dead_tokens": (-1,)}, {"end_tokens": (True,)}, {"positions": 1}]
)
def test_impossible_rules_are_refused_by_name(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        Segments(**fields)
