"""Makes the pages that nobody writes: commands, configuration keys, and the lessons of ``examples/`` with their list.

A command is a dataclass, so its page is made from its docstring, its fields and their docstrings; so are the sections
of a recipe and the configurations. A lesson is a script: its docstring and comments are the prose of its page.
"""

import ast
import dataclasses
import importlib
import inspect
import itertools
import pathlib
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parents[1]


def on_config(config: Any) -> Any:
    """Put the lessons into the navigation, behind the page that introduces them."""
    for group in config.nav:
        for pages in group.values():
            if "tutorials.md" in pages:
                pages += [f"lessons/{path.stem}.md" for path in lessons()]
    return config


def on_files(files: Any, *, config: Any) -> Any:
    """Add a page for each lesson."""
    for path in lessons():
        files.append(File.generated(config, f"lessons/{path.stem}.md", content=lesson_page(path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Complete the pages of commands, of configuration keys and of the list of lessons."""
    if page.file.src_uri == "commands.md":
        return markdown + command_pages()
    if page.file.src_uri == "configuration.md":
        return markdown + configuration_pages()
    if page.file.src_uri == "tutorials.md":
        return markdown + lesson_list()
    return markdown


# --- commands ---


def commands() -> Iterator[tuple[str, str, type]]:
    """Every verb with the words before it, what it does in a line, and its class."""
    from engram_lm.cli import VERBS

    def below(verbs: Mapping[str, Any], before: str) -> Iterator[tuple[str, str, type]]:
        for name, (command, about) in verbs.items():
            if isinstance(command, str):
                module, _, kind = command.partition(":")
                yield f"{before} {name}", about, getattr(importlib.import_module(module), kind)
            else:
                yield from below(command, f"{before} {name}")

    yield from below(VERBS, "engram-lm")


def command_pages() -> str:
    """A section for each verb: what it does, its flags, its examples."""
    parts = []
    for words, _, kind in commands():
        parts.append(f"\n## {words.removeprefix('engram-lm ')} {{ #{words.replace(' ', '-')} }}\n\n{prose(kind)}\n\n")
        rows = [(_flag(field, hint), _shown(hint, field), text) for field, hint, text in fields_of(kind)]
        parts.append(table(("flag", "value, default", "meaning"), rows))
    return "".join(parts)


def _flag(field: Any, hint: Any) -> str:
    if "Positional" in str(hint):
        return f"`{_metavar(hint) or field.name.upper()}`"
    return f"`--{field.name.replace('_', '-')}`"


def _shown(hint: Any, field: Any) -> str:
    kind = "" if _plain(hint) is bool else f"`{_metavar(hint) or _type_name(hint)}`"
    return ", ".join(filter(None, [kind, _default(field)]))


# --- configuration ---


def configuration_pages() -> str:
    """The sections of the recipes of ``train`` and ``adapt``, and the fields of our own configurations."""
    from engram_lm import EngramConfig, EngramLMConfig
    from engram_lm.studies.adaptation.recipe import AdaptationRecipe
    from engram_lm.training.recipe import Recipe

    parts = ["\n## A recipe of engram-lm train\n"]
    parts += _sections(Recipe, "train")
    parts.append("\n## A recipe of engram-lm adapt\n")
    parts += _sections(AdaptationRecipe, "adapt", known=Recipe)
    for kind, about in (
        (
            EngramConfig,
            "A memory: `EngramConfig(…)`, the arguments of `attach`, `[model.memory]` and `[adapter]` of a recipe.",
        ),
        (
            EngramLMConfig,
            "The language model around it: `EngramLMConfig(…)`, `config.json`, `[model.backbone]` of a recipe.",
        ),
    ):
        parts.append(f"\n## {kind.__name__}\n\n{about}\n\n")
        rows = [(f"`{field.name}`", _value(hint, field), text) for field, hint, text in fields_of(kind) if text]
        parts.append(table(("field", "value, default", "meaning"), rows))
    return "".join(parts)


def _sections(recipe: type, verb: str, known: type | None = None) -> list[str]:
    """A table for each section; sections that ``known`` has too, of the same class, are named in a line."""
    parts = []
    shared = {} if known is None else {field.name: hint for field, hint, _ in fields_of(known)}
    for field, hint, text in fields_of(recipe):
        kind = _plain(hint)
        if not dataclasses.is_dataclass(kind):
            parts.append(f"\n`{field.name}`: {text}\n")
        elif shared.get(field.name) is hint:
            parts.append(f"\n`[{field.name}]` is that of [train](#train-{field.name}).\n")
        else:
            parts.append(f"\n### [{field.name}] {{ #{verb}-{field.name} }}\n\n{text}\n\n")
            rows = [(f"`{key.name}`", _value(of, key), words) for key, of, words in fields_of(kind)]
            parts.append(table(("key", "value, default", "meaning"), rows))
    return parts


# --- lessons ---


def lessons() -> list[pathlib.Path]:
    """The scripts and notebooks of ``examples/``, in their order."""
    return sorted(path for path in (ROOT / "examples").glob("[0-9]*") if path.suffix == ".py")


def lesson_list() -> str:
    """The list of the lessons in ``examples/README.md``, whose links lead to their pages."""
    text = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    rows = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    return "\n## What each of them shows\n\n" + re.sub(r"\]\((\w+)\.py\)", r"](lessons/\1.md)", rows) + "\n"


def lesson_page(path: pathlib.Path) -> str:
    """The docstring of a lesson as its introduction, then its code."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    title, _, rest = (ast.get_docstring(tree) or path.stem).partition("\n")
    first = tree.body[0].end_lineno if ast.get_docstring(tree) else 0
    code = "\n".join(text.splitlines()[first:]).strip("\n")
    number = path.stem.partition("_")[0].lstrip("0")
    return (
        f"# {number}. {title.rstrip('.')}\n\n{_markdown(textwrap.dedent(rest))}\n\n"
        f'```python title="examples/{path.name}"\n{code}\n```\n'
    )


# --- what dataclasses say of themselves ---


def fields_of(kind: type) -> list[tuple[Any, Any, str]]:
    """The fields of a dataclass that people set: field, type, docstring."""
    documented: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        if one.__module__.startswith("engram_lm"):
            body = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0].body  # type: ignore[attr-defined]
            for node, after in itertools.pairwise(body):
                if (
                    isinstance(node, ast.AnnAssign)
                    and isinstance(after, ast.Expr)
                    and isinstance(after.value, ast.Constant)
                ):
                    documented[ast.unparse(node.target)] = inspect.cleandoc(str(after.value.value))
    import torch

    hints = typing.get_type_hints(kind, localns={"torch": torch}, include_extras=True)
    fields = (field for field in dataclasses.fields(kind) if field.init and "Suppress" not in str(hints[field.name]))
    return [(field, hints[field.name], _markdown(documented.get(field.name, ""))) for field in fields]


def prose(kind: type) -> str:
    """A class's docstring as Markdown."""
    return _markdown(inspect.getdoc(kind) or "")


def _markdown(text: str) -> str:
    """Turn what our docstrings use of reStructuredText into Markdown."""
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    text = re.sub(r"^Source:", "**Source:**", text, flags=re.MULTILINE)
    lines, is_code = [], False
    for line in text.splitlines():
        if line.endswith("::"):
            lines += [line[:-1], "", "```console"]
            is_code = True
        elif is_code and line.strip() and not line.startswith(" "):
            lines += ["```", "", line]
            is_code = False
        elif is_code:
            if line.strip():
                lines.append(
                    "$ " + line.strip() if line.strip().startswith(("engram-lm", "torchrun")) else line.strip()
                )
        else:
            lines.append(line)
    return "\n".join([*lines, "```"] if is_code else lines)


def _plain(hint: Any) -> Any:
    """The type itself, without Annotated and None."""
    while typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        some = [one for one in typing.get_args(hint) if one is not type(None)]
        return _plain(some[0]) if len(some) == 1 else hint
    return hint


def _metavar(hint: Any) -> str | None:
    names = (getattr(note, "metavar", None) for note in getattr(hint, "__metadata__", ()))
    return next(filter(None, names), None)


def _type_name(hint: Any) -> str:
    hint = _plain(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "|".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type_name(one) for one in arguments if one is not type(None)))
    if origin in (tuple, list):
        return f"{_type_name(arguments[0])} …" if arguments else "list"
    if origin is not None:
        return "table"
    return getattr(hint, "__name__", str(hint)).lower()


def _default(field: Any) -> str:
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "" if field.default_factory is dataclasses.MISSING and "Positional" in str(field.type) else "required"
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    if value is None or value is False or value == () or value == {}:
        return ""
    return f"`{value}`"


def _value(hint: Any, field: Any) -> str:
    return ", ".join(filter(None, [f"`{_type_name(hint)}`", _default(field)]))


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    if not rows:
        return ""
    shown = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [" ".join(cell.split()) for cell in row]
        shown.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(shown) + "\n"
