"""Sparse writing, retention and dependence in trainers of Hugging Face."""

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from tests.adapt.small_models import SHAPE
from tests.training.test_huggingface import IDS, adapted, arguments, assert_same, dataset, weights

from engram_lm.adapt import attached_adapters
from engram_lm.errors import ConfigError, DataError, MismatchError
from engram_lm.training.data.batches import Batches
from engram_lm.training.dependence import DependenceOptions, mean_of_sequences, memory_off, missing_gain
from engram_lm.training.huggingface import MemoryTrainer, TableTraining
from engram_lm.training.retention import RetentionLoss
from engram_lm.training.trainer_losses import RetentionTraining
from engram_lm.training.writing import WritingOptions, choose_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
GENERAL = np.array(IDS[::-1])
RETENTION = RetentionTraining(tokens=GENERAL, weight=0.7, per_device_batch_size=2, length=9)
DEPENDENCE = DependenceOptions(weight=0.4, margin=0.2)


def trainer_of(model, folder, data=None, changes=None, **options):
    return MemoryTrainer(model, arguments(folder, **(changes or {})), train_dataset=data or dataset(), **options)


def chosen(model, share=0.3):
    adapter = next(iter(attached_adapters(model).values()))
    domain = Batches(np.array(IDS), 4, 12, seed=0)
    return choose_rows(adapter.spec, domain, Batches(GENERAL, 4, 12, seed=0), WritingOptions(rule="kl", share=share))


class Gradients(transformers.TrainerCallback):
    def __init__(self):
        self.found = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        self.found.append({name: grad.to_dense().clone() for name, grad in named.items()})


@pytest.mark.parametrize("parts", [1, 2])
def test_the_gradient_of_a_step_is_that_of_all_its_losses(parts, tmp_path):
    data = dataset(4)
    watch = Gradients()
    # One step of the whole data, in one or two parts, without clipping.
    changes = {"max_steps": 1, "per_device_train_batch_size": 4 // parts, "gradient_accumulation_steps": parts}
    own = RetentionTraining(tokens=GENERAL, weight=0.7, per_device_batch_size=4 // parts, length=9, beginning=(1,))
    trainer = trainer_of(
        adapted(), tmp_path, data, {**changes, "max_grad_norm": 0.0, "logging_steps": 1, "logging_strategy": "steps"},
        retention=own, dependence=DEPENDENCE,
    )  # fmt: skip
    trainer.add_callback(watch)
    trainer.train()
    model = adapted().train()
    ids = torch.tensor([one["input_ids"] for one in data])
    labels = torch.tensor([one["labels"] for one in data])
    targets = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    with torch.no_grad(), memory_off(model, attached_adapters(model).values()):
        off = mean_of_sequences(model(input_ids=ids).logits, targets)
    missing = missing_gain(off, mean_of_sequences(model(input_ids=ids).logits, targets), 0.2)
    kept = RetentionLoss(model)(Batches(GENERAL, 4, 9, 0, beginning=(1,))[0][0])
    (model(input_ids=ids, labels=labels).loss + 0.7 * kept + 0.4 * missing).backward()
    theirs = {name: value.grad.to_dense() for name, value in model.named_parameters() if value.grad is not None}
    (ours,) = watch.found
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6)
    logged = trainer.state.log_history[0]
    assert logged["retention_loss"] == pytest.approx(kept.item(), rel=1e-4)
    assert logged["dependence_loss"] == pytest.approx(missing.item(), rel=1e-4, abs=1e-6)


def test_a_run_that_stops_in_the_middle_ends_with_the_same_bits(tmp_path):
    def build(folder, **changes):
        model = adapted(occupancy="rows")
        return trainer_of(
            model, tmp_path / folder, changes={"save_strategy": "steps", "save_steps": 2, **changes},
            writing=chosen(model), retention=RETENTION, dependence=DEPENDENCE,
        )  # fmt: skip

    whole = build("whole")
    whole.train()
    again = build("whole")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same(weights(whole.model), weights(again.model))


@pytest.mark.parametrize("gradient", ["sparse", "dense"])
def test_rows_that_were_not_chosen_keep_their_bits(gradient, tmp_path):
    model = adapted(table_gradient=gradient)
    rows = chosen(model)
    adapter = next(iter(attached_adapters(model).values()))
    before = {name: table.weight.detach().clone() for name, table in adapter.tables.items()}
    options = TableTraining(weight_decay=0.5 if gradient == "sparse" else 0.0)
    trainer_of(model, tmp_path, tables=options, writing=rows, retention=RETENTION).train()
    for name, table in adapter.tables.items():
        moved = (table.weight.detach() != before[name]).any(1)
        assert bool(moved.any()) and not bool(moved[~rows.masks[name]].any())
        assert table.trained_rows is None  # the restriction ends with training
    if gradient == "dense":
        with pytest.raises(ConfigError, match="weight decay of tables"):
            trainer_of(model, tmp_path, tables=TableTraining(weight_decay=0.1), writing=rows).train()


def test_training_that_was_stopped_inside_a_batch_can_be_done_again(tmp_path):
    class Stops(transformers.TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    changes = {"max_steps": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    trainer = trainer_of(adapted(), tmp_path, dataset(4), changes, retention=RETENTION)
    trainer.add_callback(Stops)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Stops)
    assert trainer.train().global_step == 1


def test_weights_of_0_change_nothing(tmp_path):
    found = []
    for options in (
        {},
        {"retention": RetentionTraining(tokens=GENERAL, weight=0.0), "dependence": DependenceOptions()},
    ):
        trainer = trainer_of(adapted(), tmp_path, **options)
        trainer.train()
        found.append(weights(trainer.model))
    assert_same(*found)


def test_what_cannot_be_compared_with_a_base_is_refused(tmp_path):
    model = adapted()
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match="its own weights are trained"):
        trainer_of(model, tmp_path, retention=RETENTION)
    with pytest.raises(DataError, match="one sequence needs"):
        trainer_of(adapted(), tmp_path, retention=RetentionTraining(tokens=GENERAL[:5]))
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    with pytest.raises(ConfigError, match="attach one first"):
        trainer_of(plain, tmp_path, dependence=DEPENDENCE)
    for options in ({"weight": -1.0}, {"weight": float("nan")}, {"per_device_batch_size": 0}, {"length": 0}):
        with pytest.raises(ConfigError):
            RetentionTraining(tokens=GENERAL, **options)
    other = adapted(rows_per_head=31)
    with pytest.raises(MismatchError, match="rows were chosen"):
        trainer_of(adapted(), tmp_path, writing=chosen(other)).train()
    with pytest.raises(ConfigError, match="no memories are"):
        trainer_of(plain, tmp_path, writing=chosen(other)).train()


def test_checkpointing_computes_nothing_below_the_first_memory(tmp_path):
    model = adapted(layers=(2,))
    trainer = trainer_of(model, tmp_path, changes={"gradient_checkpointing": True, "max_steps": 1})
    seen = []
    model.model.layers[1].register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    trainer.train()
    assert seen == [False]


def trained(rank, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1",
                      ACCELERATE_USE_CPU="true")  # fmt: skip
    model = adapted(occupancy="rows")
    trainer = trainer_of(
        model, folder, changes={"max_grad_norm": 0.5, "logging_steps": 1,
                                "logging_strategy": "steps", "average_tokens_across_devices": False},
        writing=chosen(model), retention=RETENTION, dependence=DEPENDENCE,
    )  # fmt: skip
    assert trainer.args.world_size == dist.get_world_size() == 2
    trainer.train()
    logs = [line["retention_loss"] for line in trainer.state.log_history if "retention_loss" in line]
    return weights(model), logs, chosen(model).masks


def test_two_processes_agree(rank_pools, tmp_path):
    (one, logs, rows), (other, logs_too, rows_too) = rank_pools(2).run(trained, str(tmp_path))
    assert_same(one, other)
    assert logs == logs_too and len(logs) == 4
    assert all(torch.equal(rows[name], rows_too[name]) for name in rows)
    start = weights(adapted(occupancy="rows"))
    tables = [name for name in one if "memory_tables" in name]
    for name in tables:
        moved = (one[name] != start[name]).any(1)
        assert bool(moved.any()) and not bool(moved[~rows[name.split(".")[-2]]].any())
