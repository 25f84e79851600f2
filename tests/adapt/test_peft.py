"""Memory and LoRA on one model, in either order."""

import pytest
import torch
from tests.adapt.conftest import speak
from tests.adapt.small_models import TOKENIZER, small_model

import engram_lm
from engram_lm.adapt import attached_adapters
from engram_lm.errors import ConfigError

peft = pytest.importorskip("peft")

# peft asks transformers by names that transformers calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


def lora(model):
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


@torch.no_grad()
@pytest.mark.parametrize("memory_first", [True, False])
def test_memory_and_lora_add_up_in_either_order_and_part_again(memory_first, adapted, config, tmp_path):
    ids = torch.randint(2, 280, (2, 12), generator=torch.Generator().manual_seed(2))
    if memory_first:
        model, adapter = adapted()
        both = lora(model)
    else:
        both = lora(small_model())
        torch.manual_seed(0)
        adapter = engram_lm.attach(both, TOKENIZER, config())
        speak(adapter)
    assert not any(p.requires_grad for p in adapter.parameters()) or not memory_first
    adapter.requires_grad_(True)
    trained = [name for name, parameter in both.named_parameters() if parameter.requires_grad]
    assert any("lora" in name for name in trained)
    assert all("lora" in name or "engram_adapters" in name for name in trained)
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    found = both.generate(input_ids=ids, **asked)
    assert torch.equal(found, both.generate(input_ids=ids, **asked, use_cache=False))
    both.save_pretrained(tmp_path / "lora")
    adapter.save_pretrained(tmp_path / "memory")
    logits = both(input_ids=ids, use_cache=False).logits

    again = peft.PeftModel.from_pretrained(small_model(), tmp_path / "lora").eval()
    alone = again(input_ids=ids, use_cache=False).logits
    engram_lm.MemoryAdapter.from_pretrained(again, tmp_path / "memory")
    torch.testing.assert_close(again(input_ids=ids, use_cache=False).logits, logits)
    assert not torch.allclose(alone, logits, atol=1e-2)
    adapter.detach()
    torch.testing.assert_close(both(input_ids=ids, use_cache=False).logits, alone)


@torch.no_grad()
def test_a_second_memory_joins_the_first_through_peft(adapted, config):
    model, first = adapted()
    both = lora(model)
    second = engram_lm.attach(both, TOKENIZER, config(), name="second", check=False)
    assert list(attached_adapters(both)) == list(attached_adapters(model)) == ["default", "second"]
    with pytest.raises(ConfigError, match="already has a memory adapter called 'default'"):
        engram_lm.attach(both, TOKENIZER, config())
    first.detach()
    assert list(attached_adapters(both)) == ["second"]
    second.detach()
    assert not attached_adapters(both)
    assert not any("engram_adapters" in name for name, _ in both.named_modules())
