"""Tasks of lm-evaluation-harness run on any model, on data from a folder, and their results are the harness's."""

import copy
import json
import random

import datasets
import numpy as np
import pytest
import torch
from lm_eval import evaluate
from lm_eval.models.huggingface import HFLM
from tests.adapt.small_models import TOKENIZER, small_model
from tests.evaluation.test_harness_model import BEGINS, attached, with_memory

from engram_lm.cli import main
from engram_lm.errors import ConfigError, DataError
from engram_lm.evaluation import run_tasks
from engram_lm.evaluation.harness_tasks import Tasks
from engram_lm.evaluation.result_files import write_results
from engram_lm.evaluation.task_data import load_dataset

ROWS = [
    {"start": "the cat sat", "ends": [" on the mat", " a rat"], "right": 0},
    {"start": "The Cat saw", "ends": [" the", " a rat"], "right": 1},
    {"start": "the rat ran", "ends": [" to the mat", " it; the"], "right": 0},
    {"start": "a rat", "ends": [" sat", " ran to the mat"], "right": 1},
]
CHOICES = """\
task: ends
dataset_path: owner/animals
dataset_name: {part}
output_type: multiple_choice
test_split: test
fewshot_split: train
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{ends}}}}"
doc_to_target: right
target_delimiter: ""
num_fewshot: 1
metric_list:
  - metric: acc
  - metric: acc_norm
"""
WORDS = """\
task: words
dataset_path: owner/animals
dataset_name: small
output_type: generate_until
test_split: test
doc_to_text: "{{start}}"
doc_to_target: "{{ends[right]}}"
target_delimiter: ""
num_fewshot: 0
generation_kwargs:
  until: ["."]
  max_gen_toks: 6
metric_list:
  - metric: exact_match
"""
TEXTS = """\
task: texts
dataset_path: owner/animals
dataset_name: small
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{start}}{{ends[0]}}"
num_fewshot: 0
metric_list:
  - metric: bits_per_byte
"""
GROUP = """\
group: animals
task:
  - ends
  - words
aggregate_metric_list:
  - metric: acc
"""


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def data(tmp_path):
    """A folder of data sets, with tasks that read them."""
    root = tmp_path / "data"
    write_lines(root / "owner/animals/small/test.jsonl", ROWS)
    write_lines(root / "owner/animals/small/train.jsonl", ROWS[::-1])
    (root / "tasks").mkdir()
    files = {"ends": CHOICES.format(part="small"), "words": WORDS, "texts": TEXTS, "animals": GROUP}
    for name, text in files.items():
        (root / f"tasks/{name}.yaml").write_text(text)
    return root


@pytest.mark.parametrize("build", [small_model, with_memory, attached])
def test_results_are_those_of_the_harness_with_its_own_class(build, data):
    model = build()
    found = run_tasks(model, TOKENIZER, ["ends", "words", "texts"], task_data=data, seed=7)
    loaded = Tasks(data).load(["ends", "words", "texts"])
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(7)
    asked = HFLM(pretrained=model, tokenizer=TOKENIZER, backend="causal", batch_size=1, add_bos_token=False)
    expected = evaluate(lm=asked, task_dict=loaded, bootstrap_iters=100000)
    for name, measures in expected["results"].items():
        for key, score in found.tasks[name].scores.items():
            assert score.value == pytest.approx(measures[f"{key},none"], rel=1e-5)
            error = measures[f"{key}_stderr,none"]
            assert score.standard_error == (None if error == "N/A" else pytest.approx(error))
            assert score.num_questions == 4
    assert [sample["arguments"] for sample in found.raw["samples"]["ends"]] == [
        sample["arguments"] for sample in expected["samples"]["ends"]
    ]
    assert set(found.tasks) == {"ends", "words", "texts"} and found.tasks["ends"].num_few_shot == 1
    assert found.tasks["ends"].scores["acc"].higher_is_better and found.num_truncated == 0


def test_questions_are_limited_examples_are_chosen_and_groups_have_scores(data):
    done = []
    found = run_tasks(
        small_model(), TOKENIZER, ["animals"], task_data=data, limit=2, num_fewshot=2,
        on_progress=lambda *now: done.append(now),
    )  # fmt: skip
    assert found.tasks["animals"].is_group and not found.tasks["ends"].is_group
    assert found.value("animals", "acc") == found.value("ends", "acc")
    assert (found.tasks["ends"].num_questions, found.tasks["ends"].num_few_shot) == (2, 2)
    assert found.tasks["words"].num_few_shot == 0  # it says so itself
    assert done[-1] == (6, 6)
    prompt, _ = found.raw["samples"]["ends"][0]["arguments"][0]
    assert prompt.count("\n\n") == 2 and prompt.endswith("the cat sat")


def test_chance_and_the_model_are_left_as_they_were(data):
    model = small_model().train()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state()
    one, two, other = (run_tasks(model, TOKENIZER, ["ends"], task_data=data, seed=seed) for seed in (3, 3, 4))
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.random.get_rng_state(), before[2]) and model.training
    asked = [[sample["arguments"] for sample in found.raw["samples"]["ends"]] for found in (one, two, other)]
    assert asked[0] == asked[1] != asked[2]


@pytest.mark.parametrize("form", ["save_to_disk", "by split", "parquet", "arrow", "name only", "no part"])
def test_a_data_set_is_read_in_every_form(form, tmp_path):
    whole = datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS), "train": datasets.Dataset.from_list(ROWS)})
    folder = tmp_path / ("animals/small" if form == "name only" else "owner/animals/small")
    part = None if form == "no part" else "small"
    if form == "no part":
        folder = tmp_path / "owner/animals/default"
    if form == "by split":
        for split, rows in whole.items():
            rows.save_to_disk(folder / split)
    elif form == "parquet":
        for split, rows in whole.items():
            rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    elif form == "arrow":
        whole.save_to_disk(tmp_path / "saved")
        folder.mkdir(parents=True)
        for split in whole:
            (tmp_path / f"saved/{split}/data-00000-of-00001.arrow").rename(folder / f"{split}.arrow")
    else:
        whole.save_to_disk(folder)
    found = load_dataset(tmp_path, "owner/animals", part)
    assert {split: rows["start"][:] for split, rows in found.items()} == {
        split: [row["start"] for row in ROWS] for split in ("test", "train")
    }


def test_data_that_are_not_there_are_named_with_the_places_where_they_may_be(data, tmp_path):
    (data / "tasks/ends.yaml").write_text(CHOICES.format(part="large"))
    (data / "owner/animals").rename(data / "elsewhere")
    with pytest.raises(DataError, match=r"'owner/animals' \(large\) is not in .*owner/animals/large, animals/large"):
        run_tasks(small_model(), TOKENIZER, ["ends"], task_data=data)
    with pytest.raises(DataError, match="there is no folder of data sets"):
        run_tasks(small_model(), TOKENIZER, ["ends"], task_data=tmp_path / "none")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/test.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match="cannot read the data set 'broken'"):
        load_dataset(tmp_path, "broken")
    assert not load_outside(tmp_path)


def load_outside(root):
    """Whether a name of a data set leads out of the folder."""
    (root / "inner").mkdir(exist_ok=True)
    write_lines(root / "secret/test.jsonl", ROWS)
    try:
        return load_dataset(root / "inner", "../secret")
    except DataError:
        return False


def test_a_data_set_without_examples_will_do_for_none(data):
    (data / "owner/animals/small/train.jsonl").unlink()
    with pytest.raises(DataError, match="no split 'train', from which the task ends takes its examples"):
        run_tasks(small_model(), TOKENIZER, ["ends"], task_data=data)
    found = run_tasks(small_model(), TOKENIZER, ["ends"], task_data=data, num_fewshot=0)
    assert found.tasks["ends"].num_questions == 4
    # A task that brings its examples, or has a split of them, needs no training split beside it.
    plain = CHOICES.format(part="small").replace("fewshot_split: train", "training_split: train")
    own = f"{plain}fewshot_config:\n  sampler: first_n\n  samples: {json.dumps(ROWS[:1])}\n"
    for text in (own, f"{plain}fewshot_split: test\n"):
        (data / "tasks/ends.yaml").write_text(text)
        assert run_tasks(small_model(), TOKENIZER, ["ends"], task_data=data).tasks["ends"].num_few_shot == 1
    (data / "tasks/ends.yaml").write_text(plain)
    with pytest.raises(DataError, match="no split 'train', from which the task ends takes its examples"):
        run_tasks(small_model(), TOKENIZER, ["ends"], task_data=data)
    (data / "tasks/ends.yaml").write_text(CHOICES.format(part="small"))
    write_lines(data / "owner/animals/small/train.jsonl", ROWS[:2])
    with pytest.raises(DataError, match="the task ends has 2 examples to show and was asked for 3"):
        run_tasks(small_model(), TOKENIZER, ["ends"], task_data=data, num_fewshot=3)
    (data / "owner/animals/small/test.jsonl").rename(data / "owner/animals/small/train.jsonl")
    with pytest.raises(DataError, match="has no split 'test' of questions, but train"):
        run_tasks(small_model(), TOKENIZER, ["ends"], task_data=data)


def test_tasks_that_run_code_need_consent_and_unknown_ones_are_refused(data, capfd):
    (data / "tasks/ends.yaml").write_text(CHOICES.format(part="small") + "unsafe_code: true\n")
    with pytest.raises(ConfigError, match="ends would run the code that the model writes"):
        run_tasks(small_model(), TOKENIZER, ["ends"], task_data=data)
    # As soon as it is loaded, this one fetches what runs code.
    with pytest.raises(ConfigError, match="humaneval would run the code that the model writes"):
        run_tasks(small_model(), TOKENIZER, ["humaneval"], task_data=data)
    capfd.readouterr()
    assert run_tasks(small_model(), TOKENIZER, ["ends"], task_data=data, run_unsafe_code=True).tasks
    assert "it/s" not in capfd.readouterr().err
    (data / "tasks/words.yaml").write_text(WORDS + "process_results: !function nowhere.score\n")
    with pytest.raises(ConfigError, match=r"cannot make the task words ready: .*nowhere"):
        run_tasks(small_model(), TOKENIZER, ["animals"], task_data=data, run_unsafe_code=True)
    with pytest.raises(ConfigError, match="there is no task file"):
        run_tasks(small_model(), TOKENIZER, ["none.yaml"], task_data=data)
    with pytest.raises(ConfigError, match="name at least one task"):
        run_tasks(small_model(), TOKENIZER, [], task_data=data)


def test_a_chat_template_is_written_around_questions(data):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = (
        "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    found = run_tasks(small_model(), tokenizer, ["ends"], task_data=data, num_fewshot=0, chat_template=True)
    assert found.raw["samples"]["ends"][0]["arguments"][0][0] == "<user>the cat sat<assistant>"


def test_results_are_written_as_the_harness_writes_them(data, tmp_path):
    results = run_tasks(small_model(), TOKENIZER, ["ends", "words"], task_data=data)
    path = write_results(tmp_path / "out", results)
    written = json.loads(path.read_text())
    assert written["results"]["ends"]["acc,none"] == results.value("ends", "acc")
    assert written["n-shot"] == {"ends": 1, "words": 0} and written["config"]["limit"] is None
    (samples,) = (tmp_path / "out").glob("samples_ends_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(lines) == 4 and set(lines[0]["arguments"]) == {"gen_args_0", "gen_args_1"}
    assert lines[0]["arguments"]["gen_args_1"]["arg_1"] == " a rat" and lines[0]["doc"] == ROWS[0]


def test_the_command_runs_lists_and_writes(data, tmp_path, capsys):
    with_memory().save_pretrained(tmp_path / "model")
    BEGINS.save_pretrained(tmp_path / "model")
    run = ["eval", str(tmp_path / "model"), "--task-data", str(data), "--tasks", str(data / "tasks/ends.yaml")]
    assert main([*run, "--limit", "3", "--few-shot", "0", "--out", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["task", "measure", "score", "error", "questions", "examples"]
    assert table[1].split()[:2] == ["ends", "acc"] and table[1].split()[-2:] == ["3", "0"]
    assert len(list((tmp_path / "out").iterdir())) == 2
    assert main([*run, "--json", "--max-length", "8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_truncated"] > 0 and found["tasks"]["ends"]["num_few_shot"] == 1
    assert main([*run, "--out", str(tmp_path / "out"), "--seed", "-1"]) != 0
    capsys.readouterr()
    (tmp_path / "file").write_text("")
    nothing = str(tmp_path / "none")  # what is wrong is said before the model is loaded
    for wrong, message in (
        (["--tasks", ","], "name what to evaluate on"),
        (["--tasks", "none.jsonl"], "cannot read the task file none.jsonl"),
        (["--tasks", "no_such_task", "--task-data", str(data)], "there is no task 'no_such_task'"),
        (["--tasks", "ruler_vs_512"], "there is no task 'ruler_vs_512'; did you mean 'ruler_vt'"),
        (["--tasks", "ruler_vt_512", "--few-shot", "-1"], "--few-shot is a whole number from 0"),
        (["--tasks", "ruler_vt_512", "--out", str(tmp_path / "file")], "file"),
    ):
        assert main(["eval", nothing, *wrong]) != 0
        assert message in " ".join(capsys.readouterr().err.replace("│", "").split())
    assert main(["eval", "--list", "--tasks", "animals,ruler_vt_512", "--task-data", str(data)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["ends", "1"], ["words", "0"], ["ruler_vt_512", "0"]]
    assert "owner/animals small, found in" in lines[1]
    assert main(["eval", "--list", "--tasks", "no_such_task", "--task-data", str(data)]) != 0
    assert "there is no task 'no_such_task'" in capsys.readouterr().err


SHOTS = {
    "mmlu": 5, "mmlu_redux_generative": 5, "mmlu_pro": 5, "cmmlu": 5, "ceval-valid": 5, "agieval": 0, "arc_easy": 25,
    "arc_challenge": 25, "triviaqa": 5, "triviaqa_zh": 5, "popqa": 15, "ccpm": 0, "bbh_cot_fewshot": 3, "hellaswag": 0,
    "piqa": 0, "winogrande": 5, "drop": 1, "race_middle": 5, "race_high": 5, "c3": 0, "humaneval": 0, "mbpp": 3,
    "cruxeval_input": 0, "cruxeval_output": 0, "gsm8k": 8, "mgsm_direct": 8, "minerva_math": 4,
}  # fmt: skip


def test_every_name_of_the_papers_suite_resolves_with_its_number_of_examples():
    tasks = Tasks()
    rows = tasks.leaves("engram-paper")
    found = {row["task"]: row["num_fewshot"] for row in rows}
    expected = {row["task"]: number for name, number in SHOTS.items() for row in tasks.leaves(name)}
    del expected["mgsm_direct_es_spanish_bench"]  # a second Spanish one, of another suite
    assert found == expected and len(rows) == len(found) > 300
    brought = {row["task"] for row in rows if (row.get("metadata") or {}).get("bring")}
    assert brought == {"triviaqa_zh", "ccpm"}


def test_the_librarys_own_tasks_ask_what_their_data_say(tmp_path):
    write_lines(tmp_path / "akariasai/PopQA/test.jsonl", [
        {"question": f"Who is {name}?", "possible_answers": json.dumps([name, "The Cat."])} for name in ("Ann", "Bob")
    ])  # fmt: skip
    for part in ("middle", "high"):
        row = {"article": "the cat sat", "question": f"{part}?", "options": ["a", "b", "c", "d"], "answer": "C"}
        for split in ("train", "validation", "test"):
            write_lines(tmp_path / f"ehovy/race/{part}/{split}.jsonl", [row, row])
    row = {"context": ["甲", "乙"], "question": "谁？", "choice": ["甲", "乙"], "answer": "乙"}
    for split in ("train", "validation"):
        write_lines(tmp_path / f"clue/clue/c3/{split}.jsonl", [row, {**row, "context": ["丙"]}])
    write_lines(tmp_path / "ccpm/valid.jsonl", [
        {"translation": line, "choices": list("甲乙丙丁"), "answer": 2} for line in "春秋"
    ])  # fmt: skip
    for split in ("train", "test"):
        write_lines(tmp_path / f"triviaqa_zh/{split}.jsonl", [{"question": "谁？", "answers": ["甲", "《乙》"]}])
    names = ["popqa", "race_middle", "race_high", "c3", "ccpm", "triviaqa_zh"]
    loaded = Tasks(tmp_path).load(names)["tasks"]
    docs = {name: next(iter(task.eval_docs)) for name, task in loaded.items()}
    assert loaded["popqa"].doc_to_text(docs["popqa"]) == "Q: Who is Ann?\nA:"
    assert loaded["popqa"].process_results(docs["popqa"], [" the cat\n"]) == {"exact_match": 1.0, "answer_in_text": 1.0}
    assert loaded["popqa"].process_results(docs["popqa"], ["It is Ann"]) == {"exact_match": 0.0, "answer_in_text": 1.0}
    assert loaded["race_middle"].doc_to_text(docs["race_middle"]).endswith("Question: middle?\nAnswer:")
    assert loaded["race_high"].doc_to_target(docs["race_high"]) == 2
    assert (
        loaded["c3"].doc_to_text(docs["c3"]) == "甲\n乙\n\n问题：谁？\n答案："
        and loaded["c3"].doc_to_target(docs["c3"]) == 1
    )
    assert loaded["ccpm"].doc_to_target(docs["ccpm"]) == 2
    assert loaded["triviaqa_zh"].process_results(docs["triviaqa_zh"], [" 乙。"]) == {"exact_match": 1.0}
    results = run_tasks(with_memory(), TOKENIZER, names, task_data=tmp_path, num_fewshot=1, limit=1)
    assert all(result.num_questions == 1 for result in results.tasks.values())
