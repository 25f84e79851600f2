"""Gates are recorded at every forward pass, and no caller of a layer notices."""

import torch

from engram_lm.memory import EngramConfig
from engram_lm.memory.gate_recorder import record_gates
from engram_lm.memory.layer import EngramLayer

CONFIG = EngramConfig(hidden_size=8, memory_dim=8, num_heads=2, rows_per_head=11)


def call(layer, **options):
    memory = torch.randn(2, 3, CONFIG.memory_dim, generator=torch.Generator().manual_seed(1))
    return layer(torch.ones(2, 3, CONFIG.hidden_size), memory, **options)


def test_callers_get_what_they_asked_for_and_recorders_nest():
    layer, outer, inner = EngramLayer(CONFIG), [], []
    alone = call(layer, return_gates=True)
    with record_gates({4: layer}, lambda block, gates: outer.append((block, gates))):
        assert torch.equal(call(layer), alone.update)
        with record_gates({7: layer}, lambda block, gates: inner.append((block, gates))):
            assert torch.equal(call(layer), alone.update)
            both = call(layer, return_gates=True)
        assert torch.equal(both.update, alone.update) and torch.equal(both.gates, alone.gates)
    call(layer)
    assert [block for block, _ in outer] == [4, 4, 4] and [block for block, _ in inner] == [7, 7]
    assert all(torch.equal(gates, alone.gates) and not gates.requires_grad for _, gates in outer + inner)


def test_other_hooks_see_what_the_caller_will_see():
    layer, seen = EngramLayer(CONFIG), []
    layer.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    with record_gates({0: layer}, lambda block, gates: None):
        call(layer)
    assert seen == [torch.Tensor]
