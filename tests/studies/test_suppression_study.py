"""The study of suppression: two families that differ in where the answer is, and one command that measures both."""

import json
import re

import pytest

from engram_lm.cli import main
from engram_lm.errors import ConfigError
from engram_lm.evaluation.tasks import read_tasks
from engram_lm.studies.suppression.families import FamilyOptions, make_families
from engram_lm.studies.suppression.summary import markdown_table, summarize, suppression_finding

SMALL = FamilyOptions(num_people=20, num_documents=600, num_questions=60)
QUICK = """
[model]
preset = "engram-nano"
[model.backbone]
first_k_dense_replace = 2
num_hidden_layers = 2
hidden_size = 32
num_attention_heads = 2
intermediate_size = 48
num_streams = 1
[model.memory]
layers = [0, 1]
memory_dim = 32
rows_per_head = 97
[tokenizer]
vocab_size = 400
[data]
sequence_length = 64
[train]
num_steps = 6
batch_size = 4
dtype = "float32"
[optimizer]
lr = 4e-3
[checkpoint]
every = 3
asynchronous = false
[log]
details_every = 0
peak_tflops = 1.0
"""


def by_family(families, name):
    return [item for item in families.items if item.family == name]


def asked_about(item):
    """The two names that a question ends in."""
    return tuple(item.prompt.split()[-2:])


def test_families_are_the_same_for_the_same_seed_and_no_others():
    assert make_families(SMALL) == make_families(SMALL)
    assert make_families(SMALL) != make_families(FamilyOptions(**{**vars(SMALL), "seed": 1}))


def test_recall_asks_for_what_the_text_states_and_rewords_what_it_states_otherwise():
    families = make_families(SMALL)
    text = " ".join(families.documents)
    for item in by_family(families, "recall"):
        assert f"{item.prompt}{item.answer}." in text
        assert not any(f"{item.prompt}{choice}." in text for choice in item.choices if choice != item.answer)
    for item in by_family(families, "recall-reworded"):
        assert not any(f"{item.prompt}{choice}." in text for choice in item.choices)
        wording = item.prompt.replace(" ".join(asked_about(item)), "X")
        stated = {
            document.replace(name, "X") for document in families.documents for name in [" ".join(asked_about(item))]
        }
        assert not any(f"{wording} " in one for one in stated), "the wording is withheld for this fact"
        pattern = re.escape(wording).replace("X", "[A-Z][a-z]+ [A-Z][a-z]+")
        assert re.search(pattern, text), "the wording itself is known"


def test_reading_asks_about_nobody_the_text_knows_and_answers_in_the_context():
    families = make_families(SMALL)
    text = " ".join(families.documents)
    known = {asked_about(item) for item in by_family(families, "recall")}
    for item in by_family(families, "reading"):
        name = asked_about(item)
        assert " ".join(name) not in text and name not in known
        context, question = item.prompt.rsplit(".", 1)
        sentences = context.split(". ")
        assert len(sentences) == 4 and all(" ".join(name) in sentence for sentence in sentences)
        (stated,) = [sentence for sentence in sentences if sentence.endswith(item.answer)]
        assert question not in context and stated.removesuffix(item.answer) != question.strip(), "in another wording"
        assert sum(choice in context for choice in item.choices) == 1, "what is asked for is stated once"
    assert {item.choices for item in by_family(families, "reading")} <= {
        item.choices for item in by_family(families, "recall")
    }


def test_impossible_families_are_refused():
    for options in ({"num_people": 0}, {"num_people": 600}, {"people_per_passage": 0}, {"people_per_passage": 20}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            FamilyOptions(**options)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    (folder / "quick.toml").write_text(QUICK)
    call = ["study", "suppression", "--out", str(folder / "out"), "--recipe", str(folder / "quick.toml")]
    call += ["--people", "20", "--documents", "400", "--questions", "8", "--seeds", "2"]
    assert main(call) == 0
    return folder / "out", call


def test_one_command_trains_asks_and_says_what_is_retained(study, capsys):
    out, _ = study
    result = json.loads((out / "result.json").read_text())
    assert [seed["seed"] for seed in result["seeds"]] == [0, 1] and result["commit"] is not False
    effect = result["seeds"][0]["run"]["effect"]
    names = [condition["name"] for condition in effect["conditions"]]
    assert names[:2] == ["memory on", "zero in blocks 0, 1"] and len(names) == 7
    assert effect["families"] == ["recall", "recall-reworded", "reading"] and effect["num_items"] == [8, 8, 8]
    assert result["summary"] == summarize(result["seeds"]) and result["reading_by_copying_any"] == 0.25
    assert (out / "retained.png").read_bytes().startswith(b"\x89PNG")
    assert len(read_tasks(out / "seed-1" / "tasks.jsonl")) == 24
    # The questions and the model in the folder give what the result says.
    assert main(["eval", str(out / "seed-1/run/model"), "--tasks", str(out / "seed-1/tasks.jsonl"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["tasks"]
    for column, name in enumerate(effect["families"]):
        told = result["seeds"][1]["run"]["effect"]["answer_loss"][0][column]
        assert found[name]["answer_loss"]["value"] == pytest.approx(told, rel=1e-4)


def test_a_study_is_gone_on_with_and_trains_nothing_twice(study, capsys):
    out, call = study
    before = (out / "seed-0/run/model/model.safetensors").stat()
    first = json.loads((out / "result.json").read_text())
    assert main(call) == 1
    assert "continue it with --resume" in capsys.readouterr().err
    status = main([*call, "--twin", "--resume", "--json"])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    result = json.loads(printed.out)
    after = (out / "seed-0/run/model/model.safetensors").stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    assert [seed["run"]["effect"] for seed in result["seeds"]] == [seed["run"]["effect"] for seed in first["seeds"]]
    assert set(result["summary"]["twin"]) == {"recall", "recall-reworded", "reading"}
    config = json.loads((out / "seed-0/twin/model/config.json").read_text())
    assert config.get("memory") is None
    # Another text is another recipe: what was trained on the first one does not count.
    assert main([*call, "--twin", "--people", "21", "--resume", "--json"]) == 0
    printed = capsys.readouterr()
    changed = json.loads(printed.out)
    said = " ".join(printed.err.split())
    assert "trained again: run of seed 0, twin of seed 0 (" in said and "data.sources is" in said
    assert changed["seeds"][0]["run"]["training"]["held_out"] != result["seeds"][0]["run"]["training"]["held_out"]


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("dear reader")
    assert main(["study", "suppression", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "is not a study" in said and "cannot write" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def made_seed(recall, reading):
    effect = {
        "conditions": [{"name": "memory on"}, {"name": "zero in block 1"}],
        "families": ["recall", "reading"],
        "exact_match": [[0.8, 0.5], [0.8 * (recall or 0), 0.5 * reading]],
        "retained": [[1.0, 1.0], [recall, reading]],
        "accuracy": [[0.8, 0.5], [0.1, 0.5]],
        "answer_loss": [[0.1, 0.2], [3.0, 0.2]],
    }
    return {"run": {"effect": effect}}


def test_the_summary_averages_over_seeds_and_leaves_out_what_is_unknown():
    summary = summarize([made_seed(0.25, 1.0), made_seed(0.5, 0.75), made_seed(None, 0.5)])
    row = summary["conditions"]["zero in block 1"]
    assert row["recall"]["retained"]["mean"] == 0.375
    assert row["reading"]["retained"] == {"mean": 0.75, "std": 0.25}
    assert summary["reading_minus_recall"]["zero in block 1"]["per_seed"] == [0.75, 0.25]
    alone = summarize([made_seed(None, 1.0)])
    assert alone["reading_minus_recall"]["zero in block 1"] == {"mean": None, "std": None, "per_seed": []}
    (shown,) = suppression_finding({"seeds": [0], "summary": alone}).tables
    assert len(shown.rows) == 2
    assert markdown_table({"summary": summary}).splitlines() == [
        "| memory | recall | retained | reading | retained |",
        "| :-- | --: | --: | --: | --: |",
        "| memory on | 80 ± 0 % | 100 ± 0 % | 50 ± 0 % | 100 ± 0 % |",
        "| zero in block 1 | 20 ± 20 % | 38 ± 18 % | 38 ± 12 % | 75 ± 25 % |",
    ]
    twins = [
        {"twin": {"scores": {"recall": {"exact_match": one}, "reading": {"exact_match": 1.0}}}} for one in (0.95, 0.3)
    ]
    table = markdown_table({"seeds": twins, "summary": {**summary, "twin": {}}})
    assert table.splitlines()[-1] == "| trained without memory | 95, 30 % |  | 100, 100 % |  |"


def test_a_dry_run_of_one_arm_says_one_arm(tmp_path, capsys):
    assert main(["study", "suppression", "--dry-run", "--out", str(tmp_path / "none")]) == 0
    assert "\n1 arm, 1 seed" in capsys.readouterr().out


def test_the_group_of_studies_explains_itself(capsys):
    assert main(["study"]) == 2
    assert "suppression" in capsys.readouterr().err
    assert main(["study", "suppression", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(
        f"--{name}" in text for name in ("out", "seeds", "twin", "recipe", "people", "questions", "resume", "json")
    )
    assert main(["study", "suppression", "--seeds", "0"]) == 2
    assert main(["study", "supression"]) == 2
    assert "did you mean 'suppression'?" in capsys.readouterr().err
