"""Two processes, each with a part of the parameters, train as one process with all of them."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from engram_lm.training.optimizers import Muon, OptimizerOptions, SinkhornMomentum, build_optimizer, clip_gradients
from engram_lm.training.optimizers.rows import Sharing

NUM_ROWS, WIDTH, CUT = 9, 4, 5
STEPS = 3


class Model(nn.Module):
    """Matrices that two ranks divide unevenly, and stacks of which one rank has fewer matrices or none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(5, 7, bias=False)
        self.stack = nn.Parameter(torch.randn(3, 7, 6))
        self.single = nn.Parameter(torch.randn(1, 6, 4))

    def forward(self, inputs):
        return (self.second(self.first(inputs)) @ self.stack.sum(0) @ self.single[0]).square().mean()


def train(model, group=None):
    optimizer = build_optimizer(model, OptimizerOptions(lr=0.02), group=group)
    optimizer.allocate_state()
    norms = []
    for step in range(STEPS):
        inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        model(inputs).backward()
        norms.append(clip_gradients(model.parameters(), 0.5))
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.named_state()
    found = {**dict(model.named_parameters()), **state}
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in found.items()}
    return norms, {name: t.detach().clone() for name, t in whole.items()}


def sparse(step, first=0, last=NUM_ROWS):
    """Rows [first, last) of a step's gradient; in step 1 rows from CUT on have none."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(CUT if step == 1 else NUM_ROWS, (12,), generator=generator)
    values = torch.randn(12, WIDTH, generator=generator)
    own = (rows >= first) & (rows < last)
    return torch.sparse_coo_tensor(rows[own][None] - first, values[own], (last - first, WIDTH), check_invariants=True)


def balance(first, last, sharded):
    weight = nn.Parameter(torch.ones(NUM_ROWS, WIDTH)[first:last].clone())
    optimizer = SinkhornMomentum([weight], lr=0.1, sharing=Sharing(sharded))
    for step in range(STEPS):
        weight.grad = sparse(step, first, last)
        optimizer.step()
    return weight.detach()


def clip(first, last, sharded):
    """A table, of which the second rank has no gradient, and a weight that all ranks have."""
    table, other = nn.Parameter(torch.ones(last - first, WIDTH)), nn.Parameter(torch.ones(3))
    other.grad = torch.tensor([1.0, 2.0, 3.0])
    if first == 0:
        table.grad = sparse(1, first, last)
    norm = clip_gradients([table, other], 0.5, is_sharded=lambda parameter: sharded and parameter is table)
    return norm, other.grad, table.grad.to_dense()[:CUT] if first == 0 else None


def columns(mesh):
    """Matrices of a stack divided by their columns: no rank has a whole one."""
    whole = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(5))
    gradient = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(6))
    parameter = nn.Parameter(whole if mesh is None else distribute_tensor(whole, mesh, [Shard(2)]))
    parameter.grad = gradient if mesh is None else distribute_tensor(gradient, mesh, [Shard(2)])
    Muon([parameter], lr=0.1, dtype=torch.float32).step()
    return (parameter if mesh is None else parameter.full_tensor()).detach().clone()


def counted(model, group):
    """Matrices that this rank made orthogonal in one step, by shape."""
    from engram_lm.training.optimizers import muon

    seen, whole = {}, muon.orthogonalize

    def count(matrices, **options):
        shape = tuple(matrices.shape[1:])
        seen[shape] = seen.get(shape, 0) + len(matrices)
        return whole(matrices, **options)

    muon.orthogonalize = count
    try:
        train(model, group)
    finally:
        muon.orthogonalize = whole
    return seen


def _rank(rank):
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    model = Model()
    fully_shard(model, mesh=mesh)
    first, last = ((0, CUT), (CUT, NUM_ROWS))[rank]
    return {
        "trained": train(model),
        "copies": train(Model(), torch.distributed.group.WORLD),
        "orthogonalized": counted(Model(), torch.distributed.group.WORLD),
        "balanced": balance(first, last, True),
        "clipped": clip(first, last, True),
        "columns": columns(mesh),
    }


@pytest.fixture(scope="module")
def ranks(rank_pools):
    """What two processes found."""
    return rank_pools(2).run(_rank)


def test_a_model_divided_by_fsdp2_trains_as_a_whole_one(ranks):
    norms, whole = train(Model())
    for found, divided in (rank["trained"] for rank in ranks):
        assert found == pytest.approx(norms, rel=1e-5)
        assert divided.keys() == whole.keys()
        for name, value in whole.items():
            # Products in bfloat16 amplify what a sum in another order changes.
            torch.testing.assert_close(divided[name], value, atol=2e-4, rtol=2e-3)


def test_ranks_that_hold_copies_divide_the_work_and_end_alike(ranks):
    norms, whole = train(Model())
    first, second = (rank["copies"] for rank in ranks)
    assert first[0] == pytest.approx(norms, rel=1e-5)
    for name, value in whole.items():
        assert torch.equal(first[1][name], second[1][name]), name
        torch.testing.assert_close(first[1][name], value, atol=2e-4, rtol=2e-3)
    # The stack's three matrices in two shares; of the shapes that have one matrix, the first rank makes all.
    assert [rank["orthogonalized"].get((7, 6)) for rank in ranks] == [2 * STEPS, STEPS]
    assert [rank["orthogonalized"].get((6, 4)) for rank in ranks] == [STEPS, None]


def test_matrices_divided_by_columns_are_trained_as_whole_ones(ranks):
    for found in ranks:
        torch.testing.assert_close(found["columns"], columns(None))


def test_balancing_a_divided_table_equals_balancing_the_whole_though_a_rank_has_no_rows_of_a_step(ranks):
    whole = balance(0, NUM_ROWS, False)
    assert not torch.equal(whole[CUT:], torch.ones(NUM_ROWS - CUT, WIDTH))
    torch.testing.assert_close(torch.cat([found["balanced"] for found in ranks]), whole)


def test_parts_of_a_gradient_are_added_over_the_ranks_and_copies_count_once(ranks):
    expected, other, table = clip(0, NUM_ROWS, False)
    for norm, gradient, _ in (found["clipped"] for found in ranks):
        assert norm == pytest.approx(expected)
        torch.testing.assert_close(gradient, other)
    assert ranks[0]["clipped"][0] == ranks[1]["clipped"][0]
    torch.testing.assert_close(ranks[0]["clipped"][2], table)
