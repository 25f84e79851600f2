"""Atomic writing."""

import pytest

from engram.files import replacing, write_atomically


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
