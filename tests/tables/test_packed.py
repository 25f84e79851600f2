"""The packed table: rows come back to the bit, every safetensors reader opens it, and no damage goes unnoticed."""

import json
import os
import re
import resource
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engram_lm.errors import CheckpointError, ConfigError, MismatchError
from engram_lm.tables import MappedTable
from engram_lm.tables.codec import CODEC_NAMES, RowCodec
from engram_lm.tables.files.convert import build_packed, build_random
from engram_lm.tables.files.packed import PackedHeader, packed_layout, read_packed_header
from engram_lm.tables.files.packed_writer import write_packed
from engram_lm.tables.files.verify import verify_packed


def records_of(codec, num_rows, seed=0):
    return torch.from_numpy(
        np.random.default_rng(seed).integers(0, 256, (num_rows, codec.record_bytes), dtype=np.uint8)
    )


def written(path, codec, num_rows, **options):
    records = records_of(codec, num_rows)
    write_packed(path, lambda start, stop: records[start:stop], codec, num_rows, **options)
    return records


def crc_of(text):
    """CRC-32 of a header, by the definition: that of the header which states 0 for it."""
    return zlib.crc32(re.sub(rb'"header_crc32":"[0-9a-f]{8}"', b'"header_crc32":"00000000"', text, count=1))


def with_header(path, change, target):
    """Copy a packed table with another header, whose checksum is right again."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    text = change(data[8 : 8 + size])
    text = re.sub(rb'("header_crc32":")[0-9a-f]{8}', b"\\g<1>%08x" % crc_of(text), text, count=1)
    target.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    return target


def edited(**changes):
    """A change of the metadata: objects are written as JSON, None leaves a key out."""

    def change(text):
        header = json.loads(text)
        for name, value in changes.items():
            header["__metadata__"][name] = value if isinstance(value, str | int) else json.dumps(value)
            if value is None:
                del header["__metadata__"][name]
        return json.dumps(header, separators=(",", ":")).encode()

    return change


def codec_of(**changes):
    return edited(codec={"width": 100, "stored_dtype": "int8", "scale": "blocks", "table_scale": 1.0} | changes)


def tensor(name, **changes):
    def change(text):
        header = json.loads(text)
        header[name] |= changes
        return json.dumps(header, separators=(",", ":")).encode()

    return change


def renamed(text):
    header = json.loads(text)
    header["rows"] = header.pop("records")
    return json.dumps(header, separators=(",", ":")).encode()


@pytest.mark.parametrize("num_rows", [1, 15, 16, 100])
@pytest.mark.parametrize(
    "codec", [*(RowCodec.named(name, 70) for name in CODEC_NAMES), RowCodec.named("float32", 1500)]
)
def test_rows_come_back_to_the_bit_through_every_way_of_reading(tmp_path, codec, num_rows):
    records = written(tmp_path / "t.safetensors", codec, num_rows)
    layout = packed_layout(tmp_path / "t.safetensors")
    assert (layout.codec, layout.num_rows) == (codec, num_rows)
    rows = torch.cat([torch.arange(num_rows), torch.randint(num_rows, (50,))])
    assert torch.equal(MappedTable(layout).read_records(rows), records[rows])
    for start in range(0, num_rows, 7):
        for stop in {start, start + 1, min(start + 31, num_rows), num_rows}:
            assert torch.equal(layout.load_records(start, stop), records[start:stop])
    data, found = (tmp_path / "t.safetensors").read_bytes(), []
    for extent, where, starts in layout.parts[0].divide(rows.numpy()):
        assert (extent.file, where) == (str(tmp_path / "t.safetensors"), slice(None))
        found += [data[start : start + codec.record_bytes] for start in starts.tolist()]
    assert found == [bytes(record) for record in records[rows].numpy()]


@pytest.mark.parametrize("record_bytes", [1, 255, 264, 4096, 4400])
def test_any_safetensors_reader_opens_it_and_records_follow_each_other_from_a_page_on(tmp_path, record_bytes):
    codec, num_rows = RowCodec(record_bytes, torch.float8_e4m3fn, "table"), 2000
    path = tmp_path / "layer-1.safetensors"
    records = written(path, codec, num_rows, provenance={"from": "test"})
    extent = packed_layout(path).parts[0].extents[0]
    assert extent.start_bytes % 4096 == 0
    assert np.diff(extent.offsets(np.arange(num_rows))).tolist() == [record_bytes] * (num_rows - 1)
    with safe_open(path, "numpy") as file:
        assert set(file.keys()) == {"records", "crc32"}
        metadata, rows = file.metadata(), file.get_slice("records")
        assert rows.get_shape() == [num_rows, record_bytes] and rows.get_dtype() == "U8"
        assert (rows[17:40] == records[17:40].numpy()).all()
        chunk_rows = int(metadata["chunk_rows"])
        expected = [zlib.crc32(records[at : at + chunk_rows].numpy()) for at in range(0, num_rows, chunk_rows)]
        assert file.get_tensor("crc32").tolist() == expected
    assert chunk_rows == max(1, 4194304 // record_bytes)
    assert (metadata["format"], metadata["num_rows"]) == ("engram.packed_table.1", str(num_rows))
    assert json.loads(metadata["codec"]) == codec.to_dict()
    assert json.loads(metadata["provenance"]) == {"from": "test"}
    assert torch.equal(load_file(path)["records"], records)
    assert load_file(path)["crc32"].tolist() == expected
    found = verify_packed(path)
    assert (found.bad, found.num_chunks, found.rows_checked) == (None, len(expected), num_rows)


def test_the_header_tells_all_it_was_given_with_large_integers_as_strings(tmp_path):
    spec = {"format": "x", "multipliers": [[str(2**60)]], "orders": [2, 3]}
    written(
        tmp_path / "t.safetensors", RowCodec.named("float8_e4m3", 256), 20,
        spec_digest="ab" * 32, hash_spec=spec, provenance={"small": 7},
    )  # fmt: skip
    header = read_packed_header(tmp_path / "t.safetensors")
    assert (header.spec_digest, header.hash_spec) == ("ab" * 32, spec)
    assert header.provenance == {"small": 7}
    large = build_random(tmp_path / "r.safetensors", 3, RowCodec.named("float32", 2), seed=2**53)
    assert large.provenance["seed"] == str(2**53)
    assert header.layout.spec_digest == "ab" * 32
    values = header.describe()
    assert (values["record_bytes"], values["num_rows"], values["file_bytes"]) == (264, 20, 4096 + 20 * 264)


def test_a_flipped_bit_anywhere_is_noticed(tmp_path):
    path = tmp_path / "t.safetensors"
    written(path, RowCodec.named("int8", 100), 60, provenance={"from": "test"})
    good = bytearray(path.read_bytes())
    assert verify_packed(path).bad is None
    header = read_packed_header(path)
    rows, checksums = header.records_start, header.checksums_start
    assert checksums < rows == len(good) - 60 * header.codec.record_bytes
    for position in [*range(64), *range(64, checksums, 7), *range(checksums, rows), *range(rows, len(good), 13)]:
        damaged = bytearray(good)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        if position < rows:
            with pytest.raises(CheckpointError):
                (read_packed_header if position < checksums else verify_packed)(path)
        else:
            assert verify_packed(path).bad is not None, position


def test_verify_names_the_first_bad_chunk_with_its_rows(tmp_path):
    path = tmp_path / "t.safetensors"
    codec = RowCodec.named("float32", 1000)
    written(path, codec, 5000)
    chunk = 1048 * 4000  # as many rows as fit 4 MiB
    for where in (4096 + 3 * chunk + 5, 4096 + 2 * chunk + 4000):
        with open(path, "r+b") as file:
            file.seek(where)
            byte = file.read(1)
            file.seek(where)
            file.write(bytes([byte[0] ^ 255]))
    bad = verify_packed(path).bad
    assert (bad.index, bad.first_row, bad.last_row, bad.start_bytes) == (2, 2 * 1048, 3 * 1048 - 1, 4096 + 2 * chunk)
    assert "CRC-32" in bad.reason
    # Five chunks, two bad: every sample of four finds one, some of one do not.
    assert all(verify_packed(path, sample=4, seed=seed).bad for seed in range(5))
    found = [verify_packed(path, sample=1, seed=seed) for seed in range(12)]
    assert {result.chunks_checked for result in found} == {1}
    assert {result.bad is None for result in found} == {True, False}


def test_verify_compares_the_source_row_by_row_whatever_its_type(tmp_path):
    build_random(tmp_path / "a.safetensors", 3000, RowCodec.named("float32", 40), seed=1)
    source = packed_layout(tmp_path / "a.safetensors")
    build_packed(tmp_path / "b.safetensors", source, codec=RowCodec.named("int4", 40))
    assert verify_packed(tmp_path / "b.safetensors", source=source).bad is None
    records = packed_layout(tmp_path / "b.safetensors").load_records(0, 3000)
    records[1234, 3] ^= 16
    write_packed(tmp_path / "b.safetensors", lambda a, b: records[a:b], RowCodec.named("int4", 40), 3000)
    assert verify_packed(tmp_path / "b.safetensors").bad is None, "its own checksums are right"
    assert "row 1234 is not the source's" in verify_packed(tmp_path / "b.safetensors", source=source).bad.reason
    build_random(tmp_path / "c.safetensors", 2999, RowCodec.named("float32", 40), seed=1)
    with pytest.raises(MismatchError, match="3000 rows of 40"):
        verify_packed(tmp_path / "b.safetensors", source=packed_layout(tmp_path / "c.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edited(num_rows="61"), "num_rows is '61', .* give 60"),
        (edited(num_rows=None), "num_rows is None"),
        (edited(num_rows=60), "values that are not text"),
        (edited(record_bytes="1"), "record_bytes"),
        (edited(chunk_rows="1"), "chunk_rows is '1'"),
        (edited(chunk_rows=str(2**60)), "chunk_rows"),
        (codec_of(width=0), "cannot be stored"),
        (codec_of(width=99), r"expected U8 \[rows, 107\]"),
        (codec_of(width=2**47), "expected U8"),
        (codec_of(width=2**60), "cannot be stored"),
        (codec_of(width=True), "cannot be stored"),
        (codec_of(width=1e2), "cannot be stored"),
        (codec_of(width=None), "cannot be stored"),
        (codec_of(width=float("nan")), "cannot be stored"),
        (codec_of(stored_dtype="complex64"), "complex64"),
        (codec_of(stored_dtype=["int8"]), "cannot be stored"),
        (codec_of(stored_dtype="nn"), "cannot be stored"),
        (codec_of(scale="none"), "8-bit rows have one scale or scales by blocks"),
        (codec_of(block=0), "for 0 numbers each"),
        (codec_of(scale_dtype="int64"), "scales of torch.int64"),
        (codec_of(scale_dtype=7), "cannot be stored"),
        (codec_of(scale={}), "scale"),
        (codec_of(stored_dtype="float8_e4m3fn", scale="table", table_scale=0), "scale is 0"),
        (codec_of(stored_dtype="float8_e4m3fn", scale="table", table_scale=10**400), "cannot be stored"),
        (codec_of(more=1), "a codec is an object"),
        (edited(codec=None), "lacks .'codec'"),
        (edited(codec="7"), "JSON int, not an object"),
        (edited(codec='{"width":1,"width":2}'), "'width' twice"),
        (edited(codec="[" * 100_000), "not readable JSON"),
        (edited(checksums_crc32="zzzzzzzz"), "eight hexadecimal"),
        (edited(checksums_crc32=None), "eight hexadecimal"),
        (edited(provenance="[]"), "JSON list, not an object"),
        (edited(provenance=None), "lacks .'provenance'"),
        (edited(hash_spec="x"), "not readable JSON"),
        (edited(format="else"), "is not a packed table: its format is 'else'"),
        (edited(format="engram.packed_table.2"), "engram.packed_table.2', known is .*another version"),
        (tensor("records", dtype="I8"), r"records \(I8 .*expected U8 \[rows, 108\]"),
        (tensor("records", shape=[30, 216]), "expected U8"),
        (tensor("records", shape=[60 * 108]), "expected U8"),
        (tensor("records", data_offsets=[4, 4 + 60 * 107], shape=[60, 107]), "longer than its header says"),
        (tensor("records", data_offsets=[4, 2**50], shape=[2**42, 256]), "takes|truncated"),
        (tensor("records", data_offsets=[2, 6482]), "overlaps|longer"),
        (tensor("crc32", dtype="F32"), r"crc32 \(F32 .*expected U32 \[1\]"),
        (renamed, r"the tensors \['crc32', 'rows'\], expected crc32 and records"),
        (lambda text: text.replace(b'"num_rows":"60"', b'"num_rows":"60","num_rows":"60"'), "twice"),
        (lambda text: b"[" * 100_000, "not readable JSON"),
        (lambda text: b"{}", "truncated|longer"),
        (lambda text: b"\xff\xfe", "not readable JSON"),
        (lambda text: b"[]", "JSON list, not an object"),
    ],
)  # fmt: skip
def test_a_hostile_header_with_a_right_checksum_is_refused_before_any_row_is_read(tmp_path, change, message):
    written(tmp_path / "good.safetensors", RowCodec.named("int8", 100), 60)
    bad = with_header(tmp_path / "good.safetensors", change, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read_packed_header(bad)


def test_a_file_of_another_kind_or_size_is_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    written(path, RowCodec.named("int8", 100), 60)
    good = path.read_bytes()
    assert with_header(path, lambda text: text, tmp_path / "same.safetensors").read_bytes() == good
    save_file({"records": torch.zeros(3)}, tmp_path / "other.safetensors", metadata={"format": "pt"})
    for data, message in (
        (b"", "truncated or not a safetensors file"),
        (good[:7], "truncated or not a safetensors file.*found 7 bytes"),
        (good[:4000], "truncated"),
        (good[:-1], "is truncated: expected"),
        (good + b"\0", "longer than its header says"),
        (b"GGUF\0\0\0\0" + good[8:], "is a GGUF file; engram-lm reads safetensors"),
        (b"\x89ENGRAM\n" + good[8:], r"no longer read \(\.engram\); convert its source again"),
        ((2**63).to_bytes(8, "little") + good[8:], "not a safetensors file"),
        ((tmp_path / "other.safetensors").read_bytes(), "is not a packed table: its format is 'pt'"),
    ):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            read_packed_header(path)
    with pytest.raises(CheckpointError, match="cannot read"):
        read_packed_header(tmp_path / "missing.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    for other in (tmp_path, tmp_path / "pipe.safetensors"):
        with pytest.raises(CheckpointError, match="is not a file"):
            read_packed_header(other)


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path, codec = tmp_path / "t.safetensors", RowCodec.named("float32", 1000)
    written(path, codec, 10)
    before = path.read_bytes()

    def broken(start, stop):
        raise CheckpointError("the source is gone")

    for records, message in ((broken, "is gone"), (lambda start, stop: torch.zeros(1, 3), "expected bytes")):
        with pytest.raises(CheckpointError, match=message):
            write_packed(path, records, codec, 20)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["t.safetensors"]
    with pytest.raises(OSError, match=r"bytes, .* are free"):
        write_packed(tmp_path / "huge.safetensors", broken, codec, 2**47)
    assert os.listdir(tmp_path) == ["t.safetensors"]


def test_a_full_disk_while_building_leaves_nothing(tmp_path):
    script = (
        "import resource, sys; from engram_lm.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)); "
        "sys.exit(main(['table', 'build', sys.argv[1], '--rows', '9000', '--width', '64', '--dtype', 'float32']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "t.safetensors")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "engram-lm table build: [Errno 27] File too large" in done.stderr
    assert os.listdir(tmp_path) == []


def test_random_rows_depend_on_the_seed_alone(tmp_path):
    codec = RowCodec.named("float32", 700)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build_random(tmp_path / name, 4000, codec, seed=seed, std=0.5)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    rows = [packed_layout(tmp_path / name).load_records(0, 4000).view(torch.float32) for name in "ac"]
    assert not torch.equal(*rows)
    assert abs(rows[0].std().item() - 0.5) < 0.01
    assert not torch.equal(rows[0][:1000], rows[0][1024:2024]), "chunks differ"
    for options, message in (({"std": 0.0}, "deviation"), ({"seed": -1}, "seed")):
        with pytest.raises(ConfigError, match=message):
            build_random(tmp_path / "d", 4, codec, **options)


def test_a_file_of_the_published_size_opens_at_once_in_little_memory(tmp_path):
    path = tmp_path / "layer-1.safetensors"
    codec, far = RowCodec.named("float8_e4m3", 256), 384_006_167
    header = PackedHeader(file=str(path), codec=codec, num_rows=far + 1).placed()
    record = bytes(range(256)) + bytes([127] * 8)
    with open(path, "wb") as file:
        file.write(header.encode())
        file.seek(header.records_start + far * 264)
        file.write(record)
    used, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    table = MappedTable(packed_layout(path))
    assert bytes(table.read_records(torch.tensor([far]))[0].numpy()) == record
    assert (table.read_records(torch.tensor([0, far - 1])) == 0).all()
    assert time.perf_counter() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 200 * 2**10
    with pytest.raises(CheckpointError, match="the checksums at byte"):
        verify_packed(path)
