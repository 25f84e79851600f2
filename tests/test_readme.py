"""The README is short, and its numbers are those of the committed results; `test_documents` runs its code."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_at_most_180_lines():
    assert len(README.splitlines()) <= 180


def test_its_tables_are_made_from_the_committed_results():
    call = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
