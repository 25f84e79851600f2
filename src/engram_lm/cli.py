"""The command line: verb → command, imported only when it is chosen. A verb with verbs of its own is a group.

A command is a frozen dataclass whose fields are the flags and whose ``run`` does the work and returns the exit status:
0, 1 where it failed, 2 where the call was wrong. Results go to stdout, progress and errors to stderr.
"""

import codecs
import importlib
import io
import os
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engram_lm.errors import EngramError, suggestion
from engram_lm.files import user_path
from engram_lm.studies.registry import STUDIES
from engram_lm.threads import settle_threads

_TABLE_VERBS = {
    "build": ("engram_lm.memory.formats.table_command:Build", "write a packed table, from a checkpoint or at random"),
    "convert": ("engram_lm.evaluation.rounding:ConvertAndMeasure", "a checkpoint's tables as packed ones, or rounded"),
    "verify": ("engram_lm.tables.files.command:Verify", "check a packed table against its checksums and its source"),
    "inspect": ("engram_lm.tables.files.command:Inspect", "geometry, codec, bytes and origin of a packed table"),
    "bench": ("engram_lm.serving.bench.tables:Bench", "rows per second of a table by tier, cold and warm"),
    "simulate": ("engram_lm.serving.bench.simulate:Simulate", "row reuse and cache hit rates of a text or a trace"),
}

_PATCH_VERBS = {
    "new": ("engram_lm.serving.patch_commands:PatchNew", "an empty memory for facts, for any causal language model"),
    "fit": ("engram_lm.serving.patch_commands:PatchFit", "fit a file of facts into rows of a memory, as a patch"),
    "apply": ("engram_lm.serving.patch_commands:PatchApply", "put a patch into a folder, which keeps its table files"),
    "revert": ("engram_lm.serving.patch_commands:PatchRevert", "take a patch, or single facts, out of a folder"),
    "proof": ("engram_lm.serving.patch_commands:PatchProof", "what a patch touches in a text, and what not"),
    "merge": ("engram_lm.serving.patch_commands:PatchMerge", "join patches, or write a folder's into its tables"),
}

_BENCHES = {
    "serve": ("engram_lm.serving.bench.serve:ServeBench", "tokens per second of vLLM with tables in every place"),
}

_ALL = ("engram_lm.studies.every_study:EveryStudy", "as many of them as fit a budget of hours, resumable")

VERBS: Mapping[str, tuple[str | Mapping[str, tuple[str, str]], str]] = {
    "quickstart": ("engram_lm.studies.quickstart.run:Quickstart", "train with memory and without, compare, report"),
    "train": ("engram_lm.training.command:Train", "train a model by a recipe, on one process or on many"),
    "adapt": (
        "engram_lm.studies.adaptation.command:Adapt",
        "give a pretrained model memory, with controls",
    ),
    "patch": (_PATCH_VERBS, "add facts to a memory, take them back, prove what changed"),
    "export": ("engram_lm.training.export:Export", "the model of a training's checkpoint as a Hugging Face folder"),
    "join": ("engram_lm.serving.join:Join", "a model of others and its memory adapters as one folder for vLLM"),
    "eval": ("engram_lm.evaluation.command:Eval", "loss of a model on text files, its answers to task files"),
    "analyze": ("engram_lm.analysis.command:Analyze", "what the memory of a model does: gates, lens, CKA, rows"),
    "explore": (
        "engram_lm.explore.command:Explore",
        "a page on this machine: what a memory reads, and what it changes",
    ),
    "generate": ("engram_lm.serving.generate:Generate", "continue a prompt with a model"),
    "serve": ("engram_lm.serving.serve:Serve", "an OpenAI-compatible server for a model, by vLLM"),
    "plan": ("engram_lm.planning.command:Plan", "parameters, bytes, FLOPs and traffic of a model, without building it"),
    "hash": ("engram_lm.hashing.command:Hash", "row numbers of a text under any published config"),
    "table": (_TABLE_VERBS, "build, convert, verify, inspect, bench and simulate tables"),
    "doctor": ("engram_lm.doctor.command:Doctor", "what a bug report needs: versions, machine, tiers that work here"),
    "bench": (_BENCHES, "what memory costs an engine that serves"),
    "study": ({**STUDIES, "all": _ALL}, "ask one of the paper's questions of small models, by one command"),
}
"""For each verb, the module and class of its command, or the verbs it has of its own; and what it does, in a line."""

_PLAINLY = "engram-lm-plainly"
"""Name of the error handler that spells what a terminal cannot print."""
_PLAIN = {
    "–": "-", "—": "-", "−": "-", "→": "->", "←": "<-", "×": "x", "·": "*", "±": "+-", "…": "...", "“": '"', "”": '"',
    "‘": "'", "’": "'", "│": "|", "─": "-", "█": "#", "•": "*", "✓": "ok", "≥": ">=", "≤": "<=",
}  # fmt: skip
"""Characters of our own output, as an ASCII terminal can print them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb by what follows ``engram-lm`` (by default the process's own arguments), and return the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    codecs.register_error(_PLAINLY, _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_PLAINLY)
    if arguments and arguments[0] in ("-V", "--version"):
        from engram_lm import __version__

        print(f"engram-lm {__version__}")
        return 0
    return _choose("engram-lm", "conditional memory for language models", VERBS, arguments)


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Spell in ASCII what a terminal or a pipe cannot print; an error handler of `codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    spelled = "".join(_PLAIN.get(letter) or unicodedata.normalize("NFKD", letter) for letter in text)
    without_accents = "".join(letter for letter in spelled if not unicodedata.combining(letter))
    return without_accents.encode("ascii", "replace").decode(), error.end


def _choose(
    program: str,
    about: str,
    verbs: Mapping[str, tuple[str | Mapping[str, tuple[str, str]], str]],
    arguments: list[str],
) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        width = max(map(len, verbs))
        lines = [f"usage: {program} VERB [--help] ...", "", about, ""]
        lines += [f"  {name:{width}}  {line}" for name, (_, line) in verbs.items()]
        lines += ["", f"{program} VERB --help explains a verb; engram-lm --version says which version this is"]
        print("\n".join(lines), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in verbs:
        print(f"{program}: there is no verb {name!r}; {suggestion(name, verbs)}", file=sys.stderr)
        return 2
    command, about = verbs[name]
    if isinstance(command, str):
        return _run(f"{program} {name}", command, rest)
    return _choose(f"{program} {name}", about, command, rest)


def _paths() -> Any:
    """Read paths of a command line as a person means them, by a registry that tyro uses within a ``with`` block.

    A shell leaves the ``~`` of ``--out=~/run`` alone, and so do programs that start us without a shell.
    """
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def of_a_person(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
        if kind.type is not Path:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=lambda given: user_path(given[0]),
            is_instance=lambda value: isinstance(value, Path),
            str_from_instance=lambda path: [str(path)],
        )

    return registry


def _run(program: str, command: str, arguments: list[str]) -> int:
    import tyro

    module, _, name = command.partition(":")
    try:
        if "torch" not in sys.modules:
            settle_threads(os.environ)
        command_class = getattr(importlib.import_module(module), name)
        try:
            with _paths():
                if hasattr(command_class, "from_arguments"):  # some of its flags are not fields
                    chosen = command_class.from_arguments(arguments, program)
                else:
                    config = (tyro.conf.FlagCreatePairsOff,)
                    chosen = tyro.cli(command_class, prog=program, args=arguments, config=config)
        except SystemExit as ended:  # the parser has explained: 0 after --help, 2 where the call is wrong
            sys.stdout.flush()
            return int(ended.code or 0)
        status: int = chosen.run()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader of the output has ended (`| head`), which is no error; this keeps Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (EngramError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
