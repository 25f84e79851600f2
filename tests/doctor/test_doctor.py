"""`engram-lm doctor` finds what works here, and says what does not where the rest of the library cannot be loaded."""

import json
import os
import subprocess
import sys

import pytest
from tests.tables.mooncake_store import reason_to_skip

from engram_lm import threads
from engram_lm.cli import main
from engram_lm.doctor import machine
from engram_lm.tables import available_memory
from engram_lm.versions import declared_packages, is_within


def run(folder, *arguments, **environment):
    """Run Python where the packages in a folder come first, on a terminal that prints ASCII alone."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(folder), *sys.path]),
            "PYTHONIOENCODING": "ascii",
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )


def claim_version(folder, name, version):
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")


def test_every_tier_that_the_tests_use_works_and_nothing_is_missed(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    tiers = found["tiers"]
    assert tiers.pop("device").startswith("works")
    mooncake = tiers.pop("mooncake")
    assert mooncake.startswith("its client loads") == (reason_to_skip() is None), mooncake
    direct = tiers.pop("file, past the page cache")
    assert direct == "works" or "O_DIRECT" in direct
    assert tiers == dict.fromkeys(("host", "mmap", "file", "remote"), "works")
    assert found["problems"] == []
    assert set(found["parts"].values()) == {"loads"}
    assert found["packages"]["torch"].startswith("2.")
    assert not [section for section in found.values() if isinstance(section, str)]


def test_where_transformers_does_not_load_it_says_so_and_looks_at_the_rest(tmp_path):
    claim_version(tmp_path, "transformers", "4.0.0")
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("raise ImportError('brökén')", encoding="utf-8")
    done = run(tmp_path, "-m", "engram_lm", "doctor", HF_TOKEN="very-secret")
    assert done.returncode == 1, done.stderr
    assert "transformers 4.0.0 is outside the tested versions: pip install 'transformers>=5" in done.stdout
    assert "engram_lm.model does not load, no: ImportError: broken" in done.stdout
    assert "mmap" in done.stdout and "works" in done.stdout
    assert "very-secret" not in done.stdout + done.stderr


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_the_control_group_that_a_process_is_in_are_shown(version, tmp_path, monkeypatch):
    files = {"memory.max": 3_000_000_000, "memory.current": 1_000_000_000, "cpu.max": "100000 100000"}
    if version == 1:
        files = {"memory.limit_in_bytes": 3_000_000_000, "memory.usage_in_bytes": 1_000_000_000}
        files |= {"cpu.cfs_quota_us": 100_000, "cpu.cfs_period_us": 100_000}
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    for name, value in files.items():
        (tmp_path / name).write_text(f"{value}\n")
    for module in (available_memory, threads):
        groups = [(tmp_path, version == 2), (tmp_path / "outer", version == 2)]
        monkeypatch.setattr(module, "control_groups", lambda controller, groups=groups: groups)
    assert machine.processor()["cores allowed"] == 1
    assert machine.memory()["container limit"] == "3.0 GB"
    assert float(machine.memory()["available within the container"].split()[0]) <= 2


def test_a_version_that_was_not_tested_is_said_once_with_the_range(tmp_path):
    claim_version(tmp_path, "transformers", "4.0.0")
    script = "import engram_lm\nfor name in ('EngramLMConfig', 'EngramForCausalLM', 'attach'): getattr(engram_lm, name)"
    done = run(tmp_path, "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning: engram-lm was tested with transformers >=5") == 1


def test_what_the_library_needs_is_read_from_its_metadata():
    found = {package.name: package for package in declared_packages()}
    assert found["torch"].extra is None and found["peft"].extra == "lora"
    assert "pytest" not in found and "engram-lm" not in found
    assert all(package.is_tested is not False for package in found.values())


@pytest.mark.parametrize(
    ("version", "tested", "expected"),
    [
        ("5.19.0", ">=5.19,<5.25", True),
        ("5.19", ">=5.19.0,<5.25", True),
        ("5.18.9", ">=5.19,<5.25", False),
        ("5.24.3", ">=5.19,<5.25", True),
        ("5.25.0", ">=5.19,<5.25", False),
        ("2.13.0+cpu", "<2.14,>=2.13", True),
        ("2.14.0.dev20261101", ">=2.13,<2.14", False),
        ("10.0", ">=9", True),
        ("1.0", "", True),
    ],
)
def test_versions_are_compared_by_their_numbers(version, tested, expected):
    assert is_within(version, tested) is expected
