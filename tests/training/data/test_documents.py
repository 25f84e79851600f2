"""Files become documents; what is no text is skipped and counted."""

import os

import numpy as np
import pytest

from engram_lm.errors import DataError
from engram_lm.training.data.batches import Batches
from engram_lm.training.data.documents import Document, pack, read_documents, split_documents
from engram_lm.training.data.packing import pack_to_shards
from engram_lm.training.data.text import prepare_text
from engram_lm.training.data.tokenizer import train_tokenizer


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    for number in range(40):
        (tmp_path / "sub" / f"{number}.txt").write_text(f"file {number}\n" * (10 + number))
    (tmp_path / "latin.txt").write_bytes("déjà".encode("latin-1"))
    (tmp_path / "binary.bin").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / ".hidden" / "secret.txt").write_text("not read")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    return tmp_path


def test_everything_that_is_no_text_is_skipped_and_counted(folder):
    corpus = read_documents([folder])
    assert len(corpus.documents) == 40
    assert corpus.skipped == {"not UTF-8": 1, "binary": 1, "empty": 1, "not a regular file": 1}
    assert all("secret" not in document.text for document in corpus.documents)


def test_the_order_depends_on_names_alone(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("elsewhere")
    for path in sorted(folder.glob("sub/*"), reverse=True):
        (other / "sub").mkdir(exist_ok=True)
        (other / "sub" / path.name).write_text(path.read_text())
    assert read_documents([folder]).documents == read_documents([other]).documents


def test_a_size_limit_leaves_the_rest_unread_and_says_so(folder):
    corpus = read_documents([folder], max_bytes=1000)
    assert corpus.skipped["beyond the size limit"] > 20
    assert corpus.num_bytes < 2000


def test_whole_files_are_held_out_and_the_same_ones_as_in_training(folder, tmp_path_factory):
    corpus = read_documents([folder])
    train, held_out = split_documents(corpus, 0.2)
    assert {d.name for d in train}.isdisjoint(d.name for d in held_out)
    assert len(train) + len(held_out) == 40
    share = sum(len(d.text) for d in held_out) / corpus.num_bytes
    assert 0.1 <= share <= 0.4
    tokenizer = train_tokenizer([document.text for document in train], 300)
    packed = pack_to_shards([folder], tokenizer, tmp_path_factory.mktemp("cache"), held_out=0.2)
    assert packed.skipped == corpus.skipped
    assert packed.train[:].tolist() == pack(train, tokenizer).tolist()
    assert packed.held_out[:].tolist() == pack(held_out, tokenizer).tolist()


def test_a_file_under_two_names_is_read_once(folder):
    (folder / "copy.txt").write_text((folder / "sub" / "3.txt").read_text())
    (folder / "link").symlink_to(folder / "sub" / "4.txt")
    corpus = read_documents([folder, folder / "sub"])
    assert len(corpus.documents) == 40 and corpus.skipped["a copy of another"] == 42
    train, held_out = split_documents(corpus, 0.2)
    assert {document.text for document in train}.isdisjoint(document.text for document in held_out)


def test_a_large_file_among_small_ones_is_cut_rather_than_held_out_whole(tmp_path):
    (tmp_path / "big").write_text("a line of a big file\n" * 5000)
    for number in range(3):
        (tmp_path / f"small{number}").write_text(f"small file {number}\n")
    corpus = read_documents([tmp_path])
    train, held_out = split_documents(corpus, 0.05)
    assert [document.name for document in train] == ["big (beginning)"]
    assert [document.name for document in held_out] == ["big (end)", "small0", "small1", "small2"]
    assert sum(len(document.text) for document in held_out) == pytest.approx(0.05 * corpus.num_bytes, rel=0.02)


@pytest.mark.parametrize("ending", ["0123456789 9876543210\n", "the same words again and again\n"])
def test_a_tokenizer_of_the_training_documents_sees_nothing_that_training_holds_out(tmp_path, ending):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a").write_text("größer als the same words, 1234567890\n" * 500)
    (tmp_path / "text" / "b").write_text(ending * 500)
    train, held_out = split_documents(read_documents([tmp_path / "text"]), 0.2)
    tokenizer = train_tokenizer([document.text for document in train], 300)
    text = prepare_text([tmp_path / "text"], tokenizer, tmp_path / "cache", sequence_length=8, held_out=0.2)
    aside = tokenizer.decode(text.held_out.tolist(), skip_special_tokens=True)
    whole = "".join(document.text for document in held_out)
    assert text.about and whole.endswith(aside) and len(aside) > 0.3 * len(whole)


def test_one_huge_line_is_cut_where_it_must_be(tmp_path):
    for start in ("", "title\n"):
        (tmp_path / "line").write_text(start + "x y " * 100_000)
        train, held_out = split_documents(read_documents([tmp_path / "line"]), 0.05)
        assert len(held_out[0].text) == pytest.approx(20_000, rel=0.01)
        assert train[0].text.startswith(start + "x y")


def test_a_file_name_that_is_no_text_is_read_and_can_be_printed(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xff.txt")
    with open(path, "w") as file:
        file.write("some text")
    (document,) = read_documents([tmp_path]).documents
    assert document.text == "some text" and document.name.encode()


def test_of_a_single_file_the_end_is_held_out(tmp_path):
    (tmp_path / "one.txt").write_text("a line of text\n" * 1000)
    train, held_out = split_documents(read_documents([tmp_path / "one.txt"]), 0.05)
    assert train[0].text + held_out[0].text == "a line of text\n" * 1000
    assert len(held_out[0].text) == pytest.approx(750, abs=20)


@pytest.mark.parametrize("content", [None, b"\0\0", b"  "])
def test_a_folder_without_text_is_refused_with_the_reasons(tmp_path, content):
    if content is not None:
        (tmp_path / "x").write_bytes(content)
    with pytest.raises(DataError, match=r"no text in .*(no files at all|1 binary|1 empty).*name files or folders"):
        read_documents([tmp_path])
    with pytest.raises(DataError, match="neither a file nor a folder"):
        read_documents([tmp_path / "missing"])
    (tmp_path / "short").write_text("hm")
    with pytest.raises(DataError, match="held out"):
        split_documents(read_documents([tmp_path / "short"]))


def test_the_standard_library_is_found_without_its_tests():
    corpus = read_documents()
    names = [document.name for document in corpus.documents]
    assert "argparse.py" in names and not [name for name in names if "/tests/" in f"/{name}" or "site-packages" in name]
    assert corpus.num_bytes > 5_000_000


def test_packing_ends_every_document_and_gives_the_text_back():
    documents = [Document(str(i), f"def f{i}(x):\n    return x + {i}\n") for i in range(150)]
    tokenizer = train_tokenizer([document.text for document in documents], 300)
    done = []
    tokens = pack(documents, tokenizer, on_progress=done.append)
    ends = np.flatnonzero(tokens == tokenizer.eos_token_id)
    assert len(ends) == 150 and ends[-1] == len(tokens) - 1
    texts = [tokenizer.decode(part) for part in np.split(tokens, ends + 1)[:-1]]
    assert [text.removesuffix("<|end|>") for text in texts] == [document.text for document in documents]
    assert sum(done) == sum(len(document.text) for document in documents)


def test_tokenizer_training_repeats():
    first, second = (train_tokenizer(["some text, twice " * 30], 280).get_vocab() for _ in range(2))
    assert first == second


def test_batches_are_a_pure_function_of_seed_and_step():
    tokens = np.arange(1003, dtype=np.int32)
    batches = Batches(tokens, batch_size=3, length=10, seed=5)
    late = batches[40]
    again = Batches(tokens, batch_size=3, length=10, seed=5)
    assert all((a == b).all() for a, b in zip(late, again[40], strict=True))
    assert not (Batches(tokens, 3, 10, seed=6)[0][0] == batches[0][0]).all()
    inputs, targets = batches[0]
    assert inputs.shape == (3, 10) and (targets == inputs + 1).all()


def test_every_sequence_comes_once_in_each_pass():
    batches = Batches(np.arange(1003, dtype=np.int32), batch_size=4, length=10, seed=0)
    assert batches.num_sequences == 100
    for epoch in range(2):
        starts = [int(row[0]) for step in range(25 * epoch, 25 * (epoch + 1)) for row in batches[step][0]]
        assert sorted(starts) == list(range(0, 1000, 10))


def test_text_shorter_than_a_sequence_is_refused():
    with pytest.raises(DataError, match="--sequence-length"):
        Batches(np.arange(10, dtype=np.int32), batch_size=1, length=10, seed=0)
