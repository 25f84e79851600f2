"""The packed file: rows come back to the bit, none lies on two pages, and no damage goes unnoticed."""

import json
import os
import resource
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch

from engram_lm.errors import CheckpointError, ConfigError, MismatchError
from engram_lm.tables import MappedTable
from engram_lm.tables.codec import CODEC_NAMES, RowCodec
from engram_lm.tables.files.build import build_packed, build_random
from engram_lm.tables.files.packed import PackedGeometry, encode_header, packed_layout, read_packed_header
from engram_lm.tables.files.packed_writer import write_packed
from engram_lm.tables.files.verify import inspect_packed, verify_packed

PREFIX = "<8sIIQII"


def records_of(codec, num_rows, seed=0):
    return torch.from_numpy(
        np.random.default_rng(seed).integers(0, 256, (num_rows, codec.record_bytes), dtype=np.uint8)
    )


def written(path, codec, num_rows, **options):
    records = records_of(codec, num_rows)
    write_packed(path, lambda start, stop: records[start:stop], codec, num_rows, **options)
    return records


def with_header(path, change, target):
    """Copy a packed file with another header, whose checksums are right again."""
    data = path.read_bytes()
    magic, version, reserved, size, _, _ = struct.unpack_from(PREFIX, data)
    text = change(data[32 : 32 + size])
    text += b" " * (-(32 + len(text)) % 4096)
    prefix = struct.pack("<8sIIQI", magic, version, reserved, len(text), zlib.crc32(text))
    target.write_bytes(prefix + struct.pack("<I", zlib.crc32(prefix)) + text + data[32 + size :])
    return target


def edited(**changes):
    return lambda text: json.dumps({**json.loads(text), **changes}).encode()


@pytest.mark.parametrize("num_rows", [1, 15, 16, 100])
@pytest.mark.parametrize(
    "codec", [*(RowCodec.named(name, 70) for name in CODEC_NAMES), RowCodec.named("float32", 1500)]
)
def test_rows_come_back_to_the_bit_through_every_way_of_reading(tmp_path, codec, num_rows):
    records = written(tmp_path / "t.engram", codec, num_rows)
    layout = packed_layout(tmp_path / "t.engram")
    assert (layout.codec, layout.num_rows) == (codec, num_rows)
    rows = torch.cat([torch.arange(num_rows), torch.randint(num_rows, (50,))])
    assert torch.equal(MappedTable(layout).read_records(rows), records[rows])
    for start in range(0, num_rows, 7):
        for stop in {start, start + 1, min(start + 31, num_rows), num_rows}:
            assert torch.equal(layout.load_records(start, stop), records[start:stop])
    data, found = (tmp_path / "t.engram").read_bytes(), []
    for extent, where, starts in layout.parts[0].divide(rows.numpy()):
        assert (extent.file, where) == (str(tmp_path / "t.engram"), slice(None))
        found += [data[start : start + codec.record_bytes] for start in starts.tolist()]
    assert found == [bytes(record) for record in records[rows].numpy()]


@pytest.mark.parametrize("record_bytes", [1, 255, 264, 512, 1365, 2049, 4095, 4096])
def test_no_record_lies_on_two_pages_and_no_page_has_room_for_one_more(tmp_path, record_bytes):
    codec = RowCodec(record_bytes, torch.float8_e4m3fn, "table")
    num_rows = 3 * (4096 // record_bytes) + 1
    written(tmp_path / "t.engram", codec, num_rows)
    extent = packed_layout(tmp_path / "t.engram").parts[0].extents[0]
    starts = extent.offsets(np.arange(num_rows))
    assert extent.start_bytes % 4096 == 0
    assert (starts // 4096 == (starts + record_bytes - 1) // 4096).all()
    assert np.bincount((starts - extent.start_bytes) // 4096).tolist() == [4096 // record_bytes] * 3 + [1]


def test_records_longer_than_a_page_follow_each_other_without_gaps(tmp_path):
    codec = RowCodec.named("float32", 1100)
    written(tmp_path / "t.engram", codec, 2000)
    extent = packed_layout(tmp_path / "t.engram").parts[0].extents[0]
    assert np.diff(extent.offsets(np.arange(2000))).tolist() == [4400] * 1999
    found = verify_packed(tmp_path / "t.engram")
    assert (found.bad, found.num_chunks, found.rows_checked) == (None, 3, 2000)


def test_the_header_tells_all_it_was_given_with_large_integers_as_strings(tmp_path):
    spec = {"format": "x", "multipliers": [[str(2**60)]], "orders": [2, 3]}
    written(
        tmp_path / "t.engram", RowCodec.named("float8_e4m3", 256), 20,
        spec_digest="ab" * 32, hash_spec=spec, provenance={"seed": 2**53, "small": 7},
    )  # fmt: skip
    header = read_packed_header(tmp_path / "t.engram")
    assert (header.spec_digest, header.hash_spec) == ("ab" * 32, spec)
    assert header.provenance == {"seed": str(2**53), "small": 7}
    assert header.layout.spec_digest == "ab" * 32
    values = inspect_packed(tmp_path / "t.engram")
    assert (values["record_bytes"], values["rows_per_page"], values["file_bytes"]) == (264, 15, 3 * 4096 + 4)
    assert values["padding_share"] == pytest.approx(1 - 20 * 264 / 8192)


def test_a_flipped_bit_anywhere_is_noticed(tmp_path):
    path = tmp_path / "t.engram"
    written(path, RowCodec.named("int8", 100), 60, provenance={"from": "test"})
    good = bytearray(path.read_bytes())
    assert verify_packed(path).bad is None
    for position in [*range(32), *range(32, len(good) - 8, 13), *range(len(good) - 8, len(good))]:
        damaged = bytearray(good)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        if position < 4096 or position >= len(good) - 4:
            with pytest.raises(CheckpointError, match=r"damaged|version|not a packed table"):
                (read_packed_header if position < 4096 else verify_packed)(path)
        else:
            assert verify_packed(path).bad is not None, position


def test_verify_names_the_first_bad_chunk_with_its_rows(tmp_path):
    path = tmp_path / "t.engram"
    codec = RowCodec.named("float32", 1000)
    written(path, codec, 5000)
    chunk = 4194304
    for where in (4096 + 3 * chunk + 5, 4096 + 2 * chunk + 4000):
        with open(path, "r+b") as file:
            file.seek(where)
            byte = file.read(1)
            file.seek(where)
            file.write(bytes([byte[0] ^ 255]))
    bad = verify_packed(path).bad
    assert (bad.index, bad.first_row, bad.last_row, bad.start_bytes) == (2, 2048, 3071, 4096 + 2 * chunk)
    assert "CRC-32" in bad.reason
    # Five chunks, two bad: every sample of four finds one, some of one do not.
    assert all(verify_packed(path, sample=4, seed=seed).bad for seed in range(5))
    found = [verify_packed(path, sample=1, seed=seed) for seed in range(12)]
    assert {result.chunks_checked for result in found} == {1}
    assert {result.bad is None for result in found} == {True, False}


def test_verify_compares_the_source_row_by_row_whatever_its_type(tmp_path):
    build_random(tmp_path / "a.engram", 3000, RowCodec.named("float32", 40), seed=1)
    source = packed_layout(tmp_path / "a.engram")
    build_packed(tmp_path / "b.engram", source, codec=RowCodec.named("int4", 40))
    assert verify_packed(tmp_path / "b.engram", source=source).bad is None
    records = packed_layout(tmp_path / "b.engram").load_records(0, 3000)
    records[1234, 3] ^= 16
    write_packed(tmp_path / "b.engram", lambda a, b: records[a:b], RowCodec.named("int4", 40), 3000)
    assert verify_packed(tmp_path / "b.engram").bad is None, "its own checksums are right"
    assert "row 1234 is not the source's" in verify_packed(tmp_path / "b.engram", source=source).bad.reason
    build_random(tmp_path / "c.engram", 2999, RowCodec.named("float32", 40), seed=1)
    with pytest.raises(MismatchError, match="3000 rows of 40"):
        verify_packed(tmp_path / "b.engram", source=packed_layout(tmp_path / "c.engram"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edited(num_rows=2**60), "num_rows"),
        (edited(num_rows=0), "num_rows"),
        (edited(num_rows=-5), "num_rows"),
        (edited(num_rows=True), "num_rows"),
        (edited(num_rows=1e3), "num_rows"),
        (edited(num_rows="9" * 30), "num_rows"),
        (edited(num_rows=10**6), "data_bytes|truncated"),
        (edited(num_rows=30), "data_bytes"),
        (edited(width=0), "width"),
        (edited(width=2**47), "record_bytes"),
        (edited(width=None), "width"),
        (edited(rows_per_page=16), "rows_per_page is 16"),
        (edited(stride_bytes=0), "stride_bytes"),
        (edited(record_bytes=10**30), "record_bytes"),
        (edited(page_bytes=1), "page_bytes"),
        (edited(chunk_rows=1), "chunk_rows"),
        (edited(num_chunks=2**31), "num_chunks"),
        (edited(codec={"numbers": "complex64", "scale": "none", "table_scale": 1.0}), "complex64"),
        (edited(codec={"numbers": ["int8"], "scale": "none", "table_scale": 1.0}), "unknown"),
        (edited(codec={"numbers": "int8", "scale": "none", "table_scale": 1.0}), "8-bit rows have scales"),
        (edited(codec={"numbers": "int8", "scale": {}, "table_scale": 1.0}), "scale"),
        (edited(codec={"numbers": "float8_e4m3fn", "scale": "table", "table_scale": 0}), "scale is 0"),
        (edited(codec={"numbers": "float8_e4m3fn", "scale": "table", "table_scale": 10**400}), "cannot be read"),
        (edited(codec=7), "codec"),
        (edited(checksums={"algorithm": "md5", "crc32": "00000000"}), "md5"),
        (edited(checksums={"algorithm": "crc32", "crc32": "zzzzzzzz"}), "cannot be read"),
        (edited(checksums={"algorithm": "crc32", "crc32": 5}), "eight hexadecimal"),
        (edited(provenance=[]), "provenance"),
        (edited(hash_spec="x"), "hash_spec"),
        (edited(spec_digest=5), "spec_digest"),
        (edited(format="else"), "not that of a packed table"),
        (lambda text: text.replace(b'"width":100', b'"width":NaN'), "NaN"),
        (lambda text: text.replace(b'"width":100', b'"width":100,"width":100'), "twice"),
        (lambda text: b"[" * 100_000, "cannot be read"),
        (lambda text: b"{}", "not that of a packed table"),
        (lambda text: b"\xff\xfe", "cannot be read"),
        (lambda text: b"[]", "not that of a packed table"),
    ],
)  # fmt: skip
def test_a_hostile_header_with_right_checksums_is_refused_before_any_row_is_read(tmp_path, change, message):
    written(tmp_path / "good.engram", RowCodec.named("int8", 100), 60)
    bad = with_header(tmp_path / "good.engram", change, tmp_path / "bad.engram")
    with pytest.raises(CheckpointError, match=message):
        read_packed_header(bad)


def test_a_hostile_prefix_or_size_is_refused(tmp_path):
    path = tmp_path / "t.engram"
    written(path, RowCodec.named("int8", 100), 60)
    good = path.read_bytes()
    size = struct.unpack_from(PREFIX, good)[3]

    def prefixed(magic=b"\x89ENGRAM\n", version=1, reserved=0, size=size):
        head = struct.pack("<8sIIQI", magic, version, reserved, size, zlib.crc32(good[32 : 32 + size]))
        return head + struct.pack("<I", zlib.crc32(head)) + good[32:]

    assert prefixed() == good
    for data, message in (
        (b"", "not a packed table"),
        (good[:31], "truncated: expected 32 bytes and a header, found 31"),
        (good[:4000], "truncated"),
        (good[:-1], "is truncated: expected"),
        (good + b"\0", "longer than its header says"),
        (prefixed(magic=b"GGUF\0\0\0\0"), "not a packed table"),
        (prefixed(version=2), "version 2"),
        (prefixed(reserved=1), "version"),
        (prefixed(size=2**63), "truncated or damaged"),
        (prefixed(size=size - 1), "truncated or damaged"),
        (prefixed(size=size + 4096), "cannot be read"),
    ):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            read_packed_header(path)
    with pytest.raises(CheckpointError, match="cannot read"):
        read_packed_header(tmp_path / "missing.engram")
    os.mkfifo(tmp_path / "pipe.engram")
    for other in (tmp_path, tmp_path / "pipe.engram"):
        with pytest.raises(CheckpointError, match="is not a file"):
            read_packed_header(other)


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path, codec = tmp_path / "t.engram", RowCodec.named("float32", 1000)
    written(path, codec, 10)
    before = path.read_bytes()

    def broken(start, stop):
        raise CheckpointError("the source is gone")

    for records, message in ((broken, "is gone"), (lambda start, stop: torch.zeros(1, 3), "expected bytes")):
        with pytest.raises(CheckpointError, match=message):
            write_packed(path, records, codec, 20)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["t.engram"]
    with pytest.raises(ConfigError, match="header of a packed table takes"):
        written(path, codec, 5, provenance={"x": "y" * 2**20})
    with pytest.raises(OSError, match=r"bytes, .* are free"):
        write_packed(tmp_path / "huge.engram", broken, codec, 2**47)
    assert os.listdir(tmp_path) == ["t.engram"]


def test_a_full_disk_while_building_leaves_nothing(tmp_path):
    script = (
        "import resource, sys; from engram_lm.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)); "
        "sys.exit(main(['table', 'build', sys.argv[1], '--rows', '9000', '--width', '64', '--dtype', 'float32']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "t.engram")], capture_output=True, text=True, check=False
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
    geometry = PackedGeometry(RowCodec.named("float8_e4m3", 256), 384_006_168)
    path = tmp_path / "layer-1.engram"
    far = 384_006_167
    record = bytes(range(256)) + bytes([127] * 8)
    head = encode_header(geometry, 0, spec_digest=None, hash_spec=None, provenance={})
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(len(head) + geometry.data_bytes + 4 * geometry.num_chunks)
        file.seek(len(head) + far // 15 * 4096 + far % 15 * 264)
        file.write(record)
    used, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    table = MappedTable(packed_layout(path))
    assert bytes(table.read_records(torch.tensor([far]))[0].numpy()) == record
    assert (table.read_records(torch.tensor([0, far - 1])) == 0).all()
    assert time.perf_counter() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 200 * 2**10
    with pytest.raises(CheckpointError, match="table of checksums"):
        verify_packed(path)
