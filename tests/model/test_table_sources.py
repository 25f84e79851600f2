"""A model reads its tables from elsewhere than its checkpoint: the same logits, and nobody else's tables."""

import copy
import json
import shutil
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tables.mooncake_store import reason_to_skip, running
from tests.tables.tiers import Files, serving

from engram_lm.cli import main
from engram_lm.errors import CheckpointError, ConfigError, DataError, MismatchError, RemoteError, RowRangeError
from engram_lm.memory.formats.table_command import checked_spec
from engram_lm.model import EngramForCausalLM
from engram_lm.model.row_recorder import record_rows
from engram_lm.tables import CachedTable, ParameterTable, RowCodec, publish_to_mooncake, table_layouts
from engram_lm.tables.files.convert import convert
from engram_lm.tables.files.packed_writer import write_packed

IDS = torch.arange(2, 42).view(2, 20)
OFFLOADED = "ignore:Attempting to save a model with offloaded modules"
load = EngramForCausalLM.from_pretrained


@pytest.fixture
def places(build, tmp_path, tokenizer):
    """A model, and a folder with ``whole`` (its checkpoint), ``bare`` (one without tables) and ``packed`` (these)."""
    model = build()
    for name in ("whole", "bare"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    keep = {name: weight for name, weight in weights.items() if "memory_tables" not in name}
    save_file(keep, tmp_path / "bare" / "model.safetensors", metadata={"format": "pt"})
    spec = model.config.spec
    convert(tmp_path / "whole", tmp_path / "packed", spec_digest=spec.digest, hash_spec=spec.to_dict())
    return model, tmp_path


def close(model):
    for table in model.tables.values():
        if not isinstance(table, ParameterTable):
            table.close()


@torch.no_grad()
def same(model, resident):
    found = torch.equal(model(IDS).logits, resident(IDS).logits)
    close(model)
    return found


@pytest.mark.parametrize("tier", [None, "auto", "host", "mmap", "file", "device"])
def test_packed_tables_on_every_tier_give_the_logits_of_the_checkpoint_s_own(places, tier):
    resident, folder = places
    cache = {} if tier == "device" else {"table_cache_bytes": 3000, "table_cache_policy": "lru"}
    for name in ("bare", "whole"):
        model = load(folder / name, table_source=folder / "packed", table_tier=tier, **cache)
        assert isinstance(model.tables["0"], ParameterTable) == (tier == "device")
        assert same(model, resident)
    half = load(folder / "bare", table_source=folder / "packed", table_tier=tier, dtype=torch.bfloat16)
    assert same(half, load(folder / "whole", dtype=torch.bfloat16))


@pytest.mark.parametrize("tier", [None, "remote", "host", "device"])
def test_a_file_server_gives_the_same_logits(places, tier):
    resident, folder = places
    with serving(folder) as server:
        model = load(folder / "bare", table_source=f"{server.address}/whole", table_tier=tier)
        if tier is None:
            assert model.tables["0"].stats()["tier"] == "remote"
            assert same(copy.deepcopy(model), resident)
        assert same(model, resident)


def test_a_store_gives_the_same_logits_and_is_asked_whose_tables_it_has(places):
    if reason := reason_to_skip():
        pytest.skip(reason)
    resident, folder = places
    with running() as store:
        for name, layout in table_layouts(folder / "packed").items():
            publish_to_mooncake(layout, store.address, name=f"mine-{name}")
        for tier in (None, "remote", "device"):
            model = load(folder / "bare", table_source=f"{store.address}/mine-{{table}}", table_tier=tier)
            assert same(model, resident)
        other = another_hash(folder)
        with pytest.raises(MismatchError, match=f"{resident.config.spec.digest}.*{other}"):
            load(folder / "other", table_source=f"{store.address}/mine-{{table}}")
        with pytest.raises(MismatchError, match=r"mine-2: found \[\d+, 6\], expected"):
            load(folder / "bare", table_source={0: f"{store.address}/mine-2", 2: folder / "packed"})
        with pytest.raises(RemoteError, match="no table of the name 'his-0'"):
            load(folder / "bare", table_source=f"{store.address}/his-{{table}}")
        model = load(folder / "bare", table_source=f"{store.address}/mine-{{table}}")
        for process in store.processes.values():
            process.kill()
        with pytest.raises(RemoteError, match="engram/mine-0"):
            model(IDS)
        close(model)


def another_hash(folder):
    """Make ``other``: a checkpoint of the same geometry whose multipliers are others. Returns its digest."""
    shutil.copytree(folder / "bare", folder / "other")
    config = json.loads((folder / "other" / "config.json").read_text())
    rows = config["hash_spec"]["multipliers"]
    rows[0][0] = str(int(rows[0][0]) + 2)
    (folder / "other" / "config.json").write_text(json.dumps(config))
    return EngramForCausalLM.config_class.from_pretrained(folder / "other").spec.digest


def test_tables_of_another_hash_are_refused_with_both_digests(places):
    resident, folder = places
    other = another_hash(folder)
    own = resident.config.spec.digest
    assert own != other
    with serving(folder) as server:
        # A packed file's header, and the configuration beside a checkpoint's tables, say whose they are.
        for source in (folder / "packed", folder / "whole", folder / "whole" / "model.safetensors", server.address):
            source = f"{source}/whole" if source == server.address else source
            with pytest.raises(MismatchError, match=f"made for HashSpec {own}.*HashSpec {other}"):
                load(folder / "other", table_source=source)


def test_one_source_may_be_named_for_each_table(places):
    resident, folder = places
    first, second = (folder / "packed" / f"layer-{block}.safetensors" for block in (0, 2))
    for source in (
        {"0": first, 2: second},
        {0: table_layouts(first)[0], 2: folder / "packed"},
        {2: second},
        f"{folder}/packed/layer-{{table}}.safetensors",
    ):
        assert same(load(folder / "whole", table_source=source, table_tier="file"), resident)
    model = load(folder / "whole", table_source={2: second}, table_tier="device")
    assert same(model, resident) and len(list(model.model.memory_tables)) == 2
    lone = folder / "shared"
    lone.mkdir()
    second.rename(lone / "any name.safetensors")
    assert same(load(folder / "whole", table_source={2: lone}), resident)


def test_a_model_whose_blocks_share_a_table_reads_it_from_one_file(build, tmp_path):
    resident = build(memory={"tables": "shared"})
    resident.save_pretrained(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "packed")
    (path,) = (tmp_path / "packed").iterdir()
    with record_rows(resident) as trace:
        resident(IDS)
    trace.save(tmp_path / "rows.npz")
    pinned = {"table_pinned": tmp_path / "rows.npz", "table_cache_bytes": 20_000, "table_read_ahead": False}
    model = load(tmp_path / "m", table_source=path, **pinned)
    assert same(model, resident)
    assert model.tables["shared"].stats()["hit_rate"] == 1, "reads of both blocks are pinned"


def test_rounded_tables_are_read_as_the_numbers_they_hold(places):
    resident, folder = places
    layouts = table_layouts(folder / "whole")
    for block, layout in layouts.items():
        codec = RowCodec.named("int8", layout.codec.width)
        write_packed(
            folder / "int8" / f"layer-{block}.safetensors",
            lambda start, stop, layout=layout, codec=codec: codec.reencode(
                layout.load_records(start, stop), layout.codec
            ),
            codec,
            layout.num_rows,
        )
    for tier in ("mmap", "device"):
        model = load(folder / "bare", table_source=folder / "int8", table_tier=tier)
        expected = load(folder / "whole")
        with torch.no_grad():
            for name, table in expected.tables.items():
                rows = torch.arange(table.num_rows)
                table.weight.copy_(model.tables[name].gather(rows))
                assert not torch.equal(table.weight, resident.tables[name].weight)
        assert same(model, expected)


@pytest.mark.filterwarnings(OFFLOADED)
def test_a_saved_model_leaves_its_tables_where_they_are_and_never_writes_over_them(places):
    resident, folder = places
    model = load(folder / "whole", table_source=folder / "packed", table_tier="mmap")
    model.save_pretrained(folder / "saved")
    close(model)
    assert (folder / "saved" / "model.safetensors").stat().st_size < (
        folder / "whole" / "model.safetensors"
    ).stat().st_size
    assert same(load(folder / "saved", table_source=folder / "packed"), resident)
    with pytest.raises(CheckpointError, match=r"lacks 2 tensors.*memory_tables\.0.*table_source="):
        load(folder / "saved")
    with pytest.raises(CheckpointError, match="table_source="):
        load(folder / "saved", table_tier="mmap")
    model = load(folder / "bare", table_source=folder / "whole", table_tier="mmap")
    with pytest.raises(ConfigError, match="another folder"):
        model.save_pretrained(folder / "whole")
    assert same(model, resident)
    model = load(folder / "bare", table_source=folder / "packed", table_tier="device")
    model.save_pretrained(folder / "filled")
    assert same(load(folder / "filled"), resident), "what became parameters is saved with the model"
    model = load(folder / "bare", table_source=folder / "whole", table_tier="device")
    model.save_pretrained(folder / "whole")  # nothing is read from there any more
    assert same(load(folder / "whole"), resident)


def test_the_policy_and_the_rows_of_a_trace_reach_the_cache(places):
    resident, folder = places
    with record_rows(resident) as trace:
        resident(IDS)
    trace.save(folder / "rows.npz")
    options = {"table_tier": "mmap", "table_cache_bytes": 6000, "table_read_ahead": False}
    model = load(folder / "whole", **options, table_cache_policy="lru", table_pinned=folder / "rows.npz")
    for block in (0, 2):
        table = model.tables[str(block)]
        assert isinstance(table, CachedTable)
        assert (table.policy, table.stats()["pinned_rows"]) == ("lru", len(np.unique(trace.rows[block])))
    assert same(model, resident)
    assert model.tables["2"].stats()["hit_rate"] == 1
    np.savez(folder / "far.npz", rows_0=np.array([10**9]), rows_2=np.array([0]))
    np.savez(folder / "one.npz", rows_0=np.array([1]))
    for path, error, message in (
        ("far.npz", RowRangeError, "row 1000000000 is outside"),
        ("one.npz", DataError, "no rows of block 2"),
        ("none.npz", DataError, r"no readable \.npz"),
    ):
        with pytest.raises(error, match=message):
            load(folder / "whole", **options, table_pinned=folder / path)


def test_tables_that_were_opened_are_closed_when_a_later_one_cannot_be(places):
    _, folder = places
    np.savez(folder / "one.npz", rows_0=np.array([1]))
    options = {"table_cache_bytes": 6000, "table_pinned": folder / "one.npz"}
    before = set(threading.enumerate())
    with serving(folder) as server:
        # The error is held, and with it everything that could be collected otherwise.
        with pytest.raises(DataError, match="block 2") as _held:
            load(folder / "bare", table_source=f"{server.address}/whole", **options)
        left = [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("engram-")]
        for thread in left:
            thread.join(5)
    assert not any(thread.is_alive() for thread in left)


def test_sources_that_cannot_be_are_refused_with_what_could_be(places, build):
    _, folder = places
    first = folder / "packed" / "layer-0.safetensors"
    for source, error, message in (
        ({7: first}, ConfigError, "names the tables 7; the model has 0, 2"),
        ({}, ConfigError, "of none; the model has 0, 2"),
        ({0: first, "0": first}, ConfigError, "each once at most"),
        ({0: 3}, ConfigError, "path, an address or a RowLayout, not 3"),
        (table_layouts(first)[0], ConfigError, "a layout is one table"),
        (first, ConfigError, "no table of layer '2'; there are those of 0"),
        ("mooncake://127.0.0.1:9/x", ConfigError, r"one table, the model has 0, 2; write \{table\}"),
        (folder / "none", CheckpointError, "does not exist"),
        (
            {0: folder / "packed" / "layer-2.safetensors"},
            MismatchError,
            r"layer-2.safetensors: found \[\d+, 6\], expected",
        ),
        ("http://127.0.0.1:9/x", RemoteError, "check the address and that its server is running"),
        ("mooncake://127.0.0.1:9/{table}", RemoteError, "nobody answers"),
    ):
        with pytest.raises(error, match=message):
            load(folder / "whole", table_source=source)
    for options, message in (
        ({"table_tier": "remote"}, "name it with table_source"),
        ({"table_tier": "remote", "table_source": folder / "packed"}, "reads addresses"),
        ({"table_pinned": "x.npz"}, "table_cache_bytes"),
        ({"table_cache_policy": "lru"}, "table_cache_bytes"),
        ({"table_tier": "mmap", "table_cache_bytes": 5000, "table_cache_policy": "fifo"}, "clock, lru, not 'fifo'"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(folder / "whole", **options)
    build(memory=False).save_pretrained(folder / "plain")
    with pytest.raises(ConfigError, match="models with memory"):
        load(folder / "plain", table_source=folder / "packed")


def test_the_commands_read_from_a_source_and_a_trace(places, capsys):
    resident, folder = places
    (folder / "text.txt").write_text("the cat sat on the mat " * 20)
    with record_rows(resident) as trace:
        resident(IDS)
    trace.save(folder / "rows.npz")
    generate = ["generate", "--prompt", "the cat", "--max-new-tokens", "5", "--json"]
    evaluate = ["eval", "--data", str(folder / "text.txt"), "--sequence-length", "32", "--json"]
    cache = ["--table-cache-mib", "1", "--table-cache-policy", "lru", "--table-pinned", str(folder / "rows.npz")]
    for call in (generate, evaluate):
        printed = []
        for more in (
            [str(folder / "whole")],
            [str(folder / "bare"), "--table-source", str(folder / "packed")],
            [str(folder / "bare"), "--table-source", f"{folder}/packed/layer-{{table}}.safetensors", *cache],
        ):
            assert main([*call, *more]) == 0
            values = json.loads(capsys.readouterr().out)
            printed.append({name: value for name, value in values.items() if name != "model" and "second" not in name})
        assert printed[0] == printed[1] == printed[2]
        for wrong in (cache[2:], ["--table-tier", "remote"]):
            assert main([*call, str(folder / "whole"), *wrong]) == 2
        for source in (str(folder / "none"), "http://127.0.0.1:9/x", "mooncake://127.0.0.1:9/{table}"):
            assert main([*call, str(folder / "whole"), "--table-source", source]) == 1
            assert "Traceback" not in capsys.readouterr().err


class Dying(Files):
    """A server that ends every connection after so many requests, as one that was killed does."""

    def send_file(self, path):
        if len(self.server.requests) <= self.server.most_requests:
            return super().send_file(path)
        self.close_connection = True
        return None


def test_a_server_that_dies_in_the_middle_ends_a_command_in_words(places, capsys):
    _, folder = places
    call = ["generate", str(folder / "bare"), "--prompt", "the cat", "--max-new-tokens", "5"]
    with serving(folder, Dying) as server:
        call += ["--table-source", f"{server.address}/whole"]
        server.most_requests = 10**6
        assert main(call) == 0
        server.most_requests = len(server.requests) - 3
        server.requests.clear()
        assert main(call) == 1
    error = capsys.readouterr().err
    assert "check the address and that its server is running" in error and "Traceback" not in error


@pytest.mark.parametrize("more", [[], ["--table-tier", "mmap"]])
def test_a_checkpoint_whose_rows_are_not_its_primes_is_refused_by_the_name_of_the_table(places, more, capsys):
    _, folder = places
    weights, name = load_file(folder / "whole" / "model.safetensors"), "model.memory_tables.0.weight"
    weights[name] = weights[name][:-8].clone()
    save_file(weights, folder / "whole" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layer 0 has \d+ rows, the hash in config.json addresses \d+"):
        checked_spec(folder / "whole", table_layouts(folder / "whole"))
    assert main(["generate", str(folder / "whole"), "--prompt", "a", *more]) == 1
    error = capsys.readouterr().err
    assert "memory_tables.0.weight" in error and "HashSpec" in error and "Traceback" not in error
