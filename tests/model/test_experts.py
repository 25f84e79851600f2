"""Mixtures of experts: transformers' modules, an observable load, and a bias that evens it out."""

import pytest
import torch
from tests.small_model import BACKBONE
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from engram_lm.errors import ConfigError
from engram_lm.model import EngramForCausalLM, EngramLMConfig, balance_experts, expert_load
from engram_lm.model.experts import Router, sequence_balance_loss

EXPERTS = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 16,
}
IDS = torch.randint(2, 280, (3, 20), generator=torch.Generator().manual_seed(1))


def moe(seed=0, **changes) -> EngramForCausalLM:
    torch.manual_seed(seed)
    return EngramForCausalLM(EngramLMConfig(vocab_size=300, **{**BACKBONE, **EXPERTS, **changes}))


@torch.no_grad()
@pytest.mark.parametrize("groups", [{}, {"n_group": 4, "topk_group": 2}], ids=str)
def test_a_model_without_memory_is_transformers_deepseek_v3(groups):
    ours = moe(**groups).eval()
    changes = {"n_group": 1, "topk_group": 1, "num_mtp_layers": 0, **groups}
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(vocab_size=300, **{**BACKBONE, **EXPERTS, **changes})).eval()
    for router in (module for module in ours.modules() if isinstance(module, Router)):
        router.e_score_correction_bias.copy_(torch.randn(8))
    theirs.load_state_dict(ours.state_dict())
    for implementation in ("eager", "grouped_mm"):
        theirs.set_experts_implementation(implementation)
        ours.set_experts_implementation(implementation)
        assert ours.config._experts_implementation == implementation
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits)


def test_grouped_products_and_the_loop_agree_forward_and_in_gradients():
    results = []
    for implementation in ("eager", "grouped_mm"):
        model = moe().train()
        model.set_experts_implementation(implementation)
        output = model(IDS, labels=IDS)
        output.loss.backward()
        results.append([output.logits, *(parameter.grad for parameter in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("is_small", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_products_of_large_experts_follow_autocast_and_their_gradients_do_not(implementation, is_small, monkeypatch):
    if not is_small:
        monkeypatch.setattr("engram_lm.model.experts._FEW_NUMBERS", 0)
    model = moe().train()
    model.set_experts_implementation(implementation)
    experts, seen = model.model.layers[1].mlp.experts, []
    experts.register_forward_hook(lambda module, given, result: seen.append(result.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert seen[0] == (torch.float32 if is_small else torch.bfloat16)  # the inner call
    assert experts.gate_up_proj.grad.dtype == experts.gate_up_proj.dtype == torch.float32
    lower = experts.gate_up_proj.grad.clone()
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    torch.testing.assert_close(lower, experts.gate_up_proj.grad, atol=3e-3, rtol=0.1)


def test_load_counts_every_choice_made_in_training_and_none_in_evaluation():
    model = moe()
    output = model.train()(IDS, output_chosen_experts=True)
    load = expert_load(model)
    assert len(load) == len(output.chosen_experts) == 2
    for share, chosen in zip(load.values(), output.chosen_experts, strict=True):
        assert chosen.shape == (60, 2)
        torch.testing.assert_close(share, torch.bincount(chosen.flatten(), minlength=8) / 120)
    model.eval()(IDS)
    assert all(torch.equal(a, b) for a, b in zip(load.values(), expert_load(model).values(), strict=True))
    assert all(torch.equal(share, load[name]) for name, share in balance_experts(model).items())
    assert all(share.sum() == 0 for share in expert_load(model).values())


def test_balancing_evens_the_load_and_moves_no_weight():
    model = moe().train()
    # Two experts that everybody prefers.
    routers = [module for module in model.modules() if isinstance(module, Router)]
    with torch.no_grad():
        for router in routers:
            router.e_score_correction_bias[:2] = 0.3
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    spread = []
    for _ in range(60):
        model(IDS)
        spread.append(max(float(share.max()) for share in balance_experts(model, 0.02).values()))
    assert spread[0] > 0.45 and spread[-1] < 0.25  # an even load is 0.125
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert all(abs(float(router.e_score_correction_bias.mean()) - 0.075) < 1e-5 for router in routers)


def test_one_step_of_the_bias_is_its_speed_towards_the_mean_load():
    router = Router(EngramLMConfig(vocab_size=300, **BACKBONE, **EXPERTS))
    router.expert_counts.copy_(torch.tensor([10, 2, 2, 2, 4, 4, 4, 4]))
    balance_experts(router, 0.1)
    # signs -1 +1 +1 +1 0 0 0 0, less their mean 0.25
    expected = 0.1 * (torch.tensor([-1.0, 1, 1, 1, 0, 0, 0, 0]) - 0.25)
    torch.testing.assert_close(router.e_score_correction_bias, expected)
    balance_experts(router, 0.1)
    torch.testing.assert_close(router.e_score_correction_bias, expected)  # nothing was counted since


def test_the_configuration_s_speed_is_the_default_and_zero_leaves_the_bias_alone():
    for speed in (0.0, 0.25):
        model = moe(router_bias_speed=speed).train()
        model(IDS)
        balance_experts(model)
        bias = model.model.layers[1].mlp.gate.e_score_correction_bias
        assert (float(bias.abs().max()) > 0.2) == (speed > 0)


def _rank(rank):
    """What one of two processes finds."""
    alone = [torch.distributed.new_group([other]) for other in range(2)][rank]
    found = {}
    for name, group in (("all", None), ("alone", alone)):
        router = Router(EngramLMConfig(vocab_size=300, **BACKBONE, **EXPERTS))
        router.expert_counts[rank] = 6
        load = balance_experts(router, 0.1, group=group)
        found[name] = next(iter(load.values())), router.e_score_correction_bias
    model = moe(router_bias_speed=0.25).train()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    output = wrapped(IDS.roll(rank, 1)[rank:], labels=IDS[rank:], output_chosen_experts=True)
    output.loss.backward()
    load = balance_experts(wrapped)
    counts = torch.stack([torch.bincount(chosen.flatten(), minlength=8) for chosen in output.chosen_experts])
    biases = torch.stack([module.e_score_correction_bias for module in model.modules() if isinstance(module, Router)])
    found["wrapped"] = torch.stack(list(load.values())), biases, counts
    return found


@pytest.fixture(scope="module")
def ranks(rank_pools):
    """What two processes with different data found."""
    return rank_pools(2).run(_rank)


def test_ranks_with_different_data_move_the_bias_alike(ranks):
    for load, bias in (found["all"] for found in ranks):
        assert load.tolist() == [0.5, 0.5, 0, 0, 0, 0, 0, 0]
        torch.testing.assert_close(bias, 0.1 * (torch.tensor([-1.0, -1, 1, 1, 1, 1, 1, 1]) - 0.5))


def test_counts_are_added_over_the_ranks_of_the_group_and_no_others(ranks):
    for rank, found in enumerate(ranks):
        load, bias = found["alone"]
        assert load.tolist() == [float(expert == rank) for expert in range(8)]
        assert int(bias.argmin()) == rank


def test_a_wrapped_model_is_balanced_over_the_data_of_all_ranks_at_its_configured_speed(ranks):
    (load, bias, counts), (other_load, other_bias, other_counts) = (found["wrapped"] for found in ranks)
    assert torch.equal(load, other_load) and torch.equal(bias, other_bias) and not torch.equal(counts, other_counts)
    counts = counts + other_counts
    torch.testing.assert_close(load, counts / counts.sum(1, keepdim=True))
    signs = torch.sign(counts.float().mean(1, keepdim=True) - counts)
    torch.testing.assert_close(bias, 0.25 * (signs - signs.mean(1, keepdim=True)))


def test_casting_a_model_leaves_the_bias_and_the_counts_alone():
    model = moe(router_bias_speed=1e-3).train()
    model(IDS)
    router = model.model.layers[1].mlp.gate
    counts = router.expert_counts.clone()
    router.e_score_correction_bias.fill_(1)
    for cast in (model.to(torch.bfloat16), model.half(), model.bfloat16()):
        assert router.weight.dtype == cast.dtype and cast.dtype.itemsize == 2
        assert (router.e_score_correction_bias.dtype, router.expert_counts.dtype) == (torch.float32, torch.int64)
    model(IDS)
    assert int(router.expert_counts.sum()) == 2 * int(counts.sum()) == 240
    balance_experts(model)
    # In bfloat16 a step of a thousandth from 1 would be lost.
    assert 0 < float((router.e_score_correction_bias - 1).abs().max()) < 0.0021
    router.expert_counts.fill_(2**24)
    model(IDS)
    assert int(router.expert_counts.sum()) == 8 * 2**24 + 120  # float32 counts to 2 ** 24


@torch.no_grad()
def test_a_router_is_as_exact_under_autocast_as_without():
    torch.manual_seed(0)
    router = Router(EngramLMConfig(vocab_size=300, **BACKBONE, **EXPERTS))
    router.weight.normal_()
    hidden = torch.randn(2, 30, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower = router(hidden)
    assert [result.dtype for result in lower] == [torch.float32, torch.float32, torch.int64]
    assert all(torch.equal(a, b) for a, b in zip(lower, router(hidden), strict=True))


def plain_balance_loss(logits, chosen, batch_size, mask):
    """DeepSeek-V3's Eq. 17 to 20, one sequence and one expert at a time."""
    length, (num_experts, num_chosen) = len(logits) // batch_size, (logits.shape[1], chosen.shape[1])
    losses = []
    for sequence in range(batch_size):
        kept = [t for t in range(length) if mask[sequence, t]]
        rows = [sequence * length + t for t in kept]
        loss = 0.0
        for expert in range(num_experts):
            f = num_experts / (num_chosen * len(rows)) * sum(int(expert in chosen[row].tolist()) for row in rows)
            p = sum(float(logits[row].sigmoid()[expert] / logits[row].sigmoid().sum()) for row in rows) / len(rows)
            loss += f * p
        losses.append(loss)
    return sum(losses) / batch_size


def test_sequence_balance_loss_equals_the_published_sums_and_leaves_padding_out():
    model = moe(sequence_balance=0.5).train()
    mask = torch.ones(3, 20, dtype=torch.int64)
    mask[1, :7] = 0
    output = model(IDS, attention_mask=mask, labels=IDS, output_router_logits=True, output_chosen_experts=True)
    expected = 0.5 * sum(
        plain_balance_loss(logits.detach(), chosen, 3, mask)
        for logits, chosen in zip(output.router_logits, output.chosen_experts, strict=True)
    )
    assert float(output.balance_loss.detach()) == pytest.approx(expected, rel=1e-5)
    without = moe().train()(IDS, attention_mask=mask, labels=IDS)
    assert without.balance_loss is None
    torch.testing.assert_close(output.loss - output.balance_loss, without.loss)
    output.balance_loss.backward()
    assert model.model.layers[1].mlp.gate.weight.grad.abs().sum() > 0


def test_sequence_balance_loss_takes_the_end_of_a_mask_that_covers_the_past_and_no_masked_sequence():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 8, generator=generator)
    chosen = logits.topk(2).indices
    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[0, 6:] = 0
    past = torch.zeros(2, 5, dtype=torch.int64)
    with_past = sequence_balance_loss((logits,), (chosen,), 2, torch.cat([past, mask], dim=1))
    assert float(with_past) == pytest.approx(plain_balance_loss(logits, chosen, 2, mask), rel=1e-5)
    first = plain_balance_loss(logits[:10], chosen[:10], 1, mask[:1])
    mask[1] = 0
    # A sequence without a token adds nothing; it is still one of two.
    assert float(sequence_balance_loss((logits,), (chosen,), 2, mask)) == pytest.approx(first / 2, rel=1e-5)


def test_sequence_balance_loss_is_one_per_layer_for_an_even_load():
    chosen = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    loss = sequence_balance_loss((torch.zeros(4, 8),), (chosen,), 1)
    assert float(loss) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_group": 3}, "does not divide into n_group 3; the nearest that does is 9"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is more than the 8"),
        ({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "num_experts_per_tok 3 is more than the 2"),
        ({"n_group": 2, "topk_group": 3}, "topk_group 3"),
        ({"n_group": 8, "topk_group": 8}, "a group needs 2 experts"),
        ({"n_shared_experts": 0}, "n_shared_experts"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size"),
        ({"router_bias_speed": -1.0}, "router_bias_speed"),
        ({"sequence_balance": float("nan")}, "sequence_balance"),
    ],
    ids=str,
)
def test_contradictory_experts_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        EngramLMConfig(**{**BACKBONE, **EXPERTS, **change})
