"""Ranks that train together do what one process does; where one fails, all fail alike; nobody waits for ever."""

import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.small_model import BACKBONE, MEMORY, TEXT
from torch.distributed.tensor import DTensor

from engram_lm.errors import ConfigError, DataError, EngramError
from engram_lm.memory import EngramConfig
from engram_lm.model import EngramForCausalLM, EngramLMConfig, balance_experts
from engram_lm.tables.tiers.sharded import ShardedTable, block_of
from engram_lm.training.data.batches import Batches
from engram_lm.training.data.tokenizer import train_tokenizer
from engram_lm.training.distribution import (
    LossModule,
    Ranks,
    agree,
    loss_weight,
    sharded_weights,
    share,
    start,
    stop,
    without_sync,
    wrap_backbone,
)
from engram_lm.training.loop import Trainer, TrainOptions
from engram_lm.training.loss import language_model_loss
from engram_lm.training.optimizers import clip_gradients
from engram_lm.training.shard_tables import shard_tables

TOKENIZER = train_tokenizer([TEXT], 270)
BATCH, LENGTH, STEPS, LR = 5, 16, 3, 0.05
EXPERTS = {"first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CASES = {
    "plain": ({}, {}),
    "shared": ({"num_streams": 2}, {"num_streams": 2, "tables": "shared"}),
    "experts": ({**EXPERTS, "router_bias_speed": 0.01, "sequence_balance": 0.01}, {}),
}


@pytest.fixture(scope="module", params=[2, 3])
def processes(request, rank_pools):
    return rank_pools(request.param)


def ranks_here():
    if not dist.is_initialized():
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size(), 0, torch.device("cpu"), dist.group.WORLD)


def build(case, seed=0):
    backbone, memory = CASES[case]
    torch.manual_seed(seed)
    config = EngramLMConfig.for_tokenizer(TOKENIZER, EngramConfig(**{**MEMORY, **memory}), **{**BACKBONE, **backbone})
    model = EngramForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "memory" in name or parameter.dim() >= 2:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.train()


def batch(step):
    # Numbers for which no gate stands at 0, where the slope of its square root makes 1e-7 of rounding into 1e-3 of a
    # norm: one process that adds the batch up in parts would differ as much.
    generator = torch.Generator().manual_seed(300 + step)
    tokens = torch.randint(2, 270, (BATCH, LENGTH + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def norm_of(model, ranks):
    """Global norm of all gradients: replicated ones once, those of tables by merged rows of all ranks."""
    own = {id(weight) for weight in sharded_weights(model)}
    gradients = [(id(p) in own, p.grad) for p in model.parameters() if p.grad is not None]
    tables = sum((g.coalesce().values().square().sum() for is_own, g in gradients if is_own), torch.zeros(()))
    if ranks.world_size > 1:
        dist.all_reduce(tables, group=ranks.group)
    return float((tables + sum(full(g).square().sum() for is_own, g in gradients if not is_own)).sqrt())


def assert_not_exchanged(gradient, kind, ranks):
    """Every rank still has the gradient of its own part of the batch; of FSDP2's, its own part of the gradient."""
    if kind == "ddp":
        everybody = [torch.empty_like(gradient) for _ in range(ranks.world_size)]
        dist.all_gather(everybody, gradient)
        assert not torch.equal(everybody[0], everybody[1])
    else:
        assert gradient.to_local().shape[0] < gradient.shape[0]


def train(rank, case, kind, checkpointing=False, parts=1):
    """A few steps of gradient descent; what one process and a rank of several must agree on."""
    ranks = ranks_here()
    # Other ranks begin with other weights, and are given the first one's.
    model = build(case, seed=0)
    tables = shard_tables(model, seed=5)
    if ranks.rank > 0:
        with torch.no_grad():
            model.model.norm.weight.add_(ranks.rank)
    if checkpointing:
        model.gradient_checkpointing_enable()
    loss_module = LossModule(model, language_model_loss)
    wrapped = wrap_backbone(loss_module, kind, ranks)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    losses, norms, own = [], [], {id(weight) for weight in sharded_weights(model)}
    for step in range(STEPS):
        inputs, targets = batch(step)
        first, last = share(BATCH, ranks)
        weight, loss = loss_weight(last - first, BATCH, ranks), 0.0
        pieces = torch.arange(first, last).tensor_split(parts)
        for number, piece in enumerate(pieces):
            if number < parts - 1:
                with without_sync(wrapped):
                    part = wrapped(inputs[piece], targets[piece]) * len(piece) / (last - first)
                    (part * weight).backward()
                assert_not_exchanged(model.model.norm.weight.grad, kind, ranks)
            else:
                part = wrapped(inputs[piece], targets[piece]) * len(piece) / (last - first)
                (part * weight).backward()
            loss += part.detach()
        if step == 0:
            gradients = {n: full(p.grad).to_dense().clone() for n, p in model.named_parameters()}
        total = loss * weight
        if ranks.world_size > 1:
            dist.all_reduce(total)
        losses.append(float(total) / ranks.world_size)
        before = norm_of(model, ranks)
        norms.append(clip_gradients(model.parameters(), 1.0, is_sharded=lambda p: id(p) in own, group=ranks.group))
        assert norms[-1] == pytest.approx(before, rel=1e-5) and before > 1.1
        assert norm_of(model, ranks) == pytest.approx(1.0, rel=1e-4)
        optimizer.step()
        optimizer.zero_grad()
        balance_experts(model)
    # Asked ahead of the blocks and gathered by them: one exchange for each block that reads, two where it runs twice.
    assert all(table._pending == {} for table in tables.values())
    num_exchanges = sum(table.stats()["num_exchanges"] for table in tables.values())
    assert num_exchanges == (ranks.world_size > 1) * 2 * STEPS * parts * (1 + checkpointing)
    state = {name: full(value).clone() for name, value in model.state_dict().items()}
    # Every rank in the same order, with its own text: evaluation, and decoding token by token.
    model.eval()
    with torch.no_grad():
        hidden = model.model(batch(ranks.rank)[0]).last_hidden_state if kind != "fsdp2" else None
        written = None
        if kind != "fsdp2":
            prompt = batch(ranks.rank)[0][:2, :6]
            written = model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=1)
    return losses, norms, gradients, state, hidden, written


_ALONE = {}


def alone(case):
    if case not in _ALONE:
        _ALONE[case] = train(0, case, "none")
    return _ALONE[case]


def check(found, expected, world_size):
    for rank, (losses, norms, gradients, state, *_) in enumerate(found):
        torch.testing.assert_close(losses, expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norms, expected[1], rtol=1e-4, atol=1e-6)
        for name, gradient in expected[2].items():
            if "memory_tables" in name:
                first, count = block_of(len(gradient), rank, world_size)
                gradient = gradient[first : first + count]
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=2e-6, msg=name)
        assert state.keys() == expected[3].keys()
        for name, value in expected[3].items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=name)
            assert torch.equal(state[name], found[0][3][name])


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("case", CASES)
def test_ranks_train_as_one_process_does_on_the_whole_batch(processes, case, kind):
    expected = alone(case)
    found = processes.run(train, case, kind)
    check(found, expected, processes.world_size)
    assert expected[0][-1] != expected[0][0]
    if kind == "ddp":
        model = build(case).eval()
        shard_tables(model)
        model.load_state_dict(expected[3])
        for rank, (*_, hidden, written) in enumerate(found):
            with torch.no_grad():
                torch.testing.assert_close(hidden, model.model(batch(rank)[0]).last_hidden_state, rtol=1e-3, atol=1e-4)
            assert written.shape == (2, 10)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_recomputed_blocks_read_their_rows_again_and_give_the_same_gradients(processes, kind):
    check(processes.run(train, "shared", kind, True), alone("shared"), processes.world_size)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_accumulated_parts_add_up_to_the_batch(processes, kind):
    # Three ranks have 1, 2 and 2 samples, of which one cannot be divided; two ranks have 2 and 3.
    if processes.world_size == 2:
        check(processes.run(train, "plain", kind, False, 2), alone("plain"), 2)


def fail(rank, culprit, kind):
    ranks = ranks_here()
    words = []
    for attempt in range(2):
        try:
            with agree(ranks, "reading batch 7"):
                if rank in culprit and attempt == 0:
                    raise {"data": DataError, "other": KeyError, "os": OSError}[kind]("broken.parquet")
            words.append(None)
        except EngramError as error:
            words.append((type(error).__name__, str(error)))
    return words


@pytest.mark.parametrize("kind", ["data", "other", "os"])
def test_what_fails_one_rank_fails_all_with_the_same_words(processes, kind):
    found = processes.run(fail, (1, processes.world_size - 1), kind)
    assert all(words == found[0] for words in found)
    (name, message), after = found[0]
    assert name == ("DataError" if kind == "data" else "EngramError") and after is None
    assert message.startswith("rank 1, reading batch 7: ") and "broken.parquet" in message


def test_a_process_that_is_alone_raises_what_was_raised():
    with pytest.raises(KeyError), agree(Ranks()):
        raise KeyError("x")


def lose_tables(rank):
    """What is refused, and what a model built on the meta device becomes."""
    ranks = ranks_here()
    with pytest.raises(ConfigError, match="use 'ddp' or 'fsdp2'"):
        wrap_backbone(LossModule(build("plain"), language_model_loss), "none", ranks)
    with pytest.raises(ConfigError, match="call shard_tables"):
        wrap_backbone(LossModule(build("plain"), language_model_loss), "fsdp2", ranks)
    model = build("plain")
    meta = build("plain").to("meta")
    tables = shard_tables(model, seed=3)
    for name, table in shard_tables(meta, seed=3, device="cpu").items():
        assert torch.equal(table.weight, tables[name].weight)
        assert meta.model.memory_tables[name] is table is meta.model.layers[int(name)].memory.table
    with pytest.raises(ConfigError, match="meta device"):
        wrap_backbone(LossModule(meta, language_model_loss), "ddp", ranks)
    still = shard_tables(build("plain").to("meta"))
    assert all(isinstance(table, ShardedTable) and table.weight.is_meta for table in still.values())
    assert [w.shape[0] for w in sharded_weights(model)] == [
        block_of(t.num_rows, rank, ranks.world_size)[1] for t in tables.values()
    ]
    return {name: full(table.state_dict()["weight"]) for name, table in tables.items()}


def test_tables_are_divided_without_being_made_whole_and_drawn_alike_by_any_number_of_ranks(processes):
    model = build("plain", seed=9)
    expected = shard_tables(model, seed=3)
    assert not torch.equal(expected["0"].weight[:97], expected["2"].weight[:97])
    for found in processes.run(lose_tables):
        assert all(torch.equal(weight, expected[name].weight) for name, weight in found.items())


def test_tables_with_dense_gradients_are_not_divided():
    config = EngramConfig(**MEMORY, table_gradient="dense")
    with pytest.raises(ConfigError, match="table_gradient='sparse'"):
        shard_tables(EngramForCausalLM(EngramLMConfig.for_tokenizer(TOKENIZER, config, **BACKBONE)))


@pytest.mark.parametrize(("batch_size", "world_size"), [(5, 2), (5, 3), (3, 3), (64, 7), (1, 1)])
def test_a_batch_is_divided_whole_and_the_mean_of_weighted_means_is_the_mean(batch_size, world_size):
    everybody = [Ranks(rank, world_size) for rank in range(world_size)]
    shares = [share(batch_size, ranks) for ranks in everybody]
    assert [sample for first, last in shares for sample in range(first, last)] == list(range(batch_size))
    assert max(b - a for a, b in shares) - min(b - a for a, b in shares) <= 1
    samples = torch.arange(batch_size, dtype=torch.float64).exp2()
    means = [
        samples[a:b].mean() * loss_weight(b - a, batch_size, ranks)
        for (a, b), ranks in zip(shares, everybody, strict=True)
    ]
    assert float(sum(means) / world_size) == pytest.approx(float(samples.mean()))


def test_a_batch_smaller_than_the_ranks_is_refused():
    with pytest.raises(ConfigError, match="a batch of 2 cannot be divided over 3"):
        share(2, Ranks(0, 3))


def set_environment(monkeypatch, environment):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_without_torchrun_a_process_is_alone(monkeypatch):
    set_environment(monkeypatch, {})
    with start("cpu") as ranks:
        assert ranks == Ranks() and ranks.group is None and ranks.is_first
    stop(ranks)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "not WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE 2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK in the environment must be a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "-1"}, "LOCAL_RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "http"}, "MASTER_PORT"),
    ],
    ids=str,
)
def test_an_environment_that_contradicts_itself_is_refused(environment, message, monkeypatch):
    whole = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", **environment} if len(environment) > 1 else environment
    set_environment(monkeypatch, whole)
    with pytest.raises(ConfigError, match=message):
        start("cpu")


@pytest.mark.parametrize("device", ["mps", "nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device, monkeypatch):
    set_environment(monkeypatch, {})
    with pytest.raises(ConfigError, match=r"device|GPU|cpu or cuda"):
        start(device)


def test_a_rank_that_never_comes_is_reported_in_time(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    set_environment(monkeypatch, environment)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"rank 0 of 2 could not join the others .* within 2 s"):
        start("cpu", timeout_seconds=2)
    assert time.monotonic() - began < 20 and not dist.is_initialized()


SCRIPT = """
import os, sys, torch
from engram_lm.tables.tiers.sharded import ShardedTable
from engram_lm.training.distribution import agree, start
def main():
    with start("cpu", timeout_seconds=60) as ranks:
        table = ShardedTable(10, 2)
        table.gather(torch.arange(10))
        # In one write: the ranks share a pipe.
        os.write(1, f"ready {ranks.rank} {ranks.local_rank} {ranks.world_size} {ranks.device}\\n".encode())
        if sys.argv[1] == "kill" and ranks.rank == 1:
            os.kill(os.getpid(), 9)
        table.gather(torch.arange(10))
# In a function, so that the table and its group do not live until Python itself ends.
main()
"""


def torchrun(tmp_path, how):
    (tmp_path / "script.py").write_text(SCRIPT)
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*call, str(tmp_path / "script.py"), how],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_torchrun_starts_the_ranks(tmp_path):
    done = torchrun(tmp_path, "live")
    assert done.returncode == 0, done.stderr
    assert sorted(line for line in done.stdout.split("\n") if line) == ["ready 0 0 2 cpu", "ready 1 1 2 cpu"]


def test_a_rank_that_is_killed_ends_the_others(tmp_path):
    began = time.monotonic()
    assert torchrun(tmp_path, "kill").returncode != 0
    assert time.monotonic() - began < 55  # the ranks would wait 60 s


class Unreadable:
    """Tokens of which one process cannot read any."""

    def __len__(self):
        return 1000

    def __getitem__(self, part):
        raise DataError("00000.safetensors is missing")


def step_once(rank, culprit):
    ranks = ranks_here()
    model = build("plain")
    shard_tables(model, seed=5)
    tokens = Unreadable() if rank == culprit else np.arange(1000) % 270
    batches = Batches(tokens, batch_size=4, length=LENGTH, seed=0)
    trainer = Trainer(model, batches, TrainOptions(num_steps=2), ranks=ranks)
    try:
        trainer.step()
    except EngramError as error:
        return type(error).__name__, str(error)
    return None


def test_text_that_one_process_cannot_read_ends_the_step_of_all(processes):
    found = processes.run(step_once, 1)
    assert found == [("DataError", "rank 1, reading the text of step 1: 00000.safetensors is missing")] * len(found)
