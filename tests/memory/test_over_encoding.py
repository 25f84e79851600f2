"""OverEncoding against its published definition, written as loops over tables of their own."""

import pytest
import torch
from tests.small_model import BACKBONE, TEXT

from engram_lm.errors import ConfigError
from engram_lm.memory import EngramConfig
from engram_lm.memory.interface import build_layer
from engram_lm.model import EngramForCausalLM, EngramLMConfig
from engram_lm.planning.sizes import model_sizes
from engram_lm.tables import ParameterTable
from engram_lm.training.data.tokenizer import train_tokenizer

OPTIONS = {"layers": (0,), "gate": "none", "kernel_size": 0, "layer": "over_encoding"}
GEOMETRY = {"hidden_size": 32, "num_heads": 2, "memory_dim": 24, "rows_per_head": 97}


@pytest.mark.parametrize("num_streams", [1, 4])
def test_the_update_turns_the_embedding_into_the_published_mean(num_streams):
    config = EngramConfig(**GEOMETRY, **OPTIONS, num_streams=num_streams)
    torch.manual_seed(0)
    heads, width = config.num_heads_total, config.head_dim
    table = ParameterTable(400, width, std=1.0)
    layer = build_layer(config, table)
    rows = torch.randint(400, (2, 5, heads))
    embedding = torch.randn(2, 5, 32)
    hidden = embedding if num_streams == 1 else embedding[:, :, None].expand(-1, -1, num_streams, -1).contiguous()
    active = torch.ones(2, 5, dtype=torch.bool)
    active[0, :2] = False
    found = hidden + layer(hidden, rows, active=active)
    for sequence in range(2):
        for position in range(5):
            total = embedding[sequence, position].clone()
            for head in range(heads):
                matrix = layer.projection.weight[
                    :, head * width : (head + 1) * width
                ].T  # [slice, D], one for each head
                total += table.weight[rows[sequence, position, head]] @ matrix
            mean = total / (1 + heads) if active[sequence, position] else embedding[sequence, position]
            expected = mean.expand(num_streams, -1) if num_streams > 1 else mean
            torch.testing.assert_close(found[sequence, position], expected)


def test_a_model_with_it_counts_itself_decodes_and_saves(tmp_path):
    tokenizer = train_tokenizer([TEXT], 300)
    torch.manual_seed(0)
    memory = EngramConfig(**GEOMETRY, **OPTIONS, projection_std=0.5)
    model = EngramForCausalLM(EngramLMConfig.for_tokenizer(tokenizer, memory, **BACKBONE)).eval()
    assert sum(weight.numel() for weight in model.parameters()) == model_sizes(model.config, context=1).total
    ids = torch.arange(2, 42).view(2, 20)
    with torch.no_grad():
        whole, first = model(ids).logits, model(ids[:, :12], use_cache=True)
        rest = [first.logits]
        for position in range(12, 20):
            step = model(ids[:, position : position + 1], past_key_values=first.past_key_values)
            rest.append(step.logits)
        model.model.layers[0].memory.projection.weight.zero_()
        silent = model(ids).logits
    torch.testing.assert_close(torch.cat(rest, 1), whole)
    assert not torch.allclose(silent, whole)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(EngramForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, silent)


@pytest.mark.parametrize("change", [{"layers": (1,)}, {"gate": "plain"}, {"kernel_size": 4}])
def test_what_it_does_not_have_is_refused(change):
    config = EngramConfig(**GEOMETRY, **{**OPTIONS, **change})
    with pytest.raises(ConfigError, match="read at the input"):
        config.num_parameters()
    with pytest.raises(ConfigError, match=next(iter(change))):
        build_layer(config)
