"""Recall and reading are asked with the memory on and off, and compared question by question."""

import json

import numpy as np
import pytest
from tests.adapt.small_models import TOKENIZER, small_model
from tests.evaluation.diagnostics.test_measure import attached
from tests.evaluation.test_recall_questions import TEXTS

from engram_lm.cli import main
from engram_lm.errors import DataError
from engram_lm.evaluation import run_tasks
from engram_lm.evaluation.recall import MEASURES, recall_and_reading
from engram_lm.evaluation.recall_questions import recall_questions
from engram_lm.evaluation.suppressing import suppressed

pytest.importorskip("lm_eval")
ITEMS = recall_questions(TEXTS)


def test_both_families_are_asked_with_memory_and_without_and_differences_are_paired():
    model = attached()
    found = recall_and_reading(model, TOKENIZER, ITEMS, batch_size=4)
    on = run_tasks(model, TOKENIZER, [ITEMS])
    with suppressed(model):
        off = run_tasks(model, TOKENIZER, [ITEMS])
    for family in ("recall", "reading"):
        scores = found[family].scores
        assert found[family].chance == 0.25 and found[family].num_questions == len(ITEMS) // 2
        for name, results in (("memory on", on), ("memory off", off)):
            for measure in ("acc", "exact_match"):
                assert scores[name][measure]["value"] == pytest.approx(results.value(family, measure))
        pairs = [
            [sample["answer_loss"][0] / np.log(2) for sample in sorted(one.raw["samples"][family], key=_number)]
            for one in (on, off)
        ]
        difference = np.array(pairs[1]) - np.array(pairs[0])
        bits = scores["memory off"]["answer_bits"]
        assert bits["difference"] == pytest.approx(difference.mean(), rel=1e-4) != 0
        assert bits["difference_error"] == pytest.approx(difference.std(ddof=1) / len(difference) ** 0.5, rel=1e-4)
    with pytest.raises(DataError, match="the model sees 1;"):
        recall_and_reading(model, TOKENIZER, ITEMS, max_length=1)
    plain = recall_and_reading(small_model(), TOKENIZER, ITEMS)["recall"].scores
    assert list(plain) == ["model"] and set(plain["model"]) == set(MEASURES)


def _number(sample):
    return sample["doc_id"]


def test_the_command_asks_about_a_text(tmp_path, capsys):
    small_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    command = ["eval", str(tmp_path / "model"), "--recall", str(tmp_path / "text.txt"), "--limit", "5"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["recall"]
    assert found["reading"]["num_questions"] == 5 and found["recall"]["scores"]["model"]["acc"]["value"] is not None
    assert main(command) == 0
    assert "guessing gives acc 0.25" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "short.txt").write_text("no sentence\n")
    assert main(["eval", str(tmp_path / "model"), "--recall", str(tmp_path / "short.txt")]) == 1
    assert "name a longer text" in capsys.readouterr().err
