"""Tables of every kind of checkpoint become packed files to the bit, also after a kill; what rounding costs is told."""

import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from tests.raw_safetensors import random_e4m3, write_raw

from engram_lm.errors import CheckpointError, ConfigError, MismatchError
from engram_lm.tables import table_layouts
from engram_lm.tables.codec import RowCodec
from engram_lm.tables.files.convert import build_packed, build_random, convert
from engram_lm.tables.files.packed import packed_layout, read_packed_header
from engram_lm.tables.files.packed_writer import write_packed
from engram_lm.tables.files.row_error import measure_row_error
from engram_lm.tables.files.verify import verify_packed

DEEPSEEK = "layers.{}.engram.embed.{}"
QWEN = "model.language_model.layers.1.ple.ple_embedding.ngram_embedding."


def deepseek(folder, sizes=None, width=70):
    """Tables of several layers, each with its scales; every scale byte but NaN's occurs."""
    folder.mkdir(exist_ok=True)
    tensors, records = {}, {}
    for layer, rows in (sizes or {1: 400, 14: 300}).items():
        blocks = -(-width // 32)
        values = np.frombuffer(random_e4m3(rows * width, layer), np.uint8)
        scales = np.random.default_rng(layer).integers(0, 255, rows * blocks, dtype=np.uint8)
        tensors[DEEPSEEK.format(layer, "weight")] = ("F8_E4M3", (rows, width), values.tobytes())
        tensors[DEEPSEEK.format(layer, "scale")] = ("F8_E8M0", (rows, blocks), scales.tobytes())
        records[layer] = np.concatenate([values.reshape(rows, width), scales.reshape(rows, blocks)], axis=1)
    write_raw(folder / "model.safetensors", tensors)
    return records


def plain(folder, name, dtype, kind, rows=300, width=24):
    folder.mkdir(exist_ok=True)
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(5)).to(dtype)
    write_raw(folder / "model.safetensors", {name: (kind, (rows, width), weight.view(torch.uint8).numpy().tobytes())})
    return weight


def test_published_eight_bit_rows_and_scales_come_to_lie_side_by_side_and_keep_every_bit(tmp_path):
    records = deepseek(tmp_path / "source")
    results = convert(tmp_path / "source", tmp_path / "packed")
    assert [(result.layer, result.path.name, result.error) for result in results] == [
        (1, "layer-1.safetensors", None), (14, "layer-14.safetensors", None),
    ]  # fmt: skip
    for result in results:
        layout = packed_layout(result.path)
        assert layout.load_records(0, layout.num_rows).numpy().tobytes() == records[result.layer].tobytes()
        assert verify_packed(result.path, source=table_layouts(tmp_path / "source")[result.layer]).bad is None
    assert sorted(os.listdir(tmp_path / "packed")) == ["layer-1.safetensors", "layer-14.safetensors"]
    assert table_layouts(tmp_path / "packed").keys() == {1, 14}


def test_qwen_shards_become_one_table_in_the_order_of_their_numbers(tmp_path):
    for kind, scale in (("BF16", None), ("F8_E4M3", 0.0137)):
        folder = tmp_path / kind
        folder.mkdir()
        item = 1 if scale else 2
        data = [np.random.default_rng(i).integers(0, 120, (11, 10 * item), dtype=np.uint8) for i in range(12)]
        tensors = {f"{QWEN}shard_{i}.weight": (kind, (11, 10), part.tobytes()) for i, part in enumerate(data)}
        if scale:
            tensors[f"{QWEN}weight_scale"] = ("F32", (), np.float32(scale).tobytes())
        write_raw(folder / "model.safetensors", tensors)
        (result,) = convert(folder, tmp_path / f"packed-{kind}")
        layout = packed_layout(result.path)
        assert layout.load_records(0, 132).numpy().tobytes() == np.concatenate(data).tobytes()
        assert (layout.codec.scale, layout.codec.table_scale) == (
            ("table", float(np.float32(scale))) if scale else ("none", 1.0)
        )


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, "F32"), (torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_our_own_tables_keep_every_bit_and_a_packed_file_may_be_the_source_again(tmp_path, dtype, kind):
    weight = plain(tmp_path / "own", "model.memory_tables.shared.weight", dtype, kind)
    (first,) = convert(tmp_path / "own", tmp_path / "packed", hash_spec={"a": 1}, spec_digest="d")
    assert (first.layer, first.path.name) == ("shared", "shared.safetensors")
    header = read_packed_header(first.path)
    assert (header.hash_spec, header.spec_digest, header.provenance["layer"]) == ({"a": 1}, "d", "shared")
    (second,) = convert(first.path, tmp_path / "again")
    for result in (first, second):
        assert torch.equal(packed_layout(result.path).load_records(0, 300).view(dtype), weight)
    with pytest.raises(ConfigError, match="is the source itself"):
        convert(tmp_path / "packed", tmp_path / "packed", dtype="int8")


@pytest.mark.parametrize("width", [24, 1500], ids=["short rows", "rows longer than a page"])
def test_a_packed_source_is_copied_whole_and_a_flipped_bit_in_it_gets_no_checksum_of_its_own(tmp_path, width):
    rows = 100_000 if width == 24 else 1500
    weight = plain(tmp_path / "m", "model.memory_tables.3.weight", torch.float32, "F32", rows=rows, width=width)
    (first,) = convert(tmp_path / "m", tmp_path / "first")
    header = read_packed_header(first.path)
    assert header.num_chunks > 1
    # Other types lie in chunks of other rows.
    for dtype in (None, "bfloat16"):
        (again,) = convert(first.path, tmp_path / f"again-{dtype}", dtype=dtype)
        found = packed_layout(again.path).load_records(0, rows)
        assert torch.equal(found, weight.to(getattr(torch, dtype or "float32")).view(torch.uint8))
    position = header.chunk_bytes(1)[0] + 50
    with open(first.path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 4]))
    low, high = header.chunk(1)
    for write in (
        lambda: convert(first.path, tmp_path / "bad"),
        lambda: build_packed(tmp_path / "bad" / "b.safetensors", packed_layout(first.path)),
    ):
        with pytest.raises(CheckpointError, match=rf"chunk 1, rows {low} to {high - 1}, .*expected the CRC-32.*again"):
            write()
    assert not list((tmp_path / "bad").glob("*.safetensors"))


def test_one_layer_is_converted_alone_and_an_unknown_one_or_type_refused_before_anything_is_written(tmp_path):
    deepseek(tmp_path / "source")
    for options, message in (
        ({"layer": 2}, "no table of layer 2"),
        ({"dtype": "int3"}, "int3"),
        ({"error_rows": 0}, "1 row"),
    ):
        with pytest.raises(ConfigError, match=message):
            convert(tmp_path / "source", tmp_path / "packed", **options)
    assert not (tmp_path / "packed").exists()
    convert(tmp_path / "source", tmp_path / "packed", layer="14")
    assert os.listdir(tmp_path / "packed") == ["layer-14.safetensors"]


def test_a_finished_file_of_the_same_source_and_type_is_left_alone(tmp_path):
    deepseek(tmp_path / "source", {1: 50})
    target = tmp_path / "packed"
    convert(tmp_path / "source", target)
    written = (target / "layer-1.safetensors").stat().st_mtime_ns

    def again(**options):
        (result,) = convert(tmp_path / "source", target, **options)
        return result.kept

    assert again()
    assert (target / "layer-1.safetensors").stat().st_mtime_ns == written
    assert not again(resume=False)
    assert not again(dtype="bfloat16")
    assert again(dtype="bfloat16")
    deepseek(tmp_path / "source", {1: 50})  # the same bytes, at another time: nobody can know without reading them
    os.utime(tmp_path / "source" / "model.safetensors", ns=(1, 1))
    assert not again(dtype="bfloat16")
    (target / "layer-1.safetensors").write_bytes(b"broken")
    assert not again(dtype="bfloat16")


CHUNK_BYTES = 4194304 // 264 * 264

KILLED = """
import os, signal, sys
from engram_lm.tables.files.convert import convert
def progress(layer, done, total):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
convert(sys.argv[1], sys.argv[2], progress=progress)
"""


def test_a_killed_conversion_goes_on_and_ends_with_the_bytes_of_an_uninterrupted_one(tmp_path):
    deepseek(tmp_path / "source", {1: 180_000}, width=256)
    target = tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "source"), str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert sorted(os.listdir(target)) == [".layer-1.safetensors.journal", ".layer-1.safetensors.part"]
    noted = (target / ".layer-1.safetensors.journal").read_text().splitlines()[1:]
    assert 5 <= len(noted) <= 10
    # What a power cut leaves: a line cut short, and a chunk that never reached the disk.
    with open(target / ".layer-1.safetensors.journal", "a") as journal:
        journal.write("11 0000")
    with open(target / ".layer-1.safetensors.part", "r+b") as part:
        part.seek(4096 + 2 * CHUNK_BYTES + 100)
        part.write(b"\0" * 1000)
    seen = []
    convert(tmp_path / "source", target, progress=lambda layer, done, total: seen.append(done))
    assert os.listdir(target) == ["layer-1.safetensors"]
    chunks = (len(noted) - 1) * CHUNK_BYTES
    assert chunks in seen, "the chunks that were there were taken as they are"
    convert(tmp_path / "source", tmp_path / "whole", resume=False)
    assert (target / "layer-1.safetensors").read_bytes() == (tmp_path / "whole" / "layer-1.safetensors").read_bytes()
    assert verify_packed(target / "layer-1.safetensors").bad is None


def test_only_the_same_work_goes_on_and_only_one_process_does_it(tmp_path):
    codec, asked = RowCodec.named("float32", 1000), []

    def write(key, *, stop_at=None, num_rows=9_000, **options):
        asked.clear()

        def records(start, stop):
            if stop_at is not None and start >= stop_at:
                raise CheckpointError("stopped")
            asked.append(start)
            return torch.full((stop - start, 4000), len(key), dtype=torch.uint8)

        return write_packed(tmp_path / "t.safetensors", records, codec, num_rows, resume_key=key, **options)

    def interrupted():
        with pytest.raises(CheckpointError, match="stopped"):
            write("one", stop_at=4 * 1048)
        assert not (tmp_path / "t.safetensors").exists()

    interrupted()
    write("one")
    assert asked[0] == 4 * 1048, "the first four chunks were there"
    for options in ({"num_rows": 9_001}, {"provenance": {"x": 1}}, {}):
        (tmp_path / "t.safetensors").unlink()
        interrupted()
        write("other" if not options else "one", **options)
        assert asked[0] == 0
        expected = 5 if not options else 3
        layout = packed_layout(tmp_path / "t.safetensors")
        assert (layout.load_records(0, layout.num_rows) == expected).all()
    import fcntl

    with open(tmp_path / ".t.safetensors.part", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="written by another process"):
            write("one")


def test_memory_stays_bounded_whatever_the_size(tmp_path):
    (tmp_path / "source").mkdir()
    rows = 600_000  # 158 MB
    write_raw(tmp_path / "source" / "model.safetensors", {
        DEEPSEEK.format(1, "weight"): ("F8_E4M3", (rows, 256), {(rows - 1) * 256: b"\1" * 256}),
        DEEPSEEK.format(1, "scale"): ("F8_E8M0", (rows, 8), {}),
    })  # fmt: skip
    script = (
        "import resource, sys; from engram_lm.tables.files.convert import convert\n"
        "from engram_lm.tables.files.verify import verify_packed\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = used()\n"
        "for dtype in (None, 'int4'):\n"
        "    (result,) = convert(sys.argv[1], f'{sys.argv[2]}/to{dtype}', dtype=dtype, error_rows=1000)\n"
        "    assert verify_packed(result.path).bad is None\n"
        "print(used() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "source"), str(tmp_path)],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert int(done.stdout) < 110 * 2**10, f"{int(done.stdout) >> 10} MiB"
    last = packed_layout(tmp_path / "toNone" / "layer-1.safetensors").load_records(rows - 1, rows)
    assert bytes(last[0].numpy()) == b"\1" * 256 + b"\0" * 8


@pytest.mark.parametrize(
    ("dtype", "record_bytes", "low", "high"),
    [("bfloat16", 512, 1e-3, 2e-3), ("float16", 512, 1e-4, 3e-4), ("float8_e4m3", 264, 0.02, 0.04),
     ("int8", 272, 4e-3, 7e-3), ("int4", 144, 0.08, 0.13)],
)  # fmt: skip
def test_rounding_is_told_with_its_error_and_the_bytes_saved(tmp_path, dtype, record_bytes, low, high):
    plain(tmp_path / "own", "model.memory_tables.1.weight", torch.float32, "F32", rows=500, width=256)
    (result,) = convert(tmp_path / "own", tmp_path / "packed", dtype=dtype, error_rows=None)
    assert result.to_dict()["stored_bytes"] == 500 * record_bytes
    assert result.to_dict()["bytes_saved"] == 500 * (1024 - record_bytes)
    error = result.error
    assert low < error.relative_error_p50 <= error.relative_error_p99 <= error.relative_error_max < high
    assert low < error.relative_error_mean < high
    assert 1 - high**2 < error.cosine_min <= error.cosine_mean < 1
    assert (error.num_rows, error.all_rows) == (500, True)
    json.dumps(result.to_dict(), allow_nan=False)


def test_the_error_of_rows_equals_its_definition_row_by_row(tmp_path):
    build_random(tmp_path / "a.safetensors", 400, RowCodec.named("float32", 20), seed=1)
    exact = packed_layout(tmp_path / "a.safetensors").load_records(0, 400).view(torch.float32)
    exact[7], exact[8] = 0, torch.full((20,), 3.0)
    rows = exact.view(torch.uint8)
    write_packed(tmp_path / "a.safetensors", lambda a, b: rows[a:b], RowCodec.named("float32", 20), 400)
    a = packed_layout(tmp_path / "a.safetensors")
    build_packed(tmp_path / "b.safetensors", a, codec=RowCodec.named("int4", 20))
    b = packed_layout(tmp_path / "b.safetensors")
    other = b.codec.decode(b.load_records(0, 400), torch.float32)
    relative, cosines = [], []
    for x, y in zip(exact.tolist(), other.tolist()):
        length, distance = math.hypot(*x), math.dist(x, y)
        relative.append(distance / length if distance else 0.0)
        if length and math.hypot(*y):
            cosines.append(min(1.0, sum(map(float.__mul__, x, y)) / length / math.hypot(*y)))
    found = measure_row_error(a, b)
    assert found.relative_error_mean == pytest.approx(sum(relative) / 400, rel=1e-12)
    assert found.relative_error_p50 == pytest.approx(sorted(relative)[199], rel=1e-12)
    assert found.relative_error_p99 == pytest.approx(sorted(relative)[395], rel=1e-12)
    assert found.relative_error_max == pytest.approx(max(relative), rel=1e-12)
    assert found.cosine_mean == pytest.approx(sum(cosines) / 399, rel=1e-12)
    assert found.cosine_min == pytest.approx(min(cosines), rel=1e-12)
    sample = measure_row_error(a, b, sample=50, seed=3)
    assert (sample.num_rows, sample.all_rows) == (50, False)
    assert sample == measure_row_error(a, b, sample=50, seed=3) != measure_row_error(a, b, sample=50, seed=4)
    assert measure_row_error(a, a).relative_error_max == 0
    build_random(tmp_path / "c.safetensors", 399, RowCodec.named("float32", 20))
    with pytest.raises(MismatchError, match="cannot be compared"):
        measure_row_error(a, packed_layout(tmp_path / "c.safetensors"))


def test_a_number_that_cannot_be_rounded_is_named_with_its_rows_and_leaves_no_table(tmp_path):
    (tmp_path / "own").mkdir()
    weight = torch.ones(300, 24)
    weight[123, 4] = math.nan
    data = weight.view(torch.uint8).numpy().tobytes()
    write_raw(tmp_path / "own" / "model.safetensors", {"memory_tables.1.weight": ("F32", (300, 24), data)})
    with pytest.raises(CheckpointError, match=r"layer 1, rows 0 to 299: .*infinite or NaN"):
        convert(tmp_path / "own", tmp_path / "packed", dtype="int8")
    assert not (tmp_path / "packed" / "layer-1.safetensors").exists()
