"""The trainers of Hugging Face train a model with memory: rates, clipping, accumulation, checkpoints."""

import copy
import importlib.util
import json
import logging.handlers
import runpy
from pathlib import Path

import accelerate
import pytest
import safetensors
import torch
import transformers
from tests.adapt.conftest import speak
from tests.adapt.small_models import TEXT, TOKENIZER, small_model
from tests.small_model import BACKBONE, MEMORY, needs_checkpointing_of_hooks

import engram_lm
from engram_lm import EngramConfig
from engram_lm.errors import CheckpointError, ConfigError, MismatchError, MissingExtraError
from engram_lm.training.huggingface import MemoryTrainer, TableTraining, train_memory
from engram_lm.training.optimizers import OptimizerOptions, RowAdam, RowWiseAdam, build_optimizer, clip_gradients
from engram_lm.training.table_gradients import sparse_tables

# peft and accelerate ask torch and transformers by names that those call deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
IDS = TOKENIZER(TEXT).input_ids
BATCH = 2


def dataset(number=40, length=12):
    # Of different lengths, so that a mean of means would not be the mean.
    starts = range(0, number * length, length)
    return [one(IDS[start : start + length], 4 + 2 * (place % 4)) for place, start in enumerate(starts)]


def one(ids, known):
    return {"input_ids": ids, "labels": ids[:known] + [-100] * (len(ids) - known)}


def adapted(lora=False, seed=0, **changes):
    model = small_model()
    torch.manual_seed(seed)
    speak(engram_lm.attach(model, TOKENIZER, EngramConfig(**{**MEMORY, **changes})), seed)
    if lora:
        model = with_lora(model)
    train_memory(model)
    return model


def with_lora(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def arguments(folder, **changes):
    usual = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "seed": 3,
    }
    return transformers.TrainingArguments(str(folder), **{**usual, **changes})


def trainer_of(model, folder, tables=None, **changes):
    return MemoryTrainer(model, arguments(folder, **changes), train_dataset=dataset(), tables=tables)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    different = [name for name, value in one.items() if not torch.equal(value, other[name])]
    assert not different


class Watch(transformers.TrainerCallback):
    """Notes every learning rate that a step was taken with, by group."""

    def __init__(self):
        self.rates = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})


@pytest.mark.parametrize("gradient", ["sparse", "dense"])
def test_tables_keep_their_multiple_of_the_rate_at_every_step_of_the_schedule(gradient, tmp_path):
    model = adapted(table_gradient=gradient)
    trainer = trainer_of(model, tmp_path, warmup_steps=2, max_steps=5, lr_scheduler_type="cosine")
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    name = "tables" if gradient == "sparse" else "dense_tables"
    assert len({rates["group0"] for rates in watch.rates}) == 5
    for rates in watch.rates:
        assert rates[name] == pytest.approx(5 * rates["group0"], rel=1e-12)


def test_arguments_and_options_reach_their_groups(tmp_path):
    model = adapted()
    trainer = trainer_of(
        model, tmp_path, TableTraining(lr_multiplier=3.0, weight_decay=0.01, optimizer="row_wise_adam"),
        learning_rate=0.02, weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.97, adam_epsilon=1e-7,
    )  # fmt: skip
    optimizer = trainer.create_optimizer()
    backbone, plain, tables = optimizer.param_groups
    assert (backbone["weight_decay"], plain["weight_decay"], tables["weight_decay"]) == (0.3, 0.0, 0.01)
    assert (backbone["lr"], tables["lr"]) == (0.02, pytest.approx(0.06))
    assert all((group["betas"], group["eps"]) == ((0.8, 0.97), 1e-7) for group in optimizer.param_groups)
    assert isinstance(optimizer.optimizers[-1], RowWiseAdam)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [{names[id(parameter)].rsplit(".", 2)[-1] for parameter in group["params"]} for group in (plain, tables)]
    assert found == [{"query_norm", "key_norm", "conv_norm", "conv_weight"}, {"weight"}]
    assert {names[id(parameter)] for parameter in backbone["params"]} == {
        f"engram_adapters.default.layers.{block}.key_value.weight" for block in (0, 2)
    }
    with pytest.raises(ConfigError, match="table_lr_multiplier >= 0"):
        TableTraining(lr_multiplier=-1.0)


def test_the_whole_backbone_can_be_trained_and_one_adapter_of_several(tmp_path):
    model = adapted()
    engram_lm.attach(model, TOKENIZER, EngramConfig(**{**MEMORY, "layers": (1,)}), name="other")
    speak(model.engram_adapters["other"])
    packed = torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    model.register_parameter("packed", packed)  # as the matrices of a quantized model
    train_memory(model, "full", adapters=["other"])
    before = weights(model)
    trainer_of(model, tmp_path, max_steps=1).train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[1] for name in moved if "engram_adapters" in name} == {"other"}
    assert "engram_adapters.other.memory_tables.1.weight" in moved
    assert "model.layers.0.self_attn.q_proj.weight" in moved
    with pytest.raises(ConfigError, match=r"nobody.*has \['default', 'other'\]"):
        train_memory(model, adapters=["nobody"])


@pytest.mark.parametrize("gradient", ["sparse", "dense"])
def test_accumulated_parts_are_one_batch(gradient, tmp_path):
    found = []
    for changes in ({"per_device_train_batch_size": 4}, {"gradient_accumulation_steps": 4}):
        model = adapted(table_gradient=gradient)
        changes = {"per_device_train_batch_size": 1, "max_grad_norm": 0.05, "logging_strategy": "steps", **changes}
        trainer = trainer_of(model, tmp_path, logging_steps=1, **changes)
        trainer.train()
        logs = [(one["loss"], one["grad_norm"]) for one in trainer.state.log_history if "grad_norm" in one]
        found.append((torch.tensor(logs), weights(model)))
    (logs, one), (logs_of_parts, other) = found
    assert logs[:, 1].min() > 0.05  # it was clipped
    torch.testing.assert_close(logs_of_parts, logs, rtol=1e-3, atol=1e-4)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("max_norm", [0.0, 0.05])
def test_the_norm_is_that_of_all_gradients_and_bounds_them(max_norm, tmp_path):
    norms = {}

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            norms["after"] = clip_gradients(model.parameters(), float("inf"))

    model = adapted()
    changes = {"max_grad_norm": max_norm, "max_steps": 1, "logging_strategy": "steps", "logging_steps": 1}
    trainer = trainer_of(model, tmp_path, **changes)
    trainer.add_callback(Look())
    trainer.train()
    before = trainer.state.log_history[0]["grad_norm"]
    assert norms["after"] == pytest.approx(max_norm or before, rel=1e-5)
    assert before > 0.05


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_that_stops_in_the_middle_ends_with_the_same_bits(lora, tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "warmup_steps": 2}
    whole = adapted(lora)
    trainer_of(whole, tmp_path / "whole", **changes).train()

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    first = trainer_of(adapted(lora), tmp_path / "parts", **changes)
    first.add_callback(Stop())
    first.train()
    again = adapted(lora, seed=9)  # nothing of the first run but its folder
    resumed = trainer_of(again, tmp_path / "parts", **changes)
    watch = Watch()
    resumed.add_callback(watch)
    resumed.train(resume_from_checkpoint=True)
    assert [round(rates["tables"] / rates["group0"], 9) for rates in watch.rates] == [5.0] * 3
    assert_same(weights(again), weights(whole))
    held = {path.relative_to(tmp_path / "parts/checkpoint-3").as_posix() for path in tmp_path.rglob("*.safetensors")
            if (tmp_path / "parts/checkpoint-3") in path.parents}  # fmt: skip
    memory = {f"engram_adapters/default/{name}.safetensors" for name in ("adapter", "tables")}
    assert held == (memory | {"adapter_model.safetensors"} if lora else memory)


def test_full_fine_tuning_saves_a_plain_model_and_the_memory_apart(tmp_path):
    model = adapted()
    train_memory(model, "full")
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer_of(model, tmp_path, **changes).train()
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    with safetensors.safe_open(tmp_path / "checkpoint-2/model.safetensors", "pt") as file:
        assert set(file.keys()) == set(plain.state_dict())
    engram_lm.MemoryAdapter.from_pretrained(plain, tmp_path / "checkpoint-2/engram_adapters/default")
    assert_same(weights(plain), weights(model))
    again = adapted(seed=9)
    train_memory(again, "full")
    handler = logging.handlers.BufferingHandler(100)
    logging.getLogger("transformers.trainer").addHandler(handler)
    trainer_of(again, tmp_path, **changes).train(resume_from_checkpoint=True)
    logging.getLogger("transformers.trainer").removeHandler(handler)
    assert [record.getMessage() for record in handler.buffer if "missing keys" in record.getMessage()] == []
    assert_same(weights(again), weights(model))


@pytest.mark.parametrize("lora", [False, True])
def test_the_best_model_has_its_memory(lora, tmp_path):
    model = adapted(lora)
    seen = {}

    class Remember(transformers.TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs):
            seen[metrics["eval_loss"]] = weights(model)

    changes = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1, "max_steps": 2}
    trainer = MemoryTrainer(
        model,
        # The highest loss is called best, which is the first.
        arguments(
            tmp_path, **changes, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True
        ),
        train_dataset=dataset(),
        eval_dataset=dataset(6),
        callbacks=[Remember()],
    )
    trainer.train()
    assert max(seen) == next(iter(seen))
    assert_same(weights(model), seen[max(seen)])


def test_a_checkpoint_without_the_memory_is_refused(tmp_path):
    model = adapted()
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1/trainer_state.json").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match=r"holds no memory 'default'.*resume from another"):
        trainer_of(model, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_checkpoint_of_another_hash_is_refused(tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer_of(adapted(), tmp_path, **changes).train()
    other = small_model()
    engram_lm.attach(other, TOKENIZER, EngramConfig(**MEMORY, seed=5))
    train_memory(other)
    with pytest.raises(MismatchError, match=r"has the hash .* the attached one .* attach with the configuration"):
        trainer_of(other, tmp_path, **changes).train(resume_from_checkpoint=True)


@needs_checkpointing_of_hooks
def test_gradient_checkpointing_and_bfloat16_change_what_they_should(tmp_path):
    found = {}
    for name, changes in {
        "plain": {},
        "checkpointed": {"gradient_checkpointing": True},
        "bfloat16": {"bf16": True},
    }.items():
        model = adapted()
        trainer_of(model, tmp_path, **changes).train()
        found[name] = weights(model)
    assert_same(found["checkpointed"], found["plain"])
    table = "engram_adapters.default.memory_tables.0.weight"
    assert found["bfloat16"][table].dtype == torch.float32
    start = adapted().state_dict()[table]
    moved, moved_plain = found["bfloat16"][table] - start, found["plain"][table] - start
    assert torch.equal(moved.ne(0).any(1), moved_plain.ne(0).any(1))
    assert torch.nn.functional.cosine_similarity(moved.flatten(), moved_plain.flatten(), dim=0) > 0.9


def test_a_scaler_of_half_precision_skips_what_overflows_and_unscales_the_rest():
    model = adapted()
    model.train()
    optimizer = engram_optimizer(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    ids = torch.tensor([IDS[:12]])
    before = weights(model)
    scaler.scale(model(input_ids=ids, labels=ids).loss * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_same(weights(model), before)
    twin = copy.deepcopy(model)
    for one, scale in ((model, scaler), (twin, None)):
        optimizer = engram_optimizer(one)
        one.zero_grad()
        loss = one(input_ids=ids, labels=ids).loss
        (scale.scale(loss) if scale else loss).backward()
        (scale.step(optimizer) if scale else optimizer.step())
    for name, value in weights(twin).items():
        torch.testing.assert_close(model.state_dict()[name], value)


def engram_optimizer(model):
    return build_optimizer(model, OptimizerOptions(backbone="adamw", lr=1e-2, betas=(0.9, 0.999), weight_decay=0.0))


def test_loops_of_torch_and_accelerate_take_the_same_steps(tmp_path):
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # an earlier test may have asked for bf16
    batches = [torch.tensor([IDS[start : start + 12]]) for start in (0, 12, 24)]
    found = []
    for kind in ("ours", "accelerate", "sparse_adam", "dense"):
        model = adapted(table_gradient="dense" if kind == "dense" else "sparse").train()
        tables = [module.weight for module in model.modules() if isinstance(module, engram_lm.Table)]
        others = [p for p in model.parameters() if p.requires_grad and not any(p is table for table in tables)]
        optimizers = [engram_optimizer(model)]
        if kind == "sparse_adam":
            adam = torch.optim.AdamW(others, lr=1e-2, weight_decay=0.0)
            optimizers = [adam, torch.optim.SparseAdam(tables, lr=5e-2)]
        if kind == "dense":
            groups = [{"params": others}, {"params": tables, "lr": 5e-2}]
            optimizers = [torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)]
        if kind == "accelerate":
            _, optimizers[0] = accelerate.Accelerator(cpu=True).prepare(model, optimizers[0])
            assert [g["lr_multiplier"] for g in optimizers[0].param_groups] == [1.0, 1.0, 5.0]
        for ids in batches[: 1 if kind == "dense" else 3]:  # a dense step also moves rows that were touched before
            model(input_ids=ids, labels=ids).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        found.append(weights(model))
        if kind == "ours":
            assert isinstance(optimizers[0].optimizers[-1], RowAdam)
    ours, accelerated, sparse_adam, dense = found
    assert_same(accelerated, ours)
    for name, value in ours.items():
        torch.testing.assert_close(sparse_adam[name], value, rtol=1e-5, atol=1e-5)
    assert dense.keys() == ours.keys()


def test_what_would_divide_or_copy_the_memory_is_refused(tmp_path):
    trainer = trainer_of(adapted(), tmp_path)
    trainer.args._n_gpu = 2
    with pytest.raises(ConfigError, match=r"sees 2 GPUs.*one process per GPU"):
        trainer.create_optimizer()
    trainer.args._n_gpu = 1
    trainer.is_fsdp_enabled = True
    with pytest.raises(ConfigError, match=r"FSDP would divide.*DistributedDataParallel"):
        trainer.create_optimizer()
    assert len(sparse_tables(trainer.model)) == 2


def test_a_reference_model_is_trained_and_resumed_like_an_adapted_one(tmp_path):
    def run(name, seed, resume=None):
        torch.manual_seed(seed)
        config = engram_lm.EngramLMConfig.for_tokenizer(TOKENIZER, EngramConfig(**MEMORY), **BACKBONE)
        model = engram_lm.EngramForCausalLM(config)
        trainer = trainer_of(model, tmp_path / name, save_strategy="steps", save_steps=2)
        watch = Watch()
        trainer.add_callback(watch)
        trainer.train(resume_from_checkpoint=resume)
        return weights(model), watch.rates

    whole, _ = run("whole", 0)
    resumed, rates = run("parts", 9, str(tmp_path / "whole/checkpoint-2"))
    assert_same(resumed, whole)
    assert [row["tables"] for row in rates] == pytest.approx([5 * row["group0"] for row in rates])
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "parts/checkpoint-4")
    assert_same(weights(again), whole)


def test_rows_that_are_read_from_files_are_neither_trained_nor_copied(tmp_path):
    adapted().engram_adapters["default"].save_pretrained(tmp_path / "memory")

    def mapped():
        model = small_model()
        engram_lm.MemoryAdapter.from_pretrained(model, tmp_path / "memory", table_tier="mmap")
        train_memory(model)
        return model

    model, again = mapped(), mapped()
    before = weights(model)
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer_of(model, tmp_path, **changes).train()
    assert any(value.ne(before[name]).any() for name, value in model.state_dict().items())
    assert not (tmp_path / "checkpoint-2/engram_adapters/default/tables.safetensors").exists()
    trainer_of(again, tmp_path, **changes).train(resume_from_checkpoint=True)
    assert_same(weights(again), weights(model))


def test_a_missing_accelerate_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"engram-lm\[hf\]"):
        runpy.run_path(engram_lm.training.huggingface.__file__)


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(Path(__file__).parents[2] / "examples/adapt_with_trainer.py"), run_name="__main__")
    assert "loss" in capsys.readouterr().out
    assert (tmp_path / "runs/adapt_with_trainer/adapter/tables.safetensors").is_file()
