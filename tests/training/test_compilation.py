"""Compiled training computes what plain training does."""

import functools

import pytest
import torch

from engram_lm.errors import ConfigError
from engram_lm.model import EngramForCausalLM, EngramLMConfig
from engram_lm.training.compilation import can_compile, compile_training
from engram_lm.training.loss import language_model_loss
from engram_lm.training.recipe import Recipe

# torch's compiler looks at the gradients of all its inputs, and uses what torch itself calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore:`torch.jit:DeprecationWarning")

SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "kv_lora_rank": 16}
MEMORY = {"memory_dim": 32, "rows_per_head": 31, "value_init": "normal"}
VARIANTS = {
    "experts and memory": {"n_routed_experts": 8, "moe_intermediate_size": 16},
    "streams": {"num_streams": 3, "first_k_dense_replace": 2},
    "one fusion": {"num_streams": 2, "first_k_dense_replace": 2, "memory_fusion": "single"},
}


def model_and_loss(compiled, **backbone):
    torch.manual_seed(0)
    streams = backbone.get("num_streams", 1) if backbone.get("memory_fusion") != "single" else 1
    config = EngramLMConfig.preset("engram-micro-100k", memory=MEMORY | {"num_streams": streams}, **SMALL | backbone)
    model = EngramForCausalLM(config).train()
    head = {"head": compile_training(model, 24)} if compiled else {}
    return model, functools.partial(language_model_loss, model, **head)


def gradients(model, loss, tokens):
    found = loss(tokens[:, :-1], tokens[:, 1:])
    found.backward()
    return found.detach(), {
        name: parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def check_same(**backbone):
    tokens = torch.randint(0, 97, (2, 25), generator=torch.Generator().manual_seed(1))
    plain, compiled = (model_and_loss(kind, **backbone) for kind in (False, True))
    loss, expected = gradients(*plain, tokens)
    found_loss, found = gradients(*compiled, tokens)
    torch.testing.assert_close(found_loss, loss)
    assert found.keys() == expected.keys() and len(found) > 20
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert plain[0].state_dict().keys() == compiled[0].state_dict().keys(), "nothing of it is in a checkpoint"
    for one, other in zip(plain[0].modules(), compiled[0].modules(), strict=True):
        if hasattr(one, "expert_counts"):
            assert torch.equal(one.expert_counts, other.expert_counts) and one.expert_counts.sum()
    with torch.no_grad():
        torch.testing.assert_close(*(loss(tokens[:1, :9], tokens[:1, 1:10]) for _, loss in (plain, compiled)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_gradients_and_counts_are_those_of_the_plain_model(variant, monkeypatch):
    # The graphs are those that are compiled, run without a compiler, which would take a minute for each.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    check_same(**VARIANTS[variant])


@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="there is no C++ compiler")
def test_the_compiler_s_code_gives_the_same():
    check_same(first_k_dense_replace=2)


def test_a_recipe_refuses_to_compile_a_model_of_others():
    with pytest.raises(ConfigError, match="is for models of this project"):
        Recipe.from_dict({"train": {"num_steps": 1, "compile": "yes"}, "model": {"base": "somebody/model"}})
