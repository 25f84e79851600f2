"""Many optimizers look like one: groups by kind of parameter, one state, schedulers of torch, checkpoints by name."""

import copy

import pytest
import torch
from tests.small_model import BACKBONE, EXPERTS, MEMORY, TEXT

from engram_lm.errors import ConfigError
from engram_lm.memory import EngramConfig
from engram_lm.model import EngramForCausalLM, EngramLMConfig
from engram_lm.training.data.tokenizer import train_tokenizer
from engram_lm.training.optimizers import (
    CombinedOptimizer,
    OptimizerOptions,
    RowAdam,
    build_optimizer,
    clip_gradients,
    sort_parameters,
)

TOKENIZER = train_tokenizer([TEXT], 270)
IDS = torch.tensor(TOKENIZER(TEXT).input_ids[:66]).view(2, 33)


def small_model(**changes):
    torch.manual_seed(0)
    memory = EngramConfig(**MEMORY, num_streams=4, **changes)
    backbone = {**BACKBONE, **EXPERTS, "num_streams": 4, "tie_word_embeddings": False}
    return EngramForCausalLM(EngramLMConfig.for_tokenizer(TOKENIZER, memory, **backbone))


def backward(model, step=0):
    ids = IDS.roll(step, 1)
    model(ids, labels=ids).loss.backward()


def train(model, optimizer, steps):
    for step in steps:
        backward(model, step)
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def assert_same_weights(one, other):
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_parameters_are_sorted_by_the_class_they_belong_to():
    kinds = sort_parameters(small_model())
    assert {name.split(".", 3)[-1] for name in kinds.matrices} == {
        *(f"self_attn.{name}.weight" for name in ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")),
        *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        *(f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")),
        "mlp.experts.gate_up_proj",
        "mlp.experts.down_proj",
        "memory.key_value.weight",
    }
    assert {name.split(".")[-2] for name in kinds.decayed} == {
        "gate", "attention_streams", "feed_forward_streams", "stream_head", "lm_head"
    }  # fmt: skip
    assert all(parameter.dim() == 2 for parameter in kinds.decayed.values())
    assert "model.embed_tokens.weight" in kinds.plain
    flat = {name.split(".")[-1] for name, parameter in kinds.plain.items() if parameter.dim() > 1}
    assert flat == {"query_norm", "key_norm", "conv_norm", "conv_weight", "weight"}
    assert list(kinds.tables) == ["model.memory_tables.0.weight", "model.memory_tables.2.weight"]
    assert not kinds.dense_tables and kinds.num_sharded == 0


@pytest.mark.parametrize(
    ("backbone", "tables"),
    [("muon", "row_adam"), ("muon", "row_wise_adam"), ("adamw", "row_wise_adagrad"), ("muon", "sinkhorn")],
)
def test_every_choice_of_optimizers_lowers_the_loss(backbone, tables):
    model = small_model()
    optimizer = build_optimizer(model, OptimizerOptions(backbone=backbone, tables=tables, lr=3e-3))
    names = [group["name"] for group in optimizer.param_groups]
    assert names == ["matrices", "decayed", "plain", "tables"][backbone == "adamw" :]
    with torch.no_grad():
        first = float(model(IDS, labels=IDS).loss)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, optimizer, [0] * 15)
    with torch.no_grad():
        assert float(model(IDS, labels=IDS).loss) < first - 0.5
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert not still


def test_learning_rates_are_multiples_that_wrapping_and_schedulers_keep():
    model = small_model()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = build_optimizer(wrapped, OptimizerOptions(lr=0.01, table_lr_multiplier=7.0))
    finally:
        torch.distributed.destroy_process_group()
    assert optimizer.param_groups[-1]["name"] == "tables"
    assert optimizer.param_groups[-1]["param_names"][0] == "model.memory_tables.0.weight"
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(3):
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [rate / (1 + step) for rate in (0.01, 0.01, 0.01, 0.07)]
        )
        backward(model)
        optimizer.step()
        scheduler.step()
    optimizer.set_lr(0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5, 0.5, 3.5]
    # The optimizers inside see it too: nothing moves at a rate of 0.
    optimizer.set_lr(0.0)
    before = copy.deepcopy(model)
    backward(model)
    optimizer.step()
    assert_same_weights(model, before)


@pytest.mark.parametrize("tables", ["row_adam", "row_wise_adam", "row_wise_adagrad", "sinkhorn"])
def test_its_state_dict_resumes_to_the_same_weights(tables):
    options = OptimizerOptions(tables=tables, lr=3e-3, table_bias_correction="row")
    model = small_model()
    optimizer = build_optimizer(model, options)
    train(model, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = copy.deepcopy(model)
    other = build_optimizer(resumed, OptimizerOptions(tables=tables, lr=1.0))
    other.load_state_dict(saved)
    assert [group["lr"] for group in other.param_groups] == [group["lr"] for group in optimizer.param_groups]
    for some, one in ((model, optimizer), (resumed, other)):
        train(some, one, range(3, 6))
    assert_same_weights(model, resumed)


def test_state_made_ahead_is_filled_in_place_by_name_and_changes_nothing():
    options = OptimizerOptions(lr=3e-3, table_bias_correction="row")
    model, other = small_model(), small_model()
    optimizer, ahead = build_optimizer(model, options), build_optimizer(other, options)
    assert ahead.named_state() == {}
    ahead.allocate_state()
    train(model, optimizer, range(3))
    named, made = optimizer.named_state(), ahead.named_state()
    assert {name: (value.shape, value.dtype) for name, value in made.items()} == {
        name: (value.shape, value.dtype) for name, value in named.items()
    }
    assert {name.rsplit("/")[-1] for name in named} == {
        "momentum_buffer", "step", "exp_avg", "exp_avg_sq", "row_steps"
    }  # fmt: skip
    # Made ahead or by the first step: the same training.
    train(other, ahead, range(3))
    assert_same_weights(model, other)
    # Filled in place: the same continuation.
    third = copy.deepcopy(model)
    fresh = build_optimizer(third, options)
    fresh.allocate_state()
    for name, value in fresh.named_state().items():
        value.copy_(named[name])
    for some, one in ((model, optimizer), (third, fresh)):
        train(some, one, range(3, 5))
    assert_same_weights(model, third)


def test_a_closure_is_called_once():
    model = small_model()
    optimizer, calls = build_optimizer(model), []

    def closure():
        calls.append(1)
        backward(model)
        return 1.5

    assert optimizer.step(closure) == 1.5 and calls == [1]


def test_tables_with_dense_gradients_have_adamw_and_the_table_s_rate():
    model = small_model(table_gradient="dense")
    optimizer = build_optimizer(model, OptimizerOptions(lr=0.01, table_lr_multiplier=3))
    group = optimizer.param_groups[-1]
    assert (group["name"], group["lr"], group["weight_decay"]) == ("dense_tables", pytest.approx(0.03), 0.0)
    train(model, optimizer, range(1))
    with pytest.raises(ConfigError, match="gradient='sparse'"):
        build_optimizer(model, OptimizerOptions(tables="sinkhorn"))


def test_what_cannot_be_is_refused():
    model = small_model()
    optimizer = build_optimizer(model)
    with pytest.raises(ConfigError, match="no further groups"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    with pytest.raises(ConfigError, match="no trainable parameter"):
        build_optimizer(model.requires_grad_(False))
    with pytest.raises(ConfigError, match="names"):
        CombinedOptimizer([RowAdam([torch.nn.Parameter(torch.ones(2, 2))])]).named_state()
    for options, message in (
        ({"backbone": "sgd"}, "muon, adamw"),
        ({"tables": "adam"}, "row_wise_adam"),
        ({"lr": float("nan")}, "lr >= 0"),
        ({"betas": (0.9, 1.0)}, "betas in"),
        ({"table_bias_correction": "no"}, "'step' or 'row'"),
    ):
        with pytest.raises(ConfigError, match=message):
            OptimizerOptions(**options)
