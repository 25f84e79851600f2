"""Each optimizer of rows equals its plain dense twin on the rows of a step and leaves all others as they were."""

import copy

import pytest
import torch
from tests.training.test_optimizers import table, touch

from engram_lm.errors import ConfigError
from engram_lm.tables import ParameterTable
from engram_lm.training.optimizers import RowAdam, RowWiseAdagrad, RowWiseAdam, SinkhornMomentum, rows

NUM_ROWS, WIDTH = 40, 5
OPTIMIZERS = {
    "adam": lambda params, **options: RowAdam(params, betas=(0.9, 0.95), **options),
    "adam by rows": lambda params, **options: RowAdam(params, betas=(0.9, 0.95), bias_correction="row", **options),
    "row-wise adam": lambda params, **options: RowWiseAdam(params, betas=(0.9, 0.95), **options),
    "row-wise adam by rows": lambda params, **options: RowWiseAdam(
        params, betas=(0.9, 0.95), bias_correction="row", **options
    ),
    "row-wise adam without first moment": lambda params, **options: RowWiseAdam(
        params, betas=(0.9, 0.95), first_moment="none", **options
    ),
    "row-wise adagrad": RowWiseAdagrad,
    "sinkhorn": SinkhornMomentum,
}


def plain_row(name, weight, gradient, state, step, lr, decay):
    """Train one touched row, one number or one row at a time; ``state`` is the row's own dict."""
    eps = 1e-10 if name == "row-wise adagrad" else 1e-8
    weight = weight * (1 - lr * decay)
    if name == "row-wise adagrad":
        state["sum"] = state.get("sum", 0.0) + float((gradient**2).mean())
        return weight - lr * gradient / (state["sum"] ** 0.5 + eps)
    beta1, beta2 = (0.0 if name.endswith("without first moment") else 0.9), 0.95
    square = gradient**2
    if name.startswith("row-wise"):
        square = square.mean()
    state["t"] = state.get("t", 0) + 1
    t = state["t"] if name.endswith("by rows") else step
    state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * gradient
    state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * square
    size = lr * (1 - beta2**t) ** 0.5 / (1 - beta1**t)
    return weight - size * state["m"] / (state["v"] ** 0.5 + eps)


def plain_balance(matrix, normalizations=11, threshold=1e-3):
    """Divide by row norms and column norms in turn."""
    norms = matrix.norm(dim=1, keepdim=True)
    matrix = torch.where(norms > threshold * norms.mean(), matrix, 0.0)
    for turn in range(normalizations):
        matrix = matrix / matrix.norm(dim=1 - turn % 2, keepdim=True).clamp_min(1e-20)
    return matrix


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "sinkhorn"])
def test_touched_rows_are_trained_as_by_the_plain_twin_and_others_not_at_all(name, decay, monkeypatch):
    monkeypatch.setitem(rows._CHUNK_NUMBERS, "cpu", 4 * WIDTH)  # several pieces per step
    one = table()
    optimizer = OPTIMIZERS[name]([one.weight], lr=0.05, weight_decay=decay)
    expected, states = one.weight.detach().double(), [{} for _ in range(NUM_ROWS)]
    for step in range(1, 13):
        before = one.weight.detach().clone()
        touched = touch(one, step, rows=9)
        gradient = one.weight.grad.to_dense().double()
        for row in touched:
            expected[row] = plain_row(name, expected[row], gradient[row], states[row], step, 0.05, decay)
        optimizer.step()
        optimizer.zero_grad()
        others = [row for row in range(NUM_ROWS) if row not in touched]
        assert torch.equal(one.weight[others], before[others])
        torch.testing.assert_close(one.weight.detach().double(), expected, atol=2e-6, rtol=1e-5)


def pushed(name, dtype, steps, one=None, optimizer=None):
    """A table all of whose rows are pushed the same way, step after step, by far less than bfloat16 can hold."""
    if one is None:
        one = ParameterTable(64, 32, dtype=dtype)
        with torch.no_grad():
            one.weight.copy_(torch.linspace(1.01, 1.9, 64 * 32).view(64, 32).bfloat16())
        lr = {"sinkhorn": 5e-4, "row-wise adagrad": 1e-3}.get(name, 1e-4)
        optimizer = OPTIMIZERS[name]([one.weight], lr=lr)
    for step in steps:
        push = 1 + 0.1 * torch.randn(64, 32, generator=torch.Generator().manual_seed(step))
        (one.gather(torch.arange(64)) * push.to(dtype)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return one, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_of_bfloat16_move_under_tiny_updates_as_those_of_float32_do_in_the_mean(name):
    start = torch.linspace(1.01, 1.9, 64 * 32).view(64, 32).bfloat16()
    exact = pushed(name, torch.float32, range(200))[0].weight.detach() - start
    found = pushed(name, torch.bfloat16, range(200))[0].weight.detach().float() - start
    step = exact.abs().max() / 200
    assert step < 2**-7 / 2  # less than half the distance between two numbers: rounding to the nearest moves nothing
    assert float(found.mean() / exact.mean()) == pytest.approx(1, abs=0.06)
    assert float((found - exact).std()) < 4 * 2**-7


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bfloat16_table_that_is_resumed_ends_with_the_same_bits(name):
    whole, _ = pushed(name, torch.bfloat16, range(20))
    part, optimizer = pushed(name, torch.bfloat16, range(9))
    again = ParameterTable(64, 32, dtype=torch.bfloat16)
    again.load_state_dict(copy.deepcopy(part.state_dict()))
    resumed = OPTIMIZERS[name]([again.weight], lr=1.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    pushed(name, torch.bfloat16, range(9, 20), again, resumed)
    assert torch.equal(again.weight, whole.weight)


def test_rounding_at_random_keeps_what_bfloat16_has_and_is_the_number_in_the_mean():
    values = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    total = sum(rows._rounded_at_random(values, step) for step in range(400))
    distance = values.abs().log2().floor().exp2() * 2**-7
    error = (total / 400 - values) / distance
    assert abs(float(error.mean())) < 1e-3
    assert float(error.std()) == pytest.approx(6**-0.5 / 20, rel=0.05)  # of 400 independent draws
    special = torch.tensor([[0.0, -0.0, torch.inf, -torch.inf, 1.5, -(2.0**-126), 3.3895313892515355e38]])
    assert torch.equal(rows._rounded_at_random(special, 7).view(torch.int32), special.view(torch.int32))
    assert rows._rounded_at_random(torch.tensor([[torch.nan]]), 7).isnan()
    # No matter how a table is divided.
    assert torch.equal(rows._rounded_at_random(values[100:], 3), rows._rounded_at_random(values, 3)[100:])


@pytest.mark.parametrize("every_row", [True, False])
def test_sinkhorn_is_the_published_update_with_the_rows_of_the_step_as_its_matrix(every_row):
    one = table()
    optimizer = SinkhornMomentum([one.weight], lr=0.05)
    expected, momentum = one.weight.detach().double(), torch.zeros(NUM_ROWS, WIDTH, dtype=torch.float64)
    for step in range(8):
        if every_row:
            factor = torch.randn(NUM_ROWS, WIDTH, generator=torch.Generator().manual_seed(step))
            (one.gather(torch.arange(NUM_ROWS)) * factor).sum().backward()
            touched = list(range(NUM_ROWS))
        else:
            touched = sorted(touch(one, step, rows=15))
        gradient = one.weight.grad.to_dense().double()
        # The published momentum, of all rows: what ours makes up for when a row is touched again.
        momentum = 0.95 * momentum + 0.05 * gradient
        looked_ahead = 0.95 * momentum + 0.05 * gradient
        expected[touched] -= 0.05 * 0.18 * WIDTH**0.5 * plain_balance(looked_ahead[touched])
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(one.weight.detach().double(), expected, atol=1e-5, rtol=1e-4)


def test_sinkhorn_moves_every_row_by_the_same_amount_and_faint_rows_not_at_all():
    one = table()
    before = one.weight.detach().clone()
    factor = torch.randn(20, WIDTH) * torch.logspace(-2, 2, 20).unsqueeze(1)
    factor[7] *= 1e-9
    (one.gather(torch.arange(20)) * factor).sum().backward()
    SinkhornMomentum([one.weight], lr=1.0).step()
    moved = (one.weight.detach() - before).square().mean(1).sqrt()
    kept = (factor.norm(dim=1) > 1e-3 * factor.norm(dim=1).mean()).tolist()
    assert not kept[7] and sum(kept) > 5
    torch.testing.assert_close(moved[:20], torch.tensor([0.18 if row else 0.0 for row in kept]), atol=1e-6, rtol=1e-4)


def test_with_bias_corrected_by_rows_the_first_move_of_a_late_row_is_whole():
    for correction, expected in (("row", 1.0), ("step", 0.1 / 0.05**0.5)):
        one = table()
        optimizer = RowAdam([one.weight], lr=0.01, betas=(0.9, 0.95), bias_correction=correction)
        for _ in range(200):
            one.gather(torch.tensor([1])).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        before = one.weight[2].detach().clone()
        one.gather(torch.tensor([2])).sum().backward()
        optimizer.step()
        torch.testing.assert_close(
            before - one.weight[2].detach(), torch.full((WIDTH,), 0.01 * expected), rtol=1e-3, atol=0
        )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_of_a_bfloat16_table_is_float32_and_stays_so_when_it_is_loaded(name):
    torch.manual_seed(0)
    one = ParameterTable(NUM_ROWS, WIDTH, dtype=torch.bfloat16)
    optimizer = OPTIMIZERS[name]([one.weight], lr=0.1)
    for _ in range(30):
        (one.gather(torch.tensor([1, 2, 2])) * torch.randn(3, WIDTH)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = copy.deepcopy(optimizer.state_dict())
    other = copy.deepcopy(one)
    resumed = OPTIMIZERS[name]([other.weight], lr=0.5)
    resumed.load_state_dict(saved)
    ours, theirs = optimizer.state[one.weight], resumed.state[other.weight]
    assert one.weight.dtype == torch.bfloat16
    for key, value in ours.items():
        assert value.dtype in (torch.float32, torch.int32)
        assert theirs[key].dtype == value.dtype and torch.equal(theirs[key], value), key
    # Loaded state is a copy: stepping one does not move the other.
    for some, optimizer_ in ((one, optimizer), (other, resumed)):
        some.gather(torch.tensor([2, 5])).float().square().sum().backward()
        optimizer_.step()
    assert torch.equal(one.weight, other.weight)
    assert all(torch.equal(theirs[key], value) for key, value in ours.items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_in_which_nothing_was_read_changes_nothing(name):
    one = table()
    before = one.weight.detach().clone()
    optimizer = OPTIMIZERS[name]([one.weight], lr=0.1)
    one.gather(torch.empty(0, dtype=torch.int64)).sum().backward()
    assert one.weight.grad.is_sparse
    optimizer.step()
    assert torch.equal(one.weight, before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_dense_gradients_and_impossible_options_are_refused_by_each(name):
    dense = table("dense")
    touch(dense, 0)
    with pytest.raises(ConfigError, match="gradient='sparse'"):
        OPTIMIZERS[name]([dense.weight]).step()
    for options in ({"lr": -1}, {"lr": float("nan")}, {"weight_decay": -0.1}):
        with pytest.raises(ConfigError, match=f"{next(iter(options))} >= 0"):
            OPTIMIZERS[name]([dense.weight], **options)


def test_unknown_choices_are_refused():
    weight = table().weight
    with pytest.raises(ConfigError, match="'step' or 'row'"):
        RowAdam([weight], bias_correction="rows")
    with pytest.raises(ConfigError, match="'full' or 'none'"):
        RowWiseAdam([weight], first_moment="half")
    with pytest.raises(ConfigError, match="odd"):
        SinkhornMomentum([weight], num_normalizations=10)
    with pytest.raises(ConfigError, match="betas"):
        RowAdam([weight], betas=(0.9, 1.0))
