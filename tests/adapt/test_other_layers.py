"""Layers of the registry that read hashed rows can be attached to other models, as the Engram layer can."""

import pytest
import torch
from tests.adapt.conftest import speak
from tests.adapt.small_models import TOKENIZER, small_model

import engram_lm


@pytest.mark.parametrize("layer", ["per_order", "sink", "segment_gate", "factor_engram", "pooled"])
def test_it_begins_as_the_identity_decodes_and_is_saved(config, layer, tmp_path):
    model = small_model("llama").eval()
    ids = torch.arange(5, 37).view(2, 16)
    with torch.no_grad():
        before = model(ids).logits
        adapter = engram_lm.attach(model, TOKENIZER, config(layer=layer, value_init="zero"))
        assert torch.equal(model(ids).logits, before)
        speak(adapter)
        whole, cache = model(ids).logits, None
        parts = []
        for piece in ids.split([9, 1, 1, 5], dim=1):
            output = model(piece, past_key_values=cache, use_cache=True)
            parts.append(output.logits)
            cache = output.past_key_values
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=1e-4)
        assert (whole - before).abs().max() > 0.01
        adapter.save_pretrained(tmp_path / "adapter")
        again = small_model("llama").eval()
        engram_lm.MemoryAdapter.from_pretrained(again, tmp_path / "adapter", tokenizer=TOKENIZER)
        assert torch.equal(again(ids).logits, whole)
