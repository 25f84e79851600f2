"""The README is short, its code runs, and its numbers are those of the committed results."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_at_most_180_lines():
    assert len(README.splitlines()) <= 180


def test_its_tables_are_made_from_the_committed_results():
    call = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_file_it_links_to_exists():
    links = re.findall(r"\]\(((?!http)[^)]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_its_python_runs(block, tmp_path, monkeypatch):
    if "runs/quickstart" in block:
        from engram_lm.cli import main

        (tmp_path / "text").mkdir()
        for number in range(8):
            (tmp_path / "text" / f"{number}.py").write_text("def main():\n    return 'hello'\n" * 40)
        monkeypatch.chdir(tmp_path)
        small = ["--vocab-size", "280", "--hidden-size", "32", "--blocks", "2", "--rows-per-head", "100"]
        small += ["--tokens", "500", "--sequence-length", "64", "--batch-size", "2", "--dtype", "float32"]
        assert main(["quickstart", "--data", "text", *small]) == 0
    exec(compile(block, "README.md", "exec"), {})
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
