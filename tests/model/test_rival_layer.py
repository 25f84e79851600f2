"""A rival layer is one class and one line of the registry."""

import pytest
import torch
from tests.small_model import BACKBONE, MEMORY
from torch import nn
from transformers import DynamicCache

from engram_lm.errors import ConfigError
from engram_lm.memory import EngramConfig, EngramLayer
from engram_lm.memory.interface import EngramOutput, MemoryLayer
from engram_lm.memory.registry import LAYERS, LayerEntry, layer_class
from engram_lm.model import EngramForCausalLM, EngramLMConfig


class PlainSum(MemoryLayer):
    """Adds a projection of the rows, averaged with that of the position before."""

    def __init__(self, config, table=None):
        super().__init__(config, table)
        self.value = nn.Linear(config.memory_dim, config.hidden_size, bias=False)

    def reset_parameters(self):
        nn.init.normal_(self.value.weight)

    @property
    def window_shape(self):
        return 1, self.config.hidden_size

    @classmethod
    def count_parameters(cls, config):
        return config.memory_dim * config.hidden_size

    @classmethod
    def count_flops(cls, config):
        return 2 * cls.count_parameters(config)

    def respond(self, hidden_states, vectors, state, active, lengths):
        value = self.value(vectors)
        before = torch.zeros_like(value[:, :1])
        if state is not None:
            window = state.open(value, 1)
            before = window.values.clone()
            window.advance(value, lengths)
        update = (value + torch.cat([before, value[:, :-1]], 1)) / 2
        return EngramOutput(update, torch.ones(*value.shape[:2], 1))


@pytest.fixture
def rival(monkeypatch):
    monkeypatch.setitem(LAYERS, "plain_sum", LayerEntry(place=f"{__name__}.PlainSum"))
    return EngramConfig(**MEMORY, layer="plain_sum")


def test_a_rival_is_built_priced_saved_and_decodes_as_its_whole_forward(rival, tokenizer, tmp_path):
    config = EngramLMConfig.for_tokenizer(tokenizer, rival, **BACKBONE)
    model = EngramForCausalLM(config).eval()
    assert [type(layer.memory) for layer in model.model.layers] == [PlainSum, type(None), PlainSum]
    assert sum(p.numel() for p in model.model.layers[0].memory.parameters()) == rival.layer_parameters()
    assert rival.flops_per_token() == 4 * rival.layer_parameters()
    model.save_pretrained(tmp_path)
    model = EngramForCausalLM.from_pretrained(tmp_path).eval()
    ids, cache = torch.randint(2, 280, (2, 20)), DynamicCache(config=model.config)
    with torch.no_grad():
        pieces = [model(piece, past_key_values=cache).logits for piece in ids.split(4, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(ids).logits, atol=2e-5, rtol=1e-5)


def test_the_usual_layer_is_not_named_in_files_and_a_rival_is(rival):
    assert "layer" not in EngramConfig(**MEMORY).to_dict()
    assert EngramConfig.from_dict(EngramConfig(**MEMORY).to_dict()).layer == "engram"
    assert layer_class("engram") is EngramLayer
    assert EngramConfig.from_dict(rival.to_dict()) == rival


@pytest.mark.parametrize(("name", "message"), [("engramm", "did you mean 'engram'"), (3, "no memory layer 3")])
def test_an_unknown_layer_is_refused_with_a_suggestion(name, message):
    with pytest.raises(ConfigError, match=message):
        EngramConfig(**MEMORY, layer=name)
