"""A model gives the same logits, to the bit, from whatever tier its tables are read."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.small_model import BACKBONE, VARIANTS
from tests.tables.test_read_ahead import GatedTable
from tests.training.test_loop import TOKENIZER
from tests.training.test_loop import model as small_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

from engram_lm.cli import main
from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.model import EngramForCausalLM, EngramLMConfig
from engram_lm.model.row_recorder import record_rows
from engram_lm.serving.load import ModelFlags, load_model
from engram_lm.tables import (
    CachedTable,
    HostTable,
    MappedTable,
    ParameterTable,
    ReadAheadTable,
    StagedTable,
    most_frequent,
)
from engram_lm.tables.choose import TIERS

IDS = torch.arange(2, 42).view(2, 20)
AWAY = [tier for tier in TIERS if tier not in ("device", "remote")]
GENERATE = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 1}


@pytest.fixture(params=["plain", "all", "shared"])
def kind(request):
    """Variant of the small model; ``all`` has experts, streams and YaRN, and ``shared`` one table for two blocks."""
    if request.param == "shared":
        return {}, {"tables": "shared", "signs": "hashed"}
    return VARIANTS[request.param]


def saved(build, folder, kind=({}, {})):
    model = build(backbone=kind[0], memory=kind[1])
    model.save_pretrained(folder)
    return model


def close(model):
    for table in model.tables.values():
        if not isinstance(table, ParameterTable):
            table.close()


def test_rows_in_the_memory_of_the_process_are_not_read_ahead(build, tmp_path):
    saved(build, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, table_tier="host")
    assert [type(table) for table in model.tables.values()] == [HostTable] * len(model.tables)
    close(model)


@torch.no_grad()
@pytest.mark.parametrize(
    ("tier", "cache_bytes", "ahead"),
    [(tier, 3000, True) for tier in AWAY]
    + [("file", 0, True), ("file", 3000, False), ("file", 0, False), ("mmap", 0, True), ("mmap", 0, False)],
)
def test_logits_and_texts_are_those_of_resident_tables(build, tmp_path, tier, cache_bytes, ahead):
    resident = saved(build, tmp_path)
    options = {"table_tier": tier, "table_cache_bytes": cache_bytes, "table_read_ahead": ahead}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    for table in model.tables.values():
        assert isinstance(table, ReadAheadTable) == ahead
        assert isinstance(table.table if ahead else table, CachedTable) == bool(cache_bytes)
    assert torch.equal(model(IDS).logits, resident(IDS).logits)
    for search in ({}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}):
        expected = resident.generate(IDS, **GENERATE, **search)
        assert torch.equal(model.generate(IDS, **GENERATE, **search), expected)
    for make in (lambda one: None, lambda one: StaticCache(config=one.config, max_cache_len=20)):
        caches = [make(model), make(resident)]
        for t in (slice(0, 13), *(slice(t, t + 1) for t in range(13, 20))):
            outputs = [
                one(IDS[:, t], past_key_values=cache, use_cache=True)
                for one, cache in zip((model, resident), caches, strict=True)
            ]
            caches = [output.past_key_values for output in outputs]
            assert torch.equal(*(output.logits for output in outputs))
    stats = model.tables["0"].stats()
    if cache_bytes:
        assert stats["hits"] and stats["evictions"] and stats["used_bytes"] <= cache_bytes
    if ahead:
        assert stats["used_rows"] == stats["staged_rows"] and not stats["skipped"], "every row was there when needed"
    close(model)


@torch.no_grad()
def test_every_variant_reads_the_same_from_files(build, kind, tmp_path):
    resident = saved(build, tmp_path, kind)
    model = EngramForCausalLM.from_pretrained(tmp_path, table_tier="file", table_cache_bytes=2000)
    assert torch.equal(model(IDS).logits, resident(IDS).logits)
    assert torch.equal(model.generate(IDS, **GENERATE), resident.generate(IDS, **GENERATE))
    half = EngramForCausalLM.from_pretrained(tmp_path, table_tier="file", dtype=torch.bfloat16)
    assert torch.equal(half(IDS).logits, EngramForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)(IDS).logits)
    close(model)
    close(half)


class Recorded(MappedTable):
    """A table that notes when it is asked ahead and when it is read."""

    def prefetch(self, rows):
        self.events.append(("asked", self.name))
        return super().prefetch(rows)

    def gather(self, rows, out=None):
        self.events.append(("read", self.name))
        return super().gather(rows, out)


@torch.no_grad()
def test_all_blocks_ask_for_their_rows_before_the_first_one_runs(build, tmp_path):
    saved(build, tmp_path)
    model = EngramForCausalLM.from_pretrained(tmp_path, table_tier="mmap", table_read_ahead=False)
    events = []
    model.model.embed_tokens.register_forward_pre_hook(lambda *_: events.append("embedding"))
    for block in model.config.memory_layers:
        table = Recorded(model.tables[str(block)].layout)
        table.events, table.name = events, block
        model.model.layers[block].memory.table = table
    model(IDS)
    assert events == [("asked", 0), ("asked", 2), "embedding", ("read", 0), ("read", 2)]


@torch.no_grad()
def test_a_block_computes_while_the_rows_of_a_later_one_are_being_read(build, tmp_path):
    resident = saved(build, tmp_path)
    model = EngramForCausalLM.from_pretrained(tmp_path, table_tier="mmap", table_read_ahead=False)
    gated = GatedTable(model.tables["2"].layout)
    gated.gate.clear()
    model.model.layers[2].memory.table = table = ReadAheadTable(gated)

    def release(*_):
        # Blocks 0 and 1 are through; the read of block 2 has begun long before, and has not ended.
        assert gated.begun.wait(20) and not gated.reads
        gated.gate.set()

    model.model.layers[1].register_forward_hook(release)
    assert torch.equal(model(IDS).logits, resident(IDS).logits)
    assert len(gated.in_background()) == 1 and not gated.in_gather()
    table.close()


@torch.no_grad()
def test_a_file_cut_while_the_model_uses_it_is_refused_at_the_layer_that_reads_it(build, tmp_path):
    resident = build()
    # A file of its own for the table: transformers may have mapped the others' weights.
    resident.save_pretrained(tmp_path, max_shard_size="10KB")
    model = EngramForCausalLM.from_pretrained(tmp_path, table_tier="file")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    path = tmp_path / index["model.memory_tables.2.weight"]
    assert list(index.values()).count(path.name) == 1
    whole = path.read_bytes()
    path.write_bytes(whole[:2000])
    with pytest.raises(CheckpointError, match=path.name):
        model(IDS)
    path.write_bytes(whole)
    assert torch.equal(model(IDS).logits, resident(IDS).logits)
    close(model)


def test_the_rest_trains_around_tables_that_are_read(build, tmp_path):
    resident = saved(build, tmp_path).train()
    model = EngramForCausalLM.from_pretrained(tmp_path, table_tier="mmap").train()
    for each in (model, resident):
        each(IDS, labels=IDS).loss.backward()
    expected = {name: each.grad for name, each in resident.named_parameters() if "memory_tables" not in name}
    found = {name: each.grad for name, each in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name
    close(model)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("tier", AWAY)
def test_such_a_model_is_saved_whole_copied_and_never_over_its_own_files(build, tmp_path, tier):
    resident = saved(build, tmp_path / "first")
    model = EngramForCausalLM.from_pretrained(tmp_path / "first", table_tier=tier, table_cache_bytes=4000)
    with pytest.raises(ConfigError, match="another folder"):
        model.save_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    copied = copy.deepcopy(model)
    close(model)
    assert copied.tables["0"] is copied.model.layers[0].memory.table
    with torch.no_grad():
        assert torch.equal(copied(IDS).logits, resident(IDS).logits)
    copied.save_pretrained(tmp_path / "third")
    close(copied)


def test_a_device_map_places_the_backbone_and_the_tier_the_tables(build, tmp_path):
    pytest.importorskip("accelerate")
    resident = saved(build, tmp_path)
    device_map = {"": "cpu", "model.memory_tables": "disk"}
    for given in (None, "auto", device_map):
        model = EngramForCausalLM.from_pretrained(tmp_path, device_map=given, table_tier="host")
        assert {table.stats()["tier"] for table in model.tables.values()} == {"host"}
        assert model.hf_device_map["model.memory_tables.0"] == "cpu"
        assert torch.equal(model(IDS).logits, resident(IDS).logits)
        close(model)
    assert isinstance(EngramForCausalLM.from_pretrained(tmp_path).tables["0"], ParameterTable)


def test_impossible_places_are_refused_with_what_is_possible(build, tmp_path):
    saved(build, tmp_path)
    for options, message in (
        ({"table_tier": "tape"}, "file, remote, not 'tape'"),
        ({"table_tier": "file", "table_cache_bytes": -1}, "at least 0"),
        ({"table_cache_bytes": 10_000}, "another tier"),
        ({"table_tier": "file", "table_cache_bytes": 1}, "cache has 1 bytes"),
    ):
        with pytest.raises(ConfigError, match=message):
            EngramForCausalLM.from_pretrained(tmp_path, **options)
    model = EngramForCausalLM.from_pretrained(tmp_path, table_tier="host")
    with pytest.raises(ConfigError, match="max_tokens"):
        model.stage_tables(0)
    model.stage_tables(8)
    assert model.model.layers[0].memory.table is model.tables["0"], "nothing to stage where there is no GPU"
    with pytest.raises(ConfigError, match="CUDA device"):
        StagedTable(model.tables["0"], "cpu", max_rows=8)
    close(model)


@torch.no_grad()
def test_a_recorded_trace_holds_the_rows_that_were_read_and_pins_them(build, tmp_path):
    model = saved(build, tmp_path)
    with record_rows(model) as trace:
        model(IDS[:, :8])
        model(IDS)
    model(IDS)
    expected = {block: model.hash_spec.rows(IDS, layer).reshape(-1).numpy() for block, layer in layers(model)}
    assert trace.rows.keys() == expected.keys() == {0, 2}
    for block, rows in expected.items():
        assert [piece.dtype for piece in trace.rows[block]] == [np.int64] * 2
        assert np.array_equal(trace.rows[block][1], rows) and len(trace.rows[block][0]) == 8 * len(rows) // 20
    trace.save(tmp_path / "rows.npz")
    with np.load(tmp_path / "rows.npz", allow_pickle=False) as stored:
        assert sorted(stored) == ["rows_0", "rows_2"]
        assert np.array_equal(stored["rows_2"], np.concatenate(trace.rows[2]))
    table = EngramForCausalLM.from_pretrained(tmp_path, table_tier="mmap", table_read_ahead=False).tables["2"]
    pinned = most_frequent(trace.rows[2], 5000, table.codec.record_bytes)
    cache = CachedTable(table, 5000, pinned_rows=pinned)
    cache.gather(torch.from_numpy(pinned))
    assert len(pinned) and cache.stats()["hit_rate"] == 1
    with pytest.raises(ConfigError, match=r"\.npz"):
        trace.save(tmp_path / "rows.json")


def layers(model):
    return zip(model.hash_spec.blocks, model.hash_spec.layers, strict=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    small_model().save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


def test_the_commands_read_tables_from_the_tier_they_are_told(folder, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the cat sat on the mat " * 20)
    calls = (
        ["generate", str(folder), "--prompt", "the cat", "--max-new-tokens", "5", "--json"],
        ["eval", str(folder), "--data", str(tmp_path), "--sequence-length", "32", "--json"],
    )
    for call in calls:
        printed = []
        for more in ([], ["--table-tier", "file"], ["--table-tier", "mmap", "--table-cache-mib", "1"]):
            assert main([*call, *more]) == 0
            values = json.loads(capsys.readouterr().out)
            printed.append({name: value for name, value in values.items() if "second" not in name})
        assert printed[0] == printed[1] == printed[2]
        assert main([*call, "--table-tier", "tape"]) == 2
        assert "--table-tier is one of auto, device" in capsys.readouterr().err
        assert main([*call, "--table-tier", "shared"]) == 2
        assert "use 'mmap'" in capsys.readouterr().err
        assert main([*call, "--table-cache-mib", "1"]) == 2
        assert "--table-cache-mib" in capsys.readouterr().err
    model, _ = load_model(folder, tables=ModelFlags(table_tier="file", table_cache_mib=1))
    stats = next(iter(model.tables.values())).stats()
    assert (stats["tier"], stats["capacity_bytes"]) == ("file", 1 << 20)
    close(model)


def test_a_model_of_another_kind_has_no_tables_to_place_and_one_without_memory_none(tmp_path, capsys):
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    EngramForCausalLM(EngramLMConfig.for_tokenizer(TOKENIZER, None, **BACKBONE)).save_pretrained(tmp_path / "plain")
    for name, code in (("llama", 1), ("plain", 0)):
        TOKENIZER.save_pretrained(tmp_path / name)
        call = ["generate", str(tmp_path / name), "--prompt", "a", "--max-new-tokens", "2"]
        assert main([*call, "--table-tier", "file"]) == code
        assert main([*call, "--table-source", str(tmp_path)]) == 1
        assert main([*call, "--table-tier", "device"]) == 0
    error = capsys.readouterr().err
    assert "--table-tier or --table-source" in error and "for models with memory" in error
