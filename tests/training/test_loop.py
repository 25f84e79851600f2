"""Training lowers the loss, repeats bit for bit, and leaves frozen tables alone."""

import math

import numpy as np
import pytest
import torch
from tests.small_model import BACKBONE, MEMORY, TEXT

from engram_lm.errors import ConfigError, DataError
from engram_lm.memory import EngramConfig
from engram_lm.model import EngramForCausalLM, EngramLMConfig
from engram_lm.training.data.batches import Batches
from engram_lm.training.data.tokenizer import train_tokenizer
from engram_lm.training.interrupts import Interrupt
from engram_lm.training.loop import Trainer, TrainOptions
from engram_lm.training.loss import language_model_loss
from engram_lm.training.optimizers import OptimizerOptions

TOKENIZER = train_tokenizer([TEXT], 270)
TOKENS = np.array(TOKENIZER(TEXT).input_ids, dtype=np.int32)


def model():
    torch.manual_seed(0)
    return EngramForCausalLM(EngramLMConfig.for_tokenizer(TOKENIZER, EngramConfig(**MEMORY), **BACKBONE))


def trained(steps=12, freeze=False, **options):
    one = model()
    for table in one.tables.values():
        table.weight.requires_grad_(not freeze)
    optimizer = OptimizerOptions(backbone="adamw", **{"lr": 3e-3, **options})
    trainer = Trainer(one, Batches(TOKENS, 4, 32, 0), TrainOptions(num_steps=steps), optimizer)
    return one, [trainer.step() for _ in range(steps)]


def test_the_loss_falls_and_records_say_what_happened():
    _, records = trained(steps=40)
    assert records[-1].loss < records[0].loss - 1.0
    assert records[0].loss == pytest.approx(math.log(len(TOKENIZER)), abs=0.5)
    assert [record.step for record in records] == list(range(1, 41))
    assert records[9].num_tokens == 10 * 4 * 32 and all(record.grad_norm > 0 for record in records)


def test_training_repeats_bit_for_bit():
    (first, _), (second, _) = trained(), trained()
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_tables_are_trained_unless_frozen():
    start = model().state_dict()
    for freeze in (False, True):
        after = trained(freeze=freeze)[0].state_dict()
        name = "model.memory_tables.0.weight"
        assert torch.equal(after[name], start[name]) is freeze


EXPERTS = {"first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def test_the_selection_bias_of_experts_moves_with_every_step():
    torch.manual_seed(0)
    one = EngramForCausalLM(EngramLMConfig(vocab_size=300, **{**BACKBONE, **EXPERTS}, router_bias_speed=0.01))
    trainer = Trainer(one, Batches(TOKENS, 4, 32, 0), TrainOptions(num_steps=10))
    for _ in range(10):
        trainer.step()
    for block in one.model.layers[1:]:
        bias = block.mlp.gate.e_score_correction_bias
        assert 0 < float(bias.abs().max()) <= 0.2 and block.mlp.gate.expert_counts.sum() == 0


def test_the_balance_loss_is_trained_as_the_model_adds_it():
    torch.manual_seed(0)
    one = EngramForCausalLM(EngramLMConfig(vocab_size=300, **{**BACKBONE, **EXPERTS}, sequence_balance=0.5))
    inputs, targets = torch.tensor(TOKENS[:64]).long().view(2, 32), torch.tensor(TOKENS[1:65]).long().view(2, 32)
    labels = torch.cat([inputs[:, :1], targets[:, :-1]], dim=1)  # shifted by the model itself
    labels[:, 0] = -100
    output = one.train()(torch.cat([inputs], dim=1), labels=labels)
    plain = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(language_model_loss(one, inputs, targets), plain + output.balance_loss)
    torch.testing.assert_close(language_model_loss(one.eval(), inputs, targets), plain)
    assert one(inputs, labels=labels).balance_loss is None


def test_the_loss_is_the_model_s_own():
    one = model().eval()
    inputs = torch.from_numpy(TOKENS[:64].astype(np.int64)).view(2, 32)
    targets = torch.from_numpy(TOKENS[1:65].astype(np.int64)).view(2, 32)
    expected = torch.nn.functional.cross_entropy(one(inputs).logits.flatten(0, 1), targets.flatten()).detach()
    torch.testing.assert_close(language_model_loss(one, inputs, targets).detach(), expected)
    assert language_model_loss(one, inputs, targets, "bfloat16").detach().item() == pytest.approx(
        float(expected), abs=0.05
    )


def test_the_table_s_learning_rate_is_a_multiple_of_the_backbone_s_at_every_step():
    optimizer = OptimizerOptions(lr=1e-3, table_lr_multiplier=7.0)
    trainer = Trainer(model(), Batches(TOKENS, 4, 32, 0), TrainOptions(num_steps=8), optimizer)
    for _ in range(8):
        record = trainer.step()
        rates = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
        assert rates.pop("tables") == pytest.approx(7 * record.lr)
        assert set(rates.values()) == {record.lr} and {"matrices", "plain"} <= set(rates)
    still, _ = trained(steps=3, table_lr_multiplier=0.0)
    name = "model.memory_tables.0.weight"
    assert torch.equal(still.state_dict()[name], model().state_dict()[name])


def test_parts_of_a_batch_add_up_to_the_whole():
    def weights(micro_batch_size):
        one = model()
        trainer = Trainer(
            one,
            Batches(TOKENS, 5, 32, 0),
            TrainOptions(num_steps=4, micro_batch_size=micro_batch_size),
            OptimizerOptions(backbone="adamw", lr=1e-3, eps=1e-3),
        )
        return [trainer.step() for _ in range(4)], one.state_dict()

    (whole, expected), (parts, found) = weights(None), weights(2)
    assert [record.loss for record in parts] == pytest.approx([record.loss for record in whole], rel=1e-5)
    assert [record.grad_norm for record in parts] == pytest.approx([record.grad_norm for record in whole], rel=1e-4)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_details_measure_what_a_step_did():
    one = model()
    trainer = Trainer(one, Batches(TOKENS, 4, 32, 0), TrainOptions(num_steps=4), OptimizerOptions(lr=1e-3))
    trainer.step()
    before = {name: value.clone() for name, value in one.state_dict().items()}
    record = trainer.step(details=True)
    details = record.details
    assert math.hypot(*details["grad_norms"].values()) == pytest.approx(record.grad_norm, rel=1e-5)
    tables = [name for name in before if "memory_tables" in name]
    moved = {name: float((one.state_dict()[name] - before[name]).norm()) for name in tables}
    assert details["update_norms"]["tables"] == pytest.approx(math.hypot(*(moved[name] for name in tables)), rel=1e-4)
    assert all(value > 0 for value in details["update_norms"].values())
    for name, use in details["tables"].items():
        changed = (one.state_dict()[f"model.memory_tables.{name}.weight"] != model().tables[name].weight).any(1)
        assert use["occupancy"] == pytest.approx(float(changed.float().mean())) and 0 < use["occupancy"] <= 1
        assert 0.5 < use["row_norm_drift"] < 2


def test_a_gradient_that_is_not_finite_skips_the_step_and_is_counted(monkeypatch):
    one = model()
    options = TrainOptions(num_steps=9, max_skipped_steps=2)
    trainer = Trainer(one, Batches(TOKENS, 4, 32, 0), options, OptimizerOptions(lr=1e-3))
    trainer.step()
    weight, good = one.lm_head.weight, one.lm_head.weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = float("nan")
    before = {name: value.clone() for name, value in trainer.optimizer.named_state().items()}
    for skipped in (1, 2):
        record = trainer.step()
        assert record.skipped and trainer.num_skipped == skipped
    assert all(torch.equal(value, before[name]) for name, value in trainer.optimizer.named_state().items())
    with torch.no_grad():
        weight.copy_(good)
    assert not trainer.step().skipped and trainer.num_skipped == 2
    with torch.no_grad():
        weight[0, 0] = float("inf")
    trainer.step(), trainer.step()
    with pytest.raises(DataError, match="3 such steps in a row"):
        trainer.step()


def test_a_loss_that_is_no_number_stops_training_with_the_model_as_it_was():
    one = model()
    trainer = Trainer(one, Batches(TOKENS, 4, 32, 0), TrainOptions(num_steps=3))
    with torch.no_grad():
        one.lm_head.weight[0, 0] = float("nan")
    before = {name: value.clone() for name, value in one.state_dict().items()}
    with pytest.raises(DataError, match="lower the learning rate"):
        trainer.step()
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, before[name], equal_nan=True, atol=0, rtol=0)


def test_impossible_options_are_refused():
    with pytest.raises(ConfigError, match="num_steps"):
        TrainOptions(num_steps=0)


def test_the_first_interruption_is_a_request_and_the_second_ends_it():
    import os
    import signal

    # A shell's background jobs begin with SIGINT ignored, and Python leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with Interrupt() as interrupt:
        assert not interrupt.asked
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_a_signal_that_comes_twice_at_once_is_one_request():
    import os
    import signal

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with Interrupt(same_seconds=60.0) as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.asked
    signal.signal(signal.SIGINT, before)


def test_a_token_that_the_model_does_not_have_is_refused_before_anything_is_exchanged():
    tokens = TOKENS.copy()
    tokens[:] = 2
    tokens[33] = len(TOKENIZER)
    trainer = Trainer(model(), Batches(tokens, 4, 32, 0), TrainOptions(num_steps=20), OptimizerOptions(lr=1e-3))
    words = f"the token {len(TOKENIZER)}, the model's vocabulary has {len(TOKENIZER)}"
    with pytest.raises(DataError, match=words):  # noqa: PT012 - one of the steps
        for _ in range(20):
            trainer.step()
