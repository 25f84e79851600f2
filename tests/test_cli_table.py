"""`engram-lm table`: its verbs are found and explained, results go to stdout as text or JSON; statuses are right."""

import dataclasses
import importlib
import json
import os

import pytest
import torch
from tests.raw_safetensors import write_raw
from tests.small_model import BACKBONE, MEMORY, TEXT

from engram_lm.cli import VERBS, main
from engram_lm.errors import MismatchError
from engram_lm.evaluation.rounding import put_tables
from engram_lm.memory import EngramConfig
from engram_lm.model import EngramForCausalLM, EngramLMConfig
from engram_lm.tables import table_layouts
from engram_lm.tables.codec import RowCodec
from engram_lm.tables.files.convert import build_random
from engram_lm.tables.files.packed import packed_layout
from engram_lm.training.data.tokenizer import train_tokenizer

OURS = ("build", "convert", "verify", "inspect")


@pytest.fixture
def own(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    weight = torch.randn(3000, 40, generator=torch.Generator().manual_seed(2))
    data = weight.view(torch.uint8).numpy().tobytes()
    write_raw(folder / "model.safetensors", {"model.memory_tables.1.weight": ("F32", (3000, 40), data)})
    return folder


def printed(capsys, *arguments, status=0):
    assert main(["table", *map(str, arguments)]) == status
    return capsys.readouterr().out


def test_the_verbs_of_tables_are_listed_with_a_line_each(capsys):
    lines = printed(capsys, "--help").splitlines()
    for name, (_, about) in VERBS["table"][0].items():
        assert any(line.split(maxsplit=1) == [name, about] for line in lines)
    assert main(["--help"]) == 0
    assert "  table " in capsys.readouterr().out
    assert main(["table"]) == 2
    assert "convert" in capsys.readouterr().err


def test_an_unknown_verb_is_refused_with_the_nearest(capsys):
    assert main(["table", "convrt"]) == 2
    assert "engram-lm table: there is no verb 'convrt'; did you mean 'convert'?" in capsys.readouterr().err
    assert main(["tabel"]) == 2
    assert "did you mean 'table'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", OURS)
def test_every_verb_explains_every_flag_and_gives_examples(name, capsys):
    text = printed(capsys, name, "--help")
    assert f"engram-lm table {name} " in text
    module, command = VERBS["table"][0][name][0].split(":")
    for field in dataclasses.fields(getattr(importlib.import_module(module), command)):
        assert field.name.replace("_", "-") in text.lower()


def test_a_table_is_converted_inspected_and_verified_with_results_on_stdout(own, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("engram_lm.progress._FIRST_LINE_SECONDS", 0)
    assert main(["table", "convert", str(own), str(tmp_path / "packed"), "--dtype", "int8"]) == 0
    out, err = capsys.readouterr()
    path = tmp_path / "packed" / "layer-1.safetensors"
    assert f"layer 1: {path}" in out and "saved 348,000 (72.5%)" in out
    assert "relative error  mean 5.0" in out and "(all rows)" in out and "cosine" in out
    assert "Ctrl-C keeps the rows that are written; the same command goes on from there" in err
    assert "layer 1  0.1 of 0.1 MB" in err, "progress goes to stderr"
    text = printed(capsys, "inspect", path)
    assert "3,000 of 40 numbers" in text and "int8 with scales by blocks of 32, 1.100 bytes" in text
    assert "44 bytes each" in text
    assert "checksums agree" in printed(capsys, "verify", path)
    assert "checksums and the source agree" in printed(capsys, "verify", path, "--source", own)
    values = json.loads(printed(capsys, "inspect", path, "--json"))
    assert (values["num_rows"], values["codec"]["stored_dtype"], values["record_bytes"]) == (3000, "int8", 44)
    found = json.loads(printed(capsys, "convert", own, tmp_path / "packed", "--dtype", "int8", "--json"))
    assert found["loss"] is None
    (table,) = found["tables"]
    assert table["kept"] and table["bytes_saved"] == 348_000 and table["error"]["all_rows"]


def test_verify_exits_with_1_and_names_the_rows_where_something_is_wrong(own, tmp_path, capsys):
    printed(capsys, "convert", own, tmp_path)
    path = tmp_path / "layer-1.safetensors"
    with open(path, "r+b") as file:
        file.seek(9000)
        file.write(b"wrong")
    assert "chunk 0, rows 0 to 2999, at byte 4096" in printed(capsys, "verify", path, status=1)
    assert json.loads(printed(capsys, "verify", path, "--json", status=1))["bad"]["last_row"] == 2999
    os.truncate(path, 8192)
    assert main(["table", "verify", str(path)]) == 1
    assert "is truncated" in capsys.readouterr().err


def test_a_table_is_built_of_a_checkpoint_of_random_rows_and_for_a_config(own, tmp_path, capsys):
    path = tmp_path / "t.safetensors"
    printed(capsys, "build", path, "--source", own, "--dtype", "bfloat16")
    expected = table_layouts(own)[1].load_records(0, 3000).view(torch.float32).to(torch.bfloat16)
    assert torch.equal(packed_layout(path).load_records(0, 3000).view(torch.bfloat16), expected)
    values = json.loads(printed(capsys, "build", path, "--rows", 50, "--width", 8, "--json"))
    assert (values["num_rows"], values["width"], values["codec"]["stored_dtype"]) == (50, 8, "bfloat16")
    config = tmp_path / "config.json"
    keys = {
        "ngram_size": 3, "heads_per_ngram": 2, "ngram_vocab_size_base": 100, "seed": 1234, "eos_token_id": 7,
        "make_ngram_vocab_size_divisible_by": 128, "split_ngram_parts": 4, "ple_layer_ids": [2], "vocab_size": 50,
        "ple_embed_dim": 64, "ple_conv_kernel_size": 4, "model_type": "qwen4_exp_text",
    }  # fmt: skip
    config.write_text(json.dumps(keys))
    values = json.loads(printed(capsys, "build", path, "--config", config, "--width", 16, "--json"))
    assert values["num_rows"] == 512 and len(values["spec_digest"]) == 64
    assert values["hash_spec"]["variant"] == "qwen_ple"


def test_calls_that_contradict_themselves_are_refused(own, tmp_path, capsys):
    path = str(tmp_path / "t.safetensors")
    for arguments, message in (
        (["build", path], "exactly one of"),
        (["build", path, "--rows", "5"], "--width"),
        (["build", path, "--source", str(own), "--width", "5"], "--width"),
        (["convert", str(own), path, "--model", "x"], "belong together"),
        (["convert", str(own), path, "--error-rows", "-1"], "at least 0"),
        (["verify", path, "--sample", "0"], "at least 1"),
        (["verify", path, "--layer", "1"], "--source"),
        (["inspect", path], "cannot read"),
    ):
        assert main(["table", *arguments]) == 2 - (arguments[0] == "inspect"), arguments
        assert message in capsys.readouterr().err
    assert main(["table", "convert", str(own), path, "--dtype", "int3"]) == 2


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([TEXT], 300)
    torch.manual_seed(0)
    model = EngramForCausalLM(EngramLMConfig.for_tokenizer(tokenizer, EngramConfig(**MEMORY), **BACKBONE)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "memory" in name or parameter.dim() >= 2:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_loss_of_a_model_is_told_before_and_after_its_tables_are_rounded(model_folder, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)

    def loss(dtype):
        arguments = [str(model_folder), str(tmp_path / dtype), "--dtype", dtype, "--json", "--sequence-length", "64"]
        more = ["--model", str(model_folder), "--data", str(tmp_path / "text.txt"), "--max-tokens", "500"]
        assert main(["table", "convert", *arguments, *more]) == 0
        found = json.loads(capsys.readouterr().out)
        assert [table["layer"] for table in found["tables"]] == [0, 2]
        return found["loss"]

    exact, rounded = loss("float32"), loss("int4")
    assert exact["change"] == 0 and exact["num_tokens"] == 500
    assert rounded["loss_before"] == exact["loss_before"]
    assert 0 < abs(rounded["change"]) < 1
    assert rounded["change"] == pytest.approx(rounded["loss_after"] - rounded["loss_before"])
    header = packed_layout(tmp_path / "int4" / "layer-0.safetensors")
    config = json.loads((model_folder / "config.json").read_text())
    assert header.spec_digest is not None and config["hash_spec"] is not None


def test_tables_of_another_model_are_refused(model_folder, tmp_path):
    model = EngramForCausalLM.from_pretrained(model_folder)
    build_random(tmp_path / "t.safetensors", 50, RowCodec.named("float32", 8))
    layout = packed_layout(tmp_path / "t.safetensors")
    for key, message in ((1, "the model has those of 0, 2"), (0, "50 of 8")):
        with pytest.raises(MismatchError, match=message):
            put_tables(model, {key: layout})
