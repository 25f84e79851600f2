"""Readers of published configs: one function per format, all giving the fields of a `HashSpec`.

The keys' names here are the publishers'; the fields they become are ours.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from engram_lm.errors import ConfigError, MismatchError, TokenMapError
from engram_lm.hashing.multipliers import pcg64_multipliers, splitmix64_multipliers
from engram_lm.hashing.primes import longcat_moduli, prime_tables
from engram_lm.hashing.segments import Segments
from engram_lm.hashing.token_map import TokenMap

__all__ = ["OURS", "read"]

OURS = "hash_spec"
"""The key under which our own configs keep `HashSpec.to_dict`."""


def read(config: Mapping[str, Any], tokenizer: Any = None) -> dict[str, Any]:
    """Recognize a published config and read the fields of its `HashSpec`.

    Args:
        config: The whole config; a nested ``text_config`` is looked into.
        tokenizer: The model's tokenizer or `TokenMap`, as for `HashSpec.from_config`.

    Raises:
        ConfigError: The config is of no known kind, or lacks or contradicts a key, which the message names.
        TokenMapError: The tokenizer is missing where one is needed, or gives another canonical vocabulary.
        MismatchError: A `TokenMap` that merges tokens was given for a format that hashes raw ids.
    """
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

    def get(self, key: str) -> Any:
        """Look a key up in the text config, then at the top."""
        value = self.text.get(key)
        return self.config.get(key) if value is None else value

    def one_of(self, *keys: str) -> str:
        """Return the one of several names of a key that is there; two names must agree."""
        there = [key for key in keys if self.get(key) is not None]
        if not there:
            raise ConfigError(f"the key {' or '.join(map(repr, keys))} is missing")
        if any(self.get(key) != self.get(there[0]) for key in there):
            raise ConfigError(
                "contradictory keys: " + ", ".join(f"{key} = {self.get(key)!r}" for key in there) + "; keep one of them"
            )
        return there[0]

    def integer(self, key: str, default: int | None = None, *, low: int = 1) -> int:
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"the key {key!r} is missing")
        high = _HIGHEST.get(key, 2**62)
        if type(value) is not int or not low <= value <= high:
            raise ConfigError(f"{key!r} is an integer from {low} to {high}, got {value!r}")
        return value

    def integers(self, key: str, *, low: int = 1) -> tuple[int, ...]:
        value = self.get(key)
        if value is None:
            raise ConfigError(f"the key {key!r} is missing")
        if (
            not isinstance(value, list | tuple)
            or not value
            or any(type(v) is not int or not low <= v <= 2**62 for v in value)
        ):
            raise ConfigError(f"{key!r} is a list of integers from {low}, got {value!r}")
        return tuple(value)


def _read_demo(keys: _Keys, tokenizer: Any) -> dict[str, Any]:
    """Read the official demo's dataclass fields. Source: deepseek-ai/Engram ``engram_demo_v1.py``."""
    layers = keys.integers("layer_ids", low=0)
    orders = tuple(range(2, keys.integer("max_ngram_size", low=2) + 1))
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
            f"({keys.get('tokenizer_name_or_path') or 'of the model'})"
        )
    return _compressed("demo", _token_map(tokenizer), layers, orders, heads, bases, pad, seed, Segments())


def _read_deepseek_v41(keys: _Keys, tokenizer: Any) -> dict[str, Any]:
    """Read DeepSeek-V4.1's config. Source: deepseek-ai/DeepSeek-V4.1-Flash ``config.json``, ``inference/engram.py``."""
    layers = keys.integers("engram_layer_ids", low=0)
    orders = tuple(range(2, keys.integer("engram_max_ngram_size", low=2) + 1))
    heads = keys.integer("engram_n_heads")
    base = keys.integer("engram_vocab_size")
    rows = keys.integers("engram_num_embeddings")
    pad = keys.integer(keys.one_of("engram_pad_token_id", "engram_pad_id"), low=0)
    promised = keys.integer("engram_compressed_vocab_size")
    image = keys.get("image_token_id")
    segments = Segments() if image is None else Segments(dead_tokens=(keys.integer("image_token_id", low=0),))
    token_map = None
    if tokenizer is not None:
        token_map = _token_map(tokenizer)
        if len(token_map) != promised:
            raise TokenMapError(
                f"'engram_compressed_vocab_size' promises {promised} canonical tokens, the tokenizer gives "
                f"{len(token_map)} (of {token_map.num_tokens}); pass the tokenizer the model was trained with"
            )
    fields = _compressed(
        "deepseek_v41", token_map, layers, orders, heads, (base,) * len(orders), pad, 0, segments,
        vocab_size=promised, num_tokens=None if token_map else keys.integer("vocab_size"),
    )  # fmt: skip
    if len(rows) != len(layers):
        raise ConfigError(f"'engram_num_embeddings' has {len(rows)} numbers, 'engram_layer_ids' has {len(layers)}")
    for layer, stated, found in zip(layers, rows, fields["padded_rows"], strict=True):
        if stated != found:
            raise ConfigError(
                f"'engram_num_embeddings' says {stated} rows for layer {layer}, the primes from 'engram_vocab_size' = "
                f"{base} add up to {found}"
            )
    return fields


def _read_qwen_ple(keys: _Keys, tokenizer: Any) -> dict[str, Any]:
    """Read Qwen's per-layer embedding (PLE).

    Source: transformers ``models/qwen4_exp/configuration_qwen4_exp.py`` and ``modeling_qwen4_exp.py``.
    """
    # transformers sorts the ids, and saves no key that has the class's default: hence these defaults, its own.
    layers = tuple(sorted(set(keys.integers("ple_layer_ids"))))
    orders = tuple(range(2, keys.integer("ngram_size", 3, low=2) + 1))
    heads = keys.integer("heads_per_ngram", 8)
    base = keys.integer("ngram_vocab_size_base", 20_000_000)
    multiple = keys.integer("make_ngram_vocab_size_divisible_by", 128)
    seed = keys.integer("seed", 1234, low=0)
    vocab_size = keys.integer("vocab_size", 248_320)
    eos = _end_token(keys, vocab_size)
    primes = prime_tables((base,) * len(orders), heads, len(layers))
    return {
        "variant": "qwen_ple",
        "layers": layers,
        "layer_base": 1,
        "orders": orders,
        "num_heads": heads,
        "primes": primes,
        "multipliers": tuple(
            splitmix64_multipliers(vocab_size, orders[-1], ordinal, seed) for ordinal in range(len(layers))
        ),
        "fill": eos,
        "pad_token_id": eos,
        "segments": Segments(end_tokens=(eos,)),
        "padded_rows": tuple(-(-sum(row) // multiple) * multiple for row in primes),
        "seed": seed,
        **_raw(vocab_size, tokenizer),
    }


def _read_longcat(keys: _Keys, tokenizer: Any) -> dict[str, Any]:
    """Read LongCat-Flash-Lite's config, or LongCat-2.0's with its renamed keys.

    Source: meituan-longcat/LongCat-Flash-Lite ``config.json`` and modeling code; arXiv 2601.21204.
    """
    for key in ("oe_ignored_token_ids", "text_vocab_size"):
        if keys.get(key) is not None:
            raise ConfigError(f"{key!r} belongs to LongCat-Next, whose hash has other rules and is not supported")
    neighbors = keys.integer(keys.one_of("emb_neighbor_num", "oe_neighbor_num"), low=2)
    heads = keys.integer(keys.one_of("emb_split_num", "oe_split_num"))
    vocab_size = keys.integer("vocab_size")
    eos = _end_token(keys, vocab_size)
    ratio = keys.get("ngram_vocab_size_ratio")
    if ratio is None:
        raise ConfigError("the key 'ngram_vocab_size_ratio' is missing")
    if type(ratio) not in (int, float) or not 0 < ratio < 2**40:
        raise ConfigError(f"'ngram_vocab_size_ratio' is a positive number, got {ratio!r}")
    orders = tuple(range(2, neighbors + 1))
    # The ratio may have a fraction; the publishers cut the product.
    moduli = longcat_moduli(int(ratio * vocab_size), len(orders) * heads)
    return {
        "variant": "longcat",
        "layers": (0,),
        "orders": orders,
        "num_heads": heads,
        "primes": (moduli,),
        "fill": 0,
        "segments": Segments(end_tokens=(eos,)),
        "padded_rows": (sum(moduli),),
        **_raw(vocab_size, tokenizer),
    }


# The first key that is there decides, so the names nobody else uses come first.
_READERS: tuple[tuple[tuple[str, ...], Callable[[_Keys, Any], dict[str, Any]]], ...] = (
    (("engram_layer_ids", "engram_num_embeddings", "engram_compressed_vocab_size"), _read_deepseek_v41),
    (("ple_layer_ids",), _read_qwen_ple),
    (("emb_neighbor_num", "oe_neighbor_num"), _read_longcat),
    (("n_head_per_ngram", "n_embed_per_ngram"), _read_demo),
)


def _compressed(
    variant: str,
    token_map: TokenMap | None,
    layers: tuple[int, ...],
    orders: tuple[int, ...],
    heads: int,
    bases: tuple[int, ...],
    pad: int,
    seed: int,
    segments: Segments,
    *,
    vocab_size: int | None = None,
    num_tokens: int | None = None,
) -> dict[str, Any]:
    """Return the fields of the two formats that hash canonical tokens."""
    if token_map is not None:
        vocab_size, num_tokens = len(token_map), token_map.num_tokens
    assert vocab_size is not None
    primes = prime_tables(bases, heads, len(layers))
    return {
        "variant": variant,
        "layers": layers,
        "orders": orders,
        "num_heads": heads,
        "primes": primes,
        "multipliers": tuple(pcg64_multipliers(vocab_size, orders[-1], layer, seed) for layer in layers),
        "vocab_size": vocab_size,
        "num_tokens": num_tokens,
        "fill": None if token_map is None else int(token_map.apply(np.array([pad]))[0]),
        "pad_token_id": pad,
        "segments": segments,
        "padded_rows": tuple(sum(row) for row in primes),
        "seed": seed,
        "token_map_digest": None if token_map is None else token_map.digest,
        "vocabulary_digest": None if token_map is None else token_map.vocabulary_digest,
        "token_map": token_map,
    }


def _raw(vocab_size: int, tokenizer: Any) -> dict[str, Any]:
    """Return the fields about tokens of the two formats that hash raw ids."""
    if isinstance(tokenizer, TokenMap):
        token_map = tokenizer
        if not token_map.is_identity or token_map.num_tokens != vocab_size:
            raise MismatchError(
                f"this model hashes its {vocab_size} raw ids (token map {TokenMap.identity(vocab_size).digest}), the "
                f"given map is {token_map.digest}; pass the tokenizer, or no tokenizer"
            )
    else:
        token_map = TokenMap.identity(vocab_size, tokenizer)
    return {
        "vocab_size": vocab_size,
        "num_tokens": vocab_size,
        "token_map_digest": token_map.digest,
        "vocabulary_digest": token_map.vocabulary_digest,
        "token_map": token_map,
    }


def _token_map(tokenizer: Any) -> TokenMap:
    return tokenizer if isinstance(tokenizer, TokenMap) else TokenMap.from_tokenizer(tokenizer)


def _end_token(keys: _Keys, vocab_size: int) -> int:
    value = keys.get("eos_token_id")
    if value is None or value == []:
        raise ConfigError("the key 'eos_token_id' is missing: it ends segments and fills what is not visible")
    # The publishers' own code uses the first of several.
    value = value[0] if isinstance(value, list | tuple) else value
    if type(value) is not int or not 0 <= value < vocab_size:
        raise ConfigError(f"'eos_token_id' = {value!r} is outside the vocabulary of 'vocab_size' = {vocab_size}")
    return value
