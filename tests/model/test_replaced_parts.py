"""Other libraries put things in the place of a model's parts: what is saved can be loaded, or is not saved."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from engram_lm.errors import ConfigError
from engram_lm.model import EngramForCausalLM

IDS = torch.randint(2, 280, (2, 12), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


# peft asks transformers by names that transformers calls deprecated.
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_a_model_inside_peft_is_saved_without_what_peft_has_put_on_it(model, tmp_path):
    peft = pytest.importorskip("peft")
    plain = logits(model)
    lora = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    both = peft.get_peft_model(model, lora)
    found = logits(both)
    assert not torch.allclose(found, plain, atol=1e-2)
    both.get_base_model().save_pretrained(tmp_path / "model")
    both.save_pretrained(tmp_path / "lora")
    loaded = EngramForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(loaded), plain)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(loaded, tmp_path / "lora")), found)


def test_parametrized_weights_are_saved_as_what_they_give(model, tmp_path):
    for layer in (model.model.layers[0].memory.key_value, model.model.layers[1].mlp.up_proj):
        parametrizations.weight_norm(layer)
        with torch.no_grad():
            layer.parametrizations.weight.original0.mul_(1.5)
    found = logits(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(EngramForCausalLM.from_pretrained(tmp_path)), found, rtol=1e-5, atol=1e-5)


def test_quantized_matrices_that_could_not_be_loaded_are_not_saved(model, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it deprecated, and people use it
        torch.ao.quantization.quantize_dynamic(model.model.layers[0].memory, {nn.Linear}, inplace=True)
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.memory\.key_value\.weight.*could not be loaded again"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
