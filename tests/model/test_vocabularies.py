"""Own models whose tokenizer has holes, or has got more tokens since the model was made."""

import copy

import pytest
import torch
from tests.adapt.test_vocabularies import holes
from transformers import AutoModelForCausalLM

from engram_lm import EngramForCausalLM, EngramLMConfig
from engram_lm.errors import MismatchError, TokenError
from engram_lm.training.data.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["the cat sat on the mat. The Cat saw a rat; the rat ran to the mat. " * 30], 300)
MEMORY = {"rows_per_head": 101}


def own_model(tokenizer=TOKENIZER, **memory):
    torch.manual_seed(0)
    config = EngramLMConfig.preset("engram-nano", tokenizer, memory={**MEMORY, **memory})
    model = EngramForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def grown():
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|tool|>"]})
    return tokenizer


@torch.no_grad()
def test_a_model_for_a_tokenizer_with_holes_embeds_its_largest_id(tmp_path):
    model, tokenizer = own_model(holes()), holes()
    assert model.config.vocab_size == 512 and EngramLMConfig.preset("dense-nano", tokenizer).vocab_size == 512
    ids = tokenizer("a<|user|>b[PAD]", return_tensors="pt").input_ids
    expected = model(ids).logits
    assert (model.hash_spec.encode(ids) >= 0).all()
    # A sampled id that no token has is hashed too.
    assert model(torch.tensor([[305, 306]])).logits.isfinite().all()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, tokenizer=tokenizer)
    torch.testing.assert_close(loaded(ids).logits, expected)


@torch.no_grad()
def test_a_vocabulary_grows_and_the_model_is_saved_and_loaded_with_it(tmp_path, caplog):
    model, tokenizer = own_model(), grown()
    ids = tokenizer("the cat<|user|>sat on<|tool|>", return_tensors="pt").input_ids
    spec, old = model.hash_spec, torch.tensor([[5, 9, 17]])
    with pytest.raises(TokenError, match=r"token id 28[34]"):
        model(ids)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    assert "grown from 283 tokens to 285" in caplog.messages[0]
    model.check_tokenizer(TOKENIZER)
    assert len(caplog.messages) == 1
    model.check_tokenizer(tokenizer)
    assert "2 more tokens than this memory was made with ('<|user|>', '<|tool|>')" in caplog.messages[1]
    layer = spec.layers[0]
    assert torch.equal(model.hash_spec.rows(old, layer), spec.rows(old, layer))
    assert model.hash_spec.digest == spec.digest and model.config.hash_spec == spec.to_dict()
    assert (model.hash_spec.encode(ids) >= 0).all()
    asked = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    assert torch.equal(model.generate(ids, **asked), model.generate(ids, **asked, use_cache=False))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, tokenizer=tokenizer)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_a_tokenizer_whose_old_tokens_changed_is_refused_and_the_first_is_named():
    other = train_tokenizer(["a dog dug a log in the fog, and the frog sat on the log. " * 30], 300)
    with pytest.raises(MismatchError, match=r"token map.*token \d+ \(.*is the first that differs"):
        own_model().check_tokenizer(other)
