"""Names say what a thing is: no drawer for everything, no test that mirrors nothing."""

import pathlib
import re
import socket

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "engram_lm"
DRAWERS = {"utils", "util", "common", "core", "helpers", "misc"}


def test_no_module_is_a_drawer_for_everything():
    drawers = [path for path in PACKAGE.rglob("*") if path.stem.lower().strip("_") in DRAWERS]
    assert not drawers


def test_every_package_folder_says_what_it_is():
    for init in PACKAGE.rglob("__init__.py"):
        assert init.read_text(encoding="utf-8").lstrip().startswith('"""'), f"{init} has no docstring"


def test_every_folder_of_tests_mirrors_a_folder_of_the_package():
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    assert [folder for folder in folders if not (PACKAGE / folder).is_dir()] == []


def test_every_file_is_read_in_one_sitting():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert [path for path, count in lines.items() if count > 450] == []


def test_messages_go_to_loggers_below_one_name():
    """``logging.getLogger("engram_lm")`` then decides about all of them; lm_eval's own is made quiet for a while."""
    text = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    assert set(re.findall(r"getLogger\((.*?)\)", text)) <= {"__name__", '"lm_eval"'}
    assert not re.search(r"logging\.(debug|info|warning|error|exception|critical|basicConfig)\(", text)


def test_package_is_marked_as_typed():
    assert (PACKAGE / "py.typed").is_file()


def test_tests_cannot_leave_the_machine():
    with socket.socket() as connection, pytest.raises(AssertionError, match="without a network"):
        connection.connect(("192.0.2.1", 80))
