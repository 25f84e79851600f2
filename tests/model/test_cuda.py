"""The same on a GPU: rows, layer, decoding and training; nothing waits for the host where it must not.

These need an NVIDIA GPU and a CUDA build of torch, and are skipped elsewhere.
"""

import pytest
import torch
from tests.small_model import VARIANTS
from transformers import StaticCache

from engram_lm.errors import RowRangeError, TableClosedError
from engram_lm.hashing import HashSpec, TokenHistory, TokenMap
from engram_lm.memory import EngramConfig, EngramLayer
from engram_lm.model import EngramForCausalLM
from engram_lm.tables import MappedTable, ParameterTable, ReadAheadTable, ResidentTable, StagedTable
from engram_lm.training.optimizers import RowAdam

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


@pytest.fixture
def everything(build):
    """Experts, four streams and YaRN in one model, on the CPU."""
    backbone, memory = VARIANTS["all"]
    return build(backbone=backbone, memory={**memory, "signs": "hashed"})


def test_a_table_on_the_host_serves_row_numbers_on_the_gpu_and_learns_from_there():
    table = ParameterTable(200, 8)
    rows = torch.randint(200, (3, 5))
    read = table.gather(rows.cuda())
    assert read.is_cuda and torch.equal(read.cpu(), table.gather(rows))
    read.square().sum().backward()
    gradient = table.weight.grad.to_dense()
    table.weight.grad = None
    table.gather(rows).square().sum().backward()
    assert not gradient.is_cuda
    torch.testing.assert_close(gradient, table.weight.grad.to_dense())


@pytest.mark.parametrize(
    ("device_map", "kind"),
    [
        ("auto", ParameterTable),
        ({"": 0, "model.memory_tables": "cpu"}, ParameterTable),
        ({"": 0, "model.memory_tables": "disk"}, MappedTable),
    ],
    ids=["auto", "host", "disk"],
)
def test_tables_off_the_gpu_give_the_logits_of_tables_on_it(everything, tmp_path, device_map, kind):
    pytest.importorskip("accelerate")
    everything.save_pretrained(tmp_path)
    model = EngramForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    whole = EngramForCausalLM.from_pretrained(tmp_path).cuda()
    assert all(isinstance(table, kind) for table in model.tables.values())
    assert not any(p.is_cuda for p in model.model.memory_tables.parameters())
    assert all(p.is_cuda for name, p in model.named_parameters() if "memory_tables" not in name)
    ids = torch.randint(2, 280, (2, 25), device="cuda")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, atol=1e-5, rtol=1e-5)
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 1}
    expected = whole.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)


def test_tables_on_the_host_are_trained_while_the_backbone_is_on_the_gpu(everything, tmp_path):
    pytest.importorskip("accelerate")
    everything.save_pretrained(tmp_path)
    model = EngramForCausalLM.from_pretrained(tmp_path, device_map={"": 0, "model.memory_tables": "cpu"}).train()
    everything.cuda().train()
    ids = torch.randint(2, 280, (2, 25), device="cuda")
    for each in (model, everything):
        each(ids, labels=ids).loss.backward()
    for name, table in model.tables.items():
        gradient = table.weight.grad
        assert not gradient.is_cuda
        expected = everything.tables[name].weight.grad.to_dense().cpu()
        torch.testing.assert_close(gradient.to_dense(), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("tier", ["file", "mmap", "host"])
def test_staged_tables_give_the_logits_of_tables_on_the_gpu(everything, tmp_path, tier):
    everything.save_pretrained(tmp_path)
    model = EngramForCausalLM.from_pretrained(tmp_path, table_tier=tier, table_cache_bytes=5000).cuda()
    whole = EngramForCausalLM.from_pretrained(tmp_path).cuda()
    model.stage_tables(2 * 25)
    ids = torch.randint(2, 280, (2, 25), device="cuda")
    torch.testing.assert_close(model(ids).logits, whole(ids).logits, atol=1e-5, rtol=1e-5)
    stats = model.model.layers[0].memory.table.stats()
    assert stats["gpu_staged_rows"] and not stats["gpu_direct_rows"]
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 1}
    expected = whole.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(model.generate(ids, num_beams=3, **options), whole.generate(ids, num_beams=3, **options))
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, atol=1e-5, rtol=1e-5)
    longer = torch.randint(2, 280, (2, 60), device="cuda")
    torch.testing.assert_close(model(longer).logits, whole(longer).logits, atol=1e-5, rtol=1e-5)
    assert model.model.layers[0].memory.table.stats()["gpu_direct_rows"], "more tokens than are staged"


def test_the_rest_trains_around_staged_tables(everything, tmp_path):
    everything.save_pretrained(tmp_path)
    model = EngramForCausalLM.from_pretrained(tmp_path, table_tier="file").cuda().train()
    model.stage_tables(50)
    everything.cuda().train()
    first, second = (torch.randint(2, 280, (2, 25), device="cuda") for _ in range(2))
    for each in (model, everything):
        # Two passes before one backward pass: the rows of the first must not be written over.
        (each(first, labels=first).loss + each(second, labels=second).loss).backward()
    expected = dict(everything.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_captured_graph_reads_the_rows_that_were_staged_before_its_replay():
    config = EngramConfig(hidden_size=64, memory_dim=64, rows_per_head=101)
    weight = torch.randn(sum(config.num_table_rows()), config.head_dim)
    below = ReadAheadTable(ResidentTable(weight))
    table = StagedTable(below, "cuda", max_rows=8 * config.num_heads_total)
    layer = EngramLayer(config, table).cuda()
    torch.nn.init.normal_(layer.key_value.weight, std=0.1)
    plain = EngramLayer(config, ResidentTable(weight.cuda())).cuda()
    plain.load_state_dict(layer.state_dict())
    hidden = torch.randn(2, 4, 64, device="cuda")
    steps = [torch.randint(len(weight), (2, 4, config.num_heads_total), device="cuda") for _ in range(5)]
    for rows in steps[:2]:  # cuBLAS and the allocator are warmed up outside of the graph
        table.prefetch(rows)
        assert torch.equal(layer(hidden, rows), plain(hidden, rows))
    graph, rows = torch.cuda.CUDAGraph(), steps[0].clone()
    with torch.cuda.graph(graph):
        table.prefetch(rows)
        update = layer(hidden, rows)
    for fresh in steps:
        rows.copy_(fresh)
        table.prefetch(fresh)
        table.wait()
        graph.replay()
        assert torch.equal(update, plain(hidden, fresh))
    table.close()


def test_a_staged_read_that_fails_raises_where_the_rows_are_wanted():
    table = StagedTable(ResidentTable(torch.randn(10, 4)), "cuda", max_rows=8)
    rows = torch.tensor([3, 10], device="cuda")
    table.prefetch(rows)
    for want in (table.wait, lambda: table.gather(rows)):
        with pytest.raises(RowRangeError, match="row 10"):
            want()
    rows = torch.tensor([3, 9], device="cuda")
    table.prefetch(rows)
    rows.fill_(1)  # written over after it was asked for, so it is read anew
    assert torch.equal(table.gather(rows).cpu(), table.table.gather(rows.cpu()))
    table.close()
    with pytest.raises(TableClosedError):
        table.gather(rows)


@torch.no_grad()
def test_the_compiled_model_equals_the_model_and_decodes(everything):
    model = everything.cuda()
    compiled = torch.compile(model, fullgraph=True)
    ids = torch.randint(2, 280, (2, 20), device="cuda")
    expected = model(ids).logits
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, atol=1e-3, rtol=1e-3)
    cache = StaticCache(config=model.config, max_cache_len=20)
    pieces = [model(ids[:, :14], past_key_values=cache).logits]
    pieces += [compiled(ids[:, t : t + 1], past_key_values=cache).logits for t in range(14, 20)]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_flex_attention_gives_the_logits_of_eager_attention(build):
    # Flex attention's kernels need heads of 16 and more, and powers of two.
    heads = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    model = build(backbone=heads).cuda()
    ids = torch.randint(2, 280, (2, 40), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    found = []
    for implementation in ("eager", "flex_attention"):
        model.set_attn_implementation(implementation)
        found.append(model(ids, attention_mask=mask).logits[mask.bool()])
    torch.testing.assert_close(*found, atol=1e-3, rtol=1e-3)
