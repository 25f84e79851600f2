"""TOML → frozen dataclasses and back. Every key is checked, and every error names the place of the mistake."""

import contextlib
import dataclasses
import io
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, Union

import tyro

from engram_lm.errors import ConfigError, MismatchError, closest, suggestion
from engram_lm.files import read_text, user_path

_Options = TypeVar("_Options")


class RecipeFile:
    """A dataclass of sections that a TOML file can hold, one section per field; keys can be given as flags, too."""

    prog: ClassVar[str]
    """The command that reads it, for messages."""
    may_change: ClassVar[frozenset[str]] = frozenset()
    """Sections and keys that may be others when a run goes on."""

    @classmethod
    def read(cls, path: Path, overrides: Sequence[str] = ()) -> Self:
        """Read a TOML file; ``--section.key VALUE`` of a command line replace what it says.

        Raises:
            ConfigError: The file cannot be read, a key is unknown, or a value is impossible.
        """
        return build(cls, override(read_table(path), overrides, prog=cls.prog))

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Self:
        """Make a recipe of nested dictionaries, as `to_dict` gives them; a ConfigError names a key that is wrong."""
        return build(cls, table)

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries of plain values; what is None is left out."""
        plain: dict[str, Any] = to_plain(self)
        return plain

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """Say which keys differ from another recipe's, as `to_dict` gave it, and must not when a run goes on."""
        ours = self.to_dict()
        return [
            f"{place} is {_show(now)}, was {_show(then)}"
            for section in ours
            if section not in self.may_change
            for place, now, then in _differences(section, ours[section], saved.get(section, {}))
            if place not in self.may_change
        ]

    def check_resumable(self, saved: Mapping[str, Any]) -> None:
        """Refuse to go on with another recipe than a run was begun with: ``saved``, as `to_dict` gave it.

        Raises:
            MismatchError: Naming every key that differs and must not.
        """
        if different := self.differences(saved):
            raise MismatchError(
                f"the run was begun with another recipe: {'; '.join(different)}. Resume with the recipe.toml of the "
                "run folder, or begin a new run with another --out"
            )


def _differences(place: str, now: Any, then: Any) -> list[tuple[str, Any, Any]]:
    """List what differs between two recipes, key by key: the key, its value now, and its value then."""
    if isinstance(now, Mapping) and isinstance(then, Mapping):
        names = [*now, *(name for name in then if name not in now)]
        return [found for name in names for found in _differences(f"{place}.{name}", now.get(name), then.get(name))]
    return [] if now == then else [(place, now, then)]


def _show(value: Any) -> str:
    return "not given" if value is None else repr(value)


def read_table(path: Path) -> dict[str, Any]:
    """Read a TOML file; a ConfigError names the line where it is not TOML."""
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the recipe {path}: {error}") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error


def override(table: dict[str, Any], arguments: Sequence[str], *, prog: str = "engram-lm train") -> dict[str, Any]:
    """Replace keys of nested tables, in place, by those given on a command line, and return the table.

    Arguments are ``--any.recipe.key VALUE`` or ``--any.recipe.key=VALUE``. A value is TOML, or else a plain string; a
    key may be spelled with hyphens.

    Raises:
        ConfigError: A flag lacks its value, an argument is not a flag, or a key lies below one that is not a table.
    """
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        name, equals, value = flag.partition("=")
        if not name.startswith("--") or "." not in name:
            raise ConfigError(
                f"{flag!r} is neither a flag of {prog} nor a key of the recipe, which are given as --section.key VALUE "
                f"(--train.num_steps 100); {prog} --keys lists them"
            )
        if not equals:
            if not rest or _is_key(rest[0]):
                raise ConfigError(f"{name} needs a value: {name} VALUE")
            value = rest.pop(0)
        *parents, last = name[2:].replace("-", "_").split(".")
        inner = table
        for depth, parent in enumerate(parents, 1):
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{name}: {'.'.join(parents[:depth])} is not a section of the recipe")
        inner[last] = _value(value)
    return table


def divide(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide a command line into the flags of the verb and the keys of a recipe, with their values, for `override`."""
    rest: list[str] = []
    keys: list[str] = []
    waits = False
    for argument in arguments:
        is_key = argument.startswith("--") and "." in argument.partition("=")[0]
        (keys if is_key or (waits and not argument.startswith("--")) else rest).append(argument)
        waits = is_key and "=" not in argument
    return rest, keys


def describe_keys(kind: type) -> str:
    """Describe every key of a recipe's dataclass: its meaning and its default."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        tyro.cli(kind, prog="RECIPE.toml", args=["--help"])
    return text.getvalue()


def build(kind: type[_Options], table: Mapping[str, Any], *, place: str = "") -> _Options:
    """Make options of a table, which is at ``place`` in its file.

    Fields of ``kind``, a dataclass, may be numbers, strings, paths, tuples, mappings, choices and dataclasses.

    Raises:
        ConfigError: A key is unknown (the nearest is suggested), or a value has the wrong type or is impossible.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key, value in table.items():
        where = f"{place}.{key}" if place else key
        name = key.replace("-", "_")
        if name not in fields:
            hint = suggestion(name, fields, prefix=f"{place}." if place else "")
            raise ConfigError(f"the recipe has an unknown key {where}; {hint}")
        values[name] = _convert(hints[name], value, where)
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"the recipe lacks {', '.join(f'{place}.{name}' if place else name for name in missing)}")
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"[{place}] {error}" if place else str(error)) from error


def to_plain(options: Any) -> Any:
    """Turn options into nested dictionaries of plain values without None, from which `build` makes them again."""
    if dataclasses.is_dataclass(options) and not isinstance(options, type):
        pairs = ((field.name, getattr(options, field.name)) for field in dataclasses.fields(options))
        return {name: to_plain(value) for name, value in pairs if value is not None}
    if isinstance(options, Mapping):
        return {str(key): to_plain(value) for key, value in options.items() if value is not None}
    if isinstance(options, list | tuple):
        return [to_plain(value) for value in options]
    return str(options) if isinstance(options, Path) else options


def write_toml(table: Mapping[str, Any]) -> str:
    """Write nested dictionaries of plain values as TOML, plain keys before tables."""
    return "\n".join(_lines(table, ())) + "\n"


def _lines(table: Mapping[str, Any], place: tuple[str, ...]) -> list[str]:
    lines = [f"{_key(name)} = {_toml(value)}" for name, value in table.items() if not _is_section(value)]
    if place and (lines or not table):
        lines = [f"[{'.'.join(map(_key, place))}]", *lines, ""]
    elif lines:
        lines.append("")
    for name, value in table.items():
        if isinstance(value, Mapping):
            lines += _lines(value, (*place, name))
        elif _is_section(value):
            for item in value:
                header = ".".join(map(_key, (*place, name)))
                lines += [f"[[{header}]]", *(f"{_key(key)} = {_toml(inner)}" for key, inner in item.items()), ""]
    return lines


def _is_section(value: Any) -> bool:
    return isinstance(value, Mapping) or (
        isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)
    )


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
        text = repr(value)
        return text if any(letter in text for letter in ".e") else f"{text}.0"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    # A TOML basic string has the escapes of JSON; DEL, which JSON leaves alone, must be escaped as well.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _is_key(argument: str) -> bool:
    return argument.startswith("--") and "." in argument


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return text


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is typing.Annotated:
        return _convert(arguments[0], value, where)
    if origin is Literal:
        if value in arguments and type(value) in {type(choice) for choice in arguments}:
            return value
        near = closest(value, arguments)
        raise ConfigError(
            f"{where} is one of {', '.join(map(repr, arguments))}, not {value!r}"
            + (f"; did you mean {near!r}?" if near else "")
        )
    if dataclasses.is_dataclass(hint):
        if isinstance(value, str) and hasattr(hint, "of"):
            return hint.of(value)  # what a string alone stands for
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is a table of keys, not {value!r}")
        return build(typing.cast(type, hint), value, place=where)
    if origin is tuple:
        return _convert_tuple(arguments, value, where)
    if origin in (dict, Mapping) or hint in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is a table of keys, not {value!r}")
        return dict(value)
    if hint is Path and isinstance(value, str):
        return user_path(value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is hint:
        return value
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", Path: "a path"}
    raise ConfigError(f"{where} is {names.get(hint, getattr(hint, '__name__', hint))}, not {value!r}")


def _convert_union(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in choices:
        return None
    errors = []
    for choice in choices:
        if choice is type(None):
            continue
        try:
            return _convert(choice, value, where)
        except ConfigError as error:
            errors.append(error)
    raise errors[0 if len(errors) == 1 else -1]


def _convert_tuple(items: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    repeated = len(items) == 2 and items[1] is Ellipsis
    if repeated and isinstance(value, str | int | float | Mapping):
        value = [value]  # one alone needs no brackets
    if not isinstance(value, list | tuple) or not (repeated or len(value) == len(items)):
        many = "any number of values" if repeated else f"{len(items)} values"
        raise ConfigError(f"{where} is a list of {many}, not {value!r}")
    kinds = [items[0]] * len(value) if repeated else items
    return tuple(
        _convert(kind, item, f"{where}[{index}]") for index, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )
