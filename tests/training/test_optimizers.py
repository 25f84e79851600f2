"""Adam on touched rows equals SparseAdam, and dense Adam where every row is touched."""

import copy
import math

import pytest
import torch
from tests.training.test_loop import model

from engram_lm.errors import ConfigError
from engram_lm.tables import ParameterTable
from engram_lm.training.optimizers import (
    OptimizerOptions,
    RowAdam,
    build_optimizer,
    clip_gradients,
    merge_rows,
    sort_parameters,
)


def table(gradient="sparse", seed=0) -> ParameterTable:
    torch.manual_seed(seed)
    return ParameterTable(40, 5, gradient=gradient)


def touch(table, seed, rows=30, high=40):
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(high, (rows,), generator=generator)
    factor = torch.randn(rows, 5, generator=generator)
    (table.gather(picked) * factor).sum().backward()
    return set(picked.tolist())


def test_row_adam_equals_torch_s_sparse_adam():
    ours, theirs = table(), table()
    optimizers = [
        RowAdam([ours.weight], lr=0.02, betas=(0.9, 0.95)),
        torch.optim.SparseAdam([theirs.weight], lr=0.02, betas=(0.9, 0.95)),
    ]
    for step in range(15):
        for one in (ours, theirs):
            touch(one, step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_row_adam_equals_dense_adam_where_every_row_is_touched():
    sparse, dense = table("sparse"), table("dense")
    optimizers = [RowAdam([sparse.weight], lr=0.02), torch.optim.Adam([dense.weight], lr=0.02, eps=1e-12)]
    optimizers[0].param_groups[0]["eps"] = 1e-12
    for step in range(5):
        for one in (sparse, dense):
            factor = torch.randn(40, 5, generator=torch.Generator().manual_seed(step))
            (one.gather(torch.arange(40)) * factor).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(sparse.weight, dense.weight, atol=1e-5, rtol=1e-5)


def test_a_step_changes_only_the_rows_it_touched():
    one = table()
    optimizer = RowAdam([one.weight], lr=0.1)
    touch(one, 0)
    optimizer.step()
    optimizer.zero_grad()
    before = one.weight.detach().clone()
    touched = touch(one, 1, rows=6)
    optimizer.step()
    changed = set((one.weight.detach() != before).any(1).nonzero()[:, 0].tolist())
    assert changed == touched


def test_its_state_resumes_to_the_same_weights():
    one = table()
    optimizer = RowAdam([one.weight], lr=0.1)
    touch(one, 0)
    optimizer.step()
    optimizer.zero_grad()
    other = copy.deepcopy(one)
    resumed = RowAdam([other.weight], lr=0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for table_, optimizer_ in ((one, optimizer), (other, resumed)):
        touch(table_, 1)
        optimizer_.step()
    assert torch.equal(one.weight, other.weight)


def test_gradients_accumulate_without_becoming_dense():
    accumulated, whole = table(), table("dense")
    for seed in (3, 4, 5):
        touch(accumulated, seed)
        touch(whole, seed)
    assert accumulated.weight.grad.is_sparse
    rows, values = merge_rows(accumulated.weight.grad)
    assert torch.equal(rows, rows.unique())
    torch.testing.assert_close(values, whole.weight.grad[rows])


def test_clipping_counts_the_merged_rows_of_a_sparse_gradient():
    sparse, dense = table("sparse"), table("dense")
    other = torch.nn.Parameter(torch.ones(3))
    for one in (sparse, dense):
        touch(one, 1)
    other.grad = torch.full((3,), 2.0)
    expected = float(torch.nn.utils.clip_grad_norm_([dense.weight, other], 0.5))
    other.grad = torch.full((3,), 2.0)
    assert clip_gradients([sparse.weight, other], 0.5) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(sparse.weight.grad.to_dense(), dense.weight.grad, atol=1e-6, rtol=1e-4)
    assert clip_gradients([sparse.weight, other], 0.5) == pytest.approx(0.5, rel=1e-4)
    before = sparse.weight.grad.to_dense()
    clip_gradients([sparse.weight, other], 10.0)
    assert torch.equal(sparse.weight.grad.to_dense(), before)
    assert clip_gradients([torch.nn.Parameter(torch.ones(1))], 1.0) == 0.0


def test_dense_gradients_and_impossible_rates_are_refused():
    one = table("dense")
    touch(one, 0)
    with pytest.raises(ConfigError, match="gradient='sparse'"):
        RowAdam([one.weight]).step()
    with pytest.raises(ConfigError, match="lr >= 0"):
        RowAdam([one.weight], lr=-1)


def test_norms_the_convolution_and_the_embedding_do_not_decay():
    one = model()
    names = {id(parameter): name for name, parameter in one.named_parameters()}
    groups = build_optimizer(one, OptimizerOptions(backbone="adamw", weight_decay=0.1)).param_groups
    decayed, plain = ({group["name"]: group for group in groups}[name] for name in ("decayed", "plain"))
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    spared = {names[id(parameter)].split(".")[-1] for parameter in plain["params"]}
    assert {"conv_weight", "query_norm", "key_norm", "conv_norm"} <= spared
    assert "model.embed_tokens.weight" in {names[id(parameter)] for parameter in plain["params"]}
    assert {names[id(p)].split(".")[-2] for p in decayed["params"]} >= {"key_value", "o_proj", "down_proj"}


def test_tables_are_told_apart_and_frozen_parameters_left_out():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = table()
            self.linear = torch.nn.Linear(3, 3)
            self.frozen = torch.nn.Linear(2, 2).requires_grad_(False)

    model = Model()
    kinds = sort_parameters(model)
    assert [parameter is model.table.weight for parameter in kinds.tables.values()] == [True]
    assert {**kinds.matrices, **kinds.decayed} == {"linear.weight": model.linear.weight}
    assert kinds.plain == {"linear.bias": model.linear.bias} and not kinds.dense_tables


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_no_number_scales_nothing(value):
    sparse, other = table(), torch.nn.Parameter(torch.ones(3))
    touch(sparse, 1)
    before = sparse.weight.grad.to_dense()
    other.grad = torch.tensor([value, 2.0, 3.0])
    norm = clip_gradients([sparse.weight, other], 0.5)
    assert not math.isfinite(norm)
    assert torch.equal(sparse.weight.grad.to_dense(), before) and other.grad[1:].tolist() == [2.0, 3.0]


def test_entries_of_one_row_are_added_in_order_and_in_float32():
    values = torch.tensor([[256.0], [1.0], [1.0], [5.0]], dtype=torch.bfloat16)
    gradient = torch.sparse_coo_tensor([[3, 3, 3, 0]], values, (4, 1), check_invariants=True)
    rows, merged = merge_rows(gradient)
    assert rows.tolist() == [0, 3] and merged.dtype == torch.bfloat16
    assert merged.tolist() == [[5.0], [258.0]]  # in bfloat16 256 + 1 is 256
