"""Readers of published configurations: one function per format, all of which return the fields of a `HashSpec`.

The names of the keys are the publishers'; the fields they become are ours.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

from engram_lm.errors import ConfigError, MismatchError, TokenMapError
from engram_lm.files import read_json, user_path
from engram_lm.hashing.codes import Segments
from engram_lm.hashing.rules import RULES
from engram_lm.hashing.spec_fields import rule_fields
from engram_lm.hashing.token_map import TokenMap

OURS = "hash_spec"
"""The key under which our own configs keep `HashSpec.to_dict`."""


def read_published(config: Mapping[str, Any], tokenizer: Any = None) -> dict[str, Any]:
    """Recognize a published config, and read the fields of its spec; the errors are those of `HashSpec.from_config`."""
    text = config.get("text_config")
    text = text if isinstance(text, Mapping) else config
    for marks, reader in _READERS:
        if any(mark in text for mark in marks):
            return reader(_Keys(config, text), tokenizer)
    raise ConfigError(
        "this config belongs to no known memory model: looked for "
        + ", ".join(f"{' or '.join(map(repr, marks))}" for marks, _ in _READERS)
        + f" (at the top or under 'text_config') and for our own {OURS!r}"
    )


def read_config(path: str | os.PathLike[str]) -> Any:
    """Read a config from a JSON file, or from the ``config.json`` of a folder, or raise a `ConfigError`."""
    path = user_path(path)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"there is no config at {path}; pass a JSON file or a folder with a config.json")
    return read_json(path, error=ConfigError)


# No model has come near these; beyond them a config is broken, and building its hash would take the machine with it.
_HIGHEST = {
    **dict.fromkeys(("max_ngram_size", "engram_max_ngram_size", "ngram_size"), 64),
    **dict.fromkeys(("emb_neighbor_num", "oe_neighbor_num"), 64),
    **dict.fromkeys(("n_head_per_ngram", "engram_n_heads", "heads_per_ngram", "emb_split_num", "oe_split_num"), 4096),
    "vocab_size": 2**31,
}


class _Keys:
    """A config that complains by name about what is missing or of the wrong kind."""

    def __init__(self, config: Mapping[str, Any], text: Mapping[str, Any]):
        self.config, self.text = config, text

    def get(self, *names: str) -> tuple[str, Any]:
        """Find a key that has one or more names, in the text config and then at the top: the name used, and the value.

        Two names must agree. The value is None if the key is missing.
        """
        values = {name: self.config.get(name) if self.text.get(name) is None else self.text[name] for name in names}
        there = {name: value for name, value in values.items() if value is not None}
        if any(value != next(iter(there.values())) for value in there.values()):
            raise ConfigError(
                f"contradictory keys: {', '.join(f'{name} = {value!r}' for name, value in there.items())}; "
                "keep one of them"
            )
        return next(iter(there.items()), (names[0], None))

    def needed(self, *names: str) -> tuple[str, Any]:
        """As `get`, for a key that must be there."""
        name, value = self.get(*names)
        if value is None:
            raise ConfigError(f"the key {' or '.join(map(repr, names))} is missing")
        return name, value

    def integer(self, *names: str, default: int | None = None, low: int = 1) -> int:
        name, value = self.needed(*names) if default is None else self.get(*names)
        value = default if value is None else value
        high = _HIGHEST.get(name, 2**62)
        if type(value) is not int or not low <= value <= high:
            raise ConfigError(f"{name!r} is an integer from {low} to {high}, got {value!r}")
        return value

    def integers(self, name: str, *, low: int = 1) -> tuple[int, ...]:
        _, value = self.needed(name)
        if (
            not isinstance(value, list | tuple)
            or not value
            or any(type(number) is not int or not low <= number <= 2**62 for number in value)
        ):
            raise ConfigError(f"{name!r} is a list of integers from {low}, got {value!r}")
        return tuple(value)

    def orders(self, *names: str, default: int | None = None) -> tuple[int, ...]:
        """All orders from 2 to the highest, which the key holds."""
        return tuple(range(2, self.integer(*names, default=default, low=2) + 1))

    def end_token(self, vocab_size: int) -> int:
        """The token that ends segments and fills what cannot be seen."""
        _, value = self.get("eos_token_id")
        if value is None or value == []:
            raise ConfigError("the key 'eos_token_id' is missing: it ends segments and fills what is not visible")
        # The publishers' own code uses the first of several.
        value = value[0] if isinstance(value, list | tuple) else value
        if type(value) is not int or not 0 <= value < vocab_size:
            raise ConfigError(f"'eos_token_id' = {value!r} is outside the vocabulary of 'vocab_size' = {vocab_size}")
        return value


def _read_demo(keys: _Keys, tokenizer: Any) -> dict[str, Any]:
    """Read the official demo's dataclass fields. Source: deepseek-ai/Engram ``engram_demo_v1.py``."""
    layers = keys.integers("layer_ids", low=0)
    orders = keys.orders("max_ngram_size")
    bases = keys.integers("engram_vocab_size")
    if len(bases) != len(orders):
        raise ConfigError(
            f"'engram_vocab_size' has {len(bases)} numbers, 'max_ngram_size' = {orders[-1]} asks for {len(orders)}: "
            "one per order, rows per head"
        )
    heads, pad, seed = keys.integer("n_head_per_ngram"), keys.integer("pad_id", low=0), keys.integer("seed", low=0)
    if tokenizer is None:
        raise TokenMapError(
            "the demo config does not say how many canonical tokens there are; pass the tokenizer "
            f"({keys.get('tokenizer_name_or_path')[1] or 'of the model'})"
        )
    token_map = _token_map(tokenizer)
    rule = RULES["demo"].new(
        orders=orders, num_heads=heads, vocab_size=len(token_map), layers=layers, rows_per_head=bases, seed=seed
    )
    return rule_fields(rule, "demo", layers, token_map, Segments(), pad, seed=seed)


def _read_deepseek_v41(keys: _Keys, tokenizer: Any) -> dict[str, Any]:
    """Read DeepSeek-V4.1's flat config.

    Source: deepseek-ai/DeepSeek-V4.1-Flash ``config.json`` and ``inference/engram.py``.
    """
    layers = keys.integers("engram_layer_ids", low=0)
    orders = keys.orders("engram_max_ngram_size")
    heads = keys.integer("engram_n_heads")
    base = keys.integer("engram_vocab_size")
    rows = keys.integers("engram_num_embeddings")
    pad = keys.integer("engram_pad_token_id", "engram_pad_id", low=0)
    promised = keys.integer("engram_compressed_vocab_size")
    image = keys.get("image_token_id")[1]
    segments = Segments() if image is None else Segments(dead_tokens=(keys.integer("image_token_id", low=0),))
    token_map = None if tokenizer is None else _token_map(tokenizer)
    if token_map is not None and len(token_map) != promised:
        raise TokenMapError(
            f"'engram_compressed_vocab_size' promises {promised} canonical tokens, the tokenizer gives "
            f"{len(token_map)} (of {token_map.num_tokens}); pass the tokenizer the model was trained with"
        )
    rule = RULES["deepseek_v41"].new(
        orders=orders, num_heads=heads, vocab_size=promised, layers=layers, rows_per_head=base
    )
    if len(rows) != len(layers):
        raise ConfigError(f"'engram_num_embeddings' has {len(rows)} numbers, 'engram_layer_ids' has {len(layers)}")
    for layer, stated, primes in zip(layers, rows, rule.primes, strict=True):
        if stated != sum(primes):
            raise ConfigError(
                f"'engram_num_embeddings' says {stated} rows for layer {layer}, the primes from 'engram_vocab_size' = "
                f"{base} add up to {sum(primes)}"
            )
    num_tokens = 0 if token_map else keys.integer("vocab_size")
    return rule_fields(rule, "deepseek_v41", layers, token_map, segments, pad, num_tokens=num_tokens)


def _read_qwen_ple(keys: _Keys, tokenizer: Any) -> dict[str, Any]:
    """Read Qwen's per-layer embedding (PLE).

    Source: transformers ``models/qwen4_exp/configuration_qwen4_exp.py`` and ``modeling_qwen4_exp.py``.
    """
    # transformers sorts the ids, and saves no key that has the class's default: hence these defaults, its own.
    layers = tuple(sorted(set(keys.integers("ple_layer_ids"))))
    orders = keys.orders("ngram_size", default=3)
    vocab_size = keys.integer("vocab_size", default=248_320)
    eos = keys.end_token(vocab_size)
    seed = keys.integer("seed", default=1234, low=0)
    rule = RULES["qwen_ple"].new(
        orders=orders,
        num_heads=keys.integer("heads_per_ngram", default=8),
        vocab_size=vocab_size,
        layers=layers,
        rows_per_head=keys.integer("ngram_vocab_size_base", default=20_000_000),
        seed=seed,
    )
    token_map, segments = _identity(vocab_size, tokenizer), Segments(end_tokens=(eos,))
    multiple = keys.integer("make_ngram_vocab_size_divisible_by", default=128)
    return rule_fields(rule, "qwen_ple", layers, token_map, segments, eos, seed=seed, row_multiple=multiple)


def _read_longcat(keys: _Keys, tokenizer: Any) -> dict[str, Any]:
    """Read LongCat-Flash-Lite's config, or LongCat-2.0's with its renamed keys.

    Source: meituan-longcat/LongCat-Flash-Lite ``config.json`` and modeling code; arXiv 2601.21204.
    """
    for name in ("oe_ignored_token_ids", "text_vocab_size"):
        if keys.get(name)[1] is not None:
            raise ConfigError(f"{name!r} belongs to LongCat-Next, whose hash has other rules and is not supported")
    orders = keys.orders("emb_neighbor_num", "oe_neighbor_num")
    heads = keys.integer("emb_split_num", "oe_split_num")
    vocab_size = keys.integer("vocab_size")
    eos = keys.end_token(vocab_size)
    _, ratio = keys.needed("ngram_vocab_size_ratio")
    if type(ratio) not in (int, float) or not 0 < ratio < 2**40:
        raise ConfigError(f"'ngram_vocab_size_ratio' is a positive number, got {ratio!r}")
    # The ratio may have a fraction; the publishers cut the product.
    rows_per_head = int(ratio * vocab_size)
    rule = RULES["longcat"].new(
        orders=orders, num_heads=heads, vocab_size=vocab_size, layers=(0,), rows_per_head=rows_per_head
    )
    return rule_fields(rule, "longcat", (0,), _identity(vocab_size, tokenizer), Segments(end_tokens=(eos,)), eos)


# The first key that is there decides, so the names nobody else uses come first.
_READERS: tuple[tuple[tuple[str, ...], Callable[[_Keys, Any], dict[str, Any]]], ...] = (
    (("engram_layer_ids", "engram_num_embeddings", "engram_compressed_vocab_size"), _read_deepseek_v41),
    (("ple_layer_ids",), _read_qwen_ple),
    (("emb_neighbor_num", "oe_neighbor_num"), _read_longcat),
    (("n_head_per_ngram", "n_embed_per_ngram"), _read_demo),
)


def _identity(vocab_size: int, tokenizer: Any) -> TokenMap:
    """Return the map of the two formats that hash raw ids."""
    if not isinstance(tokenizer, TokenMap):
        return TokenMap.identity(vocab_size, tokenizer)
    tokenizer = tokenizer.made
    if not tokenizer.is_identity or tokenizer.num_tokens != vocab_size:
        raise MismatchError(
            f"this model hashes its {vocab_size} raw ids (token map {TokenMap.identity(vocab_size).digest}), the "
            f"given map is {tokenizer.digest}; pass the tokenizer, or no tokenizer"
        )
    return tokenizer


def _token_map(tokenizer: Any) -> TokenMap:
    return tokenizer.made if isinstance(tokenizer, TokenMap) else TokenMap.from_tokenizer(tokenizer)
