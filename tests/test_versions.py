"""Declared ranges are those that are run: constraints-lowest.txt is the lower end, constraints.txt the upper one."""

import pathlib
import re
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = pathlib.Path(__file__).parents[1]
OTHERS = ("dev", "docs", "vllm", "vllm-cpu")


def declared():
    """What the library itself and its extras for users need: name → range. vLLM has constraints of its own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [
        *project["dependencies"],
        *(line for name in extras if name not in OTHERS for line in extras[name]),
    ]
    return {canonicalize_name(requirement.name): requirement.specifier for requirement in map(Requirement, lines)}


def pinned(file):
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    pins = (re.fullmatch(r"(\S+)==(\S+)", line).groups() for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pins}


def ends(specifier):
    """The two ends of a range, which has no other conditions."""
    found = {one.operator: Version(one.version) for one in specifier}
    assert set(found) == {">=", "<"}, specifier
    return found[">="], found["<"]


def test_the_lower_ends_are_what_is_run_as_the_lowest():
    newest, lowest = pinned("constraints.txt"), pinned("constraints-lowest.txt")
    run = {name: Version(lowest.get(name, newest[name])) for name in declared()}
    low = {name: ends(specifier)[0] for name, specifier in declared().items()}
    # Versions of one minor release, where it is the only one that is run, may start with its first.
    assert {name: low[name] for name in low if name in lowest} == {name: run[name] for name in low if name in lowest}
    assert {name for name in low if name not in lowest and low[name].release[:2] != run[name].release[:2]} == set()


def test_the_upper_ends_are_just_behind_what_is_run_as_the_newest():
    newest = pinned("constraints.txt")
    for name, specifier in declared().items():
        _, end = ends(specifier)
        major, minor, micro, *_ = (*Version(newest[name]).release, 0, 0)
        after = {(major + 1,), (major, minor + 1), (major, minor, micro + 1)}
        assert end.release in after, f"{name}{specifier}, run with {newest[name]}"
