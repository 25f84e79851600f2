"""The command line finds its verbs, explains itself, and keeps results, messages and statuses apart."""

import pathlib
import subprocess
import sys

import pytest

from engram_lm.cli import VERBS, main


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


def test_choosing_a_light_verb_imports_neither_torch_nor_transformers():
    script = (
        "import sys; from engram_lm.cli import main; main(['hash', '--config', sys.argv[1], '--ids', '1,2', '--json']);"
        "sys.exit(bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    config = pathlib.Path(__file__).parent / "golden" / "qwen_config.json"
    done = subprocess.run([sys.executable, "-c", script, str(config)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('{"variant": "qwen_ple"')
