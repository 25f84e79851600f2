"""RULER in lm-evaluation-harness: what is asked are the samples, and what is answered is checked as published."""

import json

import pytest
from tests.adapt.small_models import TOKENIZER, small_model

pytest.importorskip("lm_eval")

from engram_lm.cli import main
from engram_lm.errors import ConfigError, DataError
from engram_lm.evaluation import run_tasks
from engram_lm.evaluation.ruler.harness import GROUPS, MEASURE, is_ruler, kinds
from engram_lm.evaluation.ruler.tasks import NAMES, RulerData, answer_tokens, make_samples

LENGTH = 1500


@pytest.fixture(scope="module")
def model():
    one = small_model("llama")
    one.config.max_position_embeddings = 8192
    return one


@pytest.fixture
def oracle(model, monkeypatch):
    """Lets the model generate what is asked for, but for every second question; keeps what it was asked."""
    asked = []

    def generate(self, requests, **_):
        asked.extend(requests)
        answers = [" and ".join(request.doc["answers"]) for request in requests]
        return [text.upper() if number % 2 else "no idea" for number, text in enumerate(answers)]

    monkeypatch.setattr("engram_lm.evaluation.harness_model.HarnessModel.generate_until", generate)
    return asked


def test_the_harness_asks_the_samples_and_checks_the_answers(model, oracle):
    results = run_tasks(model, TOKENIZER, [f"ruler_vt_{LENGTH}"], limit=4, seed=3)
    samples = list(make_samples("vt", TOKENIZER, length=LENGTH, num_samples=4, seed=3))
    assert [request.args[0] for request in oracle] == [sample.prompt for sample in samples]
    assert {request.args[1]["max_gen_toks"] for request in oracle} == {answer_tokens("vt")}
    score = results.tasks[f"ruler_vt_{LENGTH}"].scores[MEASURE]
    assert (score.value, score.num_questions) == (0.5, 4)
    assert score.standard_error == pytest.approx((1 / 12) ** 0.5)


def test_a_group_has_the_mean_of_its_tasks_at_each_length(model, oracle):
    results = run_tasks(model, TOKENIZER, ["ruler_synthetic_3000", "ruler_fwe"], limit=2)
    assert results.value("ruler_synthetic_3000", MEASURE) == 0.5
    assert set(results.tasks) == {
        "ruler_synthetic_3000", *(f"ruler_{name}_3000" for name in GROUPS["ruler_synthetic"]), "ruler_fwe_4096",
    }  # fmt: skip
    assert len(oracle) == 2 * 12
    about = results.raw["configs"]["ruler_niah_single_2_3000"]["metadata"]
    assert about["length"] == 3000 and about["essay"] == RulerData().essay().digest


def test_questions_are_asked_of_files_that_a_person_brings(model, oracle, tmp_path):
    with pytest.raises(DataError, match=r"ruler_qa_2 needs the published file hotpot_dev_distractor_v1\.json"):
        run_tasks(model, TOKENIZER, [f"ruler_qa_2_{LENGTH}"], limit=1)
    (tmp_path / "ruler").mkdir()
    context = [[f"title {part}", [f"Part {part} is of wood."]] for part in range(10)]
    items = [{"question": "What is it made of?", "answer": "wood", "context": context}]
    (tmp_path / "ruler" / "hotpot_dev_distractor_v1.json").write_text(json.dumps(items))
    results = run_tasks(model, TOKENIZER, [f"ruler_qa_2_{LENGTH}"], limit=2, task_data=tmp_path)
    assert results.value(f"ruler_qa_2_{LENGTH}", MEASURE) == 0.5


def test_a_model_that_knows_nothing_says_something_and_scores_nothing(model):
    results = run_tasks(model, TOKENIZER, [f"ruler_niah_single_1_{LENGTH}"], limit=2)
    (samples,) = results.raw["samples"].values()
    assert results.value(f"ruler_niah_single_1_{LENGTH}", MEASURE) == 0.0
    assert len(samples) == 2 and all(sample["resps"][0][0] for sample in samples)


def test_what_cannot_be_asked_is_refused_in_words(model):
    assert len(kinds()) == len(NAMES) + 2
    assert all(map(is_ruler, kinds())) and not is_ruler("ruled")
    assert not any(is_ruler(f"ruler_mine.{end}") for end in ("jsonl", "yaml", "yml"))
    for name, words in (
        ("ruler_niah_singel_1", "there is no task 'ruler_niah_singel_1'; did you mean 'ruler_niah_single_1'"),
        ("ruler_vt_9000", "ruler_vt_9000 has samples of 9,000 tokens and the model sees 8,192; .* ruler_vt_8192"),
        ("ruler_vt_99", "there is no task"),
        ("ruler_64", "there is no task 'ruler_64'; .*a length of at least 100 tokens"),
        ("ruler_VT", "there is no task 'ruler_VT'"),
        ("ruler_", "there is no task 'ruler_'"),
        ("ruler_*", r"there is no task 'ruler_\*': RULER's names take no pattern"),
    ):
        with pytest.raises(ConfigError, match=words):
            run_tasks(model, TOKENIZER, [name], limit=1)


def test_the_list_says_what_a_group_consists_of_and_what_to_bring(capsys):
    assert main(["eval", "--list", "--tasks", "ruler_8192", "--json"]) == 0
    rows = {row["task"]: row["bring"] for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == [f"ruler_{name}_8192" for name in NAMES]
    assert rows["ruler_qa_1_8192"] == "bring ruler/dev-v2.0.json" and rows["ruler_vt_8192"] is None
