"""Memory on models whose own weights are quantized, offloaded or computed twice."""

import pytest
import torch
from tests.adapt.conftest import MEMORY, speak
from tests.adapt.small_models import CONFIGS, TEXT, TOKENIZER
from tests.small_model import needs_checkpointing_of_hooks
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache

import engram_lm
from engram_lm import EngramConfig, MemoryAdapter

# bitsandbytes asks torch for what torch calls deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt.*:UserWarning"),
]


def quantized(bits, folder):
    pytest.importorskip("bitsandbytes", reason="quantized backbones need bitsandbytes")
    torch.manual_seed(0)
    config = CONFIGS["llama"]()
    # Rows of 4 bits lie in blocks of 64.
    config.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 64})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    how = (
        BitsAndBytesConfig(load_in_8bit=True)
        if bits == 8
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, device_map="cpu").eval()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_backbone_decodes_exactly_and_its_memory_learns(bits, tmp_path):
    model = quantized(bits, tmp_path / "base")
    assert model.model.layers[0].self_attn.q_proj.weight.dtype in (torch.uint8, torch.int8)
    ids = torch.tensor(TOKENIZER(TEXT)["input_ids"][:40]).view(2, 20)
    # Attached with a check that nothing changes, and trained before any evaluation: on some processors bitsandbytes
    # packs weights of 4 bits when it evaluates, and warns when it is then asked for gradients.
    adapter = engram_lm.attach(
        model, TOKENIZER, EngramConfig(**{**MEMORY, "hidden_size": 64, "table_gradient": "dense"})
    )
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}

    def logits():
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    model.requires_grad_(False)
    adapter.requires_grad_(True)
    model.train()
    optimizer = torch.optim.AdamW(adapter.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.eval()
    with adapter.disabled():
        plain = logits()
    speak(adapter)
    expected, cache = logits(), DynamicCache()
    with torch.no_grad():
        pieces = [model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits for t in range(20)]
    # A backbone of 8 bits rounds its inputs by the largest of a batch, so it is not exact by itself.
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=5e-2 if bits == 8 else 2e-5, rtol=1e-3)
    adapter.save_pretrained(tmp_path / "adapter")
    adapter.detach()
    assert torch.equal(logits(), plain)
    MemoryAdapter.from_pretrained(model, tmp_path / "adapter", tokenizer=TOKENIZER)
    assert torch.equal(logits(), expected)


@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")  # transformers before 5.23
def test_weights_that_are_moved_in_from_the_host_layer_by_layer_do_not_hinder(adapted, config):
    accelerate = pytest.importorskip("accelerate")
    expected_model, expected = adapted()
    model, _ = adapted()
    model.engram_adapters["default"].detach()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    adapter = engram_lm.attach(model, TOKENIZER, config())
    adapter.load_state_dict(expected.state_dict())
    ids = torch.randint(2, 280, (2, 9), generator=torch.Generator().manual_seed(2))
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    assert torch.equal(model.generate(ids, **asked), expected_model.generate(ids, **asked))


HOW = {
    "reentrant": {"activation_checkpointing_kwargs": {"use_reentrant": True}},
    "not reentrant": {"activation_checkpointing_kwargs": {"use_reentrant": False}},
    "every second layer": {"every_n_layers": 2},
}


@needs_checkpointing_of_hooks
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_activation_checkpointing_as_users_switch_it_on_gives_the_same_gradients(name, how, adapted):
    model, adapter = adapted(name, table_gradient="dense")
    model.requires_grad_(False)
    adapter.requires_grad_(True)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = torch.randint(2, 280, (2, 20), generator=torch.Generator().manual_seed(2))

    def gradients():
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [parameter.grad.clone() for parameter in adapter.parameters()]

    expected = gradients()
    model.activation_checkpointing_enable(**HOW[how])
    model.enable_input_require_grads()  # what Trainer and peft do, for weights that are frozen
    torch.testing.assert_close(gradients(), expected)
    model.activation_checkpointing_disable()
    torch.testing.assert_close(gradients(), expected)
