"""The same on a GPU: rows, layer, decoding and training; nothing waits for the host where it must not.

These need an NVIDIA GPU and a CUDA build of torch, and are skipped elsewhere.
"""

import pytest
import torch

from engram.hashing import HashSpec, TokenHistory, TokenMap
from engram.memory import EngramConfig, EngramLayer
from engram.tables import ParameterTable
from engram.training.optimizers import RowAdam

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch")


@pytest.fixture
def no_synchronization():
    """Make every wait of the host for the device an error."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def spec():
    return HashSpec.build(TokenMap.identity(500), layers=(1, 4), rows_per_head=10_007, pad_token_id=2)


def test_rows_are_the_cpu_s_and_nothing_waits(request):
    one = spec()
    tokens = torch.randint(500, (3, 40))
    mask = torch.rand(3, 40) > 0.2
    expected = {layer: one.rows(tokens, layer, attention_mask=mask) for layer in one.layers}
    on_gpu, mask = tokens.cuda(), mask.cuda()
    one.rows(on_gpu, 1, attention_mask=mask)  # constants are copied to the device once
    history = TokenHistory(one, 3, device="cuda")
    request.getfixturevalue("no_synchronization")
    rows = {layer: one.rows(on_gpu, layer, attention_mask=mask) for layer in one.layers}
    history.advance(on_gpu[:, :10])
    one.rows_for_layers(one.encode(on_gpu[:, 10:]), history)
    torch.cuda.set_sync_debug_mode("default")
    for layer in one.layers:
        assert torch.equal(rows[layer].cpu(), expected[layer])


def test_the_layer_equals_the_cpu_s_and_nothing_waits(request):
    config = EngramConfig(hidden_size=64, num_streams=2, memory_dim=64, rows_per_head=101)
    table = ParameterTable(sum(config.num_table_rows()), config.head_dim)
    layer = EngramLayer(config, table)
    torch.nn.init.normal_(layer.conv_weight)
    hidden, rows = torch.randn(2, 20, 2, 64), torch.randint(table.num_rows, (2, 20, 16))
    expected = layer(hidden, rows)
    layer.cuda()
    table.cuda()
    hidden, rows = hidden.cuda(), rows.cuda()
    state = layer.new_state(2)
    request.getfixturevalue("no_synchronization")
    update = layer(hidden, rows, state)
    torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(update.cpu(), expected, atol=1e-3, rtol=1e-3)


def test_decoding_on_the_gpu_equals_its_own_whole_forward(model):
    model.cuda()
    ids = torch.randint(2, 280, (2, 25), device="cuda")
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache, pieces = None, []
        for t in range(25):
            output = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache, pieces = output.past_key_values, [*pieces, output.logits]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-3, rtol=1e-3)
    plain = model.generate(ids[:, :9], do_sample=False, max_new_tokens=12, use_cache=False, pad_token_id=1)
    for options in ({}, {"cache_implementation": "static"}):
        cached = model.generate(ids[:, :9], do_sample=False, max_new_tokens=12, pad_token_id=1, **options)
        assert torch.equal(cached, plain)


def test_row_adam_on_the_gpu_equals_the_cpu_s():
    torch.manual_seed(0)
    tables = [ParameterTable(200, 8) for _ in range(2)]
    tables[1].load_state_dict(tables[0].state_dict())
    tables[1].cuda()
    optimizers = [RowAdam([table.weight], lr=0.01) for table in tables]
    for _ in range(5):
        rows = torch.randint(200, (300,))
        for table, optimizer in zip(tables, optimizers, strict=True):
            table.gather(rows.to(table.weight.device)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(tables[1].weight.cpu(), tables[0].weight, atol=1e-5, rtol=1e-4)
