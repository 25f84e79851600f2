"""The command line: verb → command, imported only when chosen.

A command is a frozen dataclass whose fields are the flags and whose ``run`` does the work and returns the exit status:
0, 1 where it failed, 2 where the call was wrong. Results go to stdout, progress and errors to stderr.
"""

import dataclasses
import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from engram.errors import EngramError

__all__ = ["main"]


@dataclasses.dataclass(frozen=True)
class _Verb:
    command: str
    """Module and class of the command."""
    about: str
    """What it does, in a line."""


_VERBS = {
    "quickstart": _Verb(
        "engram.studies.quickstart.run:Quickstart",
        "train a small memory model and its memory-less twin on local text, compare them, write a report",
    ),
    "eval": _Verb("engram.evaluation.command:Eval", "loss of a model on text files"),
    "generate": _Verb("engram.serving.generate:Generate", "continue a prompt with a model"),
    "plan": _Verb(
        "engram.model.plan:Plan", "parameters, bytes, FLOPs and traffic of a preset or config, without building it"
    ),
    "hash": _Verb("engram.hashing.command:Hash", "row numbers of a text under any published config"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb.

    Args:
        arguments: What stands behind ``engram``; the process's own where None.

    Returns:
        The exit status.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from engram import __version__

        print(f"engram {__version__}")
        return 0
    name, *rest = arguments
    if name not in _VERBS:
        near = difflib.get_close_matches(name, _VERBS, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(_VERBS)}"
        print(f"engram: there is no verb {name!r}{hint}", file=sys.stderr)
        return 2
    return _run(name, rest)


def _run(name: str, arguments: list[str]) -> int:
    import tyro

    module, _, command_name = _VERBS[name].command.partition(":")
    command_class = getattr(importlib.import_module(module), command_name)
    try:
        try:
            command = tyro.cli(
                command_class, prog=f"engram {name}", args=arguments, config=(tyro.conf.FlagCreatePairsOff,)
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
        print(f"engram {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"engram {name}: interrupted", file=sys.stderr)
        return 130


def _overview() -> str:
    width = max(map(len, _VERBS))
    lines = ["usage: engram VERB [--help] ...", "", "conditional memory for language models", ""]
    lines += [f"  {name:{width}}  {verb.about}" for name, verb in _VERBS.items()]
    return "\n".join([*lines, "", "engram VERB --help explains a verb; engram --version says which engram this is"])
