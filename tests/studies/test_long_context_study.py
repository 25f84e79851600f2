"""The study of long contexts: its text can be read, its models are equal, and one command trains and asks them all."""

import contextlib
import json
import random
import types

import pytest
import torch

from engram_lm.cli import main
from engram_lm.errors import ConfigError
from engram_lm.model import EngramLMConfig
from engram_lm.studies.budget import check_budget
from engram_lm.studies.long_context.notes import NoteOptions, code_lines, hide, make_documents
from engram_lm.studies.long_context.recall import TASKS, recall
from engram_lm.studies.long_context.study import LongContextStudy
from engram_lm.studies.long_context.summary import ENGRAM, EQUAL, MOE, long_context_finding, summarize
from engram_lm.studies.result import runs_of
from engram_lm.studies.runner import Runner
from engram_lm.training.data.tokenizer import train_tokenizer

SIZES = {
    "seeds": 1, "tokens": 2048, "sequence_length": 64, "batch_size": 4, "long_tokens": 512, "long_length": 256,
    "long_batch_size": 1, "points": 3, "documents": 8, "vocab_size": 400, "hidden_size": 32, "heads": 1, "experts": 10,
    "haystacks": 2, "dtype": "float32",
}  # fmt: skip
OPTIONS = NoteOptions(num_documents=3, lines_per_document=60)


@pytest.fixture(scope="module")
def lines():
    return code_lines(400)


@pytest.fixture(scope="module")
def tokenizer(lines):
    return train_tokenizer(["\n".join(lines), *make_documents(OPTIONS, lines)], 600)


def test_a_document_notes_the_same_value_for_a_key_again_and_again(lines):
    documents = list(make_documents(OPTIONS, lines))
    assert documents == list(make_documents(OPTIONS, lines)) and len(documents) == 3
    gaps = []
    for document in documents:
        values, last = {}, {}
        rows = document.splitlines()
        assert len(rows) == OPTIONS.lines_per_document * (1 + OPTIONS.notes_per_line)
        for place, row in enumerate(rows):
            if row.startswith("note "):
                _, key, value = row.split()
                assert values.setdefault(key, value) == value
                gaps += [place - last[key]] if key in last else []
                last[key] = place
        assert set(values) == set(OPTIONS.keys) and len(set(values.values())) > 4
    # Short gaps and long ones.
    assert sum(gap <= 2 for gap in gaps) > 50 and sum(gap > 20 for gap in gaps) > 50
    assert documents[0].split()[:40] != documents[1].split()[:40]


@pytest.mark.parametrize("num_needles", TASKS.values())
def test_needles_stand_in_a_haystack_that_fills_a_length(num_needles, lines, tokenizer):
    for seed in range(5):
        hidden = hide(num_needles, OPTIONS, lines, 500, tokenizer, random.Random(seed))
        notes = {tuple(line.split()[1:]) for line in hidden.lines if line.startswith("note ")}
        assert notes == set(hidden.asked) and len(notes) == num_needles
        questions = [f"note {key} {value}" for key, value in hidden.asked]
        size = len(tokenizer("".join(f"{line}\n" for line in [*hidden.lines, *questions])).input_ids)
        assert 500 - 40 < size <= 500


class Reader(torch.nn.Module):
    """Predicts the note that it has read, but for keys of which it knows nothing."""

    def __init__(self, tokenizer, forgets):
        super().__init__()
        self.tokenizer, self.forgets, self.weight = tokenizer, forgets, torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, use_cache, logits_to_keep):
        logits = torch.zeros(1, len(logits_to_keep), 600)
        for row, place in enumerate(logits_to_keep.tolist()):
            rows = self.tokenizer.decode(input_ids[0, : place + 1]).split("\n")
            known = {row.split()[1]: row for row in rows[:-1] if row.startswith("note ")}
            key = rows[-1].split()[1]
            if key in known and key not in self.forgets:
                rest = self.tokenizer(known[key][len(rows[-1]) :]).input_ids
                logits[0, row, rest[0]] = 1.0
        return types.SimpleNamespace(logits=logits)


def test_recall_counts_the_answers_that_are_right(lines, tokenizer):
    def ask(forgets):
        return recall(
            Reader(tokenizer, forgets), tokenizer, OPTIONS, lines, lengths=(300, 600), num_haystacks=6, seed=0
        )

    everything, nothing, half = ask(()), ask(OPTIONS.keys), ask(OPTIONS.keys[::2])
    assert {found["correct"] for task in everything.values() for found in task.values()} == {1.0}
    assert {found["correct"] for task in nothing.values() for found in task.values()} == {0.0}
    assert 0.2 < half["several"]["600"]["correct"] < 0.8 and half["several"]["600"]["error"] > 0
    sure, guessing = (found["several"]["600"]["loss"] for found in (everything, nothing))
    assert sure < half["several"]["600"]["loss"] < guessing
    assert half["several"]["600"]["num_questions"] == 48 and half["single"]["300"]["num_questions"] == 6


def test_both_models_have_as_many_parameters():
    study = LongContextStudy().study()
    costs = check_budget(study)
    assert costs[ENGRAM].total == pytest.approx(costs[MOE].total, rel=0.01)
    assert costs[ENGRAM].active == pytest.approx(costs[MOE].active, rel=0.01)
    assert (
        study.arms[1].recipe.model.backbone["n_routed_experts"]
        < study.arms[0].recipe.model.backbone["n_routed_experts"]
    )
    assert LongContextStudy().lengths == (512, 1024, 2048, 4096)
    with pytest.raises(ConfigError, match="--long-length 512 must be above"):
        LongContextStudy(long_length=512)
    for factor in (0.0, 2.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="--factor"):
            LongContextStudy(factor=factor)


def test_no_line_of_a_haystack_is_among_the_lines_of_the_text(tmp_path):
    study = LongContextStudy(documents=20)
    study.prepare(tmp_path)
    text = {
        line
        for row in next(tmp_path.glob("text-*.jsonl")).read_text().splitlines()
        for line in json.loads(row)["text"].split("\n")
    }
    asked = study.code()[1]
    assert len(asked) > 1000 and not text & set(asked)


def test_one_command_trains_extends_and_asks(tmp_path, capsys, monkeypatch):
    asked = []

    @contextlib.contextmanager
    def measuring(self, title, total):
        progress = [total, 0]
        asked.append(progress)

        def advance(more=1):
            progress[1] += more

        yield advance

    monkeypatch.setattr(Runner, "measuring", measuring)
    out = tmp_path / "study"
    flags = [part for name, value in SIZES.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = ["study", "long_context", "--out", str(out), "--mode", "one_by_one", *flags]
    assert main([*command, "--json"]) == 0
    monkeypatch.undo()
    result = json.loads(capsys.readouterr().out)
    assert len(asked) == 5 and all(total == done for total, done in asked)
    assert result["study"] == "long_context" and len(runs_of(result)) == 5
    (seed,) = result["seeds"]
    assert set(seed["short"]) == {MOE, ENGRAM} and set(seed["long"]) == {MOE, ENGRAM, EQUAL}
    assert all(set(one["recall"]["single"]) == {"64", "128", "256"} for one in seed["long"].values())
    # The one that is ahead was taken at the loss that is nearest to the other's last one.
    equal, losses = seed["equal_loss"], {name: one["loss"] for name, one in seed["short"].items()}
    assert losses[equal["arm"]] == min(losses.values()) and equal["wanted_loss"] == max(losses.values())
    lines = [json.loads(line) for line in (out / f"seed-0/{equal['arm']}/metrics.jsonl").read_text().splitlines()]
    curve = {line["step"]: line["held_out"]["loss"] for line in lines if "held_out" in line}
    assert len(curve) == SIZES["points"] and equal["loss"] == curve[equal["step"]]
    assert all(abs(equal["loss"] - equal["wanted_loss"]) <= abs(loss - equal["wanted_loss"]) for loss in curve.values())
    config = EngramLMConfig.from_pretrained(next(out.glob("long-*")) / "seed-0" / EQUAL / "model")
    assert config.rope_parameters["factor"] == 10.0 and config.max_position_embeddings == 256
    assert (config.memory is not None) == (equal["arm"] == ENGRAM)
    assert (out / "report.html").is_file() and (out / "recall.png").is_file()
    # Called again, it trains nothing and finds the same.
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("metrics.jsonl")}
    assert len(stamps) == 5 and main([*command, "--resume", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["summary"] == result["summary"]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def measured(loss, correct):
    return {"loss": loss, "recall": {"single": {"64": {"correct": correct, "loss": 3.0 - correct}}}}


def test_memory_is_compared_at_equal_steps_and_at_equal_loss():
    seeds = [
        {
            "equal_loss": {"arm": ahead},
            "short": {MOE: measured(3.0, 0.1), ENGRAM: measured(2.9, 0.2)},
            "long": {MOE: measured(2.5, 0.3), ENGRAM: measured(2.4, 0.9), EQUAL: measured(2.45, equal)},
        }
        for ahead, equal in ((ENGRAM, 0.5), (MOE, 0.2))
    ]
    found = summarize(seeds)
    assert found["differences"]["equal_steps"]["recall"]["single"]["64"]["per_seed"] == pytest.approx([0.6, 0.6])
    # Memory ahead: 0.5 - 0.3; experts ahead: 0.9 - 0.2.
    assert found["differences"]["equal_loss"]["recall"]["single"]["64"]["per_seed"] == pytest.approx([0.2, 0.7])
    assert found["arms"]["long"][EQUAL]["recall"]["single"]["64"]["mean"] == pytest.approx(0.35)
    finding = long_context_finding({"summary": found, "lengths": [64], "num_values": 16, "seeds": seeds})
    assert "+0.600 at equal steps, +0.450 at equal loss" in finding.headline and "too few" in finding.detail
    assert "right in 6.2%" in finding.tables[0].note and "has 2.77" in finding.tables[1].note
    assert found["differences"]["equal_loss"]["answer_loss"]["single"]["64"]["per_seed"] == pytest.approx([-0.2, -0.7])
