"""Questions are scored as a loop over single answers would score them."""

import json

import pytest
import torch
from tests.adapt.conftest import speak
from tests.adapt.small_models import TOKENIZER, small_model
from tests.small_model import BACKBONE, MEMORY, perturbed

import engram_lm
from engram_lm import EngramConfig, EngramForCausalLM, EngramLMConfig
from engram_lm.cli import main
from engram_lm.errors import ConfigError, DataError
from engram_lm.evaluation import run_tasks
from engram_lm.evaluation.task_scores import score_tasks
from engram_lm.evaluation.tasks import TaskItem, write_tasks

ITEMS = (
    TaskItem(id="a", family="cat", prompt="the cat sat on", answer=" the mat", choices=(" the mat", " a rat", " it")),
    TaskItem(id="b", family="cat", prompt="The Cat saw", answer=" rat", choices=(" the", " rat")),
    TaskItem(id="c", family="free", prompt="the rat ran to the mat. " * 3 + "the", answer=" rat ran"),
    TaskItem(id="d", family="cat", prompt="a rat; the rat ran", answer=" to", choices=(" to", " on the mat. The Cat")),
)


def with_memory():
    torch.manual_seed(0)
    config = EngramLMConfig.for_tokenizer(TOKENIZER, EngramConfig(**MEMORY), **BACKBONE)
    model = EngramForCausalLM(config).eval()
    return perturbed(model, 0.2)


def attached():
    model = small_model("llama")
    adapter = engram_lm.attach(model, TOKENIZER, EngramConfig(**MEMORY))
    speak(adapter)
    return model


def taught(*texts):
    """A model that has learned some texts by heart."""
    torch.manual_seed(0)
    model = small_model("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        for text in texts:
            ids = torch.tensor([TOKENIZER(text).input_ids])
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def one_by_one(model, prompt, answer):
    """The log-probability of an answer, token by token, each in a forward pass of its own."""
    tokens = TOKENIZER(prompt).input_ids
    total = 0.0
    for token in TOKENIZER(answer).input_ids:
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
        total += float(logits.double().log_softmax(-1)[token])
        tokens.append(token)
    return total


@pytest.mark.parametrize("build", [small_model, with_memory, attached])
def test_scores_are_those_of_answers_taken_one_by_one_whatever_the_batch(build):
    model = build()
    sums = [[one_by_one(model, item.prompt, choice) for choice in item.choices or [item.answer]] for item in ITEMS]
    model.train()
    for batch_size in (1, 2, None):
        done = []
        scores = score_tasks(
            model, TOKENIZER, ITEMS, batch_size=batch_size, on_progress=lambda *now, done=done: done.append(now)
        )
        assert done[-1] == (8, 8) and model.training
        cat, free = scores["cat"], scores["free"]
        right = [item.choices.index(item.answer) for item in ITEMS if item.choices]
        chosen = [values.index(max(values)) for values, item in zip(sums, ITEMS) if item.choices]
        tokens = sum(len(TOKENIZER(item.answer).input_ids) for item in ITEMS if item.family == "cat")
        assert cat.answer_loss == pytest.approx(-(sums[0][0] + sums[1][1] + sums[3][0]) / tokens, rel=1e-4)
        assert cat.accuracy == pytest.approx(sum(one == other for one, other in zip(chosen, right)) / 3)
        assert cat.chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
        assert (free.accuracy, free.chance, free.num_items, cat.num_items) == (None, None, 1, 3)


def test_exact_match_says_what_greedy_decoding_gives():
    model = taught("the cat sat on the mat.", "The Cat saw a rat; the rat")
    right = TaskItem(id="right", family="right", prompt="the cat sat on", answer=" the mat.")
    wrong = TaskItem(id="wrong", family="wrong", prompt="The Cat saw", answer=" the rat")
    scores = score_tasks(model, TOKENIZER, [right, wrong])
    for item in (right, wrong):
        ids = TOKENIZER(item.prompt, return_tensors="pt").input_ids
        length = len(TOKENIZER(item.answer).input_ids)
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False)
        assert scores[item.family].exact_match == (TOKENIZER.decode(made[0, ids.shape[1] :]) == item.answer)
    assert (scores["right"].exact_match, scores["wrong"].exact_match) == (1, 0)


def test_a_choice_is_normalized_by_its_bytes():
    model = taught("the cat sat on the mat. The Cat")
    prompt, long, short = "the cat sat on", " the mat. The Cat", " q"
    item = TaskItem(id="x", family="f", prompt=prompt, answer=long, choices=(long, short))
    by_bytes = [one_by_one(model, prompt, choice) / len(choice) for choice in (long, short)]
    scores = run_tasks(model, TOKENIZER, [(item,)]).tasks["f"].scores
    assert by_bytes[0] > by_bytes[1] and scores["acc_norm"].value == 1


def test_what_is_not_a_number_counts_as_wrong_and_shows_in_the_loss():
    model = small_model("llama")
    with torch.no_grad():
        model.lm_head.weight[TOKENIZER(" rat").input_ids[0]] = float("nan")
    family = score_tasks(model, TOKENIZER, ITEMS)["cat"]
    assert family.accuracy == family.exact_match == 0
    assert family.to_dict()["answer_loss"] is None


def test_a_question_that_does_not_fit_is_refused_before_anything_is_computed():
    model = small_model("llama")
    long = TaskItem(id="long", family="f", prompt="the cat " * 300, answer=" sat")
    with pytest.raises(DataError, match=r"'long' has \d+ tokens with its answer, the model sees 256"):
        score_tasks(model, TOKENIZER, [*ITEMS, long], on_progress=lambda *now: pytest.fail("it began"))
    with pytest.raises(DataError, match="no questions"):
        score_tasks(model, TOKENIZER, [])
    with pytest.raises(ConfigError, match="batch_size is a whole number from 1, got 0"):
        score_tasks(model, TOKENIZER, ITEMS, batch_size=0)


def test_an_empty_prompt_begins_where_a_text_does():
    item = TaskItem(id="e", family="f", prompt="", answer="the cat")
    score = score_tasks(small_model("llama"), TOKENIZER, [item])["f"]
    expected = one_by_one(small_model("llama"), TOKENIZER.eos_token, "the cat")
    assert score.answer_loss * len(TOKENIZER("the cat").input_ids) == pytest.approx(-expected, rel=1e-4)


def test_eval_scores_task_files(tmp_path, capsys):
    model = with_memory()
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    write_tasks(tmp_path / "one.jsonl", ITEMS[:2])
    write_tasks(tmp_path / "two.jsonl", ITEMS[2:])
    files = [str(tmp_path / name) for name in ("one.jsonl", "two.jsonl")]
    assert main(["eval", str(tmp_path / "model"), "--tasks", ",".join(files), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = score_tasks(model, TOKENIZER, ITEMS)
    cat = found["tasks"]["cat"]
    assert (cat["num_questions"], cat["acc"]["value"]) == (3, pytest.approx(expected["cat"].accuracy))
    assert cat["answer_loss"]["value"] == pytest.approx(expected["cat"].answer_loss) and "loss" not in found
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 20)
    assert main(["eval", str(tmp_path / "model"), "--tasks", *files, "--data", str(tmp_path / "text.txt")]) == 0
    text = capsys.readouterr().out
    assert "cat" in text and "perplexity" in text and "free" in text
    assert main(["eval", str(tmp_path / "model")]) == 2
    assert "benchmarks with --tasks" in " ".join(capsys.readouterr().err.split())
    assert main(["eval"]) == 2
    assert "name the folder of a model" in " ".join(capsys.readouterr().err.split())
