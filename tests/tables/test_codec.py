"""What the bytes of a record mean: every codec against a plain loop, and what it refuses."""

import math
import struct

import numpy as np
import pytest
import torch

from engram_lm.errors import CheckpointError, ConfigError
from engram_lm.tables.codec import CODEC_NAMES, RowCodec

BITS = {"int8": 8, "int4": 4}
LARGEST = {"int8": 127, "int4": 7}


def rows_with_everything(width, seed=0):
    """Ordinary rows, a row of zeros, tiny and huge rows, blocks of very different sizes."""
    rows = torch.randn(8, width, generator=torch.Generator().manual_seed(seed))
    rows[1] = 0
    rows[2] *= 1e-30
    rows[3] *= 1e30
    rows[4, ::2] = 0
    rows[5] = -rows[0]
    rows[6] *= torch.logspace(-20, 10, width)
    rows[7] = 2.0**-140  # denormal in float32
    return rows


def bfloat16_nearest(value):
    """The nearest bfloat16, ties to even, of a positive float32; by its bits."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return bits + 0x7FFF + (bits >> 16 & 1) >> 16


def plain_integers(row, name):
    """One row's record, from the definition: integers, then one bfloat16 per 32 numbers."""
    integers, scales = [], b""
    for start in range(0, len(row), 32):
        block = row[start : start + 32]
        largest = max(abs(number) for number in block)
        code = (
            0x3F80 if largest == 0 else bfloat16_nearest(max(np.float32(largest) / np.float32(LARGEST[name]), 2**-126))
        )
        (scale,) = struct.unpack("<f", struct.pack("<I", code << 16))
        scales += struct.pack("<H", code)
        integers += [round(float(np.float32(number) / np.float32(scale))) for number in block]
    if name == "int8":
        return struct.pack(f"{len(integers)}b", *integers) + scales
    integers += [0] * (len(integers) % 2)
    return bytes((a & 15) | (b & 15) << 4 for a, b in zip(integers[::2], integers[1::2])) + scales


def plain_decode(record, width, name):
    """A record's numbers, from the definition."""
    size = width if name == "int8" else -(-width // 2)
    scales = [struct.unpack("<f", b"\0\0" + record[i : i + 2])[0] for i in range(size, len(record), 2)]
    numbers = []
    for column in range(width):
        code = record[column] if name == "int8" else record[column // 2] >> 4 * (column % 2) & 15
        signed = code - (1 << BITS[name]) if code >> (BITS[name] - 1) else code
        numbers.append(signed * scales[column // 32])
    return numbers


@pytest.mark.parametrize("width", [1, 2, 31, 32, 33, 70, 256])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_integers_equal_their_plain_twin_to_the_bit(name, width):
    codec, rows = RowCodec.named(name, width), rows_with_everything(width)
    records = codec.encode(rows)
    assert records.shape == (8, codec.record_bytes)
    assert [bytes(record) for record in records.numpy()] == [plain_integers(row.tolist(), name) for row in rows]
    decoded = codec.decode(records, torch.float32)
    assert decoded.tolist() == [plain_decode(bytes(record), width, name) for record in records.numpy()]


def test_every_byte_of_a_packed_record_decodes_to_its_two_signed_halves():
    codec = RowCodec.named("int4", 2)
    records = torch.tensor([[byte, 0x80, 0x3F] for byte in range(256)], dtype=torch.uint8)
    signed = [nibble - 16 * (nibble > 7) for nibble in range(16)]
    expected = [[signed[byte & 15], signed[byte >> 4]] for byte in range(256)]
    assert codec.decode(records, torch.float32).tolist() == expected


@pytest.mark.parametrize("width", [1, 33, 70, 256])
@pytest.mark.parametrize("name", sorted(CODEC_NAMES))
def test_what_was_decoded_comes_back_unchanged(name, width):
    codec, rows = RowCodec.named(name, width), rows_with_everything(width)
    if name == "float16":
        rows = rows.clamp(-6e4, 6e4)
    once = codec.decode(codec.encode(rows), torch.float32)
    again = codec.decode(codec.encode(once), torch.float32)
    assert torch.equal(once, again)
    assert torch.equal(once, codec.decode(codec.encode(once), codec.natural_dtype).float()), "its type loses nothing"
    assert (once[1] == 0).all(), "zero stays zero"
    if name != "float16":
        assert torch.equal(once[5], -once[0]), "a number and its negative are equally far off"


@pytest.mark.parametrize(("name", "step"), [("float8_e4m3", 1 / 16), ("int8", 0.502 / 127), ("int4", 0.502 / 7)])
def test_no_number_is_further_off_than_its_block_allows(name, step):
    rows = torch.randn(500, 96, generator=torch.Generator().manual_seed(3)) * 3
    codec = RowCodec.named(name, 96)
    off = (codec.decode(codec.encode(rows), torch.float32) - rows).abs().view(500, 3, 32)
    assert (off.amax(2) <= rows.abs().view(500, 3, 32).amax(2) * step).all()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_largest_and_the_smallest_numbers_stay_finite_and_in_place(name):
    codec = RowCodec.named(name, 32)
    rows = torch.full((3, 32), torch.finfo(torch.float32).max)
    rows[1], rows[2] = 2.0**-126, 2.0**-130
    back = codec.decode(codec.encode(rows), torch.float32)
    assert back.isfinite().all()
    assert (back[0] / rows[0] - 1).abs().max() < 0.01
    assert torch.equal(back[1], rows[1])
    assert (back[2] == 0).all()
    assert torch.equal(codec.encode(back), codec.encode(codec.decode(codec.encode(back), torch.float32)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["float8_e4m3", "int8", "int4"])
def test_numbers_that_are_none_are_refused_wherever_they_stand(name, bad):
    for column in (0, 31, 32, 69):
        rows = torch.ones(3, 70)
        rows[1, column] = bad
        with pytest.raises(CheckpointError, match="infinite or NaN"):
            RowCodec.named(name, 70).encode(rows)


def test_numbers_too_large_for_a_type_are_refused_and_not_made_infinite():
    with pytest.raises(CheckpointError, match=r"float16 cannot hold .*would be infinite"):
        RowCodec.named("float16", 2).encode(torch.tensor([[1.0, 1e5]]))
    with pytest.raises(CheckpointError, match="too large"):
        RowCodec(2, torch.float8_e4m3fn, "table", 0.5).encode(torch.tensor([[1.0, 1000.0]]))
    # What was infinite before is kept by types that have an infinity: copying loses nothing.
    assert RowCodec.named("float16", 1).encode(torch.tensor([[math.inf]])).view(torch.float16).item() == math.inf


def test_sizes_of_records_are_those_of_the_format():
    sizes = {name: RowCodec.named(name, 256).record_bytes for name in CODEC_NAMES}
    assert sizes == {"float32": 1024, "bfloat16": 512, "float16": 512, "float8_e4m3": 264, "int8": 272, "int4": 144}
    assert [RowCodec.named("int4", width).record_bytes for width in (1, 33)] == [3, 21]


def test_a_record_of_the_same_codec_is_not_encoded_again():
    codec = RowCodec.named("float8_e4m3", 32)
    # Scales that `encode` would not have chosen: only a copy keeps them.
    records = torch.arange(66, dtype=torch.uint8).view(2, 33)
    assert codec.reencode(records, RowCodec.named("float8_e4m3", 32)) is records
    exact = torch.tensor([[1 + 2.0**-40]], dtype=torch.float64)
    double = RowCodec(1, torch.float64)
    assert torch.equal(
        RowCodec(1, torch.float32).reencode(double.encode(exact), double).view(torch.float32), exact.float()
    )


def test_codecs_that_cannot_be_are_refused():
    for options, message in (
        ((0, torch.float32), "0 numbers"),
        ((4, torch.int32), "cannot be stored"),
        ((4, torch.int8), "8-bit rows have one scale or scales by blocks"),
        ((4, torch.int4, "table"), "4-bit rows have them by blocks"),
        ((4, torch.int8, "blocks", 1.0, 4, torch.int16), "scales of torch.int16"),
        ((4, torch.int8, "blocks", 1.0, 0), "for 0 numbers"),
        ((4, torch.float32, "blocks"), "others have none"),
        ((4, torch.float8_e4m3fn, "none"), "8-bit rows have one scale"),
    ):
        with pytest.raises(ConfigError, match=message):
            RowCodec(*options)
    with pytest.raises(ConfigError, match=r"stored as float32, .*not as 'int3'"):
        RowCodec.named("int3", 4)
