"""The command line finds its verbs, explains itself, and keeps results, messages and statuses apart."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from engram_lm.cli import VERBS, main
from engram_lm.tables.codec import RowCodec
from engram_lm.tables.files.packed_writer import write_packed


def test_without_a_verb_it_says_what_there_is(capsys):
    assert main([]) == 2
    assert "quickstart" in capsys.readouterr().err
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "engram-lm 0.1.0\n"


def test_an_unknown_verb_is_refused_with_the_nearest(capsys):
    assert main(["quikstart"]) == 2
    assert "did you mean 'quickstart'?" in capsys.readouterr().err
    assert main(["zzz"]) == 2
    assert "hash" in capsys.readouterr().err


@pytest.mark.parametrize("verb", sorted(name for name, (command, _) in VERBS.items() if isinstance(command, str)))
def test_every_verb_explains_every_flag(verb, capsys):
    import dataclasses
    import importlib

    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    module, name = VERBS[verb][0].split(":")
    for field in dataclasses.fields(getattr(importlib.import_module(module), name)):
        if "Suppress" in str(field.type):  # no flag
            continue
        shown = [getattr(note, "metavar", None) for note in getattr(field.type, "__metadata__", ())]
        positional = "Positional" in str(field.type)
        assert any(name in text for name in ([*filter(None, shown)] if positional else [field.name.replace("_", "-")]))


def test_an_unknown_flag_is_refused(capsys):
    assert main(["hash", "--tokeniser", "x"]) == 2
    assert "--tokenizer" in capsys.readouterr().err


def in_a_process(arguments, **environment):
    """Run the command as a shell does; its output as bytes."""
    return subprocess.run(
        [sys.executable, "-m", "engram_lm", *map(str, arguments)], capture_output=True, check=False,
        env=os.environ | environment,
    )  # fmt: skip


@pytest.mark.parametrize(("environment", "name"), [
    ({"PYTHONIOENCODING": "ascii"}, b"-->."),
    ({"PYTHONIOENCODING": "cp1252"}, b"\x96->."),
    # Python itself does not know what names mean here; each of their bytes becomes a question mark.
    ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}, b"??????."),
])  # fmt: skip
def test_a_terminal_that_cannot_print_our_characters_gets_others(tmp_path, environment, name):
    codec = RowCodec(4, torch.bfloat16)
    source = tmp_path / "層–é.safetensors"
    write_packed(source, lambda start, stop: codec.encode(torch.ones(stop - start, 4)), codec, 8)
    done = in_a_process(["table", "convert", source, tmp_path / "out", "--dtype", "int8"], **environment)
    assert done.returncode == 0, done.stderr
    assert b"bfloat16 -> int8" in done.stdout and b"Traceback" not in done.stderr
    done = in_a_process(["table", "inspect", tmp_path / "–→."], **environment)
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert name in done.stderr


def test_paths_of_a_command_may_begin_with_the_home_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    codec = RowCodec(4, torch.bfloat16)
    write_packed(tmp_path / "layer-1.safetensors", lambda start, stop: torch.zeros(stop - start, 8).byte(), codec, 8)
    assert main(["table", "convert", "~/layer-1.safetensors", "~/out"]) == 0
    for flags in (["~/out/layer-1.safetensors"], ["~/out/layer-1.safetensors", "--source", "~/layer-1.safetensors"]):
        assert main(["table", "verify", *flags]) == 0
    (tmp_path / "notes.txt").write_text("at home " * 500)
    (tmp_path / "r.toml").write_text(
        '[model]\npreset = "engram-nano"\n[data]\nsources = "~/notes.txt"\ncache = "~/cache"\n[train]\nnum_steps = 1\n'
    )
    capsys.readouterr()
    assert main(["train", "~/r.toml", "--dry-run", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)["recipe"]["data"]
    assert (data["sources"][0]["path"], data["cache"]) == (str(tmp_path / "notes.txt"), str(tmp_path / "cache"))


def test_choosing_a_light_verb_imports_neither_torch_nor_transformers():
    script = (
        "import sys; from engram_lm.cli import main; main(['hash', '--config', sys.argv[1], '--ids', '1,2', '--json']);"
        "sys.exit(bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    config = pathlib.Path(__file__).parent / "golden" / "qwen_config.json"
    done = subprocess.run([sys.executable, "-c", script, str(config)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('{"variant": "qwen_ple"')
