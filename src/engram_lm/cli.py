"""The command line: verb → command, imported only when chosen. A verb with verbs of its own is a group.

A command is a frozen dataclass whose fields are the flags and whose ``run`` does the work and returns the exit status:
0, 1 where it failed, 2 where the call was wrong. Results go to stdout, progress and errors to stderr.
"""

import dataclasses
import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence

from engram_lm.errors import EngramError, suggestion
from engram_lm.studies.registry import STUDIES

__all__ = ["main"]


@dataclasses.dataclass(frozen=True)
class _Verb:
    command: str
    """Module and class of the command."""
    about: str
    """What it does, in a line."""


_VERBS = {
    "quickstart": _Verb(
        "engram_lm.studies.quickstart.run:Quickstart",
        "train a small memory model and its memory-less twin on local text, compare them, write a report",
    ),
    "train": _Verb("engram_lm.training.command:Train", "train a model by a recipe, on one process or on many"),
    "adapt": _Verb(
        "engram_lm.studies.adaptation.command:Adapt",
        "give a pretrained model memory by a recipe, with controls, and report",
    ),
    "export": _Verb(
        "engram_lm.training.export:Export", "the model of a training's checkpoint as a Hugging Face folder"
    ),
    "eval": _Verb("engram_lm.evaluation.command:Eval", "loss of a model on text files, its answers to task files"),
    "analyze": _Verb(
        "engram_lm.analysis.command:Analyze",
        "see what the memory of a model does: gates, logit lens, CKA, suppression, rows",
    ),
    "generate": _Verb("engram_lm.serving.generate:Generate", "continue a prompt with a model"),
    "plan": _Verb(
        "engram_lm.planning.command:Plan",
        "parameters, bytes, FLOPs and traffic of a preset or config, without building it",
    ),
    "hash": _Verb("engram_lm.hashing.command:Hash", "row numbers of a text under any published config"),
}

_TABLE_VERBS = {
    "build": _Verb(
        "engram_lm.memory.formats.table_command:Build", "write a packed table, from a checkpoint or of random rows"
    ),
    "convert": _Verb(
        "engram_lm.evaluation.rounding:ConvertAndMeasure",
        "write the tables of a checkpoint as packed tables, as they are or rounded; say what rounding costs",
    ),
    "verify": _Verb(
        "engram_lm.tables.files.command:Verify", "check a packed table against its checksums and its source"
    ),
    "inspect": _Verb("engram_lm.tables.files.command:Inspect", "geometry, codec, bytes and origin of a packed table"),
    "bench": _Verb("engram_lm.serving.bench.tables:Bench", "rows per second of a table by tier, cold and warm"),
    "simulate": _Verb(
        "engram_lm.serving.bench.simulate:Simulate", "row reuse and cache hit rates of a text or a recorded trace"
    ),
}

_STUDY_VERBS = {name: _Verb(command, about) for name, (command, about) in STUDIES.items()}

_GROUPS = {
    "table": (_TABLE_VERBS, "build, convert, verify, inspect, bench and simulate tables"),
    "study": (_STUDY_VERBS, "ask one of the paper's questions of small models, by one command"),
}
"""Verbs that have verbs of their own, and what they are about."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb.

    Args:
        arguments: What stands behind ``engram-lm``; the process's own where None.

    Returns:
        The exit status.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from engram_lm import __version__

        print(f"engram-lm {__version__}")
        return 0
    name, *rest = arguments
    if name in _GROUPS:
        return _run_group(name, rest)
    if name not in _VERBS:
        _refuse("engram-lm", name, [*_VERBS, *_GROUPS])
        return 2
    return _run(name, _VERBS[name], rest)


def _run_group(group: str, arguments: list[str]) -> int:
    verbs, about = _GROUPS[group]
    # A part of the library may be left out of an installation.
    verbs = {name: verb for name, verb in verbs.items() if importlib.util.find_spec(verb.command.partition(":")[0])}
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        lines = [f"usage: engram-lm {group} VERB [--help] ...", "", about, "", *_listed(verbs)]
        lines += ["", f"engram-lm {group} VERB --help explains a verb"]
        print("\n".join(lines), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in verbs:
        _refuse(f"engram-lm {group}", name, verbs)
        return 2
    return _run(f"{group} {name}", verbs[name], rest)


def _refuse(prog: str, name: str, verbs: Sequence[str] | Mapping[str, _Verb]) -> None:
    print(f"{prog}: there is no verb {name!r}; {suggestion(name, verbs)}", file=sys.stderr)


def _run(name: str, verb: _Verb, arguments: list[str]) -> int:
    import tyro

    module, _, command_name = verb.command.partition(":")
    command_class = getattr(importlib.import_module(module), command_name)
    try:
        try:
            if hasattr(command_class, "from_arguments"):  # it knows flags that are no fields
                command = command_class.from_arguments(arguments, f"engram-lm {name}")
            else:
                command = tyro.cli(
                    command_class, prog=f"engram-lm {name}", args=arguments, config=(tyro.conf.FlagCreatePairsOff,)
                )
        except SystemExit as ended:  # the parser has explained: 0 after --help, 2 where the call is wrong
            sys.stdout.flush()
            return int(ended.code or 0)
        status: int = command.run()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): not an error of ours; keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (EngramError, OSError) as error:
        print(f"engram-lm {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"engram-lm {name}: interrupted", file=sys.stderr)
        return 130


def _overview() -> str:
    groups = {name: _Verb("", about) for name, (_, about) in _GROUPS.items()}
    lines = ["usage: engram-lm VERB [--help] ...", "", "conditional memory for language models", ""]
    lines += _listed(_VERBS | groups)
    return "\n".join(
        [*lines, "", "engram-lm VERB --help explains a verb; engram-lm --version says which version this is"]
    )


def _listed(verbs: Mapping[str, _Verb]) -> list[str]:
    width = max(map(len, verbs))
    return [f"  {name:{width}}  {verb.about}" for name, verb in verbs.items()]
