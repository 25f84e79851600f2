"""The fields of a hash specification: filled in from a rule, checked, and as JSON values."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from engram_lm.errors import ConfigError, HistoryError, MismatchError, TokenMapError, suggestion
from engram_lm.hashing.codes import Segments
from engram_lm.hashing.rules import HashRule, check_layers
from engram_lm.hashing.token_map import (
    TokenMap,
    digest_vocabulary,
    find_beginning,
    load_tokenizer,
    read_vocabulary,
)

FORMAT = "engram.hash_spec.1"
"""The value of the key ``format``."""

# JSON readers that go through a double lose integers from here on.
_EXACT = 2**53
_INT64 = 2**63
_NAMES_SHOWN = 8
_LOG = logging.getLogger(__name__)


def rule_fields(
    rule: HashRule,
    variant: str,
    layers: tuple[int, ...],
    token_map: TokenMap | None,
    segments: Segments,
    pad_token_id: int,
    *,
    num_tokens: int = 0,
    seed: int = 0,
    shared_table: bool = False,
    row_multiple: int = 1,
) -> dict[str, Any]:
    """Fill in the fields of the spec of a rule.

    Without a token map only the tables are known, and ``num_tokens`` raw ids. Each table's rows are rounded up to a
    multiple of ``row_multiple``.
    """
    fill = None if rule.has_fill else 0
    if rule.has_fill and token_map is not None:
        fill = int(token_map.apply(np.array([pad_token_id]))[0])
    return {
        "variant": variant,
        "layers": layers,
        "layer_base": rule.layer_base,
        "orders": rule.orders,
        "num_heads": rule.num_heads,
        "primes": rule.primes,
        "multipliers": rule.multipliers,
        "vocab_size": rule.vocab_size,
        "num_tokens": num_tokens if token_map is None else token_map.num_tokens,
        "fill": fill,
        "pad_token_id": pad_token_id if rule.has_fill else None,
        "segments": segments,
        "padded_rows": tuple(-(-sum(row) // row_multiple) * row_multiple for row in rule.primes),
        "shared_table": shared_table,
        "seed": seed,
        "token_map_digest": None if token_map is None else token_map.digest,
        "vocabulary_digest": None if token_map is None else token_map.vocabulary_digest,
        "token_map": token_map,
    }


def matching_map(spec: Any, tokenizer: Any) -> TokenMap:
    """Return a tokenizer's map if it is the one that the spec was made for; the errors are those of `HashSpec.bind`.

    A tokenizer that got more tokens since then, while the ids of the old ones stayed, gives the map of the old ones.
    """
    added: list[str] = []
    if isinstance(tokenizer, TokenMap):
        token_map = tokenizer
    else:
        token_map, added = _map_of_old_tokens(spec, tokenizer)
    advice = "pass the tokenizer the model was trained with"
    promised, found = spec.token_map_digest, token_map.digest
    if promised not in (None, found):
        difference = "" if spec.token_map is None else _first_difference(spec.token_map.made, token_map.made, tokenizer)
        raise MismatchError(
            f"this spec hashes with the token map {promised}, the given map is {found}{difference}; {advice}"
        )
    ours, theirs = spec.vocabulary_digest, token_map.vocabulary_digest
    if None not in (ours, theirs) and ours != theirs:
        raise MismatchError(f"this spec belongs to the vocabulary {ours}, the given map to {theirs}; {advice}")
    made = token_map.made
    if made.num_canonical != spec.vocab_size:
        raise TokenMapError(
            f"the config promises {spec.vocab_size} canonical tokens, the tokenizer gives {made.num_canonical} "
            f"(of {made.num_tokens}); {advice}"
        )
    if added:
        _LOG.warning(
            "the tokenizer has %d more tokens than this memory was made with (%s%s); each is hashed as a token of its "
            "own, and has to be trained",
            len(added),
            ", ".join(map(repr, added[:_NAMES_SHOWN])),
            ", …" if len(added) > _NAMES_SHOWN else "",
        )
    return token_map


def expected_map(found: str | None, expected: str | None) -> str | None:
    """Return the digest of a token map, where either is known, or raise a `MismatchError` if they differ."""
    if None not in (found, expected) and found != expected:
        raise MismatchError(
            f"the token map {expected} is expected, this one is {found}; pass the tokenizer the model was trained with"
        )
    return expected or found


def _map_of_old_tokens(spec: Any, tokenizer: Any) -> tuple[TokenMap, list[str]]:
    """Build the map of those of a tokenizer's tokens that the spec was made with, and name the others."""
    tokens = read_vocabulary(tokenizer)
    old = list(tokens)
    if spec.token_map is not None:
        holes = np.flatnonzero(spec.token_map.made.canonical < 0)
        old = [None if place in holes else token for place, token in enumerate(old)] if holes.size else old
    if spec.vocabulary_digest is not None:
        # No beginning of another tokenizer's tokens has this digest, so that tokenizer is refused as a whole.
        end = find_beginning(old, spec.vocabulary_digest)
        old = tokens if end is None else old[:end]
    elif spec.fill is not None:
        # A spec that was never bound has this number from a published config, which counts the rows of a matrix.
        old = old[: spec.num_tokens]
    kept = [*old, *[None] * (len(tokens) - len(old))]
    added = [token for token, before in zip(tokens, kept, strict=True) if token is not None and before is None]
    # Canonical ids count first appearances, so a map that merges nothing is the identity.
    if spec.vocab_size == spec.num_tokens:
        return TokenMap(np.arange(spec.num_tokens), digest_vocabulary(old)), added
    return TokenMap.of_tokens(tokenizer, old), added


def _first_difference(ours: TokenMap, theirs: TokenMap, tokenizer: Any) -> str:
    """Name the first token that two maps treat differently, for a message."""
    size = min(ours.num_tokens, theirs.num_tokens)
    differing = np.flatnonzero(ours.canonical[:size] != theirs.canonical[:size])
    if not differing.size:
        return f", of {theirs.num_tokens} tokens instead of {ours.num_tokens}"
    token = int(differing[0])
    text = "" if isinstance(tokenizer, TokenMap) else f" ({load_tokenizer(tokenizer).id_to_token(token)!r:.60})"
    return f", and token {token}{text} is the first that differs"


def codes_before(spec: Any, codes: Any, context: Any) -> Any:
    """Return what came before codes ``[B, L]`` as codes ``[B, context]``, from a history or such codes; or None.

    Raises:
        HistoryError: It has another batch size or width.
        MismatchError: The history belongs to another spec.
    """
    shape = (codes.shape[0], spec.context)
    if context is not None and hasattr(context, "codes"):
        if context.spec is not spec and context.spec.digest != spec.digest:
            raise MismatchError(
                f"this history belongs to the hash {context.spec.digest}, the rows are asked of {spec.digest}; "
                "make the TokenHistory with the same spec"
            )
        context = context.codes
    if context is not None and tuple(context.shape) != shape:
        raise HistoryError(
            f"the history holds {list(context.shape)} codes, the tokens need {list(shape)} "
            "([batch, context]); give each sequence of the batch its history"
        )
    return context


def check_fields(spec: Any) -> None:
    """Refuse a `HashSpec` whose fields are impossible or contradict one another, with a `ConfigError`."""
    check_layers(spec.layers)
    for name, low in (("vocab_size", 1), ("num_tokens", 1), ("seed", None)):
        value = getattr(spec, name)
        if type(value) is not int or (low is not None and not low <= value < _INT64):
            raise ConfigError(f"{name} is a positive integer, got {value!r}")
    if spec.layer_base not in (0, 1) or min(spec.layers) < spec.layer_base:
        raise ConfigError(f"layer ids {spec.layers} count from layer_base={spec.layer_base}, which is 0 or 1")
    for name, size in (("fill", spec.vocab_size), ("pad_token_id", spec.num_tokens)):
        value = getattr(spec, name)
        if value is not None and not (type(value) is int and 0 <= value < size):
            raise ConfigError(f"{name}={value!r} is outside the vocabulary of {size}")
    if not isinstance(spec.segments, Segments):
        raise ConfigError(f"segments is a Segments, got {type(spec.segments).__name__}")
    for token in (*spec.segments.end_tokens, *spec.segments.dead_tokens):
        if token >= spec.num_tokens:
            raise ConfigError(f"segments names token {token}, the vocabulary has {spec.num_tokens}")
    _check_tables(spec.layers, spec.primes, spec.padded_rows, len(spec.orders) * spec.num_heads)
    if spec.shared_table and (len(set(spec.primes)) != 1 or len(set(spec.padded_rows)) != 1):
        raise ConfigError("shared_table means one table: primes and padded_rows must be equal in all layers")
    for name in ("token_map_digest", "vocabulary_digest"):
        value = getattr(spec, name)
        if value is not None and not (
            isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
        ):
            raise ConfigError(f"{name} is a SHA-256 in hexadecimal or None, got {value!r}")
    if spec.token_map is not None:
        made = spec.token_map.made
        found = (made.num_canonical, made.num_tokens, made.digest)
        promised = (spec.vocab_size, spec.num_tokens, spec.token_map_digest)
        if found != promised:
            raise ConfigError(f"the token map has (canonical, raw, digest) {found}, the spec says {promised}")
        if spec.fill is None:
            raise ConfigError("fill is needed once a token map is bound, got None")


def _check_tables(
    layers: tuple[int, ...], primes: tuple[tuple[int, ...], ...], padded_rows: tuple[int, ...], num_columns: int
) -> None:
    if len(primes) != len(layers) or any(len(row) != num_columns for row in primes):
        raise ConfigError(
            f"primes holds {num_columns} numbers for each of {len(layers)} layers, got {[len(row) for row in primes]}"
        )
    if any(type(prime) is not int or prime < 1 for row in primes for prime in row):
        raise ConfigError("primes are integers from 1")
    if len(padded_rows) != len(layers):
        raise ConfigError(f"padded_rows has {len(padded_rows)} numbers for {len(layers)} layers")
    for layer, row, padded in zip(layers, primes, padded_rows, strict=True):
        if type(padded) is not int or not sum(row) <= padded < _INT64:
            raise ConfigError(
                f"layer {layer} needs {sum(row)} rows and its table has {padded}; "
                "a table has at least the rows that are hashed to, and fewer than 2**63: row numbers are int64"
            )


def fields_to_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the fields of a `HashSpec` into JSON values; multipliers, and integers from 2**53 on, become strings."""
    values = {"format": FORMAT, **{name: _plain(value) for name, value in fields.items()}}
    values["multipliers"] = [[str(multiplier) for multiplier in row] for row in fields["multipliers"]]
    return values


def fields_from_json(values: Any, names: Iterable[str]) -> dict[str, Any]:
    """Undo `fields_to_json`; keys that are missing, unknown or of the wrong kind raise a `ConfigError`."""
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
