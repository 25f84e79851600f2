"""``engram-lm analyze``: every part from one pass, parts that do not apply named, nothing lost or half written."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from tests.adapt import small_models
from tests.analysis.conftest import LENGTH
from tests.analysis.looking import average_gates, logit_lens
from tests.small_model import MEMORY

import engram_lm
from engram_lm.analysis import find_subject, gate_trace
from engram_lm.analysis.command import _names
from engram_lm.analysis.part import AnalyzeOptions
from engram_lm.analysis.registry import PARTS
from engram_lm.analysis.report import remarks
from engram_lm.analysis.run import analyze
from engram_lm.cli import main
from engram_lm.errors import ConfigError
from engram_lm.serving.load import load_model
from engram_lm.training.data.documents import Document, pack, read_documents


@pytest.fixture(scope="module")
def memory_model(analyzed):
    return load_model(analyzed.memory)


def entries(result, part):
    return [(entry["models"], entry.get("result"), entry.get("not_applicable")) for entry in result["parts"][part]]


def test_command_leaves_numbers_pictures_and_a_page(analyzed):
    assert {path.name for path in analyzed.out.iterdir()} == {
        "analysis.json", "report.html", "gates.png", "lens.png", "cka.png", "suppression.png", "rows.png",
    }  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n") for path in analyzed.out.glob("*.png"))
    result = analyzed.result
    assert tuple(result["parts"]) == tuple(PARTS)
    assert [model["name"] for model in result["models"]] == ["memory", "twin"]
    assert all(any(found for _, found, _ in entries(result, part)) for part in PARTS)
    ((_, cka, _),) = entries(result, "cka")
    # Fewer than the layers there are, or every column would answer to the middle.
    assert all(one["top_k"] == 2 for one in cka["maps"])


def test_numbers_are_those_of_each_analysis_by_itself(analyzed, memory_model):
    model, tokenizer = memory_model
    result, text = analyzed.result, read_documents([analyzed.text])
    tokens = pack(text.documents, tokenizer)
    alone = average_gates(model, tokenizer, tokens, length=LENGTH)
    ((_, found, _),) = entries(result, "gates")
    np.testing.assert_allclose(found["models"]["memory"]["mean"], alone.mean, rtol=1e-5)
    ((_, lens, _),) = entries(result, "lens")
    curve = next(iter(logit_lens({"memory": model}, tokenizer, tokens, length=LENGTH).models.values()))
    np.testing.assert_allclose(lens["models"]["memory"]["kl"], curve.kl, rtol=1e-4, atol=1e-6)
    assert result["texts"] == [{"models": ["memory", "twin"], "num_tokens": len(tokens), "all": True, "length": LENGTH}]


def test_one_forward_pass_for_each_batch_of_windows_whatever_is_asked(memory_model):
    model, tokenizer = memory_model
    subject = find_subject(model, tokenizer, name="memory")
    passes = []
    handle = model.register_forward_hook(
        lambda module, args, kwargs, output: passes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    try:
        documents = [Document("a", "the cat sat on the mat. " * 60)]
        num_tokens = len(pack(documents, tokenizer))
        counts = {}
        for parts in (("gates",), ("gates", "lens", "cka", "rows")):
            passes.clear()
            analyze([subject], documents, AnalyzeOptions(parts=parts, length=32, batch_size=4))
            # What a row adds to the prediction is asked on four tokens, which are none of the text's.
            counts[parts] = [shape for shape in passes if shape != (1, 4)]
    finally:
        handle.remove()
    whole, rest = divmod(num_tokens, 32)
    expected = [(4, 32)] * (whole // 4) + [(whole % 4, 32)] * (whole % 4 > 0) + [(1, rest)] * (rest > 0)
    assert [*counts.values()] == [expected, expected]


def test_passages_are_what_a_trace_of_them_says(memory_model):
    model, tokenizer = memory_model
    subject = find_subject(model, tokenizer, name="memory")
    documents = [Document("a", "the cat sat on the mat. The rat ran to the cat. " * 30)]
    findings = analyze([subject], documents, AnalyzeOptions(parts=("gates",), length=40, batch_size=3))
    tokens = pack(documents, tokenizer)
    starts = [index * 40 for index in np.linspace(0, len(tokens) // 40 - 1, 6).round().astype(int)]
    for start, trace in zip(starts, findings.page_only["gates"]["memory"].traces, strict=True):
        np.testing.assert_array_equal(trace.tokens, tokens[start : start + 40])
        alone = gate_trace(model, tokenizer, trace.tokens)
        np.testing.assert_allclose(trace.gates, alone.gates, atol=1e-6)
        np.testing.assert_allclose(trace.order_scores, alone.order_scores, atol=1e-5)
        np.testing.assert_array_equal(trace.visible, alone.visible)


def test_phrases_hold_the_mean_gates_of_the_positions_where_they_fired(memory_model):
    model, tokenizer = memory_model
    subject = find_subject(model, tokenizer, name="memory")
    documents = [Document("a", "the cat sat on the mat. The rat ran to the cat. " * 6)]
    findings = analyze([subject], documents, AnalyzeOptions(parts=("gates",), length=1000))
    trace = gate_trace(model, tokenizer, pack(documents, tokenizer))
    phrases = findings.page_only["gates"]["memory"].phrases
    assert len(phrases) > 10
    assert [phrase.fired.sum() for phrase in phrases] == sorted((p.fired.sum() for p in phrases), reverse=True)
    for phrase in phrases[:8]:
        # Case is nothing to the hash: the N-gram may be spelled in other ways too.
        for place, block in enumerate(trace.blocks):
            fired = [trace.fired(block, position) for position in range(len(trace.tokens))]
            mine = [
                position
                for position, one in enumerate(fired)
                if one and one.order == phrase.order and one.text.lower() == phrase.text.lower()
            ]
            assert len(mine) == phrase.fired[place]
            if mine:
                np.testing.assert_allclose(phrase.gates[place], trace.gates[place, mine].mean(0), atol=1e-6)
        assert phrase.text.endswith(phrase.last)


def test_parts_that_do_not_apply_are_named_and_the_others_run(analyzed, tmp_path, capsys):
    out = tmp_path / "out"
    call = ["analyze", str(analyzed.twin), "--data", str(analyzed.text), "--out", str(out), "--sequence-length", "64"]
    assert main(call) == 0
    said = capsys.readouterr().out
    assert said.count("left out for twin: it has no memory") == 1
    result = json.loads((out / "analysis.json").read_text())
    for part in ("gates", "suppression", "rows"):
        ((models, found, reason),) = entries(result, part)
        assert models == ["twin"]
        assert found is None
        assert "no memory" in reason
    ((_, cka, _),) = entries(result, "cka")  # alone, a model is compared with itself
    assert [(one["row_model"], one["column_model"]) for one in cka["maps"]] == [("twin", "twin")]
    np.testing.assert_allclose(np.diag(cka["maps"][0]["similarity"]), 1, atol=1e-6)
    page = (out / "report.html").read_text()
    assert "it has no memory" in page
    assert 'id="gates"' not in page


def test_models_of_two_tokenizers_are_read_one_after_the_other_and_not_compared(analyzed, other_tokenizer, tmp_path):
    model = small_models.small_model("llama")
    model.save_pretrained(tmp_path / "other")
    other_tokenizer.save_pretrained(tmp_path / "other")
    call = ["analyze", str(analyzed.memory), str(tmp_path / "other"), "--data", str(analyzed.text)]
    out = ["--out", str(tmp_path / "out"), "--parts", "cka,lens", "--sequence-length", "64", "--max-tokens", "300"]
    assert main([*call, *out]) == 0
    result = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert [models for models, found, _ in entries(result, "lens") if found] == [["memory"], ["other"]]
    refused = [reason for _, found, reason in entries(result, "cka") if not found]
    assert len(refused) == 1
    digests = {model["vocabulary_digest"] for model in result["models"]}
    assert len(digests) == 2
    assert all(digest in refused[0] for digest in digests)
    assert any(refused[0] in remark for remark in remarks(result))


def test_adapter_goes_to_the_first_model_and_the_second_stays_without(tmp_path, capsys):
    model = small_models.small_model("llama")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model.save_pretrained(base)
    small_models.TOKENIZER.save_pretrained(base)
    engram_lm.attach(model, small_models.TOKENIZER, engram_lm.EngramConfig(**MEMORY)).save_pretrained(adapter)
    (tmp_path / "text").write_text(small_models.TEXT)
    call = ["analyze", str(base), str(base), "--adapter", str(adapter), "--data", str(tmp_path / "text"), "--json"]
    assert main([*call, "--out", str(tmp_path / "out"), "--max-tokens", "400", "--parts", "gates,cka"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(one["name"], one["memory_blocks"]) for one in result["models"]] == [
        ("base + memory", [0, 2]),
        ("base", []),
    ]
    ((_, cka, _),) = entries(result, "cka")
    assert [(one["row_model"], one["column_model"]) for one in cka["maps"]] == [("base", "base + memory")]


def test_values_that_are_not_finite_are_left_out_counted_and_said(analyzed, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(analyzed.memory, broken)
    model, _ = load_model(broken)
    token = int(load_model(broken)[1](" rat", add_special_tokens=False).input_ids[-1])
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    model.save_pretrained(broken)
    call = ["analyze", str(broken), "--data", str(analyzed.text), "--out", str(tmp_path / "out")]
    assert main([*call, "--sequence-length", "64", "--parts", "gates,lens,rows,suppression"]) == 0
    assert "NaN" in capsys.readouterr().out
    source = (tmp_path / "out" / "analysis.json").read_text()
    result = json.loads(source, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    ((_, gates, _),) = entries(result, "gates")
    assert gates["models"]["broken"]["num_not_finite"] > 0
    assert any("gates of broken" in remark for remark in remarks(result))
    assert any("suppression of broken" in remark for remark in remarks(result))


def test_text_without_tokens_is_refused_and_nothing_is_left(analyzed, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    call = ["analyze", str(analyzed.memory), "--data", str(tmp_path / "empty.txt"), "--out", str(tmp_path / "out")]
    assert main(call) == 1
    assert "text" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_earlier_analysis_is_kept_and_a_foreign_folder_left_alone(analyzed, tmp_path, capsys):
    out = tmp_path / "out"
    call = ["analyze", str(analyzed.twin), "--data", str(analyzed.text), "--out", str(out), "--parts", "lens"]
    assert main(call) == 0
    (out / "mark").write_text("first")
    assert main(call) == 0
    assert (tmp_path / "out-1" / "mark").read_text() == "first"
    assert not (out / "mark").exists()
    (out / "analysis.json").unlink()
    assert main(call) == 1
    assert "left alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--parts", "gates,lense"], "gates, lens, cka, suppression, rows"),
        (["--parts", ","], "at least one"),
        (["--memory-mib", "0"], "--memory-mib"),
    ],
)
def test_impossible_choices_are_refused_before_anything_is_loaded(flags, said, capsys):
    assert main(["analyze", "nowhere", "--data", "nothing", *flags]) != 0
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_window_is_as_long_as_the_budget_allows_unless_it_was_chosen(memory_model):
    model, tokenizer = memory_model
    subject = find_subject(model, tokenizer, name="memory")
    documents = [Document("a", "the cat sat on the mat. " * 60)]
    options = {"parts": ("gates",), "max_tokens": 400}
    findings = analyze([subject], documents, AnalyzeOptions(**options, budget_bytes=1 << 20))
    assert 1 <= findings.texts[0]["length"] < 256
    with pytest.raises(ConfigError, match="budget"):
        analyze([subject], documents, AnalyzeOptions(**options, budget_bytes=1 << 20, length=256))


def test_budget_that_is_said_to_be_enough_is(memory_model):
    model, tokenizer = memory_model
    subject = find_subject(model, tokenizer, name="memory")
    documents = [Document("a", "the cat sat on the mat. " * 20)]
    with pytest.raises(ConfigError, match="--memory-mib") as refused:
        analyze([subject], documents, AnalyzeOptions(parts=("lens", "cka"), budget_bytes=1 << 20))
    (enough,) = re.findall(r"--memory-mib (\d+)", str(refused.value))
    found = analyze([subject], documents, AnalyzeOptions(parts=("lens", "cka"), budget_bytes=int(enough) << 20))
    assert all("result" in entry for entries in found.parts.values() for entry in entries)


def test_models_are_told_apart_by_as_much_of_their_paths_as_it_takes(tmp_path):
    first, second, third = tmp_path / "a" / "model", tmp_path / "b" / "model", tmp_path / "c"
    assert _names((first, second, third), adapter=False) == ["a/model", "b/model", "c"]
    assert _names((third, third), adapter=True) == ["c + memory", "c"]
    assert len(set(_names((first, first, second), adapter=False))) == 3
