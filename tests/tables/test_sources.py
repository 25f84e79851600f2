"""Tables are found by the names of their tensors, in folders and on servers, and what cannot be right is refused."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from tests.raw_safetensors import e4m3, e8m0, random_e4m3, write_raw
from tests.tables.tiers import serving

from engram_lm.errors import CheckpointError, ConfigError, RemoteError
from engram_lm.tables import FileTable, MappedTable, open_table, table_layouts
from engram_lm.tables.codec import RowCodec
from engram_lm.tables.files.convert import convert
from engram_lm.tables.files.packed_writer import write_packed
from engram_lm.tables.files.safetensors_file import INDEX_NAME

ROWS, WIDTH = 24, 40
DEEPSEEK, QWEN = "layers.{}.engram.embed.{}", "model.language_model.layers.1.ple.ple_embedding.{}"
SHARD_SCALE = QWEN.format("ngram_embedding.shard_0.weight_scale")


def deepseek(layers=(1, 14), rows=ROWS, seed=0):
    tensors = {}
    for layer in layers:
        scales = np.random.default_rng(layer + seed).integers(110, 140, rows * 2, dtype=np.uint8).tobytes()
        tensors[DEEPSEEK.format(layer, "weight")] = ("F8_E4M3", (rows, WIDTH), random_e4m3(rows * WIDTH, layer))
        tensors[DEEPSEEK.format(layer, "scale")] = ("F8_E8M0", (rows, 2), scales)
    return tensors


def dequantized(tensors, layer):
    values, scales = tensors[DEEPSEEK.format(layer, "weight")][2], tensors[DEEPSEEK.format(layer, "scale")][2]
    wide = e8m0(scales).reshape(-1, 2).repeat(32, axis=1)[:, :WIDTH]
    return torch.from_numpy(e4m3(values).reshape(-1, WIDTH) * wide).bfloat16()


def qwen(num_shards=12, rows=2, kind="BF16"):
    tensors = {
        QWEN.format(f"ngram_embedding.shard_{shard}.weight"): (
            kind, (rows, 4), bytes([shard]) * (rows * 4 * (2 if kind == "BF16" else 1)),
        )
        for shard in range(num_shards)
    }  # fmt: skip
    if kind != "BF16":
        scale = ("F32", (), np.float32(0.5).tobytes())
        tensors[QWEN.format("ngram_embedding.weight_scale")] = scale
    return tensors


def write(folder, tensors, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    write_raw(folder / name, tensors)
    return folder


def test_the_two_tables_of_deepseek_are_opened_by_layer_with_their_scales(tmp_path):
    tensors = {**deepseek(), "layers.1.engram.wkv.weight": ("BF16", (1,), b"ab")}
    folder = write(tmp_path / "m", tensors)
    assert list(table_layouts(folder)) == [1, 14]
    for layer in (1, "14"):
        with_path = open_table(folder, layer=layer, tier="file")
        assert torch.equal(with_path.gather(torch.arange(ROWS)), dequantized(tensors, int(layer)))
        one_file = open_table(folder / "model.safetensors", layer=layer, tier="mmap", dtype=torch.float32)
        assert torch.equal(one_file.gather(torch.arange(ROWS)), dequantized(tensors, int(layer)).float())
    for layer, message in ((None, "layers 1, 14; choose"), (2, "no table of layer 2; there are those of 1, 14")):
        with pytest.raises(ConfigError, match=message):
            open_table(folder, layer=layer)


def test_shards_of_qwen_follow_their_numbers_and_the_scale_of_the_table(tmp_path):
    folder = write(tmp_path / "m", qwen())
    table = open_table(folder, layer=1, tier="mmap")
    expected = torch.arange(12).repeat_interleave(2).to(torch.uint8)[:, None].repeat(1, 8)
    assert torch.equal(table.gather(torch.arange(24)).view(torch.uint8), expected)
    eight = open_table(write(tmp_path / "n", qwen(kind="F8_E4M3")), tier="file")
    values = torch.from_numpy(e4m3(bytes(range(12)))).repeat_interleave(2)[:, None].repeat(1, 4)
    assert torch.equal(eight.gather(torch.arange(24)), (values * 0.5).bfloat16())


@pytest.mark.parametrize("prefix", ["", "model.", "base.model."])
def test_tables_of_our_own_checkpoints_have_numbers_or_names(tmp_path, prefix):
    data = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    names = [f"{prefix}memory_tables.{name}.weight" for name in ("shared", "10", "2")]
    folder = write(tmp_path / "m", dict.fromkeys(names, ("F32", (5, 3), data.numpy().tobytes())))
    assert list(table_layouts(folder)) == [2, 10, "shared"]
    assert torch.equal(open_table(folder, layer="shared").gather(torch.arange(5)), data)


def test_an_index_and_a_server_lead_to_the_same_rows(tmp_path):
    tensors = deepseek()
    folder = tmp_path / "m"
    for number, names in enumerate((list(tensors)[:3], list(tensors)[3:])):
        write(folder, {name: tensors[name] for name in names}, name=f"part {number}.safetensors")
    places = {name: f"part {int(place > 2)}.safetensors" for place, name in enumerate(tensors)}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {**places, "other": "not-downloaded.safetensors"}}))
    rows = torch.randint(ROWS, (50,), generator=torch.Generator().manual_seed(1))
    with serving(tmp_path) as server:
        sources = {"folder": folder, "address": f"{server.address}/m/"}
        for source in sources.values():
            assert list(table_layouts(source)) == [1, 14]
            table = open_table(source, layer=14)
            assert torch.equal(table.gather(rows), dequantized(tensors, 14)[rows])
            table.close()
        for tier in ("host", "device"):
            table = open_table(
                sources["address"], layer=1, tier=tier, **({"device": "cpu"} if tier == "device" else {})
            )
            assert torch.equal(table.gather(rows), dequantized(tensors, 1)[rows])


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def bad_checkpoints():
    deep, shards, eight = deepseek((1,)), qwen(), qwen(kind="F8_E4M3")
    weight, scale = DEEPSEEK.format(1, "weight"), DEEPSEEK.format(1, "scale")
    whole = QWEN.format("ngram_embedding.weight")
    table_scale = QWEN.format("ngram_embedding.weight_scale")
    own = ("F32", (2, 2), bytes(16))
    yield "scale without weight", without(deep, weight), rf"lacks {weight}"
    yield "weight without scale", without(deep, scale), "has no scale that engram-lm finds"
    yield (
        "scales of another shape",
        {**deep, scale: ("F8_E8M0", (ROWS, 7), bytes(7 * ROWS))},
        r"engram-lm does not read scales of this type and shape for .*\[24, 40\]",
    )
    yield "rows of another type", {**deep, weight: ("BF16", (ROWS, 2), bytes(4 * ROWS))}, "is not of 8 bits"
    yield "two prefixes", {**deep, **{f"model.{name}": tensor for name, tensor in deep.items()}}, "several times"
    yield "missing shard", without(shards, QWEN.format("ngram_embedding.shard_7.weight")), "shard_7"
    yield "whole and shards", {**shards, whole: ("BF16", (2, 4), bytes(16))}, "both in one tensor and in shards"
    yield "8 bits without scale", without(eight, table_scale), "weight_scale"
    yield "scale alone", {table_scale: eight[table_scale]}, r"lacks .*\.weight, without which"
    yield "scale of 16-bit rows", {**shards, table_scale: eight[table_scale]}, "has no scale"
    yield "scale of many numbers", {**eight, table_scale: ("F32", (2,), bytes(8))}, "does not read scales of this type"
    yield "scales of integers", {**eight, table_scale: ("I64", (24,), bytes(192))}, "does not read scales of this type"
    yield (
        "scale of one shard",
        {**without(eight, table_scale), SHARD_SCALE: ("F32", (), b"abcd")},
        "lacks that of shard 1",
    )
    yield "two scales", {**eight, f"{table_scale}_inv": eight[table_scale]}, "keep one"
    yield "scales twice", {**eight, SHARD_SCALE: eight[table_scale]}, "both for all rows and for shards"
    yield (
        "another quantizer",
        {**shards, QWEN.format("ngram_embedding.shard_0.weight_packed"): ("I64", (1,), bytes(8))},
        "weight_packed.*engram-lm does not read tables that are stored in this way",
    )
    yield "no table", {"x": ("BF16", (1,), b"ab")}, r"no memory table.*memory_tables\.NAME"
    yield "two kinds in a layer", {**deep, "memory_tables.1.weight": own}, "several tables of layer 1"


@pytest.mark.parametrize(("tensors", "message"), [
    pytest.param(*case[1:], id=case[0]) for case in bad_checkpoints()
])  # fmt: skip
def test_checkpoints_that_cannot_be_right_are_refused_by_name(tmp_path, tensors, message):
    folder = write(tmp_path / "m", tensors)
    with pytest.raises(CheckpointError, match=message):
        table_layouts(folder)
    with serving(folder) as server, pytest.raises(CheckpointError, match=message):
        table_layouts(server.address)


def test_a_packed_file_on_a_server_is_found_by_its_header_and_checked_like_a_local_one(tmp_path):
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(3000, 24, generator=generator).to(torch.bfloat16)
    codec, path = RowCodec(24, torch.bfloat16), tmp_path / "layer-7.safetensors"
    records = rows.view(torch.uint8)
    write_packed(path, lambda start, stop: records[start:stop], codec, 3000, spec_digest="d1")
    numbers = torch.randint(3000, (200,), generator=generator)
    with serving(tmp_path) as server:
        address = f"{server.address}/layer-7.safetensors"
        (layout,) = table_layouts(address).values()
        assert list(table_layouts(address)) == [7] and layout.spec_digest == "d1"
        assert all(span is not None for _, span in server.requests), "never the whole file"
        for tier in ("auto", "host"):
            table = open_table(address, tier=tier)
            assert torch.equal(table.gather(numbers), rows[numbers])
            table.close()
        with pytest.raises(ConfigError, match=r"layer-7\.safetensors.* is on a server.*download it"):
            convert(address, tmp_path / "copy")
        good = path.read_bytes()
        for data, message in (
            (good[:-1], r"layer-7\.safetensors is truncated: expected"),
            (good[:20], "truncated .*, found 20 bytes in all"),
            (good.replace(b'"num_rows":"3000"', b'"num_rows":"3001"'), "header is damaged"),
            (b"no table at all, but long enough for one", "not a safetensors file"),
        ):
            path.write_bytes(data)
            with pytest.raises(CheckpointError, match=message):
                table_layouts(address)
        with pytest.raises(RemoteError, match=r"layer-8\.safetensors cannot be read: .*404"):
            table_layouts(f"{server.address}/layer-8.safetensors")


def test_packed_tables_and_checkpoints_are_told_apart_by_what_their_files_say(tmp_path):
    codec, folder = RowCodec(4, torch.float32), tmp_path / "packed"
    records = torch.randn(9, 4, generator=torch.Generator().manual_seed(3)).view(torch.uint8)
    for name in ("layer-10", "layer-2", "shared"):
        write_packed(folder / f"{name}.safetensors", lambda start, stop: records[start:stop], codec, 9)
    assert list(table_layouts(folder)) == [2, 10, "shared"]
    assert list(table_layouts(folder / "layer-10.safetensors")) == [10]
    with serving(folder) as server:
        assert list(table_layouts(f"{server.address}/layer-2.safetensors")) == [2]
    write_packed(folder / "other-2.safetensors", lambda start, stop: records[start:stop], codec, 9)
    with pytest.raises(CheckpointError, match="are both the table of layer 2"):
        table_layouts(folder)
    (folder / "other-2.safetensors").unlink()
    checkpoint = write(tmp_path / "m", deepseek((1,)))
    write_raw(folder / "model.safetensors", deepseek((1,)))
    with pytest.raises(CheckpointError, match=r"packed tables \(layer-10.safetensors, .*folder of their own"):
        table_layouts(folder)
    with pytest.raises(ConfigError, match=r"holds a checkpoint \(model.safetensors\)"):
        convert(checkpoint, folder)
    assert list(table_layouts(folder / "layer-2.safetensors")) == [2], "one file is looked at alone"
    (tmp_path / "old.engram").write_bytes(b"\x89ENGRAM\n" + bytes(100))
    with pytest.raises(CheckpointError, match=r"no longer read.*convert its source again"):
        open_table(tmp_path / "old.engram")


def test_a_source_that_is_not_there_is_refused(tmp_path):
    for source, message in (
        (tmp_path / "no", "does not exist"),
        (tmp_path, "holds neither"),
        (tmp_path / "x.safetensors", "x"),
    ):
        with pytest.raises(CheckpointError, match=message):
            open_table(source)


def test_auto_says_why_it_chose_a_tier(tmp_path, monkeypatch):
    import engram_lm.tables.open as opening

    folder = write(tmp_path / "m", deepseek((1,)))
    table = open_table(folder)
    assert table.stats()["tier"] == "host" and "fit in" in table.stats()["tier_reason"]
    # What is available and where a path lies are facts of the machine; only these are set here.
    monkeypatch.setattr(opening, "available_bytes", lambda: 1000)
    assert open_table(folder).stats()["tier"] == "mmap"
    monkeypatch.setattr(opening, "is_on_network", lambda path: True)
    stats = open_table(folder).stats()
    assert stats["tier"] == "file" and "network file system" in stats["tier_reason"]
    assert open_table(folder, tier="mmap").stats()["tier_reason"] == "asked for"
    with serving(folder) as server:
        table = open_table(server.address)
        assert (table.stats()["tier"], table.stats()["tier_reason"]) == ("remote", "the source is an address")
        table.close()


def test_impossible_requests_are_refused(tmp_path):
    folder = write(tmp_path / "m", deepseek((1,)))
    layout = table_layouts(folder)[1]
    for source, options, message in (
        (folder, {"tier": "disk"}, "tier is one of auto"),
        (folder, {"tier": "remote"}, "is not an address"),
        (folder, {"cache_bytes": -1}, "cache_bytes"),
        (folder, {"tier": "file", "num_thread": 3}, "no option num_thread; it has direct, num_threads, read_ahead"),
        (folder, {"tier": "file", "num_threads": 0}, "num_threads"),
        (folder, {"tier": "mmap", "direct": True}, "no option direct; it has lock, populate"),
        (folder, {"tier": "http"}, "'http' is no longer there; use 'remote'"),
        (folder, {"tier": "shared"}, r"'shared' is no longer there; use 'mmap'.*one copy .* for all processes"),
        (layout, {"layer": 1}, "a layout is one table"),
        (folder, {"tier": "host", "num_retries": 1}, "no option num_retries; it has pinned"),
        ("mooncake://127.0.0.1:9", {}, "expected mooncake://HOST:PORT/NAME"),
        ("mooncake://127.0.0.1:9/x", {"tier": "file"}, "tier='remote'"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_table(source, **options)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="accelerator"):
            open_table(folder, tier="host", pinned=True)


def test_a_cache_over_any_tier_returns_the_same_rows_and_keeps_the_reason(tmp_path):
    tensors = deepseek((1,))
    folder = write(tmp_path / "m", tensors)
    table = open_table(folder, tier="file", cache_bytes=10_000)
    for _ in range(2):
        assert torch.equal(table.gather(torch.arange(ROWS)), dequantized(tensors, 1))
    assert table.stats()["tier_reason"] == "asked for"
    table.close()


OPEN_LARGE = """
import os, resource, sys, time
import torch
from engram_lm.tables import open_table
rows = torch.tensor([0, 1, 191_999_999, 384_006_167])
baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
table = open_table(sys.argv[1], layer=1, tier=sys.argv[2])
found = table.gather(rows)
seconds = time.perf_counter() - start
assert table.num_rows == 384_006_168 and table.width == 256
assert [row.unique().tolist() for row in found] == [[1.0], [4.0], [16.0], [64.0]], found
print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - baseline) / 1024)
"""


@pytest.mark.parametrize("tier", ["mmap", "file"])
def test_a_table_of_98_gigabytes_opens_in_under_a_second_and_200_megabytes(tmp_path, tier):
    num_rows = 384_006_168
    one, places = b"\x38" * 256, [0, 1, 191_999_999, num_rows - 1]  # 0x38 is 1 in E4M3
    weight = {256 * row: one for row in places}
    scale = {8 * row: bytes([127 + 2 * power]) * 8 for power, row in enumerate(places)}
    folder = write(tmp_path / "m", {
        DEEPSEEK.format(1, "weight"): ("F8_E4M3", (num_rows, 256), weight),
        DEEPSEEK.format(1, "scale"): ("F8_E8M0", (num_rows, 8), scale),
    })  # fmt: skip
    file = folder / "model.safetensors"
    assert file.stat().st_size > 98e9 and file.stat().st_blocks * 512 < 1e6
    done = subprocess.run([sys.executable, "-c", OPEN_LARGE, str(folder), tier], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, megabytes = map(float, done.stdout.split())
    assert seconds < 1 and megabytes < 200


def test_classes_are_what_the_tiers_promise(tmp_path):
    layout = table_layouts(write(tmp_path / "m", deepseek((1,))))[1]
    assert isinstance(open_table(layout, tier="file"), FileTable)
    assert isinstance(open_table(layout, tier="mmap"), MappedTable)
