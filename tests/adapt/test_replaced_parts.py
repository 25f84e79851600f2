"""Other libraries put things in the place of the memory's parts: what is saved can be loaded, or is not saved."""

import warnings

import pytest
import torch
from tests.adapt.conftest import speak
from tests.adapt.small_models import TOKENIZER, small_model
from torch import nn
from torch.nn.utils import parametrizations

import engram_lm
from engram_lm.errors import ConfigError

# peft asks transformers by names that transformers calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
IDS = torch.randint(2, 280, (2, 12), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


def peft_configs():
    peft = pytest.importorskip("peft")
    lora = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return {
        "lora": peft.LoraConfig(**lora, target_modules="all-linear"),
        "dora": peft.LoraConfig(**lora, target_modules=["q_proj", "key_value"], use_dora=True),
        "ia3": peft.IA3Config(target_modules=["key_value"], feedforward_modules=[], init_ia3_weights=False),
        "whole": peft.LoraConfig(**lora, target_modules=["q_proj"], modules_to_save=["key_value"]),
    }


def with_peft(model, kind):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    both = peft.get_peft_model(model, peft_configs()[kind])
    for name, parameter in both.named_parameters():
        if "modules_to_save" in name or "ia3" in name:
            nn.init.normal_(parameter, std=0.3)
    return both


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "whole"])
def test_memory_under_an_adapter_of_peft_is_saved_beside_it_and_both_load_again(kind, adapted, tmp_path):
    peft = pytest.importorskip("peft")
    model, adapter = adapted()
    plain = logits(model)
    both = with_peft(model, kind)
    found = logits(both)
    assert not torch.allclose(found, plain, atol=1e-2)
    both.save_pretrained(tmp_path / "lora")
    with pytest.warns(UserWarning, match=r"on 0\.key_value, 2\.key_value of the memory 'default'.*first and then peft"):
        adapter.save_pretrained(tmp_path / "memory")

    again = small_model()
    engram_lm.MemoryAdapter.from_pretrained(again, tmp_path / "memory")
    torch.testing.assert_close(logits(again), plain, rtol=0, atol=0)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "lora")
    torch.testing.assert_close(logits(again), found, rtol=0, atol=0)


def test_merged_adapters_of_peft_are_part_of_the_memory_once_peft_has_let_go(adapted, tmp_path):
    model, adapter = adapted()
    both = with_peft(model, "lora")
    found = logits(both)
    both.merge_adapter()
    with (
        pytest.raises(ConfigError, match=r"merged its adapters into 0\.key_value .* would be added twice"),
        pytest.warns(UserWarning, match="peft has put adapters"),
    ):
        adapter.save_pretrained(tmp_path / "memory")
    assert not (tmp_path / "memory").exists()
    both.unmerge_adapter()
    merged = both.merge_and_unload()
    adapter.save_pretrained(tmp_path / "memory")
    adapter.detach()
    engram_lm.MemoryAdapter.from_pretrained(merged, tmp_path / "memory")
    torch.testing.assert_close(logits(merged), found, rtol=1e-4, atol=1e-4)


def test_memory_that_comes_after_the_peft_adapters_that_lie_on_it_is_refused(adapted, config, tmp_path):
    peft = pytest.importorskip("peft")
    model, adapter = adapted()
    adapter.save_pretrained(tmp_path / "memory")
    with_peft(model, "lora").save_pretrained(tmp_path / "lora")
    wrong = peft.PeftModel.from_pretrained(small_model(), tmp_path / "lora")
    with pytest.raises(ConfigError, match=r"'default' is meant for the memory too .* memory on the model first"):
        engram_lm.MemoryAdapter.from_pretrained(wrong, tmp_path / "memory")
    with pytest.raises(ConfigError, match="memory on the model first"):
        engram_lm.attach(wrong, TOKENIZER, config(), check=False)


def compiled(layers):
    layers["0"] = torch.compile(layers["0"], backend="eager")


def compiled_part(layers):
    layers["0"].key_value = torch.compile(layers["0"].key_value, backend="eager")


def weight_norm(layers):
    parametrizations.weight_norm(layers["2"].key_value)
    with torch.no_grad():
        layers["2"].key_value.parametrizations.weight.original0.mul_(1.5)


def normed_gain(layers):
    parametrizations.weight_norm(layers["0"], "conv_weight")


@pytest.mark.parametrize("change", [compiled, compiled_part, weight_norm, normed_gain])
def test_compiled_and_parametrized_layers_are_saved_as_plain_ones(change, adapted, tmp_path):
    model, adapter = adapted()
    change(adapter.layers)
    found = logits(model)
    adapter.save_pretrained(tmp_path / "memory")
    again = small_model()
    engram_lm.MemoryAdapter.from_pretrained(again, tmp_path / "memory")
    torch.testing.assert_close(logits(again), found, rtol=1e-5, atol=1e-5)


def old_weight_norm(layers):
    with pytest.warns(FutureWarning, match="deprecated"):
        torch.nn.utils.weight_norm(layers["0"].key_value)  # keeps the weight of the last forward pass as an attribute


def dynamic(layers):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it deprecated, and people use it
        layers["0"] = torch.ao.quantization.quantize_dynamic(layers["0"], {nn.Linear})


def eight_bits(layers):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    old = layers["0"].key_value
    new = bitsandbytes.nn.Linear8bitLt(old.in_features, old.out_features, bias=False, has_fp16_weights=False)
    new.weight = bitsandbytes.nn.Int8Params(old.weight.data.round().to(torch.int8), requires_grad=False)
    layers["0"].key_value = new


def more(layers):
    layers["0"].register_parameter("scale", nn.Parameter(torch.ones(1)))


@pytest.mark.parametrize("change", [old_weight_norm, dynamic, eight_bits, more])
def test_what_could_not_be_loaded_again_is_not_saved(change, adapted, tmp_path):
    _, adapter = adapted()
    adapter.save_pretrained(tmp_path / "memory")
    change(adapter.layers)
    before = {path.name: path.read_bytes() for path in (tmp_path / "memory").iterdir()}
    with pytest.raises(ConfigError, match=r"0\.(key_value|scale).*(before it is|before the model is|remove what was)"):
        adapter.save_pretrained(tmp_path / "memory")
    assert {path.name: path.read_bytes() for path in (tmp_path / "memory").iterdir()} == before


def test_a_table_that_was_wrapped_is_refused(adapted, tmp_path):
    _, adapter = adapted()
    adapter.memory_tables["0"] = nn.Sequential(adapter.memory_tables["0"])
    with pytest.raises(ConfigError, match="a Sequential has taken the place of the table 0"):
        adapter.save_pretrained(tmp_path / "memory")


def test_models_prepared_for_training_in_few_bits_give_memory_that_loads(adapted, tmp_path):
    peft = pytest.importorskip("peft")
    model = small_model(dtype=torch.bfloat16)
    adapter = engram_lm.attach(
        model, TOKENIZER, engram_lm.EngramConfig(hidden_size=32, layers=(1,), memory_dim=24, num_heads=2), dtype=None
    )
    speak(adapter)
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    found = logits(model)
    adapter.save_pretrained(tmp_path / "memory")
    adapter.detach()
    engram_lm.MemoryAdapter.from_pretrained(model, tmp_path / "memory")
    torch.testing.assert_close(logits(model), found, rtol=0, atol=0)
