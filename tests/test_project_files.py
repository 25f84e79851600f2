"""What a project has beside its code: citation, templates, workflows, image, pins. All are well-formed and agree."""

import json
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
import yaml

import engram_lm

ROOT = pathlib.Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SCHEMAS = {
    "citation-file-format": ["CITATION.cff"],
    "dependabot": [".github/dependabot.yml"],
    "github-issue-config": [".github/ISSUE_TEMPLATE/config.yml"],
    "github-issue-forms": [f".github/ISSUE_TEMPLATE/{name}.yml" for name in ("bug", "feature", "result")],
    "github-workflows": [f".github/workflows/{path.name}" for path in WORKFLOWS],
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_of_a_published_form_have_it(schema):
    pytest.importorskip("check_jsonschema")
    call = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *SCHEMAS[schema]]
    done = subprocess.run(call, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["version"] == engram_lm.__version__
    assert (citation["license"], citation["preferred-citation"]["url"]) == (
        project["license"],
        project["urls"]["Paper"],
    )


def test_workflows_run_what_runs_here_with_pinned_actions_and_few_rights():
    text = {path.name: path.read_text(encoding="utf-8") for path in WORKFLOWS}
    assert "run: .ci/run" in text["tests.yml"] and "run: .ci/run" in text["release.yml"]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for name, lines in text.items():
        for action in re.findall(r"uses: (.*)", lines):
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v[\d.]+", action), f"{name}: {action}"
        assert set(re.findall(r"run: make ([a-z-]+)", lines)) <= targets
        assert yaml.safe_load(lines)["permissions"] == {"contents": "read"}


def test_the_pythons_that_are_declared_are_those_that_are_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {found[1] for line in project["classifiers"] if (found := re.fullmatch(r".* :: (3\.\d+)", line))}
    jobs = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))["jobs"]
    tested = {*jobs["pythons"]["strategy"]["matrix"]["python"]}
    tested |= {
        step["with"]["python-version"] for step in jobs["checks"]["steps"] if "python-version" in step.get("with", {})
    }
    assert declared == tested


def test_the_image_and_the_container_call_targets_and_files_that_exist():
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    called = {
        *re.findall(r"make ([a-z-]+)", image + container["postCreateCommand"]),
        *re.findall(r'"make", "([a-z-]+)"', image),
    }
    assert {"demo", "test", "venv"} <= called <= targets
    copied = [
        name for line in re.findall(r"^COPY --chown=engram (.*) \S+$", image, re.MULTILINE) for name in line.split()
    ]
    assert len(copied) > 4 and [name for name in copied if not (ROOT / name).exists()] == []
    assert (ROOT / ".devcontainer" / container["build"]["dockerfile"]).samefile(ROOT / "Dockerfile")


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-lowest.txt", "constraints-vllm.txt"])
def test_every_pinned_package_has_its_hashes(name):
    def pins(text):
        return {
            (one.lower().replace("_", "-").replace(".", "-"), version)
            for one, version in re.findall(r"^([^\s#=]+)==([^\s;\\+]+)", text, re.M)
        }

    listed = (ROOT / ".ci" / "hashes" / name).read_text(encoding="utf-8")
    assert pins(listed) == pins((ROOT / name).read_text(encoding="utf-8")), "run .ci/pin"
    assert all("--hash=sha256:" in entry for entry in re.split(r"\n(?=\S)", listed)[1:])
