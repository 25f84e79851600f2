"""``engram-lm table simulate``: the numbers of its JSON are those of the rows it was given, or hashed."""

import io
import json
import xml.etree.ElementTree as ElementTree
import zipfile

import numpy as np
import pytest
import torch
from tests.small_model import BACKBONE, MEMORY, TEXT

from engram_lm.cli import main
from engram_lm.errors import ConfigError, DataError
from engram_lm.hashing import HashSpec, TokenMap
from engram_lm.memory import EngramConfig
from engram_lm.model import EngramForCausalLM, EngramLMConfig
from engram_lm.model.row_recorder import record_rows
from engram_lm.serving.bench.simulate import Simulate
from engram_lm.tables.around.reuse import HitCurve, lru_distances
from engram_lm.training.data.tokenizer import train_tokenizer


def simulated(capsys, *arguments):
    assert main(["table", "simulate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    """A tokenizer, a config with two memory layers and some text."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([TEXT], 300)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    options = {"layers": MEMORY["layers"], "heads": 2, "rows_per_head": 97, "orders": (2, 3)}
    spec = HashSpec.build(TokenMap.from_tokenizer(tokenizer), pad_token_id=1, **options)
    (folder / "config.json").write_text(json.dumps({"hash_spec": spec.to_dict()}))
    (folder / "text.txt").write_text(TEXT)
    return folder, spec, tokenizer


def recorded(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_a_recorded_trace_of_known_reuse_gives_known_numbers(capsys, tmp_path):
    # Rows 0, 15 and 16 of 264 bytes: page 0; pages 0 and 1, crossing; page 1.
    rows = np.array([0, 15, 0, 16, 0, 15, 0, 99], np.int64)
    path = recorded(tmp_path / "trace.npz", rows_3=rows, steps_3=np.array([0, 3, 4]))
    options = ("--batch-tokens", "1,2", "--rows-per-token", 2, "--hit-rates", "0.25,0.5,0.9", "--scale-bytes", 8)
    found = simulated(capsys, "--trace", path, *options)
    (trace,) = found["traces"]
    assert (found["record_bytes"], found["cut"], trace["block"], trace["order"]) == (264, False, 3, None)
    assert (trace["num_reads"], trace["distinct_rows"], trace["read_once_rows"]) == (8, 4, 2)
    assert trace["distinct_rows_bytes"] == 4 * 264
    assert trace["coverage"] == [{"rows": 1, "share": 0.5}, {"rows": 4, "share": 1.0}]
    one, two, step = trace["batches"]
    # Batches of two tokens: {0, 15, 16} and {0, 15, 99}; 99 lies on page 6. Numbers alone: page 0 (0, 15), 1 (16), 6.
    assert two["distinct_rows_per_batch"] == 3 and two["distinct_share"] == 6 / 8
    assert two["pages_per_batch"] == {"side_by_side": (2 + 3) / 2, "scales_apart": 2 + 1}
    assert two["page_amplification"]["side_by_side"] == 5 * 4096 / (6 * 264)
    assert one["distinct_share"] == 1
    assert (step["batch_tokens"], step["num_batches"]) == (None, 3)
    assert step["distinct_rows_per_batch"] == (2 + 1 + 3) / 3
    # Measured: 0, 15, 0, 99 behind 0, 15, 0, 16. LRU: 1 row (16) between; 2 (0, 16); 1; never.
    lru, lfu, pinned, ideal = (trace["policies"][name] for name in ("lru", "lfu", "pinned", "ideal"))
    assert trace["measured_reads"] == 4
    for policy, hits in ((lru, [0, 0, 0.5, 0.75]), (lfu, [0, 0.5, 0.5, 0.75]), (pinned, [0, 0.5, 0.75]), (
        ideal, [0, 0.5, 0.75, 1])):  # fmt: skip
        assert [point["hit_rate"] for point in policy["curve"]] == hits
        assert [point["cache_bytes"] for point in policy["curve"]] == [264 * size for size in range(len(hits))]
    assert [wanted["cache_bytes"] for wanted in lru["wanted"]] == [2 * 264, 2 * 264, None]
    assert [wanted["cache_rows"] for wanted in ideal["wanted"]] == [1, 1, 3]


def test_a_trace_that_a_model_recorded_is_read_as_it_was_saved(capsys, tmp_path, text_model):
    _, _, tokenizer = text_model
    memory = EngramConfig(**MEMORY)
    model = EngramForCausalLM(EngramLMConfig.for_tokenizer(tokenizer, memory, **BACKBONE)).eval()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[:, :120]
    with record_rows(model) as trace, torch.no_grad():
        model(ids[:, :50])
        model(ids)
    trace.save(tmp_path / "rows.npz")
    rows_per_token = memory.num_heads_total
    found = simulated(capsys, "--trace", tmp_path / "rows.npz", "--rows-per-token", rows_per_token)
    assert [one["block"] for one in found["traces"]] == [0, 2]
    for one, layer in zip(found["traces"], model.hash_spec.layers, strict=True):
        rows = model.hash_spec.rows(ids, layer)
        assert one["num_reads"] == 170 * rows_per_token
        assert one["distinct_rows"] == len(rows.unique())


def test_text_is_hashed_in_sequences_and_divided_by_order(capsys, text_model):
    folder, spec, tokenizer = text_model
    options = ("--config", folder, "--tokenizer", folder, "--data", folder / "text.txt", "--layers", "2")
    found = simulated(capsys, *options, "--sequence-length", 50, "--record-bytes", 24)
    tokens = np.array(tokenizer.backend_tokenizer.encode(TEXT, add_special_tokens=False).ids)
    rows = np.concatenate([spec.rows(tokens[at : at + 50], 2) for at in range(0, len(tokens), 50)])
    assert (found["num_tokens"], found["digest"]) == (len(tokens), spec.digest)
    assert [(trace["block"], trace["order"]) for trace in found["traces"]] == [(2, None), (2, 2), (2, 3)]
    for trace, part in zip(found["traces"], (rows, rows[:, :2], rows[:, 2:])):
        part = part.reshape(-1)
        assert (trace["num_reads"], trace["distinct_rows"]) == (len(part), len(np.unique(part)))
        curve = HitCurve.from_sizes(lru_distances(part)[len(part) // 2 :])
        points = trace["policies"]["lru"]["curve"]
        assert all(curve.hit_rate(point["cache_rows"]) == point["hit_rate"] for point in points)
        assert trace["batches"][1]["reads_per_batch"] <= 16 * part.size / len(tokens)
    assert found["traces"][1]["batches"][0]["page_amplification"] == {}


def test_a_model_of_ours_says_its_hash_and_the_size_of_its_rows(capsys, tmp_path, text_model):
    folder, _, tokenizer = text_model
    config = EngramLMConfig.for_tokenizer(tokenizer, EngramConfig(**MEMORY), **BACKBONE)
    config.save_pretrained(tmp_path)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = simulated(capsys, "--model", tmp_path, "--data", folder / "text.txt")
    assert found["record_bytes"] == 2 * EngramConfig(**MEMORY).head_dim
    assert found["digest"] == config.spec.digest
    assert [trace["block"] for trace in found["traces"]] == [0] * 3


def test_a_trace_is_cut_where_memory_is_bounded(capsys, tmp_path, text_model):
    rows = np.arange(100) % 7
    path = recorded(tmp_path / "trace.npz", rows_0=rows, rows_5=rows, steps_5=np.array([0, 10, 50]))
    found = simulated(capsys, "--trace", path, "--max-reads", 20)
    assert found["cut"] and [trace["num_reads"] for trace in found["traces"]] == [20, 20]
    assert found["traces"][1]["batches"][-1]["num_batches"] == 2
    folder = text_model[0]
    options = ("--config", folder, "--tokenizer", folder, "--data", folder / "text.txt", "--max-reads", 40)
    found = simulated(capsys, *options)
    assert found["cut"] and found["num_tokens"] == 10 and found["traces"][0]["num_reads"] == 40


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_plot_has_a_panel_for_each_order_and_a_curve_for_each_policy(capsys, tmp_path, text_model, suffix):
    folder, _, _ = text_model
    path = tmp_path / f"hits.{suffix}"
    simulated(capsys, "--config", folder, "--tokenizer", folder, "--data", folder / "text.txt", "--plot", path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    if suffix == "png":
        assert path.read_bytes().startswith(b"\x89PNG")
        return
    ids = {element.get("id") or "" for element in ElementTree.parse(path).iter()}
    assert {"axes_1", "axes_2", "axes_3", "legend_1"} <= ids and "axes_4" not in ids


def test_for_people_it_prints_tables(capsys, tmp_path):
    path = recorded(tmp_path / "trace.npz", rows_0=np.arange(1000) % 300)
    assert Simulate(trace=path, hit_rates="0.5,1").run() == 0
    printed = capsys.readouterr().out
    for words in ("block 0, all orders", "RAM for 50% hits", "77.3 KiB", "1,000 reads of 300 rows", "side by side"):
        assert words in printed, printed


def test_files_that_are_no_traces_are_refused_in_words(tmp_path):
    path = tmp_path / "trace.npz"
    rows = np.arange(8)
    for arrays, message in (
        ({"rows": rows}, "records no rows"),
        ({"rows_0": rows.astype(np.float64)}, r"float64 \[8\]; expected int64"),
        ({"rows_0": rows[None]}, r"int64 \[1, 8\]; expected int64 \[n\]"),
        ({"rows_0": np.array([{}] * 8)}, "object"),
        ({"rows_0": -rows}, "row numbers are from 0"),
        ({"rows_0": rows, "steps_0": np.array([1, 2])}, "growing from 0"),
        ({"rows_0": rows, "steps_0": np.array([0, 8])}, "below the 8 reads"),
        ({"rows_0": rows[:1]}, "nothing to divide"),
    ):
        with pytest.raises(DataError, match=message):
            Simulate(trace=recorded(path, **arrays)).run()
    with pytest.raises(DataError, match=r"no rows of block 4; it records blocks \[0\]"):
        Simulate(trace=recorded(path, rows_0=rows), layers="4").run()
    path.write_bytes(b"PK nothing")
    with pytest.raises(DataError, match=r"no readable \.npz"):
        Simulate(trace=path).run()
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": (1 << 60,)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("rows_0.npy", header.getvalue() + b"\0" * 80)
    with pytest.raises(DataError, match="promises 1152921504606846976 numbers and has fewer"):
        Simulate(trace=path).run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one source"),
        ({"trace": "a", "data": ("b",)}, "has its rows already"),
        ({"config": "a", "data": ("b",)}, "needs the --tokenizer"),
        ({"model": "a"}, "need the text"),
        ({"trace": "a", "batch_tokens": "1,x"}, "--batch-tokens takes numbers"),
        ({"trace": "a", "hit_rates": "1.5"}, "from 0 to 1"),
        ({"trace": "a", "train_share": 1.0}, "between 0 and 1"),
        ({"trace": "a", "max_reads": 0}, "--max-reads is a whole number from 1, got 0"),
        ({"trace": "a", "scale_bytes": 264}, "part of the record"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Simulate(**options)
