"""A hash specification as JSON values, and back."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engram_lm.errors import ConfigError, suggestion
from engram_lm.hashing.segments import Segments

__all__ = ["FORMAT", "fields_from_json", "fields_to_json"]

FORMAT = "engram.hash_spec.1"
"""The value of the key ``format``."""

# JSON readers that go through a double lose integers from here on.
_EXACT = 2**53


def fields_to_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the fields of a `HashSpec` into JSON values; multipliers, and integers from 2**53 on, become strings."""
    values = {"format": FORMAT, **{name: _plain(value) for name, value in fields.items()}}
    values["multipliers"] = [[str(multiplier) for multiplier in row] for row in fields["multipliers"]]
    return values


def fields_from_json(values: Any, names: Iterable[str]) -> dict[str, Any]:
    """Undo `fields_to_json`.

    Args:
        values: What was read.
        names: The fields that have to be there.

    Raises:
        ConfigError: A key is missing, unknown or of the wrong kind.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"a hash spec is a dictionary, got {type(values).__name__}")
    if values.get("format") != FORMAT:
        raise ConfigError(f"hash spec: expected format {FORMAT!r}, got {values.get('format')!r}")
    values = {name: value for name, value in values.items() if name != "format"}
    names = list(names)
    _refuse_unknown(values, names, "hash spec")
    if missing := sorted(set(names) - set(values)):
        raise ConfigError(f"hash spec: the key {missing[0]!r} is missing")
    return {name: _typed(name, value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Segments):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if type(value) is int and abs(value) >= _EXACT else value


def _typed(name: str, value: Any) -> Any:
    """Undo `_plain` for the field of that name, and refuse what it cannot have made."""
    if name in ("primes", "multipliers"):
        return tuple(_integers(name, row) for row in _list(name, value))
    if name in ("layers", "orders", "padded_rows", "end_tokens", "dead_tokens"):
        return _integers(name, value)
    if name in ("layer_base", "num_heads", "vocab_size", "num_tokens", "seed", "fill", "pad_token_id"):
        return None if value is None and name in ("fill", "pad_token_id") else _integers(name, [value])[0]
    if name == "segments":
        if not isinstance(value, Mapping):
            raise ConfigError(f"hash spec: segments is a dictionary, got {value!r}")
        _refuse_unknown(value, [field.name for field in dataclasses.fields(Segments)], "hash spec segments")
        return Segments(**{key: _typed(key, item) for key, item in value.items()})
    if name in ("shared_table", "positions") and not isinstance(value, bool):
        raise ConfigError(f"hash spec: {name} is true or false, got {value!r}")
    return value


def _refuse_unknown(values: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    for key in values:
        if key not in names:
            raise ConfigError(f"{where}: unknown key {key!r}; {suggestion(key, sorted(names))}")


def _list(name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"hash spec: {name} is a list, got {value!r}")
    return value


def _integers(name: str, values: Any) -> tuple[int, ...]:
    for value in _list(name, values):
        digits = isinstance(value, str) and len(value) < 32 and value.removeprefix("-").isdecimal()
        if type(value) is not int and not digits:
            raise ConfigError(f"hash spec: {name} holds integers (large ones as strings), got {value!r}")
    return tuple(map(int, values))
