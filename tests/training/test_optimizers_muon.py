"""Muon equals torch's on matrices, and a loop over matrices on stacks of them."""

import pytest
import torch

from engram_lm.errors import ConfigError
from engram_lm.training.optimizers import Muon, muon, orthogonalize

SHAPES = [(24, 16), (16, 24), (16, 24), (32, 32), (144, 160)]


def parameters(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def fill_gradients(parameters, step):
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def test_matrices_are_trained_as_by_torch_s_muon():
    ours, theirs = parameters(SHAPES), parameters(SHAPES)
    before = parameters(SHAPES)
    options = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    optimizers = [
        Muon(ours, update_rms=0.2, dtype=torch.bfloat16, **options),
        torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options),
    ]
    for step in range(4):
        for some, optimizer in zip((ours, theirs), optimizers):
            fill_gradients(some, step)
            optimizer.step()
    for mine, other, first in zip(ours, theirs, before):
        # Products in bfloat16, of batches and of single matrices: they differ by roundings of the update.
        mine, other, first = mine.detach(), other.detach(), first.detach()
        assert float((mine - other).norm() / (mine - first).norm()) < 0.01


def test_a_stack_is_a_loop_over_its_matrices(monkeypatch):
    monkeypatch.setattr(muon, "_CHUNK_NUMBERS", 3 * 16 * 24)  # the stack of 7 takes three batches
    (stack,) = parameters([(7, 16, 24)])
    matrices = [torch.nn.Parameter(one.detach().clone()) for one in stack]
    optimizers = [Muon([stack], lr=0.02, dtype=torch.float32), Muon(matrices, lr=0.02, dtype=torch.float32)]
    for step in range(3):
        fill_gradients([stack], step)
        for matrix, gradient in zip(matrices, stack.grad):
            matrix.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(stack.detach(), torch.stack(matrices).detach())


@pytest.mark.parametrize("shape", [(3, 40, 12), (2, 12, 40), (2, 200, 130), (1, 130, 200)], ids=str)
def test_orthogonalizing_brings_singular_values_near_one_and_keeps_singular_vectors(shape):
    matrices = torch.randn(shape)
    found = orthogonalize(matrices)
    assert found.shape == matrices.shape
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    values = left.mT @ found @ right.mT
    diagonal = values.diagonal(dim1=-2, dim2=-1)
    # The smallest of a nearly square random matrix are still on their way up after five steps.
    assert float(diagonal.max()) < 1.25 and float(diagonal.median()) > 0.65
    assert float((values - torch.diag_embed(diagonal)).abs().max()) < 1e-3


def test_updates_have_the_same_root_mean_square_whatever_the_shape():
    some = parameters([(64, 256), (256, 64), (5, 48, 48)])
    before = [parameter.detach().clone() for parameter in some]
    fill_gradients(some, 0)
    Muon(some, lr=1.0, weight_decay=0.0).step()
    for parameter, start in zip(some, before):
        assert float((parameter.detach() - start).square().mean().sqrt()) == pytest.approx(0.18, rel=0.15)


def test_weight_decay_is_decoupled():
    still = parameters([(8, 8)])
    start = still[0].detach().clone()
    still[0].grad = torch.zeros(8, 8)
    Muon(still, lr=0.5, weight_decay=0.1).step()
    torch.testing.assert_close(still[0].detach(), start * 0.95)


def test_momentum_of_bfloat16_weights_is_float32_and_resumes():
    def run(num_steps, saved=None):
        some = [torch.nn.Parameter(p.detach().bfloat16()) for p in parameters([(16, 24)])]
        optimizer = Muon(some, lr=0.02)
        first = 0
        if saved is not None:
            weights, state, first = saved
            some[0].data.copy_(weights)
            optimizer.load_state_dict(state)
        for step in range(first, num_steps):
            fill_gradients(some, step)
            optimizer.step()
        assert optimizer.state[some[0]]["momentum_buffer"].dtype == torch.float32
        return some[0].detach(), optimizer.state_dict(), num_steps

    assert torch.equal(run(6)[0], run(6, saved=run(3))[0])


def test_vectors_kernels_and_sparse_gradients_are_refused():
    for shape in ((5,), (2, 3, 4, 5)):
        with pytest.raises(ConfigError, match="AdamW"):
            Muon([torch.nn.Parameter(torch.ones(shape))])
    embedding = torch.nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match="RowAdam"):
        Muon(embedding.parameters()).step()
