"""What a text begins with is what its tokenizer puts before it: once, and nothing behind."""

import copy

import numpy as np
import pytest
from tests.adapt.small_models import TOKENIZER
from tests.beginnings import with_template
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from engram_lm.errors import DataError
from engram_lm.tokenizing import beginning_tokens, prompt_tokens, starts_of, text_tokens

TEXT = "the cat"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("$A", []),
        ("<s> $A", ["<s>"]),
        ("<s> $A </s>", ["<s>"]),
        ("$A </s>", []),
        ("[gMASK] <sop> $A", ["[gMASK]", "<sop>"]),
    ],
)
def test_a_text_begins_as_its_tokenizer_begins_it_and_ends_with_its_own_last_token(template, expected):
    tokenizer = with_template(TOKENIZER, template)
    first = tokenizer.convert_tokens_to_ids(expected)
    assert list(beginning_tokens(tokenizer)) == list(beginning_tokens(tokenizer.backend_tokenizer)) == first
    assert text_tokens(tokenizer, TEXT).tolist() == [*first, *TOKENIZER(TEXT).input_ids]
    if not template.endswith("</s>"):
        assert text_tokens(tokenizer, TEXT).tolist() == tokenizer(TEXT).input_ids


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_tokenizer_without_everyday_letters_begins_its_texts_too(wrapped):
    tokenizer = Tokenizer(BPE(vocab={"<s>": 0, "</s>": 1, "A": 2, "C": 3, "G": 4, "T": 5}, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    wrapper = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    assert wrapper("ACGT").input_ids == [0, 2, 3, 4, 5, 1]
    assert beginning_tokens(wrapper if wrapped else tokenizer) == (0,)


def test_a_chat_that_spells_its_beginning_is_not_given_a_second_one():
    tokenizer = with_template(TOKENIZER, "<s> $A")
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    chat = [{"role": "user", "content": TEXT}]
    asked = tokenizer.apply_chat_template(chat, tokenize=False)
    expected = tokenizer.apply_chat_template(chat, return_dict=False)
    assert prompt_tokens(tokenizer, asked).tolist() == expected == tokenizer(TEXT).input_ids


def test_an_empty_prompt_begins_with_a_token_that_stands_before_texts():
    assert prompt_tokens(TOKENIZER, "").tolist() == [TOKENIZER.eos_token_id]
    tokenizer = with_template(TOKENIZER, "<s> $A")
    assert prompt_tokens(tokenizer, "").tolist() == [tokenizer.bos_token_id]
    unused = copy.deepcopy(TOKENIZER)
    unused.add_special_tokens({"bos_token": "<s>"})
    assert prompt_tokens(unused, "").tolist() == [unused.bos_token_id]
    unused.bos_token = unused.eos_token = None
    with pytest.raises(DataError, match="the prompt is empty"):
        prompt_tokens(unused, "")


def test_looking_at_a_tokenizer_leaves_how_it_cuts_and_pads():
    tokenizer = with_template(TOKENIZER, "<s> $A").backend_tokenizer
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=5, direction="left", pad_id=1)
    before = tokenizer.truncation, tokenizer.padding
    assert beginning_tokens(tokenizer) == (tokenizer.token_to_id("<s>"),)
    assert (tokenizer.truncation, tokenizer.padding) == before


def test_beginnings_are_found_in_packed_tokens():
    tokens = np.array([7, 8, 1, 7, 2, 7, 8, 8])
    assert starts_of((7, 8), tokens).tolist() == [True, True, False, False, False, True, True, False]
    assert not starts_of((), tokens).any() and not starts_of((7, 8), tokens[:1]).any()
