"""Packed shards hold every document once, whatever interrupted their making, and refuse what is not theirs."""

import concurrent.futures
import json
import resource
import subprocess
import sys

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from tests.beginnings import with_template
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engram_lm.errors import ConfigError, DataError, MismatchError, RunFolderError
from engram_lm.training.data import packing
from engram_lm.training.data.documents import Document, pack, read_documents
from engram_lm.training.data.formats import PIECE_CHARACTERS
from engram_lm.training.data.packing import pack_to_shards
from engram_lm.training.data.shards import TokenShards, token_dtype, tokenizer_digest, write_index, write_shard
from engram_lm.training.data.tokenizer import END_OF_TEXT, train_tokenizer

TEXTS = [f"document {number}: " + "the cat sat on the mat. " * (number % 7 + 1) for number in range(300)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(packing, "_BATCH_PIECES", 16)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "text" / "a.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def split(shards):
    """Documents as tuples of tokens."""
    tokens, ends = shards[:], shards.document_ends(0, len(shards))
    return [tuple(document.tolist()) for document in np.split(tokens, ends[:-1])]


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_every_document_is_on_one_side_with_an_end_token(tmp_path, tokenizer, source, small_batches):
    seen = {"reading": 0, "tokenizing": 0}
    totals = set()

    def progress(task, num_bytes, total_bytes):
        seen[task] += num_bytes
        totals.add(total_bytes)

    corpus = pack_to_shards(
        [source], tokenizer, tmp_path / "cache", held_out=0.1, shard_tokens=1000, on_progress=progress
    )
    end = tokenizer.eos_token_id
    expected = [(*tokenizer(text, add_special_tokens=False)["input_ids"], end) for text in TEXTS]
    train, held_out = split(corpus.train), split(corpus.held_out)
    assert sorted(train + held_out) == sorted(expected)
    # Each side keeps the order of the source.
    assert train == [document for document in expected if document in set(train)]
    assert 10 < len(held_out) < 60
    assert len(corpus.train.shards) > 3
    assert set(seen.values()) == totals == {source.stat().st_size}
    assert corpus.train.num_text_bytes + corpus.held_out.num_text_bytes == sum(len(text) for text in TEXTS)
    assert corpus.train.dtype == np.uint16 and corpus.train.end_token == end


def test_a_second_run_reuses_the_first_wherever_the_text_lies(tmp_path, tokenizer, source):
    first = pack_to_shards([source], tokenizer, tmp_path / "cache", held_out=0.1)
    source.rename(tmp_path / "moved.jsonl")
    second = pack_to_shards([tmp_path / "moved.jsonl"], tokenizer, tmp_path / "cache", held_out=0.1)
    assert (first.reused, second.reused) == (False, True)
    assert first.digest == second.digest
    (tmp_path / "moved.jsonl").write_text(json.dumps({"text": "other"}) + "\n" + json.dumps({"text": "text"}))
    third = pack_to_shards([tmp_path / "moved.jsonl"], tokenizer, tmp_path / "cache", held_out=0)
    assert third.held_out is None and third.train.num_documents == 2


def test_the_side_of_a_document_depends_on_its_text_alone(tmp_path, tokenizer):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "a" / f"{number:03d}.txt").write_text(text)
        (tmp_path / "b" / f"{999 - number}.txt").write_text(text)
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:150] * 2))
    a, b, c = (
        pack_to_shards([tmp_path / name], tokenizer, tmp_path / "cache", held_out=0.2) for name in ("a", "b", "c.jsonl")
    )
    assert sorted(split(a.held_out)) == sorted(split(b.held_out))
    assert set(split(c.held_out)) < set(split(a.held_out)) and not set(split(c.held_out)) & set(split(c.train))
    other = pack_to_shards([tmp_path / "a"], tokenizer, tmp_path / "cache", held_out=0.2, seed=1)
    assert set(split(other.held_out)) != set(split(a.held_out))


def test_a_side_without_documents_is_refused_with_a_share_that_works(tmp_path, tokenizer):
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    names = [tmp_path / f"{number}.txt" for number in range(5)]
    with pytest.raises(DataError, match=r"none of 5 documents .*a share of at least (\S+), ") as error:
        pack_to_shards(names, tokenizer, tmp_path / "cache", held_out=1e-9)
    share = float(str(error.value).split("at least ")[1].split(",")[0])
    assert pack_to_shards(names, tokenizer, tmp_path / "cache", held_out=share).held_out.num_documents == 1
    with pytest.raises(DataError, match=r"all 5 documents fell on the held-out side"):
        pack_to_shards(names, tokenizer, tmp_path / "cache", held_out=1 - 1e-9)
    with pytest.raises(DataError, match=r"single document"):
        pack_to_shards(names[:1], tokenizer, tmp_path / "cache", held_out=0.5)
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(DataError, match=r"every document is blank"):
        pack_to_shards([tmp_path / "blank.jsonl"], tokenizer, tmp_path / "cache")


def test_a_document_in_several_pieces_has_the_tokens_of_the_whole(tmp_path, tokenizer, small_batches):
    text = "".join(f"line {number} of a long document\n" for number in range(30_000))
    assert len(text) > 2 * PIECE_CHARACTERS
    (tmp_path / "long.txt").write_text(text)
    # A shard border inside the document: one batch of a piece each.
    packing._BATCH_PIECES = 1
    corpus = pack_to_shards([tmp_path / "long.txt"], tokenizer, tmp_path / "cache", held_out=0, shard_tokens=1000)
    assert len(corpus.train.shards) > 1 and corpus.train.num_documents == 1
    expected = [*tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.eos_token_id]
    assert corpus.train[:].tolist() == expected


def test_a_special_token_spelled_in_a_text_is_text(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(f"one {END_OF_TEXT} two")
    tokenizer.backend_tokenizer.enable_truncation(3)  # of the caller's; it must neither cut nor change
    try:
        corpus = pack_to_shards([tmp_path / "a.txt"], tokenizer, tmp_path / "cache", held_out=0)
        assert tokenizer.backend_tokenizer.truncation is not None
    finally:
        tokenizer.backend_tokenizer.no_truncation()
    tokens = corpus.train[:].tolist()
    assert tokens.count(tokenizer.eos_token_id) == 1 and tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokens[:-1]) == f"one {END_OF_TEXT} two"


KILLS = """
import os, signal, sys
from engram_lm.training.data import packing
from transformers import AutoTokenizer

packing._BATCH_PIECES = 16
source, folder, cache = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
for calls in (3, 60, 180, 181, 400, 100):
    pid = os.fork()
    if pid == 0:
        def count(*progress):
            global calls
            calls -= 1
            if calls == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        packing.pack_to_shards([source], tokenizer, cache, held_out=0.1, shard_tokens=1000, on_progress=count)
        os._exit(0)
    print(os.waitpid(pid, 0)[1])
"""


def test_killed_and_started_again_it_writes_the_same_bytes(tmp_path, tokenizer, source, small_batches):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = {"held_out": 0.1, "shard_tokens": 1000}
    # The last kills fall in the second file.
    parquet.write_table(pyarrow.table({"text": TEXTS[:200]}), source.parent / "b.parquet")
    whole = pack_to_shards([source.parent], tokenizer, tmp_path / "whole", **options)
    done = subprocess.run(
        [sys.executable, "-c", KILLS, source.parent, tmp_path / "tokenizer", tmp_path / "killed"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == ["9"] * 6
    (folder,) = (path for path in (tmp_path / "killed").iterdir() if path.is_dir())
    state = json.loads((folder / "state.json").read_text())
    assert state["place"]["item"] == 1 and state["place"]["pieces"] > 0 and not (folder / "index.json").exists()
    # A kill while a shard is written leaves this, and a shard that does not count yet.
    (folder / "train" / ".00001.safetensors.xy.part").write_bytes(b"half")
    (folder / "train" / f"{len(state['sides']['train']['shards']):05d}.safetensors").write_bytes(b"torn")
    first = (folder / "train" / "00000.safetensors").stat().st_mtime_ns
    done_bytes = [0]

    def count(task, num_bytes, total_bytes):
        done_bytes[0] += num_bytes if task == "tokenizing" else 0

    again = pack_to_shards([source.parent], tokenizer, tmp_path / "killed", on_progress=count, **options)
    assert done_bytes[0] == sum(path.stat().st_size for path in source.parent.iterdir())
    assert (folder / "train" / "00000.safetensors").stat().st_mtime_ns == first
    assert contents(again.folder) == contents(whole.folder)


def test_two_at_once_pack_it_once(tmp_path, tokenizer, source, small_batches):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        calls = [
            pool.submit(pack_to_shards, [source], tokenizer, tmp_path / "cache", held_out=0.1, shard_tokens=500)
            for _ in range(2)
        ]
        corpora = [call.result() for call in calls]
    assert sorted(corpus.reused for corpus in corpora) == [False, True]
    assert corpora[0].train[:].tolist() == corpora[1].train[:].tolist()


def test_a_full_disk_stops_it_and_loses_nothing(tmp_path, tokenizer, source, small_batches):
    options = {"held_out": 0.1, "shard_tokens": 1000}
    whole = pack_to_shards([source], tokenizer, tmp_path / "whole", **options)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(*progress):
        if list((tmp_path / "full").rglob("train/00001.safetensors")):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))

    try:
        with pytest.raises(RunFolderError, match=r"cannot write .*safetensors .*make room and start again"):
            pack_to_shards([source], tokenizer, tmp_path / "full", on_progress=fill, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "full").rglob("*.part"))
    assert contents(pack_to_shards([source], tokenizer, tmp_path / "full", **options).folder) == contents(whole.folder)


def test_a_source_that_changes_under_the_run_leaves_no_corpus(tmp_path, tokenizer, source, small_batches):
    def change(task, num_bytes, total_bytes):
        if task == "tokenizing":
            source.write_text(source.read_text() + "\n")

    with pytest.raises(DataError, match=r"a\.jsonl changed while it was read"):
        pack_to_shards([source], tokenizer, tmp_path / "cache", shard_tokens=100, on_progress=change)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_shards_of_another_tokenizer_are_refused_with_both_digests(tmp_path, tokenizer, source, other_tokenizer):
    corpus = pack_to_shards([source], tokenizer, tmp_path / "cache", held_out=0.1)
    words = f"{tokenizer_digest(tokenizer)}.*{tokenizer_digest(other_tokenizer)}"
    with pytest.raises(MismatchError, match=words):
        TokenShards.open(corpus.folder / "train", tokenizer=other_tokenizer)
    assert pack_to_shards([source], other_tokenizer, tmp_path / "cache", held_out=0.1).folder != corpus.folder


def test_the_digest_of_a_tokenizer_survives_saving(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_digest(tokenizer)


def test_damaged_shards_are_refused(tmp_path, tokenizer, source):
    corpus = pack_to_shards([source], tokenizer, tmp_path / "cache", held_out=0.1)
    folder = corpus.folder / "train"
    path = folder / "00000.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(DataError, match=rf"has {len(whole) - 2} bytes, expected {len(whole)}"):
        pack_to_shards([source], tokenizer, tmp_path / "cache", held_out=0.1)
    path.write_bytes(whole.replace(b"U16", b"I16"))
    with pytest.raises(DataError, match=r"I16.* where uint16 .* was expected for tokens"):
        TokenShards.open(folder)[0:1]
    path.write_bytes(whole[:-8] + b"\1" + whole[-7:])
    with pytest.raises(DataError, match=r"has changed since it was written: its SHA-256 is .*; remove .* to pack"):
        pack_to_shards([source], tokenizer, tmp_path / "cache", held_out=0.1).train[0:1]
    path.unlink()
    with pytest.raises(DataError, match=r"is missing"):
        TokenShards.open(folder)
    for text in ("{", "[]", json.dumps({"format": "engram.tokens.1", "shards": [{"file": "../x"}]})):
        (folder / "index.json").write_text(text)
        with pytest.raises(DataError, match=r"index\.json"):
            TokenShards.open(folder)


def test_a_cache_inside_a_source_and_impossible_options_are_refused(tmp_path, tokenizer, source):
    with pytest.raises(ConfigError, match=r"lies in the source"):
        pack_to_shards([source.parent], tokenizer, source.parent / "cache")
    with pytest.raises(ConfigError, match=r"held_out is a share"):
        pack_to_shards([source], tokenizer, tmp_path / "cache", held_out=1)


@pytest.mark.parametrize("vocab_size", [300, 100_000])
def test_many_files_read_as_one_array(tmp_path, vocab_size, monkeypatch):
    monkeypatch.setattr("engram_lm.training.data.shards._OPEN_AT_ONCE", 2)
    generator = np.random.default_rng(0)
    lengths = [5, 0, 1, 7, 3, 0]
    # Ends on both sides of a border, one of a document that ended with the file before, and a file without any.
    ends = [[2, 5], [], [], [0, 7], [1], [0]]
    dtype = token_dtype(vocab_size)
    pieces = [generator.integers(vocab_size - 50, vocab_size, length).astype(dtype) for length in lengths]
    shards = [
        write_shard(tmp_path / f"{i}.safetensors", [piece], end, dtype)
        for i, (piece, end) in enumerate(zip(pieces, ends))
    ]
    write_index(tmp_path, {"vocab_size": vocab_size, "tokenizer": "x", "end_token": None, "num_text_bytes": 9}, shards)
    read, whole = TokenShards.open(tmp_path), np.concatenate(pieces).astype(np.int64)
    firsts = np.cumsum([0, *lengths])
    all_ends = np.array([first + end for first, group in zip(firsts, ends) for end in group])
    assert (len(read), read.num_documents, read.dtype) == (16, 6, dtype)
    for start in range(17):
        for stop in range(start, 17):
            assert read[start:stop].tolist() == whole[start:stop].tolist()
            assert (
                read.document_ends(start, stop).tolist() == all_ends[(all_ends > start) & (all_ends <= stop)].tolist()
            )
    assert read[3:-2].tolist() == whole[3:-2].tolist() and read[0:4].dtype == np.int64
    for part in (3, slice(0, 9, 2)):
        with pytest.raises(TypeError, match="slices without a step"):
            read[part]


def test_every_document_begins_as_its_tokenizer_begins_a_text(tmp_path, tokenizer, source, small_batches):
    begins = with_template(tokenizer, "<s> $A")
    packed, plain = (pack_to_shards([source], one, tmp_path / "cache", held_out=0) for one in (begins, tokenizer))
    documents = split(packed.train)
    assert [document[0] for document in documents] == [begins.bos_token_id] * len(TEXTS)
    assert [document[1:] for document in documents] == split(plain.train)
    read = read_documents([source]).documents
    assert packed.train[:].tolist() == pack(read, begins).tolist()
    # Shards made without the beginning are not taken for these, and those of other tokenizers stay what they were.
    assert packed.digest != plain.digest
    twin = AutoTokenizer.from_pretrained(saved(tokenizer, tmp_path / "twin"))
    assert tokenizer_digest(twin) == tokenizer_digest(tokenizer) != tokenizer_digest(begins)


def saved(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return folder


def test_only_the_first_piece_of_a_long_document_begins_it(tmp_path, tokenizer):
    begins = with_template(tokenizer, "<s> $A")
    text = "a line of a long document\n" * (PIECE_CHARACTERS // 20)
    (tmp_path / "long.txt").write_text(text)
    corpus = pack_to_shards([tmp_path / "long.txt"], begins, tmp_path / "cache", held_out=0)
    assert len(text) > PIECE_CHARACTERS and corpus.train[:].tolist() == pack([Document("a", text)], begins).tolist()
    assert corpus.train[:].tolist().count(begins.bos_token_id) == 1


def test_tokens_behind_holes_of_a_vocabulary_are_packed_whole(tmp_path, tokenizer):
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    values["model"]["vocab"]["q"] = 70_000
    backend = Tokenizer.from_str(json.dumps(values))
    far = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)
    (tmp_path / "a.txt").write_text("the cat q sat")
    packed = pack_to_shards([tmp_path / "a.txt"], far, tmp_path / "cache", held_out=0)
    assert packed.train.vocab_size == 70_001 and 70_000 in packed.train[:].tolist()
