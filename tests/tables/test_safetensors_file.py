"""Headers are believed only as far as their files go; names are found through the index or without one."""

import json
import os

import pytest
import safetensors.torch
import torch
from tests.raw_safetensors import write_raw

from engram_lm.errors import CheckpointError
from engram_lm.tables import TensorFolder
from engram_lm.tables.files.safetensors_file import INDEX_NAME, read_header
from engram_lm.tables.files.safetensors_writer import TensorWriter

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).view(2, 3),
    "a": torch.tensor(7, dtype=torch.int64),
    "half": torch.arange(5).to(torch.bfloat16),
    "eight": torch.tensor([[1.5, -448.0]]).to(torch.float8_e4m3fn),
    "empty": torch.empty(0, 4),
}


def header_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(start, end, shape=None, dtype="U8"):
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def index(folder, places):
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": places}))


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_tensors_of_the_official_writer_are_read_back(tmp_path):
    tensors = {name: tensor for name, tensor in TENSORS.items() if tensor.ndim}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "model.safetensors")
    assert set(header) == set(tensors)
    for name, tensor in tensors.items():
        assert same(header[name].load(), tensor)
    assert torch.equal(header["b"].load(1, 2), tensors["b"][1:2])
    with pytest.raises(IndexError, match="no part from 1 to 3"):
        header["b"].load(1, 3)


def test_pieces_in_any_order_become_a_file_that_the_official_reader_reads(tmp_path):
    plan = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}
    with TensorWriter(tmp_path / "file", plan) as writer:
        writer.append("b", TENSORS["b"][:1])
        for name in ("half", "a", "eight", "empty"):
            writer.append(name, TENSORS[name])
        writer.append("b", TENSORS["b"][1:])
    read = safetensors.torch.load_file(tmp_path / "file")
    assert set(read) == set(TENSORS)
    assert all(same(read[name].reshape(-1), tensor.reshape(-1)) for name, tensor in TENSORS.items())
    header = read_header(tmp_path / "file")
    assert header["a"].load() == 7 and header["a"].load().shape == ()
    assert all(place.start_bytes % place.torch_dtype.itemsize == 0 for place in header.values())


def test_a_writer_refuses_too_much_too_little_and_another_type(tmp_path):
    def write(*pieces):
        with TensorWriter(tmp_path / "file", {"a": (torch.float32, (2, 2))}) as writer:
            for piece in pieces:
                writer.append("a", piece)

    with pytest.raises(CheckpointError, match="a was not written to its end: 8 bytes"):
        write(torch.zeros(2))
    with pytest.raises(CheckpointError, match="a got more numbers"):
        write(torch.zeros(2), torch.zeros(3))
    with pytest.raises(CheckpointError, match=r"promised as torch.float32.*bfloat16"):
        write(torch.zeros(4, dtype=torch.bfloat16))


def test_a_truncated_file_is_refused_with_expected_and_found_bytes(tmp_path):
    path = tmp_path / "model.safetensors"
    write_raw(path, {"a": ("F32", (100, 4), b"\1" * 1600), "z": ("I64", (1,), b"\0" * 8)})
    whole = path.stat().st_size
    for cut in (whole - 1, whole - 9, whole // 2):
        os.truncate(path, cut)
        with pytest.raises(CheckpointError, match=rf"{path} is truncated: expected {whole} bytes, found {cut}"):
            read_header(path)
    os.truncate(path, whole + 1)
    with pytest.raises(CheckpointError, match=rf"longer than its header says: expected {whole} bytes, found"):
        read_header(path)
    for cut in (40, 8, 7, 0):
        os.truncate(path, cut)
        with pytest.raises(CheckpointError, match=rf"truncated or not a safetensors file.*found {cut} bytes"):
            read_header(path)


def test_a_file_cut_after_its_header_was_read_is_refused_when_it_is_loaded(tmp_path):
    write_raw(tmp_path / "file", {"a": ("F32", (100,), b"\1" * 400)})
    place = read_header(tmp_path / "file")["a"]
    os.truncate(tmp_path / "file", place.start_bytes + 10)
    with pytest.raises(CheckpointError, match=r"expected 400 bytes of a from byte .*, found 10"):
        place.load()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ((2**63).to_bytes(8, "little"), "not readable JSON"),
        (b"[" * 100_000, "not readable JSON"),
        (b"\xff\xfe", "not readable JSON"),
        ([1], "JSON list, not an object"),
        (b'{"a": {}, "a": {}}', "names 'a' twice"),
        ({"a": 3}, "entry for a has no type"),
        ({"a": {"dtype": 1, "shape": [1], "data_offsets": [0, 1]}}, "entry for a has no type"),
        ({"a": entry(0, 4, shape=[-2, -2])}, "impossible shape"),
        ({"a": entry(0, 4, shape=[2.0, 2])}, "impossible shape"),
        ({"a": entry(0, 4, shape=None) | {"shape": "4"}}, "impossible shape"),
        ({"a": entry(0, 4, shape=[1] * 17)}, "impossible shape"),
        ({"a": entry(0, 4, shape=[2**63])}, "impossible shape"),
        ({"a": entry(0, 4) | {"data_offsets": [0]}}, "impossible data_offsets"),
        ({"a": entry(0, 4) | {"data_offsets": [-4, 0]}}, "impossible data_offsets"),
        ({"a": entry(0, 4) | {"data_offsets": [True, 4]}}, "impossible data_offsets"),
        ({"a": entry(4, 0, shape=[4])}, "impossible data_offsets"),
        ({"a": entry(0, 4, shape=[5])}, "takes 5 bytes, its data_offsets hold 4"),
        ({"a": entry(0, 4, shape=[2], dtype="F32")}, "takes 8 bytes, its data_offsets hold 4"),
        ({"a": entry(0, 2**40)}, "truncated: expected .* found"),
        ({"a": entry(0, 3), "b": entry(2, 4)}, "b .* overlaps the tensor before it"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, "b .* overlaps"),
        ({"a": entry(0, 1), "b": entry(2, 4)}, "b .* leaves a gap"),
        ({"a": entry(1, 4)}, "a .* leaves a gap"),
    ],
    ids=str,
)
def test_a_malformed_header_is_refused_by_what_is_wrong_in_it(tmp_path, header, message):
    with pytest.raises(CheckpointError, match=message + ".* again"):
        read_header(header_file(tmp_path / "file", header, b"1234"))


def test_a_header_longer_than_the_file_or_the_format_allows_is_refused_unread(tmp_path):
    path = tmp_path / "file"
    for length in (11, 2**63, 2**64 - 1):
        path.write_bytes(length.to_bytes(8, "little") + b"{}        ")
        with pytest.raises(CheckpointError, match=f"header length of {length} bytes"):
            read_header(path)
    path.write_bytes((100_000_001).to_bytes(8, "little"))
    os.truncate(path, 200_000_000)
    with pytest.raises(CheckpointError, match="at most 100000000 are allowed"):
        read_header(path)


def test_tensors_of_unknown_types_may_lie_beside_but_cannot_be_read(tmp_path):
    file = header_file(tmp_path / "file", {"a": entry(0, 1, dtype="F4"), "b": entry(1, 4)}, b"1234")
    header = read_header(file)
    assert header["b"].load().tolist() == [ord("2"), ord("3"), ord("4")]
    with pytest.raises(CheckpointError, match=r"a \(F4 .*cannot be read"):
        header["a"].load()


def test_what_is_not_a_file_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("pipe", "is not a file"), ("absent", "cannot read")):
        with pytest.raises(CheckpointError, match=message):
            read_header(tmp_path / name)


def test_without_an_index_all_files_are_searched_and_a_name_in_two_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither .*index.json nor any"):
        TensorFolder(tmp_path)
    write_raw(tmp_path / "x.safetensors", {"a": ("BF16", (2,), b"1234")})
    write_raw(tmp_path / "y.safetensors", {"b": ("BF16", (1,), b"12")})
    folder = TensorFolder(tmp_path)
    assert sorted(folder.names) == ["a", "b"] and "a" in folder
    assert folder.find("b").file == str(tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match=f"tensor c is missing from {tmp_path}"):
        folder.find("c")
    write_raw(tmp_path / "z.safetensors", {"a": ("BF16", (1,), b"12")})
    with pytest.raises(CheckpointError, match=r"a is in both .*x.safetensors and .*z.safetensors"):
        TensorFolder(tmp_path)


def test_an_index_is_followed_to_the_files_that_are_asked_for_only(tmp_path):
    write_raw(tmp_path / "x.safetensors", {"a": ("BF16", (2,), b"1234")})
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    index(tmp_path, {"a": "x.safetensors", "b": "absent-2.safetensors", "c": "x.safetensors"})
    folder = TensorFolder(tmp_path)
    assert folder.find("a").shape == (2,)
    with pytest.raises(CheckpointError, match=r"absent-2.safetensors is missing: .* holds b"):
        folder.find("b")
    with pytest.raises(CheckpointError, match=r"x.safetensors does not hold c"):
        folder.find("c")


def test_a_name_that_no_file_system_holds_is_a_missing_file(tmp_path):
    index(tmp_path, {"a": "x" * 300, "b": "\ud800"})
    for name in "ab":
        with pytest.raises(CheckpointError, match=f"is missing: .* holds {name}"):
            TensorFolder(tmp_path).find(name)


BAD_FILES = ["../x", "/etc/passwd", "sub/../../x", "a\\..\\x", "", 3, None, "x\0y", "x" * 5000, "x/" * 2500]


@pytest.mark.parametrize("file", BAD_FILES, ids=lambda file: repr(file)[:20])
def test_an_index_that_leaves_its_folder_is_refused(tmp_path, file):
    index(tmp_path, {"a": file})
    with pytest.raises(CheckpointError, match=r"places a at .* not a file inside the folder"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": [1]}', "[]", "no"])
def test_an_index_without_a_map_is_refused(tmp_path, text):
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=INDEX_NAME):
        TensorFolder(tmp_path)


@pytest.mark.parametrize(("data", "words"), [
    (b"GGUF\3\0\0\0rest", "a GGUF file"),
    (b"PK\3\4\0\0\0\0rest", "a zip archive"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
])  # fmt: skip
def test_files_of_other_kinds_are_called_what_they_are(tmp_path, data, words):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"model.safetensors is {words}"):
        read_header(tmp_path / "model.safetensors")
