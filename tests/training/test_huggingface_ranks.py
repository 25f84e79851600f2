"""Under DistributedDataParallel a model with memory is trained as by one process: gradients, losses, rates, bits."""

import os

import pytest
import torch
import torch.distributed as dist
import transformers
from tests.training.test_huggingface import (
    IDS,
    Watch,
    adapted,
    assert_same,
    trainer_of,
    weights,
)
from torch.nn.parallel import DistributedDataParallel

from engram_lm.errors import ConfigError
from engram_lm.training.optimizers import clip_gradients
from engram_lm.training.table_gradients import average_rows, share_tables, sparse_tables

WORLD = 2


@pytest.fixture(scope="module")
def processes(rank_pools):
    return rank_pools(WORLD)


def gradients(model):
    return {n: p.grad.to_dense().clone() for n, p in model.named_parameters() if p.grad is not None}


def joint_batch():
    return torch.tensor([IDS[start : start + 12] for start in range(0, 48, 12)])


def averaged(rank, accumulate):
    # Rank 1 begins with other tables, and gets those of the first.
    model = adapted().train()
    with torch.no_grad():
        for table in sparse_tables(model).values():
            table.add_(rank)
    share_tables(model)
    wrapped = DistributedDataParallel(model)
    with pytest.raises(ConfigError, match=r"call share_tables.*before"):
        share_tables(wrapped)
    mine = joint_batch()[rank * 2 : rank * 2 + 2]
    parts = mine.split(1) if accumulate else [mine]
    for number, ids in enumerate(parts):
        if number + 1 < len(parts):
            with wrapped.no_sync():
                (wrapped(input_ids=ids, labels=ids).loss / len(parts)).backward()
        else:
            (wrapped(input_ids=ids, labels=ids).loss / len(parts)).backward()
    return gradients(model), clip_gradients(model.parameters(), float("inf"))


@pytest.mark.parametrize("accumulate", [False, True])
def test_gradients_of_two_ranks_are_those_of_one_process_with_the_whole_batch(accumulate, processes):
    model = adapted().train()
    ids = joint_batch()
    model(input_ids=ids, labels=ids).loss.backward()
    (one, norm_one), (other, norm_other) = processes.run(averaged, accumulate)
    assert norm_one == norm_other
    assert_same(one, other)
    assert any("memory_tables" in name for name in one)
    for name, value in gradients(model).items():
        torch.testing.assert_close(one[name], value, rtol=1e-4, atol=1e-6)


class Partly(torch.nn.Module):
    """A model below whose memory one rank's batch uses a weight that the other's does not, as of an expert."""

    def __init__(self):
        super().__init__()
        self.model, self.below = adapted().train(), torch.nn.Parameter(torch.zeros(32))

    def forward(self, ids, uses_it):
        add = self.model.model.embed_tokens.register_forward_hook(lambda module, args, output: output + self.below)
        if not uses_it:
            add.remove()
        loss = self.model(input_ids=ids, labels=ids).loss
        add.remove()
        return loss


def differing(rank):
    model = Partly()
    sharing = share_tables(model)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    wrapped(joint_batch()[rank : rank + 1], rank == 0).backward()
    sharing.remove()
    return gradients(model)


def test_ranks_that_use_different_weights_wait_for_each_other_in_one_order(processes):
    one, other = processes.run(differing)
    assert_same(one, other)
    model = Partly()
    for row, uses_it in enumerate((True, False)):
        (model(joint_batch()[row : row + 1], uses_it) / 2).backward()
    for name, value in gradients(model).items():
        torch.testing.assert_close(one[name], value, rtol=1e-4, atol=1e-6)


def odd_rows(rank):
    rows = torch.tensor([[3, 1, 3], []][rank], dtype=torch.int64)
    values = torch.tensor([[[1.0, 2.0], [4.0, 0.0], [2.0, 2.0]], []][rank]).view(-1, 2)
    averaged = average_rows(torch.sparse_coo_tensor(rows[None], values, (5, 2)))
    return averaged.is_coalesced(), averaged.indices(), averaged.values()


def test_a_rank_that_touched_nothing_takes_part(processes):
    for coalesced, rows, values in processes.run(odd_rows):
        assert coalesced
        assert rows.tolist() == [[1, 3]]
        assert values.tolist() == [[2.0, 0.0], [1.5, 2.0]]


class Losses(transformers.TrainerCallback):
    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.losses += [(logs["loss"], logs["grad_norm"])] if "grad_norm" in logs else []


def trained(rank, folder, gradient="sparse", seed=0, resume=None, stop=None, parts=1, batch=2, occupancy="none"):
    """Train by the trainer, in whatever group this process is in."""
    if dist.is_initialized():
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT="1", ACCELERATE_USE_CPU="true")  # fmt: skip
    changes = {} if occupancy == "none" else {"rows_per_head": 4999}
    model = adapted(table_gradient=gradient, seed=seed, occupancy=occupancy, **changes)
    trainer = trainer_of(
        model, folder, max_steps=4, warmup_steps=1, logging_strategy="steps", logging_steps=1, save_strategy="steps",
        save_steps=2, per_device_train_batch_size=batch // parts, gradient_accumulation_steps=parts,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    watch, losses = Watch(), Losses()
    trainer.add_callback(watch)
    trainer.add_callback(losses)

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop |= state.global_step == stop

    trainer.add_callback(Stop())
    trainer.train(resume_from_checkpoint=resume)
    world = dist.get_world_size() if dist.is_initialized() else 1
    assert isinstance(trainer.model_wrapped, DistributedDataParallel) == (world > 1)
    # Whoever wraps it next without share_tables is refused by DDP, instead of training tables apart.
    assert not getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    return weights(model), watch.rates, losses.losses


@pytest.mark.parametrize(("gradient", "parts"), [("sparse", 1), ("sparse", 2), ("dense", 1)])
def test_the_trainer_on_two_ranks_does_what_one_process_does(gradient, parts, processes, tmp_path):
    found = processes.run(trained, str(tmp_path / "two"), gradient, 0, None, None, parts)
    alone = trained(0, str(tmp_path / "one"), gradient, batch=2 * WORLD)
    (one, rates, losses), (other, *_) = found
    assert_same(one, other)
    name = "tables" if gradient == "sparse" else "dense_tables"
    assert [row[name] for row in rates] == pytest.approx([5 * row["group0"] for row in rates])
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(alone[2]), rtol=1e-3, atol=1e-3)
    for key, value in alone[0].items():
        torch.testing.assert_close(one[key], value, rtol=1e-3, atol=1e-3)


def test_two_ranks_that_stop_and_go_on_end_with_the_same_bits(processes, tmp_path):
    whole = processes.run(trained, str(tmp_path / "whole"))[0][0]
    processes.run(trained, str(tmp_path / "parts"), "sparse", 0, None, 2)
    (one, rates, _), (other, *_) = processes.run(trained, str(tmp_path / "parts"), "sparse", 9, True)
    assert_same(one, whole)
    assert_same(other, whole)
    assert [row["tables"] for row in rates] == pytest.approx([5 * row["group0"] for row in rates])
    assert len(rates) == 2


def test_two_ranks_agree_which_rows_were_written_and_go_on_with_the_same_bits(processes, tmp_path):
    (whole, *_), (other, *_) = processes.run(trained, str(tmp_path / "whole"), "sparse", 0, None, None, 1, 2, "rows")
    assert_same(whole, other)
    alone, *_ = trained(0, str(tmp_path / "one"), batch=2 * WORLD, occupancy="rows")
    for block in (0, 2):
        name = f"engram_adapters.default.memory_tables.{block}.weight"
        written = (whole[name] != 0).any(-1)
        assert torch.equal(written, (alone[name] != 0).any(-1))
        assert 0 < written.sum() < len(written) // 10
    processes.run(trained, str(tmp_path / "parts"), "sparse", 0, None, 2, 1, 2, "rows")
    (one, *_), (other, *_) = processes.run(trained, str(tmp_path / "parts"), "sparse", 9, True, None, 1, 2, "rows")
    assert_same(one, whole)
    assert_same(other, whole)
