"""The parts of ``engram-lm bench serve`` that need no vLLM: requests, models and their twins, prices, medians."""

import contextlib
import importlib.util
import json
import os
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from engram_lm.cli import main
from engram_lm.errors import ConfigError, DataError
from engram_lm.model import EngramForCausalLM
from engram_lm.serving.bench.bench_model import (
    copy_tables,
    copy_without_memory,
    disk_bytes,
    make_model,
    read_config,
    stored_tables,
)
from engram_lm.serving.bench.serve_arms import ARMS
from engram_lm.serving.bench.serve_price import Work, price
from engram_lm.serving.bench.serve_process import file_server
from engram_lm.serving.bench.serve_results import summarize
from engram_lm.serving.bench.text_requests import cut_requests, draw_lengths
from engram_lm.tables import open_table

TEXT = ["def read(file):\n    return file.read()\n", "class Row:\n    width = 8\n"] * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "model"
    make_model("nano", folder, TEXT, table_bytes=300_000, dtype=torch.float32)
    return folder


def test_requests_are_pieces_of_the_text_and_do_not_overlap():
    tokens = np.arange(5000, dtype=np.int32)
    lengths = draw_lengths(20, 100, 200, seed=3)
    requests = cut_requests(tokens, lengths, seed=3)
    assert [len(request) for request in requests] == lengths.tolist()
    assert lengths.min() >= 100 and lengths.max() <= 200 and len(set(lengths.tolist())) > 10
    for request in requests:
        assert np.array_equal(request, np.arange(request[0], request[0] + len(request)))
    everything = np.concatenate(requests)
    assert len(np.unique(everything)) == len(everything)
    assert requests[0][0] != 0 and not np.array_equal(np.sort(everything), everything)  # somewhere, in a random order
    assert cut_requests(np.arange(30), np.array([10, 20]), seed=0)  # exactly enough


def test_too_short_a_text_is_refused():
    with pytest.raises(DataError, match="the text has 99 tokens, the requests take 100"):
        cut_requests(np.arange(99), np.array([60, 40]), seed=0)


def test_a_made_model_loads_and_its_table_has_the_size_asked_for(model):
    tables = stored_tables(model)
    assert sum(table.num_bytes for table in tables) == pytest.approx(300_000, rel=0.05)
    loaded = EngramForCausalLM.from_pretrained(model, table_tier="mmap")
    (table,) = loaded.tables.values()
    assert 0.9 < float(table.gather(torch.arange(200)).std()) < 1.1
    assert loaded(torch.arange(5, 15)[None]).logits.isfinite().all()


def test_the_twin_without_memory_has_the_same_backbone(model, tmp_path):
    copy_without_memory(model, tmp_path / "none")
    ours, twin = (EngramForCausalLM.from_pretrained(folder) for folder in (model, tmp_path / "none"))
    assert twin.config.memory is None
    weights = dict(ours.named_parameters())
    for name, weight in twin.named_parameters():
        assert torch.equal(weight, weights[name]), name
    without = {name for name in weights if "memory" not in name}
    assert without == {name for name, _ in twin.named_parameters()}


def test_a_cold_copy_has_files_of_its_own_for_tables_alone(model, tmp_path):
    copy_tables(model, tmp_path / "cold")
    (ours,), (copied,) = stored_tables(model), stored_tables(tmp_path / "cold")
    assert not Path(copied.file).is_symlink() and Path(copied.file).read_bytes() == Path(ours.file).read_bytes()
    assert (tmp_path / "cold" / "weights.safetensors").is_symlink()


def test_a_table_of_holes_takes_no_room_and_stays_so_when_it_is_copied(tmp_path):
    make_model("nano", tmp_path / "model", TEXT, table_bytes=3 << 30, holes=True)
    copy_tables(tmp_path / "model", tmp_path / "cold")
    for folder in (tmp_path / "model", tmp_path / "cold"):
        (table,) = stored_tables(folder)
        assert table.num_bytes > 3 << 29 and disk_bytes(Path(table.file)) < 1 << 20
        with contextlib.closing(open_table(folder, tier="mmap")) as rows:
            assert not rows.gather(torch.tensor([0, rows.num_rows - 1])).any()


def test_the_file_server_answers_what_remote_tables_ask_for(model):
    with file_server(model) as address, contextlib.closing(open_table(model, tier="mmap")) as local:
        with contextlib.closing(open_table(address, tier="remote")) as remote:
            rows = torch.tensor([3, 0, remote.num_rows - 1, 3])
            assert torch.equal(remote.gather(rows), local.gather(rows))
        for path in ("/no", "/../serving/bench"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(address + path)


def _work(**changes):
    usual = {
        "model": "tiny", "dtype": None, "table_bytes": 10**10, "holes": False, "prompt_tokens": 5000, "requests": 10,
        "longest": 1088, "new_tokens": 64, "sequences": 16, "passes": 3, "remote_requests": 16,
    }  # fmt: skip
    return Work(**{**usual, **changes})


def test_a_price_counts_the_tables_once_more_where_they_are_cold():
    warm, cold = (price(_work(), ["none", name]) for name in ("mmap", "mmap_cold"))
    assert warm.table_bytes == pytest.approx(10**10, rel=0.01)
    assert cold.disk_bytes - warm.disk_bytes == warm.table_bytes
    holes = price(_work(holes=True), ["none", "mmap_cold"])
    assert holes.disk_bytes == warm.disk_bytes - warm.table_bytes
    assert price(_work(), ["host"]).memory_bytes - price(_work(), ["mmap"]).memory_bytes == warm.table_bytes


def test_arms_that_memory_has_no_room_for_are_left_out_or_refused():
    huge = _work(table_bytes=10**14)
    chosen = price(huge, None)
    assert set(ARMS) - set(chosen.arms) == {"device", "host"} == set(chosen.left_out)
    with pytest.raises(ConfigError, match=r"the arms none, host take about .* of memory together"):
        price(huge, ["none", "host"]).check()


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    asked = ["bench", "serve", "nano", "--arms", "none,mmap", "--folder", str(tmp_path / "new"), "--dry-run"]
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["arms"] == ["none", "mmap"]
    assert main(asked) == 0
    assert "about" in capsys.readouterr().out and not (tmp_path / "new").exists()


def test_medians_and_ratios_are_those_of_the_rounds():
    def taken(seconds, **more):
        return {"seconds": seconds, "cpu_seconds": seconds / 2, "prompt_tokens": 90, "new_tokens": 10, **more}

    base = [taken(1.0), taken(2.0), taken(4.0)]
    files = {"resident_shares_after": [0.5]}
    cold = [
        taken(2.0, resident_shares_before=[0.0], gathered_rows=800, gathered_bytes=1600, read_tokens=100, **files),
        taken(2.0, resident_shares_before=[0.2], gathered_rows=800, gathered_bytes=1600, read_tokens=100, **files),
        taken(5.0, resident_shares_before=[0.0], gathered_rows=800, gathered_bytes=1600, read_tokens=100, **files),
    ]
    found = summarize("mmap_cold", cold, base)
    assert found["tokens_per_second"] == 50 and found["tokens_per_cpu_second"] == 100
    assert found["tokens_per_second_ratio"] == 0.8  # of 0.5, 1 and 0.8
    assert found["tokens_per_second_ratio_range"] == [0.5, 1.0]
    assert found["rows_per_token"] == 8 and found["row_bytes_per_token"] == 16
    assert found["cold_passes"] == 2 and found["resident_share_before"] == 0
    assert "tokens_per_second_ratio" not in summarize("none", base, base)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["bench-dens"], "did you mean 'bench-dense'"),
        (["tiny", "--arms", "none,mapped"], "there is no arm 'mapped'; did you mean"),
        (["tiny", "--shortest", "9", "--longest", "8"], "--shortest 9 is longer than --longest 8"),
        (["tiny", "--table-gigabytes", "0"], "above 0"),
        (["tiny", "--passes", "0"], "--passes"),
    ],
)
def test_impossible_flags_are_refused_in_words(flags, said, capsys):
    assert main(["bench", "serve", *flags, "--dry-run"]) in (1, 2)  # 2 where flags alone say so
    assert said in capsys.readouterr().err


def test_a_checkpoint_without_memory_is_refused(model, tmp_path, capsys):
    copy_without_memory(model, tmp_path / "none")
    assert main(["bench", "serve", str(tmp_path / "none"), "--dry-run"]) == 1
    assert "not an engram-lm model with memory" in capsys.readouterr().err
    assert read_config(model).memory is not None


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["bench", "serve", "nano", "--folder", str(tmp_path), "--arms", "hf_none", "--requests", "1"]) == 1
    assert "is not empty" in capsys.readouterr().err and os.listdir(tmp_path) == ["mine.txt"]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_where_vllm_is_missing_the_command_says_what_to_install(capsys):
    assert main(["bench", "serve", "nano", "--arms", "none", "--requests", "1"]) == 1
    assert 'pip install "engram-lm[vllm]"' in capsys.readouterr().err


def test_batches_of_transformers_are_measured_without_vllm(model, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("".join(TEXT))
    asked = [
        "bench",
        "serve",
        str(model),
        "--arms",
        "hf,hf_none",
        "--requests",
        "3",
        "--shortest",
        "5",
        "--longest",
        "9",
    ]
    assert main([*asked, "--new-tokens", "2", "--passes", "1", "--data", str(tmp_path / "text.txt"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    hf, none = found["arms"]
    assert hf["rows_per_token"] >= 8 and "rows_per_token" not in none
    assert hf["tokens"] == none["tokens"] == found["workload"]["prompt_tokens"] + 6
    assert found["dtype"] == "float32" and found["workload"]["rows_per_token"] == 8
