"""The README is short, and its numbers are those of the committed results; `test_documents` runs its code."""

import importlib
import json
import pathlib
import re
import subprocess
import sys

from engram_lm.studies.registry import STUDIES

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_at_most_180_lines():
    assert len(README.splitlines()) <= 180


def test_its_tables_are_made_from_the_committed_results():
    call = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_committed_studies_have_their_pictures_and_name_no_folder_of_a_machine():
    studies = sorted((ROOT / "benchmarks" / "results").glob("study_*.json"))
    assert studies
    for path in studies:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r'"/(tmp|home|root|work|Users)\b', text), path
        results = json.loads(text)["results"]
        for result in results:
            assert result["study"] == path.stem.removeprefix("study_") and result["commit"]
            assert " --out" not in result["command"]
        result = results[0]
        module, _, command = STUDIES[result["study"]][0].partition(":")
        names = [
            picture.name for picture in getattr(importlib.import_module(module), command)().study().figures(result)
        ]
        assert any((ROOT / "docs" / "pictures" / f"{name}.png").is_file() for name in names), path
