"""Losses that compare a model with its base: what they are, what they cost, and that they hold it back."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from tests.adapt.small_models import SHAPE, TOKENIZER, small_model
from tests.training.test_base_model import MEMORY, material, table
from tests.training.test_run import measured, run
from tests.training.test_writing import GENERAL

import engram_lm
from engram_lm.errors import ConfigError
from engram_lm.training import retention as retention_module
from engram_lm.training.base_model import AdaptedBase
from engram_lm.training.dependence import DependenceLoss, DependenceOptions
from engram_lm.training.distribution import Ranks
from engram_lm.training.flops import flops_per_token
from engram_lm.training.recipe import Recipe
from engram_lm.training.retention import RetentionLoss, as_base

__all__ = ["material"]

# peft 0.21 asks transformers 5.24 by a name that is going out of use there.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def adapted(kind="llama", *, lora=False, memory=True):
    """A model that differs from its base, and a copy of the base."""
    if kind == "capped":  # its logits are not those of its output embedding
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.Gemma2Config(**SHAPE, final_logit_softcapping=2.0)
        ).eval()
    else:
        model = small_model(kind)
    model.config.use_cache = False
    base = copy.deepcopy(model)
    adapter = None
    model.requires_grad_(False)
    if lora:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "down_proj"] if kind != "gpt2" else ["c_attn"]
        get_peft_model(model, LoraConfig(r=2, target_modules=targets, fan_in_fan_out=kind == "gpt2"))
    if memory:
        adapter = engram_lm.attach(model, TOKENIZER, layers=(1,), num_heads=2, memory_dim=32, rows_per_head=97)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "engram_adapters" in name or "lora_" in name:
                parameter.requires_grad_(True).add_(torch.randn_like(parameter) * 0.3)
    return model, base, adapter


def gradients(model):
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    return {name: grad.to_dense() if grad.is_sparse else grad for name, grad in found.items()}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "capped"])
@pytest.mark.parametrize("added", ["memory", "lora", "both"])
@pytest.mark.parametrize("at_once", [1, 7 * 320, 1 << 20])
def test_value_and_gradient_are_those_of_whole_logits(kind, added, at_once, monkeypatch):
    monkeypatch.setattr(retention_module, "_LOGITS_AT_ONCE", at_once)
    model, base, _ = adapted(kind, lora=added != "memory", memory=added != "lora")
    tokens = torch.randint(2, 290, (3, 11), generator=torch.Generator().manual_seed(1))
    loss = RetentionLoss(model)
    found = loss(tokens)
    (2.5 * found).backward()
    ours = gradients(model)
    with torch.no_grad():
        wanted = base.eval()(input_ids=tokens).logits.log_softmax(-1)
    own = model(input_ids=tokens).logits.log_softmax(-1)
    expected = (wanted.exp() * (wanted - own)).sum(-1).mean()
    (2.5 * expected).backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5) and found.item() > 1e-3
    theirs = gradients(model)
    assert ours.keys() == theirs.keys() and any(grad.abs().max() > 1e-5 for grad in theirs.values())
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert loss(tokens).item() == pytest.approx(expected.item(), rel=1e-5)


def test_as_base_computes_the_base_and_puts_everything_back():
    model, base, adapter = adapted(lora=True)
    some = [value for name, value in model.named_parameters() if "lora_A" in name]
    some[0].requires_grad_(False)
    model.train()
    model.model.layers[1].eval()
    flags = [value.requires_grad for value in model.parameters()], [part.training for part in model.modules()]
    tokens = torch.arange(2, 12)[None]
    before = model(input_ids=tokens).logits
    with torch.no_grad(), as_base(model):
        assert torch.equal(model(input_ids=tokens).logits, base(input_ids=tokens).logits)
    assert flags == ([value.requires_grad for value in model.parameters()], [part.training for part in model.modules()])
    assert adapter.enabled and torch.equal(model(input_ids=tokens).logits, before)
    assert not torch.equal(before, base(input_ids=tokens).logits)


def test_a_model_without_a_frozen_base_is_refused():
    model, base, _ = adapted()
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"1 of its own weights are trained, such as lm_head.weight"):
        RetentionLoss(model)
    with pytest.raises(ConfigError, match="nothing was added"):
        RetentionLoss(base.requires_grad_(False))


@pytest.mark.parametrize("margin", [0.0, 0.3, 5.0])
def test_the_dependence_loss_is_what_memory_lacks_to_the_margin(margin):
    model, base, adapter = adapted()
    model.train()
    tokens = torch.randint(2, 290, (4, 9), generator=torch.Generator().manual_seed(1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[1, :5] = -100

    def losses(model):
        logits = model(input_ids=inputs).logits
        return torch.stack([F.cross_entropy(some, wanted) for some, wanted in zip(logits, targets, strict=True)])

    with torch.no_grad():
        off = losses(base)
    on = losses(model)
    expected = (margin - off + on).clamp(min=0).mean()
    whole = F.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), targets.flatten())
    found = DependenceLoss(adapter, DependenceOptions(weight=1.0, margin=margin))(model, inputs, targets)
    torch.testing.assert_close(found, torch.stack([whole, expected]))
    found[1].backward()
    ours = gradients(model)
    expected.backward()
    theirs = gradients(model)
    for name in ours.keys() | theirs.keys():
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)
    # At the margin and beyond it nothing is left to lower.
    gained = (off - on).detach().min().item() - 1e-3
    if gained > 0:
        assert (
            float(DependenceLoss(adapter, DependenceOptions(weight=1.0, margin=gained))(model, inputs, targets)[1]) == 0
        )


def sections(material, **more):
    general = material / "general.txt"
    general.write_text(GENERAL)
    found = table(material, adapter=MEMORY, **more)
    found["data"]["general"] = [str(general)]
    return found


ALL = {
    "retention": {"weight": 0.5, "batch_size": 3},
    "dependence": {"weight": 0.2, "margin": 0.1},
    "writing": {"rule": "kl", "share": 0.5},
    "lora": {"rank": 2, "dropout": 0.3},
}


def test_a_run_with_all_of_it_stops_and_goes_on_as_if_it_had_not(material, tmp_path):
    values = sections(material, **ALL)
    values["train"]["micro_batch_size"] = 2
    run(tmp_path / "whole", values)
    run(tmp_path / "stopped", values, stop_after=3)
    run(tmp_path / "stopped", values, resume=True)
    assert measured(tmp_path / "stopped") == measured(tmp_path / "whole")
    lines = [line for line in measured(tmp_path / "whole") if line["step"]]
    # Fresh memory says nothing yet: the base is not left, and no sequence gains.
    assert lines[0]["retention_loss"] == pytest.approx(0, abs=1e-6) and lines[-1]["retention_loss"] > 1e-5
    assert lines[0]["dependence_loss"] == pytest.approx(0.1, abs=1e-3)


def test_parts_of_a_batch_add_up(material, tmp_path):
    values = sections(material, retention=ALL["retention"], dependence=ALL["dependence"])
    run(tmp_path / "whole", values)
    values["train"]["micro_batch_size"] = 1
    run(tmp_path / "parts", values)
    for one, other in zip(measured(tmp_path / "whole"), measured(tmp_path / "parts"), strict=True):
        for name in ("loss", "retention_loss", "dependence_loss", "grad_norm"):
            assert one.get(name) == pytest.approx(other.get(name), rel=1e-3, abs=1e-6)


def test_with_a_weight_of_0_nothing_changes_and_with_more_the_base_is_kept(material, tmp_path):
    plain = table(material, adapter=MEMORY)
    run(tmp_path / "plain", plain)
    run(tmp_path / "zero", sections(material, retention={"weight": 0.0}, dependence={"weight": 0.0}))
    assert measured(tmp_path / "zero") == measured(tmp_path / "plain")
    names = ("adapter.safetensors", "tables.safetensors")
    one, other = ([(tmp_path / run / "memory" / name).read_bytes() for name in names] for run in ("plain", "zero"))
    assert one == other
    moved = {}
    for weight in (1e-6, 5.0):
        values = sections(material, retention={"weight": weight, "batch_size": 8})
        values["train"]["num_steps"] = 15
        run(tmp_path / str(weight), values)
        moved[weight] = measured(tmp_path / str(weight))[-1]["retention_loss"]
    assert moved[5.0] < 0.5 * moved[1e-6]


def test_what_these_losses_compute_is_charged(material):
    def flops(**more):
        recipe = Recipe.from_dict(sections(material, **more))
        return AdaptedBase(recipe, TOKENIZER, Ranks()).training_flops_per_token()

    plain, length = flops(), 32
    forward = flops_per_token(small_model(), length, training=False)
    head = 2 * 32 * 320
    # A pass of the base and a training step; the head's logits of the base are frozen, those of the model are not.
    per_token = forward + plain
    assert flops(retention={"weight": 1.0, "batch_size": 4}) == pytest.approx(plain + per_token, rel=1e-6)
    assert flops(retention={"weight": 1.0, "batch_size": 2}) == pytest.approx(plain + per_token / 2, rel=1e-6)
    assert flops(dependence={"weight": 1.0}) == pytest.approx(plain + forward, rel=1e-6)
    assert head < forward


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_goes_back_below_the_first_memory(material, checkpointing):
    def built(layers):
        values = table(material, adapter={**MEMORY, "layers": layers})
        values["train"]["gradient_checkpointing"] = checkpointing
        return AdaptedBase(Recipe.from_dict(values), TOKENIZER, Ranks())

    trained = built([2])
    seen = {}

    def look(index, module, args, output):
        seen.setdefault(index, (output if isinstance(output, torch.Tensor) else output[0]).requires_grad)

    for index, layer in enumerate(trained.module.model.layers):
        layer.register_forward_hook(functools.partial(look, index))
    trained.module.train()
    with torch.no_grad():
        trained.adapter.layers["2"].key_value.weight.normal_()
    tokens = torch.arange(2, 30)[None]
    trained.module(input_ids=tokens, labels=tokens).loss.backward()
    assert seen == {0: False, 1: False, 2: True}
    assert trained.adapter.tables["2"].weight.grad is not None
    late, early = trained.training_flops_per_token(), built([0]).training_flops_per_token()
    layers = [p.numel() for layer in trained.module.model.layers[:2] for p in layer.parameters() if p.dim() == 2]
    # For each weight of a layer that is passed back through, 2 operations; attention's products come on top.
    assert early - late > 2 * sum(layers)


def test_hostile_options_are_refused(material):
    for bad, message in (
        ({"retention": {"weight": -1.0}}, "finite number from 0"),
        ({"retention": {"weight": math.inf}}, "finite number from 0"),
        ({"retention": {"weight": math.nan}}, "finite number from 0"),
        ({"retention": {"batch_size": 0}}, "whole number from 1"),
        ({"retention": {"tokens": 0}}, "unknown key"),
        ({"dependence": {"margin": math.nan}}, "finite numbers from 0"),
        ({"adapter": {}, "retention": {"weight": 1.0}}, "all of this one is trained"),
        ({"adapter": {}, "lora": {"rank": 2}, "dependence": {"weight": 1.0}}, "add .adapter."),
        ({"adapter": {**MEMORY, "layers": ["erly"]}}, "did you mean"),
        ({"adapter": {**MEMORY, "layers": ["early", 1]}}, "named once"),
    ):
        with pytest.raises(ConfigError, match=message):
            Recipe.from_dict({**sections(material), **bad})
    with pytest.raises(ConfigError, match=r"retention.weight need text .* data.general"):
        Recipe.from_dict(table(material, adapter=MEMORY, retention={"weight": 1.0}))
