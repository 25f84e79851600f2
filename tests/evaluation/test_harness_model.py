"""Our models answer lm-evaluation-harness as its own class does at batch size 1, whatever the batch."""

import copy
import math

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tests.adapt.conftest import speak
from tests.adapt.small_models import TEXT, TOKENIZER, small_model
from tests.beginnings import with_template
from tests.small_model import BACKBONE, MEMORY, perturbed

import engram_lm
from engram_lm import EngramConfig, EngramForCausalLM, EngramLMConfig
from engram_lm.errors import DataError, TokenError
from engram_lm.evaluation.batching import Batches
from engram_lm.evaluation.harness_model import HarnessModel, StopWords

BEGINS = with_template(TOKENIZER, "<s> $A")
LENGTH = 48
PAIRS = [
    ("the cat sat on", " the mat"),
    ("the cat sat on", " a rat; the rat"),
    ("The Cat saw ", "a rat"),  # a space behind the context
    ("", "the rat ran"),
    ("  ", "the cat"),
    ("the rat ran to the mat. " * 3 + "the", " rat"),
    ("a rat; the rat ran", " to"),
    ("the mat. " * 40, "The Cat"),  # longer than the model sees
]


def with_memory():
    torch.manual_seed(0)
    model = EngramForCausalLM(EngramLMConfig.for_tokenizer(BEGINS, EngramConfig(**MEMORY), **BACKBONE)).eval()
    return perturbed(model, 0.2)


def attached():
    model = small_model("llama")
    speak(engram_lm.attach(model, BEGINS, EngramConfig(**MEMORY)))
    return model


KINDS = pytest.mark.parametrize("build", [small_model, with_memory, attached])
TOKENIZERS = pytest.mark.parametrize("tokenizer", [TOKENIZER, BEGINS], ids=["plain", "begins"])
BATCHES = (1, 3, None)


def requests(kind, *arguments):
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def hflm(model, tokenizer, **options):
    return HFLM(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),  # it would set a padding token
        backend="causal",
        max_length=LENGTH,
        batch_size=1,
        **{"logits_cache": False, **options},
    )


def ours(model, tokenizer, batch_size=None, made=HarnessModel):
    return made(model, tokenizer, batch_size=batch_size, max_length=LENGTH)


@KINDS
@TOKENIZERS
def test_log_probabilities_are_those_of_hflm(build, tokenizer):
    model = build()
    pairs = PAIRS if tokenizer is BEGINS else [pair for pair in PAIRS if pair[0] != "  "]  # which it cannot ask
    expected = hflm(model, tokenizer).loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert len({round(nats, 3) for nats, _ in expected}) == len(pairs)
    for batch_size in BATCHES:
        asked = ours(model, tokenizer, batch_size)
        found = asked.loglikelihood(requests("loglikelihood", *pairs))
        assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], rel=1e-5)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert asked.num_truncated == 1


@KINDS
@TOKENIZERS
def test_the_loss_of_whole_texts_is_that_of_hflm(build, tokenizer):
    model = build()
    texts = [(TEXT[:300],), ("the cat",), (TEXT[5:90],), (TEXT[:1000],)]
    # Its rolling loss puts the token before the text itself; if the tokenizer did too, there would be two.
    asked = hflm(model, tokenizer, add_bos_token=False)
    expected = asked.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    assert len(TOKENIZER(TEXT[:1000]).input_ids) > 2 * LENGTH
    for batch_size in BATCHES:
        found = ours(model, tokenizer, batch_size).loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
        assert found == pytest.approx(expected, rel=1e-5)
    assert ours(model, tokenizer).loglikelihood_rolling(requests("loglikelihood_rolling", ("",))) == [0.0]


class WithoutMask(HarnessModel):
    """The control: padding that is not masked."""

    def _generate(self, contexts, until, max_new_tokens, options):
        longest = max(map(len, contexts))
        padded = [[0] * (longest - len(context)) + list(context) for context in contexts]
        return super()._generate(padded, until, max_new_tokens, options)


@KINDS
@TOKENIZERS
def test_generation_is_that_of_hflm_and_padding_without_a_mask_changes_it(build, tokenizer):
    model = build()
    prompts = ["the cat sat on", "The", "a rat; the rat ran to the mat. the Cat saw", "the rat " * 30, "mat. "]
    free = [(prompt, {"until": [], "max_gen_toks": 12}) for prompt in prompts]
    texts = hflm(model, tokenizer).generate_until(requests("generate_until", *free), disable_tqdm=True)
    # Words in which some of the texts end, at different places, spread over tokens.
    first, second = sorted(texts, key=len)[-2:]
    until = [first[3:6], second[-3:]]
    assert all(until)
    asked = [(prompt, {"until": until, "max_gen_toks": 12}) for prompt in prompts] + free
    expected = hflm(model, tokenizer).generate_until(requests("generate_until", *asked), disable_tqdm=True)
    assert sum(stopped != text for stopped, text in zip(expected, texts)) >= 2
    for batch_size in BATCHES:
        assert ours(model, tokenizer, batch_size).generate_until(requests("generate_until", *asked)) == expected
    control = ours(model, tokenizer, None, WithoutMask)
    assert control.generate_until(requests("generate_until", *asked)) != expected


@KINDS
def test_requests_with_the_same_tokens_and_another_split_have_values_of_their_own(build):
    model = build()
    pairs = [("the cat", " sat on"), ("the cat sat", " on"), ("the", " cat sat on")]
    one_by_one = [hflm(model, TOKENIZER).loglikelihood(requests("loglikelihood", pair), True)[0][0] for pair in pairs]
    found = [nats for nats, _ in ours(model, TOKENIZER).loglikelihood(requests("loglikelihood", *pairs))]
    assert found == pytest.approx(one_by_one, rel=1e-5)
    # What lm-eval makes of them with its cache by tokens, which is on unless it is switched off.
    cached = hflm(model, TOKENIZER, logits_cache=True).loglikelihood(requests("loglikelihood", *pairs), True)
    assert [nats for nats, _ in cached] != pytest.approx(one_by_one, rel=1e-2)


def test_one_forward_pass_answers_all_choices_that_are_one_token(monkeypatch):
    model, passes = small_model(), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: passes.append(inputs["input_ids"]) or forward(**inputs))
    pairs = [("the cat sat on", choice) for choice in (" the", " a", " rat")]
    ours(model, TOKENIZER).loglikelihood(requests("loglikelihood", *pairs))
    assert [tuple(ids.shape) for ids in passes] == [(1, len(TOKENIZER("the cat sat on").input_ids))]


def test_stop_words_of_the_prompt_do_not_count():
    tokens = torch.tensor([TOKENIZER("the cat sat on").input_ids, TOKENIZER("the rat ran to").input_ids])
    assert StopWords(TOKENIZER, [" on", " cat"], tokens.shape[1] - 1)(tokens, None).tolist() == [True, False]
    assert StopWords(TOKENIZER, [" on", " cat"], tokens.shape[1])(tokens, None).tolist() == [False, False]


def test_the_model_and_the_tokenizer_stay_as_they_were():
    model, tokenizer = small_model().train(), copy.deepcopy(BEGINS)
    before = (tokenizer.padding_side, tokenizer.pad_token, tokenizer.backend_tokenizer.to_str())
    asked = ours(model, tokenizer)
    asked.loglikelihood(requests("loglikelihood", *PAIRS))
    asked.generate_until(requests("generate_until", ("the", {"until": ["x"], "max_gen_toks": 3})))
    assert model.training and before == (
        tokenizer.padding_side, tokenizer.pad_token, tokenizer.backend_tokenizer.to_str(),
    )  # fmt: skip


def test_a_model_in_bfloat16_is_scored_in_float32():
    model = small_model().bfloat16()
    ids = torch.tensor([TOKENIZER("the cat sat on the mat").input_ids])
    start = len(TOKENIZER("the cat").input_ids)
    with torch.no_grad():
        nats = model(ids).logits[0, start - 1 : -1].float().log_softmax(-1).gather(1, ids[0, start:, None]).sum()
    ((found, _),) = ours(model, TOKENIZER).loglikelihood(requests("loglikelihood", ("the cat", " sat on the mat")))
    assert found == pytest.approx(float(nats), rel=1e-6)


def test_what_cannot_be_asked_is_refused_in_words():
    asked = ours(small_model(), TOKENIZER)
    with pytest.raises(DataError, match=r"an answer has .* tokens, the model sees 48 at most"):
        asked.loglikelihood(requests("loglikelihood", ("the", " cat" * 60)))
    with pytest.raises(DataError, match="has no tokens of its own"):
        asked.loglikelihood(requests("loglikelihood", ("the cat", "")))
    with pytest.raises(DataError, match="generates up to 48 tokens, and the model sees 48"):
        asked.generate_until(requests("generate_until", ("the", {"max_gen_toks": 48})))
    model, last = small_model(), len(TOKENIZER) - 1
    model.resize_token_embeddings(last)
    with pytest.raises(TokenError, match=f"token id {last} is outside the vocabulary"):
        ours(model, TOKENIZER).loglikelihood(requests("loglikelihood", ("mat on", TOKENIZER.decode([last]))))


def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_left_out():
    tried, done = [], []

    def run(start, stop):
        tried.append(stop - start)
        if (stop - start) * lengths[start] > 30:
            raise torch.OutOfMemoryError
        done.extend(range(start, stop))

    lengths = [10] * 8 + [5] * 7
    Batches(None, torch.device("cpu"), 100).each(lengths, [1] * 15, run)
    assert done == list(range(15)) and tried == [15, 7, 3, 3, 3, 6]
    with pytest.raises(torch.OutOfMemoryError):
        Batches(8, torch.device("cpu"), 100).each(lengths, [1] * 15, run)


def test_a_batch_has_no_more_logits_than_fit():
    sizes, num_logits = [], (1 << 28) // 4 // 100  # so that there is room for 100 rows of logits
    batches = Batches(None, torch.device("cpu"), num_logits)
    batches.each([40] * 10, [20] * 10, lambda start, stop: sizes.append(stop - start))
    assert sizes == [5, 5]
    sizes.clear()
    batches.each([40, 30, 20, 10], [10] * 4, lambda start, stop: sizes.append(stop - start))
    assert sizes == [3, 1] and math.prod(sizes)  # the short ones keep as many positions as their padding needs
