"""Every kind of source gives its documents whole; what is broken, missing or changing is refused in words."""

import bz2
import gzip
import json
import lzma
import random
import re
import sys
import time

import datasets
import pyarrow
import pytest
from pyarrow import parquet
from tokenizers import Regex, pre_tokenizers

from engram_lm.errors import ConfigError, DataError, MissingExtraError
from engram_lm.training.data import sources
from engram_lm.training.data.formats import PIECE_CHARACTERS, cut_text
from engram_lm.training.data.sources import open_sources
from engram_lm.training.data.text_source import STANDARD_LIBRARY, TextSource

TEXTS = ["The cat sat.\nIt slept.\n", "déjà vu 🐈", "x = 1\n\n\ny = 2"]
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def documents(*given):
    """Text and digest of every document."""
    found, text = [], ""
    for piece in open_sources(given).pieces():
        assert len(piece.text) <= PIECE_CHARACTERS
        text += piece.text
        if piece.ends_document:
            found.append((text, piece.digest))
            text = ""
    assert not text
    return found


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_parquet(path, values, name="text", **options):
    parquet.write_table(pyarrow.table({name: values}), path, **options)
    return path


def test_each_kind_gives_the_same_documents_with_the_same_digests(tmp_path):
    for number, text in enumerate(TEXTS):
        (tmp_path / "plain").mkdir(exist_ok=True)
        (tmp_path / "plain" / f"{number}.txt").write_bytes(b"\xef\xbb\xbf" * number + text.encode())
    (tmp_path / "plain" / "2.txt").rename(tmp_path / "plain" / "2.md")
    (tmp_path / "plain" / "2.md").write_bytes(TEXTS[2].replace("\n", "\r\n").encode())
    lines = write_jsonl(tmp_path / "a.jsonl", [{"text": text, "id": 1} for text in [*TEXTS, None, " \n"]])
    (tmp_path / "b.ndjson.gz").write_bytes(gzip.compress(b"\n" + lines.read_bytes()))
    write_parquet(tmp_path / "c.parquet", [None, *TEXTS, ""])
    data = datasets.Dataset.from_dict({"text": TEXTS, "other": [1, 2, 3]})
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "splits")
    expected = documents(tmp_path / "plain")
    assert [text for text, _ in expected] == TEXTS
    for name in ("a.jsonl", "b.ndjson.gz", "c.parquet", "saved", "splits"):
        assert documents(tmp_path / name) == expected, name
    assert documents({"path": str(tmp_path / "splits"), "split": "test"}) == expected[:1]
    (tmp_path / "hub").mkdir()
    write_parquet(tmp_path / "hub" / "train.parquet", TEXTS)
    stream = TextSource(path=str(tmp_path / "hub"), kind="dataset", streaming=True)
    assert documents(stream) == expected
    # A folder of all of it goes by the names of its files.
    assert documents(tmp_path / "plain", tmp_path / "hub") == 2 * expected


def test_what_is_no_text_is_counted_in_a_folder_and_refused_by_name(tmp_path):
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / "binary").write_bytes(b"\x7fELF\0")
    # Broken far behind the beginning, and at the very end.
    (tmp_path / "latin").write_bytes(b"a" * (3 << 20) + "é".encode("latin-1") + b"b")
    (tmp_path / "half").write_bytes("aé".encode()[:-1])
    (tmp_path / "blank").write_text(" \n")
    (tmp_path / ".hidden").write_text("not read")
    opened = open_sources([tmp_path])
    assert opened.skipped == {"binary": 1, "not UTF-8": 2, "empty": 1}
    assert [piece.text for piece in opened.pieces()] == ["text"]
    assert sum(piece.source_bytes for piece in opened.pieces()) == opened.num_bytes == 4
    for name in ("binary", "latin", "half", "blank"):
        with pytest.raises(DataError, match=rf"{name} is (binary|not UTF-8|empty)"):
            open_sources([tmp_path / name])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "a"}\n{"text": "b"\n', "line 2 .*not JSON"),
        (b'{"text": "a"}\n\n{"body": "b", "id": 1}\n', "line 3 .*no field 'text', it has 'body', 'id'"),
        (b'{"text": ["a"]}', "'text' in line 1 .*of type list"),
        (b'"text"', "line 1 .*JSON str"),
        (b'{"text": "\xff"}', "line 1 .*not JSON"),
        (b"[" * 100_000, "line 1 .*not JSON"),
    ],
)
def test_a_broken_line_is_named(tmp_path, content, words):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        documents(path)


def test_json_lines_arrays_and_parquet_are_known_by_what_they_hold_whatever_their_names(tmp_path):
    records = [{"text": text, "url": "u"} for text in TEXTS]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    pretty = json.dumps(records, indent=2).replace("\n", "\r\n").encode()
    files = {
        "c4.json": lines, "c4-train.00000.json.gz": gzip.compress(lines, mtime=0),
        "C4.JSON": b"\xef\xbb\xbf" + lines,
        "part-00000": lines.replace(b"\n", b"\r\n"), "packed.jsonl": gzip.compress(lines, mtime=0),
        "flat.jsonl.gz": lines,
        "array.json": json.dumps(records).encode(), "pretty.json": b"\xef\xbb\xbf" + pretty, "array.jsonl": pretty,
    }  # fmt: skip
    write_parquet(tmp_path / "table.bin", TEXTS)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for name in [*files, "table.bin"]:
        assert [text for text, _ in documents(tmp_path / name)] == TEXTS, name
    (tmp_path / "notes.txt").write_text("not JSON")
    (tmp_path / "data.txt").write_bytes(lines)
    (tmp_path / "table.bin").unlink()
    opened = open_sources([{"path": str(tmp_path), "kind": "jsonl"}])
    assert opened.skipped == {"a copy of another": 3, "not jsonl": 1}
    assert {text for text, _ in documents({"path": str(tmp_path / "*.json*"), "kind": "jsonl"})} == set(TEXTS)
    with pytest.raises(DataError, match="matches nothing"):
        open_sources([tmp_path / "*.json5"])


def test_json_that_is_no_lines_of_documents_is_text_in_a_folder_and_says_so_where_it_is_named(tmp_path):
    config = json.dumps({"name": "package", "scripts": {}}, indent=2)
    (tmp_path / "package.json").write_text(config)
    (tmp_path / "small.json").write_text('{"a": 1}')
    (tmp_path / "list.json").write_text('[{"a": 1}]')
    assert {text for text, _ in documents(tmp_path)} == {config, '{"a": 1}', '[{"a": 1}]'}
    for name in ("small.json", "list.json"):
        with pytest.raises(DataError, match=rf"1 of .*{name} has no field 'text', it has 'a'"):
            documents(tmp_path / name)
        assert documents({"path": str(tmp_path / name), "field": "a", "kind": "text"})
    (tmp_path / "small.json").write_text('{"body": "b"}\n{"body": "c"}\n')
    with pytest.raises(DataError, match=r"line 1 of .*small.json has no field 'text', it has 'body'"):
        documents(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'[{"text": "a"}, {"text": "b"]', "object 2 of .*not JSON"),
        (b'[{"text": "a"}, ["text"]]', "object 2 of .*holds a JSON list"),
        (b'[{"text": "a"}, {"body": "b"}]', "object 2 of .*no field 'text', it has 'body'"),
        (b'[{"text": "a"}] {"text": "b"}', "holds more behind the array"),
        (b'[{"text": "a"}, {"text": "\xff"}]', "object 1 of .*not JSON"),
        (b'[{"text": "a"}', "object 2 of .*not JSON"),
    ],
)
def test_a_broken_object_of_an_array_is_named(tmp_path, content, words):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        documents({"path": str(path), "kind": "jsonl"})


def test_objects_of_an_array_may_be_longer_than_what_is_read_at_once(tmp_path):
    texts = ["é" * 3_000_000, "short", "b" * 1_500_000]
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts], ensure_ascii=False))
    assert [text for text, _ in documents(tmp_path / "a.json")] == texts


def test_what_is_packed_or_encoded_otherwise_says_what_it_is(tmp_path):
    files = {
        "a.jsonl.zst": (b"\x28\xb5\x2f\xfd\x04", "Zstandard"),
        "b.txt.bz2": (bz2.compress(b"text"), "bzip2"),
        "c.txt.xz": (lzma.compress(b"text"), "xz"),
        "d.zip": (b"PK\x03\x04rest", "zip archive"),
        "e.jsonl": ('{"text": "a"}'.encode("utf-16"), "UTF-16"),
        "f.txt": ("text".encode("utf-16-be"), "binary"),
    }
    for name, (data, words) in files.items():
        (tmp_path / name).write_bytes(data)
        for kind in ("auto", "jsonl"):
            if name != "f.txt":
                with pytest.raises(DataError, match=rf"{name} is .*{words}"):
                    documents({"path": str(tmp_path / name), "kind": kind})
    (tmp_path / "e.jsonl").unlink()
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "loop").symlink_to("..")
    skipped = open_sources([tmp_path]).skipped
    assert sum(skipped.values()) == 6 and skipped["a link to a folder"] == 1
    (tmp_path / "lost.txt").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"lost.txt is a link to nowhere"):
        open_sources([tmp_path / "lost.txt"])


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("at home")
    for source in ("~/a.txt", {"path": "~/a.txt", "kind": "text"}, "~/*.txt"):
        assert [text for text, _ in documents(source)] == ["at home"]


def test_half_of_a_surrogate_pair_becomes_a_replacement_character(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud83d b\\ud83d\\ude00"}\n')
    assert documents(path)[0][0] == "a\ufffd b😀"


def test_broken_parquet_is_refused(tmp_path):
    rows = [f"row {number} " * 40 for number in range(3000)]
    whole = write_parquet(tmp_path / "whole.parquet", rows, write_page_checksum=True, compression="NONE").read_bytes()
    cut, flipped = tmp_path / "cut.parquet", tmp_path / "flipped.parquet"
    cut.write_bytes(whole[: len(whole) // 2])
    place = whole.rindex(b"row 2500 row")
    flipped.write_bytes(whole[:place] + b"R" + whole[place + 1 :])
    for path in (cut, flipped):
        with pytest.raises(DataError, match=rf"{path.name} is a broken Parquet file"):
            documents(path)
    with pytest.raises(DataError, match=r"no field 'body', it has 'text'"):
        documents({"path": str(tmp_path / "whole.parquet"), "field": "body"})
    with pytest.raises(DataError, match=r"'text' in row 1 .*of type int"):
        documents(write_parquet(tmp_path / "numbers.parquet", [1, 2]))


def test_a_broken_gzip_file_is_refused(tmp_path):
    for name in ("a.txt.gz", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-9])
        with pytest.raises(DataError, match=r"broken gzip file"):
            documents(tmp_path / name)


def test_a_dataset_without_the_split_or_field_names_those_it_has(tmp_path):
    data = datasets.Dataset.from_dict({"body": TEXTS})
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match=r"no split 'dev', it has test, train"):
        documents({"path": str(tmp_path / "splits"), "split": "dev"})
    with pytest.raises(DataError, match=r"no field 'text', it has 'body'"):
        documents(tmp_path / "splits")


def test_a_file_that_cannot_be_read_or_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read /proc/self/mem"):
        open_sources(["/proc/self/mem"])
    with pytest.raises(DataError, match=r"nowhere is neither a file nor a folder.*hf://owner/name"):
        open_sources([tmp_path / "nowhere"])
    with pytest.raises(DataError, match=r"no text in .*no files at all"):
        open_sources([tmp_path])


def test_the_kind_of_a_folder_means_what_it_says(tmp_path):
    (tmp_path / "c4.00000.json.gz").write_bytes(gzip.compress(b'{"text": "a document"}\n'))
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a line"}])
    (tmp_path / "README.md").write_text("about")
    opened = open_sources([{"path": str(tmp_path), "kind": "jsonl"}])
    assert [piece.text for piece in opened.pieces()] == ["a line", "a document"]
    assert opened.skipped == {"not jsonl": 1}
    assert [text for text, _ in documents({"path": str(tmp_path), "kind": "text"})] == [
        "about",
        '{"text": "a line"}\n',
        '{"text": "a document"}\n',
    ]


def test_without_a_source_the_standard_library_is_read():
    names = [item.name for item in open_sources().items]
    assert "json/decoder.py" in names and names == [item.name for item in open_sources([STANDARD_LIBRARY]).items]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, name):
    path = tmp_path / name
    if name == "a.parquet":
        write_parquet(path, TEXTS * 2000)
    else:
        write_jsonl(path, [{"text": text} for text in TEXTS * 20_000])
    pieces = open_sources([path]).pieces()
    next(pieces)
    with open(path, "ab") as file:
        file.write(b'{"text": 3}\n')
    with pytest.raises(DataError, match=r"changed while it was read"):
        list(pieces)


def test_digests_are_remembered_until_the_file_changes(tmp_path, monkeypatch):
    path, memory = tmp_path / "a.txt", tmp_path / "files.json"
    path.write_text("one")
    monkeypatch.setattr(sources, "_RACY_NANOSECONDS", 0)
    time.sleep(0.01)
    first = open_sources([path], remembered=memory).items[0].identity
    entries = json.loads(memory.read_text())
    ((key, entry),) = entries.items()
    memory.write_text(json.dumps({key: [*entry[:2], "0" * 64, ""]}))
    assert open_sources([path], remembered=memory).items[0].identity == "text::" + "0" * 64
    path.write_text("two")
    changed = open_sources([path], remembered=memory).items[0].identity
    assert changed not in (first, "text::" + "0" * 64)
    memory.write_text("{broken")
    assert open_sources([path], remembered=memory).items[0].identity == changed


def test_a_file_changed_just_now_is_not_remembered(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    open_sources([tmp_path / "a.txt"], remembered=tmp_path / "files.json")
    assert not (tmp_path / "files.json").exists()


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Split(Regex(CL100K), "isolated"),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]),
    ],
    ids=["gpt2", "cl100k", "ours"],
)
def test_a_long_document_is_cut_where_pre_tokenizers_cut(pre_tokenizer):
    draw = random.Random(3)
    text = "".join(draw.choice(["a", "b1", " ", "\n", "\n", "\t", ".", "\r\n", "é", " x\ny"]) for _ in range(20_000))
    pieces = list(cut_text(text, 400))
    assert "".join(pieces) == text and len(pieces) > 50 and max(map(len, pieces)) <= 400

    def cuts(piece):
        return [word for word, _ in pre_tokenizer.pre_tokenize_str(piece)]

    assert [word for piece in pieces for word in cuts(piece)] == cuts(text)


@pytest.mark.parametrize("text", ["a" * 1000, "\n" * 1000, "word " * 200, "a\n\n" * 333, ""])
def test_a_text_without_good_places_is_cut_all_the_same(text):
    pieces = list(cut_text(text, 64))
    assert "".join(pieces) == text and max(map(len, pieces)) <= 64
    assert all(pieces) or text == ""


def test_a_file_is_cut_like_the_same_text_in_a_record(tmp_path):
    text = "some line, with words\n\n and\r\nmore\n" * 40_000
    (tmp_path / "a.txt").write_text(text, newline="")
    write_jsonl(tmp_path / "a.jsonl", [{"text": text.replace("\r\n", "\n")}])
    plain, record = (list(open_sources([tmp_path / name]).pieces()) for name in ("a.txt", "a.jsonl"))
    assert len(plain) > 3
    assert [(p.text, p.digest, p.ends_document) for p in plain] == [(p.text, p.digest, p.ends_document) for p in record]


def test_impossible_sources_are_refused():
    with pytest.raises(ConfigError, match=r"no field 'feild'; did you mean 'field'\?"):
        TextSource.of({"path": "a", "feild": "text"})
    with pytest.raises(ConfigError, match=r"needs a path"):
        TextSource.of({"field": "text"})
    with pytest.raises(ConfigError, match=r"revision belong to datasets"):
        TextSource(path="a.txt", revision="main")
    with pytest.raises(ConfigError, match=re.escape("kind of a is one of auto, text, jsonl, parquet, dataset")):
        TextSource(path="a", kind="json")  # type: ignore[arg-type]


@pytest.mark.parametrize("package", ["pyarrow", "datasets"])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, package):
    write_parquet(tmp_path / "a.parquet", TEXTS)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"{package}.*engram-lm\[data\]"):
        open_sources([{"path": str(tmp_path / "a.parquet"), "kind": "auto" if package == "pyarrow" else "dataset"}])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_that_the_hub_does_not_give_is_refused(streaming):
    with pytest.raises(DataError, match=r"cannot open the dataset hf://nobody/nothing, split 'train'"):
        open_sources([TextSource(path="hf://nobody/nothing", streaming=streaming)])
