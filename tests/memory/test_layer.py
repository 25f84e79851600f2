"""The Engram layer against its plain twin, for every option; its state; its errors."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram_lm.errors import ConfigError, HistoryError, MismatchError
from engram_lm.hashing import RollingWindow
from engram_lm.memory import EngramConfig, EngramLayer
from engram_lm.memory.interface import row_signs
from engram_lm.memory.reference import layer_reference
from engram_lm.tables import ParameterTable, ResidentTable

NUM_ROWS = 53


def build(seed=0, **options) -> EngramLayer:
    """A small layer with every weight away from its initial value."""
    options = {"hidden_size": 8, "num_heads": 2, "memory_dim": 12, "rows_per_head": 11, **options}
    config = EngramConfig(**options)
    generator = torch.Generator().manual_seed(seed)
    layer = EngramLayer(config, ParameterTable(NUM_ROWS, config.head_dim, gradient="dense"))
    with torch.no_grad():
        for parameter in [*layer.parameters(), layer.table.weight]:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
        if config.occupancy != "none":
            layer.table.weight[torch.rand(NUM_ROWS, generator=generator) < 0.6] = 0  # never written
    return layer


def inputs(layer, batch=2, length=9, seed=1):
    config = layer.config
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, config.num_streams, config.hidden_size, generator=generator)
    rows = torch.randint(NUM_ROWS, (batch, length, config.num_heads_total), generator=generator)
    active = torch.rand(batch, length, generator=generator) > 0.3
    return hidden, rows, active


OPTIONS = [
    {},
    {"num_streams": 3},
    {"gate": "plain"},
    {"gate": "none"},
    {"kernel_size": 0},
    {"kernel_size": 1},
    {"kernel_size": 2, "dilation": 5},
    {"bias": True, "num_streams": 2},
    {"norm_weight": "zero_centered", "num_streams": 2},
    {"norm_eps": 1e-2},
    {"signs": "hashed"},
    {"orders": (2, 3, 4), "memory_dim": 18},
    {"orders": (3,), "memory_dim": 4},
    {"occupancy": "rows"},
    {"occupancy": "ngrams", "num_streams": 2, "bias": True},
    {"occupancy": "rows", "gate": "none", "signs": "hashed"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_layer_equals_its_plain_twin_forward_and_gradient(options, masked):
    layer = build(**options)
    hidden, rows, active = inputs(layer)
    active = active if masked else None
    hidden.requires_grad_(True)
    parameters = [hidden, *layer.parameters(), layer.table.weight]
    direction = torch.randn(hidden.shape)

    output = layer(hidden, rows, active=active, return_gates=True)
    expected, gates = layer_reference(layer, hidden, rows, active)
    torch.testing.assert_close(output.update, expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(output.gates, gates, atol=2e-5, rtol=2e-5)
    gradients = torch.autograd.grad((output.update * direction).sum(), parameters, allow_unused=True)
    twin = torch.autograd.grad((expected * direction).sum(), parameters, allow_unused=True)
    for ours, theirs, parameter in zip(gradients, twin, parameters):
        zero = torch.zeros_like(parameter)
        torch.testing.assert_close(
            zero if ours is None else ours, zero if theirs is None else theirs, atol=1e-4, rtol=1e-3
        )


@pytest.mark.parametrize("options", [{}, {"num_streams": 3, "kernel_size": 3}, {"kernel_size": 0}], ids=str)
@pytest.mark.parametrize("chunks", [[1] * 12, [5, 7], [12], [1, 9, 2], [0, 3, 0, 9]], ids=str)
def test_any_chunking_equals_the_whole_sequence(options, chunks):
    layer = build(**options)
    hidden, rows, active = inputs(layer, length=12)
    whole = layer(hidden, rows, active=active)
    state = layer.new_state(2)
    pieces, start = [], 0
    for size in chunks:
        part = slice(start, start + size)
        pieces.append(layer(hidden[:, part], rows[:, part], state, active=active[:, part]))
        start += size
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)


@given(st.lists(st.sampled_from(["advance", "rollback", "reorder", "fork"]), min_size=3, max_size=12), st.randoms())
def test_any_interleaving_of_state_operations_equals_the_whole_sequence(operations, random):
    layer = build(num_streams=2)
    hidden, rows, _ = inputs(layer, batch=3, length=40, seed=4)
    state = layer.new_state(3, max_rollback=None)
    seen = [list(range(0)) for _ in range(3)]  # the positions each sequence has taken, from the pool below
    pool = [(b, t) for b, t in itertools.product(range(3), range(40))]
    for operation in operations:
        if operation == "advance":
            count = random.randint(1, 5)
            picks = [random.sample(pool, count) for _ in seen]
            chunk_hidden = torch.stack([torch.stack([hidden[p] for p in pick]) for pick in picks])
            chunk_rows = torch.stack([torch.stack([rows[p] for p in pick]) for pick in picks])
            update = layer(chunk_hidden, chunk_rows, state)
            for sequence, pick in enumerate(picks):
                seen[sequence] = seen[sequence] + pick
                whole = layer(
                    torch.stack([hidden[p] for p in seen[sequence]])[None],
                    torch.stack([rows[p] for p in seen[sequence]])[None],
                )
                torch.testing.assert_close(update[sequence], whole[0, -count:], atol=1e-5, rtol=1e-5)
        elif operation == "rollback":
            back = [random.randint(0, len(positions)) for positions in seen]
            state.rollback(back)
            seen = [positions[: len(positions) - n] for positions, n in zip(seen, back)]
        elif operation == "reorder":
            order = [random.randrange(len(seen)) for _ in seen]
            state.reorder(order)
            seen = [seen[i] for i in order]
        else:
            copy = state.fork()
            state.advance(torch.randn(len(seen), 2, 16))  # what happens to the original must not reach the copy
            state = copy


def test_ragged_chunks_move_each_sequence_by_its_own_length():
    layer = build()
    hidden, rows, _ = inputs(layer, length=8)
    state = layer.new_state(2)
    layer(hidden[:, :5], rows[:, :5], state, lengths=[5, 2])
    after = layer(torch.stack([hidden[0, 5:7], hidden[1, 2:4]]), torch.stack([rows[0, 5:7], rows[1, 2:4]]), state)
    whole = layer(hidden, rows)
    torch.testing.assert_close(after, torch.stack([whole[0, 5:7], whole[1, 2:4]]), atol=1e-5, rtol=1e-5)


def test_the_layer_adds_nothing_at_inactive_positions_and_they_leave_no_trace():
    layer = build(num_streams=2)
    hidden, rows, _ = inputs(layer, length=7)
    active = torch.tensor([[False, False, True, True, True, True, True]]).expand(2, -1)
    padded = layer(hidden, rows, active=active)
    assert not padded[:, :2].any()
    torch.testing.assert_close(padded[:, 2:], layer(hidden[:, 2:], rows[:, 2:]), atol=1e-6, rtol=1e-6)


def test_what_padding_holds_does_not_matter_not_even_nan():
    layer = build(num_streams=2)
    hidden, rows, _ = inputs(layer, length=6)
    active = torch.tensor([[False, True, True, True, True, True]]).expand(2, -1)
    expected = layer(hidden, rows, active=active)
    hidden[:, 0] = float("nan")
    assert torch.equal(layer(hidden, rows, active=active), expected)


def test_half_precision_stays_finite_with_the_published_eps():
    layer = build(norm_eps=1e-20).half()
    hidden, rows, _ = inputs(layer)
    with torch.no_grad():
        layer.key_value.weight *= 0
    assert layer(hidden.half(), rows).isfinite().all()


def test_a_table_given_later_stays_outside_the_module_tree():
    layer = build()
    bare = EngramLayer(layer.config)
    bare.table = layer.table
    bare.load_state_dict(layer.state_dict())
    hidden, rows, _ = inputs(layer)
    assert torch.equal(bare(hidden, rows), layer(hidden, rows))
    assert set(bare.state_dict()) == set(layer.state_dict())


def test_a_new_layer_s_convolution_is_silent_and_value_init_zero_makes_it_the_identity():
    config = EngramConfig(hidden_size=8, num_heads=2, memory_dim=8, rows_per_head=11)
    table = ParameterTable(NUM_ROWS, 2)
    hidden, rows = torch.randn(1, 6, 8), torch.randint(NUM_ROWS, (1, 6, 4))
    layer = EngramLayer(config, table)
    output = layer(hidden, rows, return_gates=True)
    value = layer.key_value(layer.read(rows))[..., -8:]
    torch.testing.assert_close(output.update, output.gates * value)
    identity = EngramLayer(EngramConfig(**{**config.to_dict(), "value_init": "zero"}), table)
    assert not identity(hidden, rows).any()
    identity(hidden, rows).sum().backward()
    assert identity.key_value.weight.grad[-8:].abs().max() > 0  # and it can still learn


def test_gradients_are_finite_for_every_published_initialization():
    for std, eps, bias in itertools.product([0.02, 1.0], [1e-20, 1e-6], [False, True]):
        layer = EngramLayer(
            EngramConfig(hidden_size=8, num_heads=2, memory_dim=8, rows_per_head=11, norm_eps=eps, bias=bias),
            table := ParameterTable(NUM_ROWS, 2, std=std),
        )
        layer(torch.randn(2, 30, 8) * 50, torch.randint(NUM_ROWS, (2, 30, 4))).square().sum().backward()
        gradient = table.weight.grad.coalesce().values()
        assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_the_same_layer_runs_on_any_table_and_on_embeddings():
    layer = build(signs="hashed")
    hidden, rows, _ = inputs(layer)
    expected = layer(hidden, rows)
    other = EngramLayer(layer.config, ResidentTable(layer.table.weight.detach()))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(hidden, rows), expected)
    assert torch.equal(layer(hidden, layer.read(rows)), expected)
    assert "table.weight" not in dict(layer.named_parameters())


def test_two_layers_given_one_table_train_it_together():
    config = EngramConfig(hidden_size=8, num_heads=2, memory_dim=8, rows_per_head=11, kernel_size=0)
    table = ParameterTable(NUM_ROWS, 2, gradient="dense")
    layers = [EngramLayer(config, table) for _ in range(2)]
    hidden, rows = torch.randn(1, 4, 8), torch.randint(NUM_ROWS, (1, 4, 4))
    separate = []
    for layer in layers:
        layer(hidden, rows).sum().backward()
        separate.append(table.weight.grad.clone())
        table.weight.grad = None
    sum(layer(hidden, rows).sum() for layer in layers).backward()
    torch.testing.assert_close(table.weight.grad, separate[0] + separate[1])


def test_gates_stay_in_float32_under_bfloat16():
    layer = build().to(torch.bfloat16)
    hidden, rows, _ = inputs(layer)
    output = layer(hidden.bfloat16(), rows, return_gates=True)
    assert output.update.dtype == torch.bfloat16 and output.gates.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = build()(hidden, rows, return_gates=True)
    assert autocast.gates.dtype == torch.float32 and autocast.update.dtype == torch.float32
    full = build()(hidden, rows, return_gates=True)
    torch.testing.assert_close(autocast.gates, full.gates, atol=0.03, rtol=0.03)


def test_signs_are_balanced_unrelated_to_the_row_and_told_apart_by_the_next_head():
    rows = torch.randint(2**40, (20_000, 6))
    signs = row_signs(rows, num_heads=3)
    assert set(signs.unique().tolist()) == {-1, 1} and abs(float(signs.float().mean())) < 0.02
    changed = rows.clone()
    changed[:, 0] += 2 * torch.randint(2**20, (20_000,))
    assert torch.equal(row_signs(changed, num_heads=3), signs)  # parity of head 0 unchanged: nothing changes
    changed[:, 0] += 1
    assert torch.equal((row_signs(changed, num_heads=3) != signs).nonzero()[:, 1].unique(), torch.tensor([2]))


def test_a_single_stream_takes_hidden_states_with_or_without_the_stream_dimension():
    layer = build()
    hidden, rows, _ = inputs(layer)
    assert torch.equal(layer(hidden[:, :, 0], rows), layer(hidden, rows)[:, :, 0])


@pytest.mark.parametrize(
    ("shape", "heads", "message"),
    [((2, 5, 7), 4, "expected .batch, length, 1, 8"), ((2, 5, 2, 8), 4, "hidden states"), ((2, 5, 8), 6, "6 heads")],
)
def test_inputs_of_another_geometry_are_refused_with_both_shapes(shape, heads, message):
    layer = build()
    with pytest.raises(MismatchError, match=message):
        layer(torch.zeros(shape), torch.zeros(2, 5, heads, dtype=torch.int64))


def test_other_misuse_is_refused():
    layer = build()
    with pytest.raises(MismatchError, match="memory is"):
        layer(torch.zeros(2, 5, 8), torch.zeros(2, 4, 12))
    with pytest.raises(MismatchError, match="without a table"):
        EngramLayer(layer.config)(torch.zeros(1, 1, 8), torch.zeros(1, 1, 4, dtype=torch.int64))
    with pytest.raises(ConfigError, match="3 wide"):
        EngramLayer(EngramConfig(hidden_size=8, num_heads=2, memory_dim=16, rows_per_head=11), layer.table)
    with pytest.raises(HistoryError):
        layer(*inputs(layer, batch=3)[:2], layer.new_state(2))
    with pytest.raises(HistoryError, match="held"):
        layer.new_state(2).rollback(1)


def test_a_state_can_be_saved_and_restored():
    layer = build()
    hidden, rows, _ = inputs(layer)
    state = layer.new_state(2)
    layer(hidden, rows, state)
    snapshot = state.snapshot()
    first = layer(hidden, rows, state)
    state.restore(snapshot)
    assert torch.equal(layer(hidden, rows, state), first)
    assert isinstance(state, RollingWindow)


def test_the_layer_compiles_without_graph_breaks():
    layer = build(num_streams=2)
    hidden, rows, active = inputs(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, rows, active=active), layer(hidden, rows, active=active))
