"""Atomic writing."""

import pytest

from engram_lm.errors import CheckpointError
from engram_lm.files import new_folder, read_json, read_text, replacing, user_path, write_atomically


def test_text_that_an_editor_saved_with_a_mark_and_other_line_ends_reads_the_same(tmp_path):
    path = tmp_path / "a.json"
    for mark in (b"", b"\xef\xbb\xbf"):
        for end in (b"\n", b"\r\n"):
            path.write_bytes(mark + b'{"a":' + end + '"é"}'.encode() + end)
            assert read_text(path) == '{"a":\n"é"}\n'
            assert read_json(path) == {"a": "é"}
    path.write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(UnicodeDecodeError):
        read_text(path)
    assert read_text(path, errors="replace") == '{"a": "\ufffd"}'
    with pytest.raises(CheckpointError, match="not readable JSON"):
        read_json(path)


def test_a_path_of_a_person_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/a/b") == tmp_path / "a" / "b"
    # Nobody of that name: a folder that is called so, which then does not exist.
    assert [str(user_path(path)) for path in ("a/~b", "~nobody-here/a")] == ["a/~b", "~nobody-here/a"]


def test_a_file_is_written_whole_with_its_folder(tmp_path):
    write_atomically(tmp_path / "new" / "file", "é")
    assert (tmp_path / "new" / "file").read_bytes() == "é".encode()
    write_atomically(tmp_path / "new" / "file", b"\x00")
    assert (tmp_path / "new" / "file").read_bytes() == b"\x00"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def fail():
        with replacing(path) as aside:
            aside.write_text("half", encoding="utf-8")
            assert aside.parent == tmp_path
            assert path.read_text(encoding="utf-8") == "old"
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fail()
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_replaced_file_keeps_its_mode_and_a_new_one_can_be_read_by_all(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "x")
    assert path.stat().st_mode & 0o777 == 0o644
    path.chmod(0o600)
    write_atomically(path, "y")
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_new_folder_appears_whole_and_a_failed_one_not_at_all(tmp_path):
    path = tmp_path / "deep" / "folder"
    with new_folder(path) as aside:
        (aside / "file").write_text("x", encoding="utf-8")
        assert not path.exists()
    assert (path / "file").read_text(encoding="utf-8") == "x"
    assert path.stat().st_mode & 0o777 == 0o755

    def fail(path):
        with new_folder(path) as aside:
            (aside / "file").write_text("half", encoding="utf-8")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fail(tmp_path / "deep" / "other")
    assert list(path.parent.iterdir()) == [path]


def test_a_new_folder_may_replace_an_empty_one_only(tmp_path):
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty"):
        pass
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").touch()
    for taken in ("full", "full/kept"):
        with pytest.raises(FileExistsError, match="left alone"), new_folder(tmp_path / taken):
            pass
    assert (tmp_path / "full" / "kept").is_file()
