"""The README is short, and its numbers are those of the committed results; `test_documents` runs its code."""

import importlib
import importlib.util
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


def test_a_result_that_is_kept_again_takes_the_place_of_its_setting():
    spec = importlib.util.spec_from_file_location("kept_studies", ROOT / "benchmarks" / "study.py")
    keeping = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(keeping)

    def made(**settings):
        return {"study": "layers", "settings": {"arms": ["bigrams"], "seeds": 2, "beside": [], **settings}}

    small, large, many = made(size="100k"), made(size="500k"), made(size="100k", arms=["bigrams", "sink"])
    again, twins = (
        made(size="100k", seeds=5, loss_tokens=524_288, beside=["other"]),
        made(size="100k", equal_flops=True),
    )
    kept = keeping.kept_beside([small, large], many)
    assert kept == [small, large, many]
    assert keeping.kept_beside(kept, again) == [again, large, many]  # a flag that it has not is as it was
    assert keeping.kept_beside(kept, twins) == [*kept, twins]
    assert keeping.kept_beside(kept, {"study": "scaling", "settings": {"seeds": 3}}) == [
        {"study": "scaling", "settings": {"seeds": 3}}
    ]
