"""LongPPL is that of a plain twin, which keeps every logit and asks for each token by itself."""

import dataclasses
import json
import math

import pytest
import torch
from tests.adapt.small_models import TEXT, TOKENIZER, small_model
from tests.beginnings import with_template

import engram_lm.evaluation.long_ppl as module
from engram_lm.adapt import attach
from engram_lm.cli import main
from engram_lm.errors import ConfigError, MismatchError
from engram_lm.evaluation.long_ppl import KeyTokens, long_ppl
from engram_lm.training.data.tokenizer import train_tokenizer

# The models are random, so what a long context saves is small.
OPTIONS = KeyTokens(short_context=24, step=10, gain=0.05, most_loss=6.0)
TEXTS = [TEXT[:300] + "Ünïcode 🐈 and the hat. " + TEXT[50:420], TEXT[:30], TEXT[7:600]]
OTHER = train_tokenizer([TEXT, "Ünïcode 🐈 and the hat."], 300)
BEGINS = with_template(TOKENIZER, "<s> $A")


@pytest.fixture(scope="module")
def model():
    return small_model("llama")


@pytest.fixture(scope="module")
def evaluator():
    return small_model("qwen3")


def nats(model, tokens, place):
    """What one token costs after others."""
    logits = model(input_ids=torch.tensor([tokens[:place]])).logits[0, -1].double()
    return -float(logits.log_softmax(-1)[tokens[place]])


@torch.no_grad()
def twin(model, tokenizer, text, evaluator, judge, options):
    """Losses at key tokens, each token and each character looked at by itself; also the number of key tokens."""
    beginning = tokenizer("").input_ids
    judged = judge(text, add_special_tokens=False, return_offsets_mapping=True)
    begins = judge("").input_ids
    characters = set()
    tokens = judged.input_ids
    for place in range(options.short_context, len(tokens)):
        start = (place - options.short_context) // options.step * options.step
        whole = nats(evaluator, begins + tokens, place + len(begins))
        short = nats(evaluator, begins + tokens[start:], place - start + len(begins))
        if short - whole > options.gain and whole < options.most_loss:
            characters.update(range(*judged.offset_mapping[place]))
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return [
        nats(model, beginning + read.input_ids, place + len(beginning))
        for place, span in enumerate(read.offset_mapping)
        if place + len(beginning) > 0 and characters & set(range(*span))
    ]


@pytest.mark.parametrize("tokenizer", [TOKENIZER, BEGINS], ids=["plain", "with a beginning"])
@pytest.mark.parametrize("judge", [OTHER, BEGINS], ids=["plain", "with a beginning"])
def test_it_is_what_a_plain_twin_finds(model, evaluator, tokenizer, judge):
    found = long_ppl(
        model, tokenizer, TEXTS, evaluator=evaluator, evaluator_tokenizer=judge, options=OPTIONS, max_length=250
    )
    texts = [text for text in TEXTS if len(judge(text).input_ids) > OPTIONS.short_context]
    expected = [loss for text in texts for loss in twin(model, tokenizer, text, evaluator, judge, OPTIONS)]
    assert found.num_key_tokens == len(expected) > 5
    assert found.num_key_tokens < found.num_tokens / 2
    assert found.loss == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert found.long_ppl == pytest.approx(math.exp(found.loss))
    assert (found.num_documents, found.num_cut) == (len(texts), 0)


def test_a_model_may_judge_for_itself(model):
    alone = long_ppl(model, TOKENIZER, TEXTS, options=OPTIONS)
    twice = long_ppl(model, TOKENIZER, TEXTS, evaluator=model, evaluator_tokenizer=TOKENIZER, options=OPTIONS)
    # Another object with the same weights is asked through characters. No character has two tokens here.
    plain = [text for text in TEXTS if text.isascii()]
    other = long_ppl(
        model, TOKENIZER, plain, evaluator=small_model("llama"), evaluator_tokenizer=TOKENIZER, options=OPTIONS
    )
    assert alone == twice and alone.num_key_tokens > 5
    assert other == long_ppl(model, TOKENIZER, plain, options=OPTIONS)
    assert alone.perplexity != alone.long_ppl


def test_a_key_token_at_the_beginning_is_the_first_token_or_none(model, evaluator):
    """The first word is a key token of the evaluator, whose tokens are letters; the model has one token for it."""
    letters = train_tokenizer(["qz"], 258)
    text = "the cat sat on the mat."
    options = KeyTokens(short_context=1, step=1, gain=-100.0, most_loss=100.0)  # all tokens but the first
    assert len(TOKENIZER("the").input_ids) == 1 and len(letters("the").input_ids) == 3
    judged = {"evaluator": evaluator, "evaluator_tokenizer": letters, "options": options}
    for tokenizer, first in ((TOKENIZER, False), (BEGINS, True)):
        found = long_ppl(model, tokenizer, [text], **judged)
        tokens = tokenizer(text).input_ids
        with torch.no_grad():
            expected = [nats(model, tokens, place) for place in range(1, len(tokens))]
        assert found.num_key_tokens == len(expected) == len(TOKENIZER(text).input_ids) - (not first)
        assert found.loss == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_few_logits_are_in_memory_at_a_time_and_nothing_changes(monkeypatch):
    torch.manual_seed(0)
    one = small_model("llama")
    attach(one, TOKENIZER, layers=(1,), rows_per_head=31, memory_dim=32)
    for parameter in one.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    expected = long_ppl(one, TOKENIZER, TEXTS, options=OPTIONS)
    monkeypatch.setattr(module, "_TOKENS_AT_ONCE", 9)
    largest = []
    one.register_forward_hook(lambda *arguments: largest.append(arguments[-1].logits.shape[1]))
    found = long_ppl(one, TOKENIZER, TEXTS, options=OPTIONS)
    assert max(largest) == 9
    assert found.num_key_tokens == expected.num_key_tokens > 0
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)


def test_a_document_is_read_as_far_as_both_models_see(model, evaluator):
    found = long_ppl(
        model, TOKENIZER, TEXTS, evaluator=evaluator, evaluator_tokenizer=OTHER, options=OPTIONS, max_length=40
    )
    assert found.num_cut == found.num_documents == 2
    assert found.num_tokens <= 2 * 40
    none = long_ppl(model, TOKENIZER, [TEXT[:20]], options=OPTIONS)
    assert (none.long_ppl, none.num_documents, none.perplexity) == (None, 0, None)


def test_what_cannot_be_measured_is_refused_in_words(model, evaluator):
    with pytest.raises(ConfigError, match="an evaluator together with its tokenizer"):
        long_ppl(model, TOKENIZER, TEXTS, evaluator=evaluator)
    with pytest.raises(ConfigError, match=r"the evaluator reads 256 tokens .* a short context has 4,096"):
        long_ppl(model, TOKENIZER, TEXTS)
    with pytest.raises(ConfigError, match="short_context"):
        dataclasses.replace(OPTIONS, short_context=0)

    class Slow:
        is_fast = False

    with pytest.raises(MismatchError, match="Slow cannot say which characters"):
        long_ppl(model, Slow(), TEXTS, options=OPTIONS)


def test_the_command_measures_it_with_another_model_as_evaluator(model, evaluator, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXTS[2])
    for name, one in (("model", model), ("evaluator", evaluator)):
        one.save_pretrained(tmp_path / name)
        TOKENIZER.save_pretrained(tmp_path / name)
    arguments = ["eval", str(tmp_path / "model"), "--data", str(text), "--long-ppl", "--evaluator"]
    arguments += [str(tmp_path / "evaluator"), "--short-context", "24"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = long_ppl(
        model, TOKENIZER, [TEXTS[2]], evaluator=evaluator, evaluator_tokenizer=TOKENIZER,
        options=KeyTokens(short_context=24),
    )  # fmt: skip
    assert found["long_ppl"] == {"evaluator": str(tmp_path / "evaluator"), **dataclasses.asdict(expected)}
    assert found["loss"] > 0
    assert main(arguments) == 0
    assert "LongPPL" in capsys.readouterr().out
    # A model that is too short for what is asked is refused before the loss of the text is measured.
    for wrong, message in (
        (["--long-ppl", "--max-length", "20", "--short-context", "24"], "take a shorter short context"),
        (["--tasks", "ruler_vt_500", "--max-length", "400"], "the model sees 400"),
    ):
        assert main(["eval", str(tmp_path / "model"), "--data", str(text), *wrong]) == 1
        out, err = capsys.readouterr()
        assert not out and message in " ".join(err.replace("│", "").split())
    assert main(["eval", str(tmp_path / "model"), "--data", str(text), "--short-context", "24"]) == 2
    assert "are for --long-ppl" in capsys.readouterr().err
