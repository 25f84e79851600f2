"""What the documents say can be done: commands are read by their parsers, Python is run, links lead somewhere.

A block that a document marks with ``<!-- not run: REASON -->`` is only compiled, and what it imports is looked up.
"""

import ast
import dataclasses
import importlib
import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import sys
import textwrap

import pytest

from engram_lm.cli import VERBS, main

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *PAGES)}
OTHERS = [ROOT / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")]
NOT_RUN = re.compile(r"<!-- not run: (.+) -->\s*$")
MODEL_OF_OTHERS = """
import torch
from tests.adapt.small_models import TEXT, TOKENIZER, small_model
small_model().save_pretrained("my-model")
TOKENIZER.save_pretrained("my-model")
from pathlib import Path
Path("domain.txt").write_text(TEXT)
domain_tokens = general_tokens = torch.tensor(TOKENIZER(TEXT)["input_ids"] * 40).numpy()
batches = [torch.randint(2, 280, (2, 16)) for _ in range(2)]
dataset = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in torch.cat(batches)]
reference_text = text = TEXT
"""
SUPPRESSION = """
import json, shutil
from pathlib import Path
shutil.copytree("runs/quickstart", "runs/suppression/seed-0/run/model")
question = {"prompt": "def main1_1():", "choices": [" return", " cat"], "answer": 0, "family": "recall"}
Path("runs/suppression/seed-0/tasks.jsonl").write_text(json.dumps(question))
"""
FACTS = (
    MODEL_OF_OTHERS
    + """
import engram_lm
from engram_lm.adapt import FactEdit
model, tokenizer = small_model(), TOKENIZER
engram_lm.attach(model, tokenizer, layers=(1,), rows_per_head=100, occupancy="ngrams", value_init="normal")
other_facts = [FactEdit(subject="the cat", prompt="the cat sat on", answer=" the rat")]
"""
)
TRAINING = """
import os, shutil
from pathlib import Path
os.mkdir("text")
for number in range(300):
    Path(f"text/{number}.txt").write_text(f"note {number} says {number * number}\\n" * 9)
shutil.copytree("runs/quickstart", "runs/mine/tokenizer")
"""
PACKED = """
import torch
from engram_lm.tables import RowCodec, write_packed
codec = RowCodec(8, torch.float32)
write_packed("layer-1.safetensors", lambda first, last: codec.encode(torch.zeros(last - first, 8)), codec, 20_000)
"""
RUN = {
    "README.md": "",
    "docs/adapt.md": MODEL_OF_OTHERS,
    "docs/add-layer.md": "",
    "docs/analysis.md": SUPPRESSION,
    "docs/coming-from.md": "",
    "docs/facts.md": FACTS,
    "docs/format.md": PACKED,
    "docs/scaling.md": "",
    "docs/systems.md": "",
    "docs/tables.md": "",
    "docs/training.md": TRAINING,
}
"""Documents whose Python is run as one program each, on a small quickstart, and what comes before it."""
SMALLER = {
    "max_steps=1000": "max_steps=2",
    "rows_per_head=100_000": "rows_per_head=100",
    "num_ngrams=50_000": "num_ngrams=9",
}
"""Sizes that a test need not have."""


def blocks(document, *languages):
    """The code blocks of a document: language, text, and whether it says that the block is not run."""
    text = DOCUMENTS[document].read_text(encoding="utf-8")
    for found in re.finditer(r"^( *)```(\w*)[^\n]*\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE):
        if found[2] in languages:
            yield found[2], textwrap.dedent(found[3]), NOT_RUN.search(text[: found.start()]) is not None


def command_lines(document):
    """Every command line of ours in a document, comments left out, lines that go on joined."""
    for _, block, _ in blocks(document, "", "console", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            line = line.split(" | ")[0].split(" && ")[0]
            words = shlex.split(line, comments=True) if line.count("'") % 2 == 0 else []
            words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S+", word)]
            if "engram-lm" in words[:1]:
                yield words[1:]


COMMANDS = [(name, words) for name in DOCUMENTS for words in command_lines(name)]
NAMES = [f"{name}: {' '.join(words)}" for name, words in COMMANDS]


def test_there_are_commands_and_blocks_to_look_at():
    assert len(COMMANDS) > 60 and len({words[0] for _, words in COMMANDS}) > 10


@pytest.mark.parametrize(
    ("document", "words"), COMMANDS, ids=[f"{name}: {' '.join(words)}" for name, words in COMMANDS]
)
def test_a_command_of_a_document_is_one_that_its_parser_reads(document, words, monkeypatch, capsys, tmp_path):
    command, rest = VERBS, list(words)
    if rest[0] in ("--version", "VERB") or "…" in words or "|" in " ".join(words):
        pytest.skip("names no command")
    while not isinstance(command, str):
        if not rest or rest[0] not in command:
            pytest.skip("names a group of commands")
        command = command[rest.pop(0)][0]
    module, _, name = command.partition(":")
    kind = getattr(importlib.import_module(module), name)
    for one in kind.__mro__[:-1]:
        if "run" in vars(one):
            monkeypatch.setattr(one, "run", lambda self: 0)
    monkeypatch.chdir(ROOT)
    assert main(words) == 0, capsys.readouterr().err


READER = (
    MODEL_OF_OTHERS
    + f"""
import json, shutil
shutil.copy({str(ROOT / "tests" / "golden" / "qwen_config.json")!r}, "config.json")
"""
    + """
shutil.copytree("my-text", "held-out", dirs_exist_ok=True)
for name in ("notes.txt", "held-out.txt", "text.txt"):
    Path(name).write_text(TEXT)
fact = {"prompt": "The capital of Elbonia is", "answer": " Mud", "subject": "Elbonia"}
Path("facts.jsonl").write_text(json.dumps(fact))
"""
)
"""What a reader has beside a quickstart when commands are run: a model of others, texts, facts, a configuration."""
_RECIPE = "--train.batch_size 2 --data.sequence_length 64"
_TRAIN = f"{_RECIPE} --data.sources my-text --tokenizer.vocab_size 280 --evaluation.every 2 --checkpoint.every 2"
MADE_SMALLER = {
    "adapt recipes/adapt-cpu.toml": f"{_RECIPE} --base.model my-model --data.retained held-out --train.num_steps 2 "
    "--data.held_out 0.4 --data.retained_held_out 0.5 --memory.rows_per_head 100 --rates.memory 0.01",
    "analyze": "--max-tokens 300 --suppression-tokens 64",
    "generate": "--max-new-tokens 3",
    "patch fit": "--max-steps 2 --rounds 1",
    "patch new": "--rows-per-head 200",
    "table bench": "--rounds 1 --rows 8",
    "train recipes/nano-cpu.toml": f"{_TRAIN} --train.num_steps 2 --model.memory.rows_per_head 100",
    "train runs/mine": "",
}
"""Flags that a test gives a command besides its own, so that it takes a second; later ones win."""
RUN_ELSEWHERE = {
    "adapt recipes/adapt-smollm2.toml": "it adapts the real model, as benchmarks/adaptation_real.py does",
    "bench": "tests/serving/test_bench_serve.py",
    "eval SmolLM2-135M": "it needs the model and its data sets; tests/evaluation runs such tasks",
    "eval runs/long/model": "it needs a model of long texts; tests/evaluation/test_ruler.py and test_long_ppl.py",
    "eval runs/notes/model": "tests/evaluation/diagnostics and test_recall.py, on runs of their own",
    "eval runs/suppression/seed-0/run/model": "tests/studies/test_suppression_study.py",
    "eval runs/quickstart --data FILES --tasks": "it needs the data set of arc_easy",
    "explore": "it serves until it is stopped; tests/explore",
    "join": "tests/serving/test_join.py",
    "serve": "it needs vLLM; tests/serving/vllm",
    "study": "tests/studies trains small ones",
}
"""Commands that are not run here, by their first words, and why."""
GIVE_OTHER_STATUS = {"patch fit": (0, 1)}
"""Commands that end with another status than 0 where two steps do not teach a fact."""


def small_command(words):
    """The words that a test runs for a command of a document, or None where it is not run here."""
    line = " ".join(words)
    dry = ("--dry-run" in words and words[0] != "serve") or "--keys" in words
    if not dry and any(line == start or line.startswith(start + " ") for start in RUN_ELSEWHERE):
        return None
    words = ["my-text" if word == "FILES" else word for word in words]
    if "num_steps 100" in line:
        words = ["2" if word == "100" else "100" if word == "50000" else word for word in words]
    smaller = "" if dry else next((flags for start, flags in MADE_SMALLER.items() if line.startswith(start)), "")
    return [*words, *smaller.split()]


RUNNABLE = [name for name in DOCUMENTS if any(of == name and small_command(words) for of, words in COMMANDS)]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
@pytest.mark.parametrize("document", RUNNABLE)
def test_commands_of_a_document_run_one_after_the_other(document, quickstart, tmp_path, monkeypatch, capsys):
    shutil.copytree(quickstart, tmp_path, dirs_exist_ok=True)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    exec(READER, {})
    if document == "README.md":
        assert main(["patch", "new", "my-model", "memory", "--rows-per-head", "200"]) == 0
    for of, words in COMMANDS:
        if of == document and "VERB" not in words and (shorter := small_command(words)):
            allowed = next(
                (ends for start, ends in GIVE_OTHER_STATUS.items() if " ".join(words).startswith(start)), (0,)
            )
            assert main(shorter) in allowed, (" ".join(shorter), capsys.readouterr().err)


def test_every_command_that_is_not_run_here_has_a_reason_that_is_needed():
    lines = [" ".join(words) for _, words in COMMANDS]
    for start in RUN_ELSEWHERE:
        assert any(line == start or line.startswith(start + " ") for line in lines), start
    for start in MADE_SMALLER:
        assert any(line.startswith(start) for line in lines), start


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_of_a_document_compiles_and_names_what_there_is(document):
    for _, block, _ in blocks(document, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("engram_lm"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """A folder with ``runs/quickstart``, its twin, and ``my-text``, as a reader has after the first commands."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "my-text").mkdir()
    for number in range(8):
        lines = [f"def main{number}_{line}():\n    return 'hello {line * number}'\n" for line in range(40)]
        (folder / "my-text" / f"{number}.py").write_text("".join(lines))
    (folder / "my-text" / "notes.txt").write_text("the cat sat on the mat, and a rat ran to the mat\n" * 40)
    small = ["--vocab-size", "280", "--hidden-size", "32", "--blocks", "2", "--rows-per-head", "100", "--json"]
    small += ["--tokens", "500", "--sequence-length", "64", "--batch-size", "2", "--dtype", "float32"]
    here = os.getcwd()
    os.chdir(folder)
    try:
        assert main(["quickstart", "--data", "my-text", *small]) == 0
    finally:
        os.chdir(here)
    return folder


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # of a trainer without an accelerator
@pytest.mark.parametrize("document", RUN)
def test_python_of_a_document_runs(document, quickstart, monkeypatch):
    monkeypatch.chdir(quickstart)
    module = type(sys)("read_in_" + re.sub(r"\W", "_", document))
    monkeypatch.setitem(sys.modules, module.__name__, module)  # so that what is defined in it can be imported
    from engram_lm.memory.registry import LAYERS

    monkeypatch.setattr("engram_lm.memory.registry.LAYERS", dict(LAYERS), raising=True)
    exec(RUN[document], module.__dict__)
    ran = 0
    for _, block, is_left_out in blocks(document, "python"):
        if not is_left_out:
            for size, smaller in SMALLER.items():
                block = block.replace(size, smaller)
            exec(compile(block, document, "exec"), module.__dict__)
            ran += 1
    assert ran


def test_recipes_and_data_of_documents_are_read(tmp_path):
    import yaml

    from engram_lm.training.recipe import Recipe

    read = 0
    for document in DOCUMENTS:
        for language, block, _ in blocks(document, "toml", "json", "yaml"):
            if language == "toml":
                (tmp_path / "recipe.toml").write_text(block, encoding="utf-8")
                base = ["--model.base", "my-model", "--adapter.layers", "[1]"] if "[retention]" in block else []
                Recipe.read(tmp_path / "recipe.toml", ["--train.num_steps", "2", *base])
            for line in block.splitlines() if language == "json" else ():
                json.loads(line)
            assert language != "yaml" or yaml.safe_load(block)
            read += 1
    assert read > 5


def test_python_that_is_not_run_says_why():
    for document in DOCUMENTS.keys() - RUN.keys() - {"docs/add-study.md"}:
        assert all(is_left_out for _, _, is_left_out in blocks(document, "python")), document


def test_a_study_of_the_documents_plans_its_arms(monkeypatch):
    _, block, _ = next(one for one in blocks("docs/add-study.md", "python"))
    module = type(sys)("read_in_add_study")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(block, "docs/add-study.md", "exec"), module.__dict__)
    monkeypatch.chdir(ROOT)
    study = module.Gates().study()
    assert [arm.name for arm in study.arms] == ["gated", "open"]


def headings(path):
    """The anchors of a document, as the site makes them."""
    from markdown.extensions.toc import slugify

    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return {
        slugify(re.sub(r"[`*]", "", line), "-") for line in re.findall(r"^#+ (.*?)(?: \{.*\})?$", text, re.MULTILINE)
    }


@pytest.mark.parametrize("path", [*OTHERS, *DOCUMENTS.values()], ids=lambda path: path.name)
def test_links_lead_to_files_and_headings_that_exist(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(((?!https?:)[^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        target = path if not file else path.parent / file
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            made = ("commands.md", "configuration.md", "api.md")  # whose headings the site makes
            assert target.name in made or anchor in headings(target), link


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page():
    import yaml

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    named = [
        page for group in nav for pages in group.values() for page in ([pages] if isinstance(pages, str) else pages)
    ]
    assert sorted(named) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_pictures_are_what_their_script_draws():
    spec = importlib.util.spec_from_file_location("draw_pictures", ROOT / "docs" / "draw_pictures.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name, draw in script.PICTURES.items():
        assert (ROOT / "docs" / "pictures" / f"{name}.svg").read_text(encoding="utf-8") == draw().svg()


def test_pages_of_commands_and_keys_have_every_flag_and_key(monkeypatch):
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("reference_pages", ROOT / "docs" / "reference_pages.py")
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    text = pages.command_pages()
    for words, _, kind in pages.commands():
        assert f"\n## {words.removeprefix('engram-lm ')} " in text
        for field in dataclasses.fields(kind):
            if "Suppress" not in str(field.type) and "Positional" not in str(field.type):
                assert f"`--{field.name.replace('_', '-')}`" in text, (words, field.name)
    keys = pages.configuration_pages()
    from engram_lm import EngramConfig
    from engram_lm.training.recipe import Recipe

    assert all(f"[{field.name}]" in keys for field in dataclasses.fields(Recipe))
    assert all(f"| `{field.name}` |" in keys for field in dataclasses.fields(EngramConfig))
    assert "| `num_steps` | `int`, required |" in keys
