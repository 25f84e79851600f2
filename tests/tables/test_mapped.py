"""Rows read in place equal the rows of the tensors that were written, however these lie in files."""

import copy
import os
import pickle
import threading

import numpy as np
import pytest
import torch
from tests.raw_safetensors import e4m3, e8m0, random_e4m3, write_raw

from engram_lm.errors import CheckpointError, ConfigError, RowRangeError, TableClosedError
from engram_lm.tables import MappedTable, ResidentTable, tensor_layout
from engram_lm.tables.block_float8 import dequantize, quantize
from engram_lm.tables.files.safetensors_file import read_header

WIDTH, SIZES = 6, (40, 1, 60)
NUM_ROWS = sum(SIZES)


def weight(dtype=torch.float32):
    return torch.randn(NUM_ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def raw(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def plain(folder, name="BF16", dtype=torch.bfloat16):
    """Three shards of different sizes in two files, at odd addresses."""
    parts = [(name, (len(part), WIDTH), raw(part)) for part in weight(dtype).split(SIZES)]
    write_raw(folder / "one", {"pad": ("F8_E4M3", (3,), b"abc"), "0": parts[0], "2": parts[2]}, align=1)
    write_raw(folder / "two", {"1": parts[1]}, align=1)
    one, two = read_header(folder / "one"), read_header(folder / "two")
    assert one["0"].start_bytes % 2 == 1 or one["2"].start_bytes % 2 == 1
    return [one["0"], two["1"], one["2"]]


def opened(shards, *, scales=None, dtype=None):
    return MappedTable(tensor_layout(shards, scales=scales), dtype)


def quantized(folder, rows=50, width=70, seed=4):
    """E4M3 rows with one scale per 32 columns, the last block cut; every scale byte but NaN's."""
    scales = np.random.default_rng(seed).integers(90, 160, rows * 3, dtype=np.uint8)
    scales[:2] = 0, 1
    values = random_e4m3(rows * width, seed)
    write_raw(folder / "file", {"w": ("F8_E4M3", (rows, width), values), "s": ("F8_E8M0", (rows, 3), scales.tobytes())})
    wide = e8m0(scales.tobytes()).reshape(rows, 3).repeat(32, axis=1)[:, :width]
    return read_header(folder / "file"), e4m3(values).reshape(rows, width) * wide


@pytest.mark.parametrize(("name", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_rows_over_shards_of_any_size_are_the_rows_of_one_table(tmp_path, name, dtype):
    table, twin = opened(plain(tmp_path, name, dtype)), ResidentTable(weight(dtype))
    assert (table.num_rows, table.width, table.dtype) == (NUM_ROWS, WIDTH, dtype)
    edges = torch.tensor([0, 39, 40, 41, NUM_ROWS - 1, 40, 0])
    for rows in (edges, torch.randint(NUM_ROWS, (2, 3, 50)), torch.tensor(7), torch.empty(0, 2, dtype=torch.long)):
        assert torch.equal(table.gather(rows), twin.gather(rows))
        assert table.gather(rows).shape == (*rows.shape, WIDTH)
    out = torch.empty(7, WIDTH, dtype=dtype)
    assert table.gather(edges, out=out) is out
    assert torch.equal(out, weight(dtype)[edges])


def test_another_type_is_converted_when_rows_are_read(tmp_path):
    table = opened(plain(tmp_path), dtype=torch.float32)
    assert torch.equal(table.gather(torch.arange(NUM_ROWS)), weight(torch.bfloat16).float())
    assert (table.codec.stored_dtype, table.row_bytes) == (torch.bfloat16, 4 * WIDTH)


@pytest.mark.parametrize("bad", [-1, NUM_ROWS, 2**40])
def test_a_row_outside_the_table_is_refused_by_number_and_nothing_is_written(tmp_path, bad):
    table, out = opened(plain(tmp_path)), torch.full((2, WIDTH), 3.0)
    with pytest.raises(RowRangeError, match=rf"{bad}.*0 to {NUM_ROWS - 1}"):
        table.gather(torch.tensor([3, bad]), out=out)
    assert (out == 3).all()
    with pytest.raises(RowRangeError, match="int64"):
        table.gather(torch.tensor([1.0]))


def test_a_closed_table_refuses_and_may_be_closed_twice(tmp_path):
    table = opened(plain(tmp_path))
    table.close()
    table.close()
    for use in (lambda: table.gather(torch.tensor([0])), lambda: table.load_records(0, 1)):
        with pytest.raises(TableClosedError):
            use()


def test_eight_bit_rows_equal_their_definition_exactly_in_bfloat16(tmp_path):
    header, expected = quantized(tmp_path)
    table = opened([header["w"]], scales=[header["s"]])
    assert table.dtype == torch.bfloat16
    rows = torch.randperm(50)
    # The first row holds the smallest scales, 2 ** -127 and 2 ** -126: there products leave bfloat16's range, only.
    exact = torch.from_numpy(expected)
    assert torch.equal(table.gather(rows).double()[rows > 0], exact[rows][rows > 0])
    assert torch.equal(table.gather(rows), exact.to(torch.bfloat16)[rows])
    wide = opened([header["w"]], scales=[header["s"]], dtype=torch.float32).gather(torch.arange(50))
    assert torch.equal(wide.double(), exact)
    assert (wide[0, :32].abs() > 0).any(), "the scale byte 0 is 2 ** -127, not 0"


def test_a_scale_of_255_is_not_a_number():
    scales = torch.tensor([[255, 127]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    result = dequantize(torch.ones(1, 64).to(torch.float8_e4m3fn), scales, torch.bfloat16)
    assert result[:, :32].isnan().all() and (result[:, 32:] == 1).all()


def test_one_scale_for_the_whole_table_is_applied_before_rounding(tmp_path):
    values = random_e4m3(NUM_ROWS * 8, 2)
    write_raw(tmp_path / "file", {"w": ("F8_E4M3", (NUM_ROWS, 8), values)})
    table = opened([read_header(tmp_path / "file")["w"]], scales=0.0137)
    expected = torch.from_numpy(e4m3(values).reshape(NUM_ROWS, 8)).float() * 0.0137
    assert torch.equal(table.gather(torch.arange(NUM_ROWS)), expected.to(torch.bfloat16))


@pytest.mark.parametrize("square", [False, True])
def test_dequantized_numbers_quantize_to_equal_numbers(tmp_path, square):
    header, expected = quantized(tmp_path, rows=50)
    values, scales = header["w"].load(), header["s"].load()
    exact = torch.from_numpy(expected).float()
    if square:
        scales = torch.from_numpy(np.random.default_rng(3).integers(100, 150, (2, 3), dtype=np.uint8))
        wide = torch.from_numpy(e8m0(scales.numpy().tobytes()).reshape(2, 3).repeat(32, 0).repeat(32, 1)[:50, :70])
        exact = (values.double() * wide).float()
        assert torch.equal(dequantize(values, scales.view(torch.float8_e8m0fnu), torch.float32, square=True), exact)
    again = dequantize(*quantize(exact, square=square), torch.float32, square=square)
    assert torch.equal(again, exact)


def test_quantizing_takes_the_smallest_power_of_two_that_fits_and_refuses_what_cannot():
    numbers = torch.zeros(4, 64)
    numbers[0, :2] = torch.tensor([448.0, -3.0])
    numbers[1, 33] = -449.0
    numbers[2, 0], numbers[2, 32] = 1e-30, 2.0**-130
    values, scales = quantize(numbers)
    assert scales.float()[:2].tolist() == [[1, 1], [1, 2]]
    assert values.float()[1, 33] == -224
    assert scales.float()[3].tolist() == [1, 1]
    back = dequantize(values, scales, torch.float32)[2]
    assert abs(back[0] / 1e-30 - 1) <= 2**-4
    assert back[32] == 2.0**-130, "under the smallest scale there is, 2 ** -127"
    for bad in (float("nan"), float("inf")):
        with pytest.raises(CheckpointError, match="infinite or NaN"):
            quantize(torch.tensor([[1.0, bad]]))


def test_stored_rows_are_copied_as_they_lie_over_shard_bounds(tmp_path):
    table = opened(plain(tmp_path), dtype=torch.float32)
    assert torch.equal(table.load_records(38, 45).view(torch.bfloat16), weight(torch.bfloat16)[38:45])
    with pytest.raises(RowRangeError):
        table.load_records(38, NUM_ROWS + 1)
    header, _ = quantized(tmp_path)
    table = opened([header["w"]], scales=[header["s"]])
    values, scales = table.load_records(3, 9).split([70, 3], dim=1)
    assert torch.equal(values, header["w"].load(3, 9).view(torch.uint8))
    assert torch.equal(scales, header["s"].load(3, 9).view(torch.uint8))


def test_copies_and_pickles_open_the_same_rows_again(tmp_path):
    table = opened(plain(tmp_path), dtype=torch.float32)
    others = [copy.deepcopy(table), pickle.loads(pickle.dumps(table))]
    table.close()
    for other in others:
        assert torch.equal(other.gather(torch.arange(NUM_ROWS)), weight(torch.bfloat16).float())


def test_several_threads_read_the_same_bytes(tmp_path):
    table, expected, wrong = opened(plain(tmp_path)), weight(torch.bfloat16), []

    def read(seed):
        rows = torch.randint(NUM_ROWS, (500,), generator=torch.Generator().manual_seed(seed))
        for _ in range(20):
            wrong.extend([seed] * (not torch.equal(table.gather(rows), expected[rows])))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_file_cut_after_its_header_was_read_is_refused_when_it_is_mapped(tmp_path):
    shards = plain(tmp_path)
    os.truncate(tmp_path / "one", shards[2].start_bytes + 100)
    with pytest.raises(CheckpointError, match=r"was cut after its header .* found"):
        opened(shards)
    os.truncate(tmp_path / "one", 0)
    with pytest.raises(CheckpointError, match="cannot map"):
        opened(shards)


def test_rows_cut_away_while_the_file_is_mapped_are_refused_and_the_others_read(tmp_path):
    shards = plain(tmp_path)
    table, rows = opened(shards, dtype=torch.float32), torch.arange(NUM_ROWS)
    whole = table.gather(rows)
    content = (tmp_path / "one").read_bytes()
    # Rows of pages that are gone: touching them would end this process.
    os.truncate(tmp_path / "one", shards[0].start_bytes)
    with pytest.raises(CheckpointError, match=r"one was cut after its header .* put the whole file back"):
        table.gather(rows)
    kept = [row for row, shard in enumerate(np.repeat([shard.file for shard in shards], SIZES)) if "one" not in shard]
    assert torch.equal(table.gather(torch.tensor(kept)), whole[kept])
    with open(tmp_path / "one", "r+b") as file:
        file.write(content)
    assert torch.equal(table.gather(rows), whole)


def test_stats_tell_what_the_table_takes_in_its_files(tmp_path):
    stats = opened(plain(tmp_path), dtype=torch.float32).stats()
    assert stats["stored_bytes"] == NUM_ROWS * WIDTH * 2
    assert (stats["table_bytes"], stats["num_files"], stats["tier"]) == (NUM_ROWS * WIDTH * 4, 2, "mmap")


def test_tensors_that_are_no_table_are_refused_by_name(tmp_path):
    half, eight, scale = ("BF16", (2, 3), b"\0" * 12), ("F8_E4M3", (2, 40), b"\0" * 80), ("F8_E8M0", (2, 2), b"\0" * 4)
    write_raw(tmp_path / "file", {
        "half": half, "flat": ("BF16", (6,), b"\0" * 12), "none": ("BF16", (0, 3), b""),
        "wide": ("BF16", (1, 4), b"\0" * 8), "full": ("F32", (1, 3), b"\0" * 12), "ids": ("I64", (1, 1), b"\0" * 8),
        "eight": eight, "scale": scale, "long": ("F8_E8M0", (2, 7), b"\0" * 14),
    })  # fmt: skip
    header = read_header(tmp_path / "file")
    for names, message in (
        (["flat"], r"flat .*\[rows, width\]"),
        (["none"], r"none .*at least one"),
        (["half", "wide"], "wide .*differs in width or type"),
        (["half", "full"], "full .*differs in width or type"),
        (["ids"], r"ids \(I64"),
    ):
        with pytest.raises(CheckpointError, match=message):
            opened([header[name] for name in names])
    for scales, message in (
        ([header["long"]], r"long .*does not read scales of this type and shape for eight"),
        ([header["ids"]], r"ids .*does not read scales of this type and shape for eight"),
        ([], "1 shards have 0"),
        (float("nan"), "scale is nan"),
        (0.0, "scale is 0.0"),
    ):
        with pytest.raises(CheckpointError, match=message):
            opened([header["eight"]], scales=scales)
    with pytest.raises(ConfigError, match="need scales"):
        opened([header["eight"]])
    with pytest.raises(ConfigError, match="only rows of F8_E4M3, F8_E5M2, I8 have scales"):
        opened([header["half"]], scales=2.0)
    with pytest.raises(ConfigError, match="16 bits or more"):
        opened([header["half"]], dtype=torch.int64)
    with pytest.raises(ConfigError, match="at least one shard"):
        opened([])


def test_rows_that_must_stay_are_brought_into_memory_and_locked_there(tmp_path, monkeypatch):
    shards, rows = plain(tmp_path), torch.arange(NUM_ROWS)
    layout = tensor_layout(shards)
    for options in ({"populate": True}, {"lock": True}):
        table = MappedTable(layout, **options)  # these few pages may be locked by anybody
        assert torch.equal(table.gather(rows), weight(torch.bfloat16))
        assert table.stats()["locked"] == ("lock" in options)
        other = pickle.loads(pickle.dumps(table))
        assert (other.populate, other.lock) == (table.populate, table.lock)
    import ctypes

    class Forbidding:
        def __init__(self, *_, **__): ...

        def mlock(self, *_):
            ctypes.set_errno(12)
            return -1

    monkeypatch.setattr(ctypes, "CDLL", Forbidding)
    with pytest.raises(ConfigError, match=r"cannot be locked in memory \(Cannot allocate.*ulimit -l.*populate=True"):
        MappedTable(layout, lock=True)
