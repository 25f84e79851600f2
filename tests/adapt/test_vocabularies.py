"""What the model embeds decides which tokens can occur: tokenizers with more tokens, fewer, holes, and grown ones."""

import copy

import pytest
import torch
from tests.adapt.conftest import speak
from tests.adapt.small_models import TOKENIZER, small_model
from tests.hashing.test_grown_vocabularies import with_holes
from transformers import PreTrainedTokenizerFast

import engram_lm
from engram_lm import MemoryAdapter
from engram_lm.errors import MismatchError, TokenError

SIZE = len(TOKENIZER)  # 283


def grown():
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|tool|>"]})
    return tokenizer


def resized(size):
    model = small_model()
    model.resize_token_embeddings(size, mean_resizing=False)
    return model


@torch.no_grad()
def reading(model, adapter, ids):
    """Which positions of a forward pass memory adds something to, in the first layer."""
    seen = []
    handle = adapter.layers["0"].register_forward_hook(lambda module, args, update: seen.append(update))
    model(input_ids=ids, use_cache=False)
    handle.remove()
    return seen[0][0].abs().amax(-1) > 0


@torch.no_grad()
def test_a_token_that_is_added_later_reads_rows_of_its_own_and_those_of_others_stay(adapted):
    model, adapter = adapted()
    user, ids = grown().convert_tokens_to_ids("<|user|>"), torch.tensor([[5, 9, 17, 30, 41]])
    before = {block: adapter.spec.rows(ids, block) for block in (0, 2)}
    assert user == SIZE and model.get_input_embeddings().num_embeddings == 320
    chat = ids.clone()
    chat[0, 2] = user
    assert reading(model, adapter, chat).all()
    for block, rows in before.items():
        assert torch.equal(adapter.spec.rows(ids, block), rows)
        changed = (adapter.spec.rows(chat, block) != rows).any(-1)[0].tolist()
        assert changed == [False, False, True, True, True]
        other = torch.where(chat == user, user + 1, chat)
        assert (adapter.spec.rows(chat, block) != adapter.spec.rows(other, block)).any(-1)[0].tolist() == changed


@torch.no_grad()
def test_memory_follows_an_embedding_that_grows_and_says_so_once(config, caplog):
    model, tokenizer = resized(SIZE), grown()
    adapter = engram_lm.attach(model, TOKENIZER, config())
    speak(adapter)
    digest = adapter.spec.digest
    ids = tokenizer("the cat<|user|>sat<|tool|>", return_tensors="pt").input_ids
    with pytest.raises(TokenError, match=r"token id 28[34] is outside the vocabulary of 283"):
        model(input_ids=ids)
    assert not caplog.records
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    assert reading(model, adapter, ids).all() and reading(model, adapter, ids).all()
    assert caplog.messages == [
        "the embedding has grown from 283 tokens to 285: memory hashes each new one as a token of its own, which has "
        "to be trained"
    ]
    asked = {"input_ids": ids, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    assert torch.equal(model.generate(**asked), model.generate(**asked, use_cache=False))
    assert adapter.spec.digest == digest


@torch.no_grad()
def test_an_adapter_is_loaded_with_a_tokenizer_that_has_grown(config, tmp_path, caplog):
    model, tokenizer = small_model(), grown()
    adapter = engram_lm.attach(model, TOKENIZER, config())
    speak(adapter)
    ids = tokenizer("the cat<|user|>sat<|tool|>", return_tensors="pt").input_ids
    expected = model(input_ids=ids).logits
    adapter.save_pretrained(tmp_path / "adapter")
    loaded = small_model()
    again = MemoryAdapter.from_pretrained(loaded, tmp_path / "adapter", tokenizer=tokenizer)
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    assert "2 more tokens than this memory was made with ('<|user|>', '<|tool|>')" in caplog.messages[0]
    assert again.spec.token_map.num_tokens == 320 and len(caplog.messages) == 1
    # What is saved is the adapter as it was made, so that any model of the kind can load it.
    again.save_pretrained(tmp_path / "again")
    for name in ("config.json", "adapter.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()
    with pytest.raises(MismatchError, match="token map"):
        MemoryAdapter.from_pretrained(small_model(), tmp_path / "adapter", tokenizer=holes())


@torch.no_grad()
def test_a_tokenizer_may_have_more_tokens_than_the_model_embeds(config, tmp_path, caplog):
    model = resized(SIZE - 1)
    adapter = engram_lm.attach(model, TOKENIZER, config())
    speak(adapter)
    assert caplog.messages == [
        "the tokenizer has tokens up to the id 282, the model embeds 282: the model refuses a text with one of those "
        "beyond"
    ]
    ids = torch.tensor([[4, SIZE - 2]])
    assert reading(model, adapter, ids).all()
    with pytest.raises(TokenError, match="token id 282 is outside the vocabulary of 282"):
        model(input_ids=ids + 1)
    adapter.save_pretrained(tmp_path)
    loaded = resized(SIZE - 1)
    MemoryAdapter.from_pretrained(loaded, tmp_path, tokenizer=TOKENIZER)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_tokenizer_may_have_far_fewer_tokens_than_the_model_embeds(config, caplog):
    engram_lm.attach(small_model(), TOKENIZER, config())
    assert not caplog.records
    adapter = engram_lm.attach(resized(2000), TOKENIZER, config())
    assert "up to the id 282, the model embeds 2000: is it the tokenizer of this model?" in caplog.messages[0]
    assert adapter.spec.encode([[1999]]).min() >= 0


def holes(**more):
    return PreTrainedTokenizerFast(
        tokenizer_object=with_holes(**more),
        eos_token="[EOS]",
        pad_token="[PAD]",
        additional_special_tokens=["<|user|>"],
    )


@torch.no_grad()
def test_tokens_behind_holes_of_a_vocabulary_read_memory(config, caplog):
    model, tokenizer = resized(512), holes()
    adapter = engram_lm.attach(model, tokenizer, config())
    speak(adapter)
    ids = tokenizer("a<|user|>b[PAD]", return_tensors="pt").input_ids
    assert ids[0, 1] == 310 and ids[0, 3] == 511 and len(tokenizer) == 259
    assert reading(model, adapter, ids).all() and not caplog.records
    assert adapter.spec.token_map.made.canonical[[310, 511]].tolist() == [228, 229]
