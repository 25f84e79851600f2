"""Our losses are those of EleutherAI's lm-evaluation-harness, for a model whose texts begin with a special token."""

import pytest
import torch
from tests.adapt.small_models import TEXT, TOKENIZER, small_model
from tests.beginnings import with_template

from engram_lm.tokenizing import beginning_tokens
from engram_lm.training.data.documents import Document, pack
from engram_lm.training.held_out import held_out_loss

LENGTH = 64
BEGINS = with_template(TOKENIZER, "<s> $A")


@pytest.fixture(scope="module")
def model():
    """A model that has only seen one text, which begins with the token that begins texts."""
    torch.manual_seed(0)
    one = small_model("llama").train()
    ids = torch.tensor([BEGINS(TEXT).input_ids[:LENGTH]])
    optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        one(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return one.eval()


@pytest.fixture(scope="module")
def harness(model):
    """Makes the harness's own view of the model."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")

    def make(**options):
        return huggingface.HFLM(
            pretrained=model,
            tokenizer=BEGINS,
            backend="causal",
            max_length=LENGTH,
            batch_size=2,
            device="cpu",
            **options,
        )

    return make


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def loss(model, text, **options):
    return held_out_loss(model, pack([Document("a", text)], BEGINS), length=LENGTH, **options)


def test_the_loss_of_a_text_is_the_harness_s(model, harness):
    text = TEXT[:150]
    num_tokens = len(TOKENIZER(text).input_ids)
    # Its rolling loss puts the token before the text itself; if the tokenizer did too, there would be two.
    lm = harness(add_bos_token=False)
    (expected,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), disable_tqdm=True)
    # Without the end-of-text token, which the harness does not score.
    found = loss(model, text, max_tokens=num_tokens, beginning=beginning_tokens(BEGINS))
    assert num_tokens < LENGTH and found.num_tokens == num_tokens
    assert found.loss == pytest.approx(-expected / num_tokens, rel=1e-5)
    without = held_out_loss(model, pack([Document("a", text)], TOKENIZER), length=LENGTH, max_tokens=num_tokens - 1)
    assert without.loss > 2 * found.loss


def test_windows_of_a_long_text_are_the_harness_s_with_a_beginning_before_each(model, harness):
    tokens = TOKENIZER(TEXT[5:]).input_ids[: 5 * LENGTH // 2]
    windows = [tokens[start : start + LENGTH] for start in range(0, len(tokens), LENGTH)]
    pairs = [(None, [BEGINS.bos_token_id], window) for window in windows]
    scored = harness()._loglikelihood_tokens(pairs, disable_tqdm=True)
    found = loss(model, TEXT[5:], max_tokens=len(tokens), beginning=beginning_tokens(BEGINS))
    assert len(windows) == 3 and found.num_tokens == len(tokens)
    assert found.loss == pytest.approx(-sum(nats for nats, _ in scored) / len(tokens), rel=1e-5)
