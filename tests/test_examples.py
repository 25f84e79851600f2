"""The lessons run in order, as their readers run them, and find what they say."""

import pathlib
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lessons")


@pytest.fixture
def run(folder):
    def lesson(name, *arguments):
        """Run a lesson as a reader does: in a process of its own, in which nothing has been imported yet."""
        call = [sys.executable, str(EXAMPLES / name), *arguments]
        ended = subprocess.run(call, cwd=folder, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    return lesson


def test_the_list_of_examples_names_every_file():
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    names = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")]
    assert [name for name in names if f"({name})" not in listed] == []


def test_the_hash_by_hand_is_the_real_one_and_collisions_are_drawn(run, folder):
    said = run("1_hash_by_hand.py")  # it compares both itself
    assert "by hand" in said
    one, several = (line.split() for line in said.splitlines() if line.split()[0] in ("1", "4"))
    shares = [[float(share.rstrip("%")) for share in line[1:]] for line in (one, several)]
    assert shares[0][0] > 30 and shares[0][1] == pytest.approx(shares[0][0], abs=1)  # one head tells none of them apart
    assert shares[1][0] > shares[0][0] and shares[1][1] < 1  # more heads are more crowded, and tell nearly all apart
    assert (folder / "runs/lessons/collisions.png").read_bytes().startswith(b"\x89PNG")


def test_memory_is_attached_in_ten_lines_and_learns(run, folder):
    said = run("2_memory_in_ten_lines.py")
    before, after = (float(said.split(word)[0].split()[-1].rstrip(",")) for word in (" before", " after"))
    assert after < before - 0.1
    assert (folder / "runs/lessons/memory/config.json").is_file()
    lines = (EXAMPLES / "2_memory_in_ten_lines.py").read_text(encoding="utf-8").split("# The ten lines")[1]
    assert len(lines.split("\n\n")[0].splitlines()[1:]) <= 11  # ten and a check


def test_a_table_of_a_hundred_gigabytes_is_read_where_it_lies(run, folder):
    said = run("4_open_100_gb.py")
    assert "100.0 GB" in said
    assert int(said.split("the process grew by ")[1].split()[0]) < 200
    assert not list(folder.rglob("huge.safetensors"))


@pytest.mark.timeout(300)
def test_a_model_trained_beside_its_twin_is_served_seen_and_edited(run, folder):
    said = run("3_engram_beside_its_twin.py", "120")
    losses = [float(line.split()[3]) for line in said.splitlines() if "held-out loss" in line]
    assert len(losses) == 2
    assert max(losses) < 6.0  # a uniform guess among 1,024 tokens costs 6.9
    assert "serve" in run("5_serve.py")
    assert "memory saves" in run("6_see_what_it_does.py")
    said = run("7_edit_a_fact.py")
    # How well it is learned depends on the text, which is another in every release of Python.
    before, after = (float(part.split()[-1]) for part in said.split("fact 'the language")[1].split(" nats")[:2])
    assert after < before - 2
    assert "taken back: it goes on with" in said
    assert "all logits the same bit for bit" in said
