"""The hash specification: everything that decides which rows a token reads, one value that travels with the weights."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from engram_lm.errors import ConfigError, HistoryError, MismatchError, TokenError, TokenMapError, suggestion
from engram_lm.files import read_json, write_atomically
from engram_lm.hashing.multipliers import pcg64_multipliers, splitmix64_multipliers
from engram_lm.hashing.primes import longcat_moduli, prime_tables
from engram_lm.hashing.rows import numpy_rows, torch_rows
from engram_lm.hashing.segments import Segments
from engram_lm.hashing.token_map import TokenMap, check_tokens, is_torch, on_device

if TYPE_CHECKING:
    import torch

    from engram_lm.hashing.history import TokenHistory

__all__ = ["HashSpec", "Variant"]

Variant = Literal["demo", "deepseek_v41", "qwen_ple", "longcat"]

_FORMAT = "engram.hash_spec.1"
_INT64 = 2**63
# JSON readers that go through a double lose integers from here on.
_EXACT = 2**53


@dataclasses.dataclass(frozen=True, kw_only=True)
class HashSpec:
    """Which rows of which layer's table a sequence of tokens reads.

    Make one with `build` (a new model), `from_config` (a published one) or `load`. Rows depend on the spec and the raw
    token ids only; the same spec gives the same rows in NumPy, in torch on any device, whole or in chunks.
    """

    variant: Variant
    """Whose hash this is: ``longcat`` a polynomial modulo odd numbers, the others XOR odd multiples modulo primes."""
    layers: tuple[int, ...]
    """Published ids of the layers with a memory, in published order. LongCat has one, 0: its input embedding."""
    layer_base: int = 0
    """What the published ids count from: 0, or 1 (Qwen)."""
    orders: tuple[int, ...]
    """N-gram orders, ascending, from 2."""
    num_heads: int
    """Hash heads per order."""
    primes: tuple[tuple[int, ...], ...]
    """Rows of each column, per layer: all heads of the first order, then of the next. For ``longcat`` odd moduli."""
    multipliers: tuple[tuple[int, ...], ...] = ()
    """Per layer, one odd integer per look-back distance from 0. Empty for ``longcat``."""
    vocab_size: int
    """Number of ids that are hashed: canonical tokens, or raw ones under the identity map."""
    num_tokens: int
    """Number of raw ids that are accepted."""
    fill: int | None
    """Canonical id that stands for what is not visible; None while no token map is bound."""
    pad_token_id: int | None = None
    """Raw id that `fill` is the canonical id of; None where the format has none (``longcat`` adds nothing instead)."""
    segments: Segments = Segments()
    """Where look-backs stop."""
    padded_rows: tuple[int, ...]
    """Rows that each layer's table has, at least the sum of its primes."""
    shared_table: bool = False
    """Whether all layers read one table: equal primes, own multipliers."""
    seed: int = 0
    """The seed the multipliers were drawn with, for the record."""
    token_map_digest: str | None
    """Digest of the token map; None while none is bound and none was promised."""
    vocabulary_digest: str | None = None
    """Digest of the tokenizer's vocabulary, where known."""
    token_map: TokenMap | None = dataclasses.field(default=None, compare=False, repr=False)
    """The token map itself; None while none is bound. Not part of the value, nor of what is saved."""
    _cache: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, compare=False, repr=False)

    @classmethod
    def build(
        cls,
        token_map: TokenMap,
        *,
        layers: Sequence[int],
        orders: Sequence[int] = (2, 3),
        heads: int = 8,
        rows_per_head: int | Sequence[int],
        seed: int = 0,
        pad_token_id: int,
        variant: Variant = "demo",
        segments: Segments | None = None,
        shared_table: bool = False,
    ) -> "HashSpec":
        """Make the spec of a new model.

        Args:
            token_map: The map of the tokenizer in use.
            layers: Ids of the layers with a memory: 0-based blocks, but 1-based for ``qwen_ple``.
            orders: N-gram orders, ascending, from 2.
            heads: Hash heads per order.
            rows_per_head: Rows asked for per head, one number or one per order; each head gets the next unused prime
                (``longcat``: column i gets ``rows_per_head + 2 i + 1``).
            seed: Seed of the multipliers.
            pad_token_id: *Raw* id that stands for what is not visible (ignored by ``longcat``).
            variant: Whose recipe to follow. ``demo`` and ``deepseek_v41`` are the same hash.
            segments: Where look-backs stop; by default only before the start and at masked positions.
            shared_table: Let all layers read one table: equal primes, own multipliers.

        Raises:
            ConfigError: A value is impossible.
            TokenError: ``pad_token_id`` is not in the vocabulary.

        Source: paper, section 2.2; for each variant the code named in ``docs/paper.md``, “Published variants”.
        """
        if variant not in get_args(Variant):
            raise ConfigError(f"variant is one of {', '.join(get_args(Variant))}, got {variant!r}")
        layers, orders = tuple(layers), tuple(orders)
        _check_geometry(layers, orders, heads)
        bases = (rows_per_head,) * len(orders) if isinstance(rows_per_head, int) else tuple(rows_per_head)
        if len(bases) != len(orders) or any(type(base) is not int or base < 1 for base in bases):
            raise ConfigError(f"rows_per_head is one positive number or one per order {orders}, got {rows_per_head!r}")
        if any(base >= _INT64 for base in bases):
            raise ConfigError(f"row numbers are int64, got rows_per_head={rows_per_head!r}; ask for fewer rows")
        longcat = variant == "longcat"
        if longcat and len(set(bases)) != 1:
            raise ConfigError(f"longcat has one rows_per_head for all orders, got {rows_per_head!r}")
        fill = 0 if longcat else int(token_map.apply(np.array([pad_token_id]))[0])
        if longcat:
            primes: tuple[tuple[int, ...], ...] = (longcat_moduli(bases[0], len(orders) * heads),) * len(layers)
            multipliers: tuple[tuple[int, ...], ...] = ()
        else:
            primes = prime_tables(bases, heads, len(layers), shared=shared_table)
            multipliers = tuple(
                splitmix64_multipliers(len(token_map), orders[-1], ordinal, seed)
                if variant == "qwen_ple"
                else pcg64_multipliers(len(token_map), orders[-1], layer, seed)
                for ordinal, layer in enumerate(layers)
            )
        return cls(
            variant=variant,
            layers=layers,
            layer_base=1 if variant == "qwen_ple" else 0,
            orders=orders,
            num_heads=heads,
            primes=primes,
            multipliers=multipliers,
            vocab_size=len(token_map),
            num_tokens=token_map.num_tokens,
            fill=fill,
            pad_token_id=None if longcat else pad_token_id,
            segments=Segments() if segments is None else segments,
            padded_rows=tuple(sum(row) for row in primes),
            shared_table=shared_table,
            seed=seed,
            token_map_digest=token_map.digest,
            vocabulary_digest=token_map.vocabulary_digest,
            token_map=token_map,
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | str | os.PathLike[str], tokenizer: Any = None) -> "HashSpec":
        """Read the spec of a model from its published config: demo, DeepSeek-V4.1, Qwen PLE, LongCat, or ours.

        Args:
            config: The config, or the path of a JSON file or of a folder with a ``config.json``.
            tokenizer: The model's tokenizer: a `TokenMap`, a fast Hugging Face tokenizer, a ``tokenizers.Tokenizer``
                or a path. Qwen and LongCat hash raw ids and need none. Without it a DeepSeek-V4.1 spec knows its
                tables but hashes nothing until `bind`.

        Raises:
            ConfigError: The config is of no known kind, or lacks or contradicts a key, which the message names.
            TokenMapError: The tokenizer is missing where one is needed, or gives another canonical vocabulary.
            MismatchError: The tokenizer is not the one our own config was saved with.

        Source: the published configs and code named in ``docs/paper.md``, “Published variants”.
        """
        from engram_lm.hashing.published import OURS, read

        config = _read_json(config) if isinstance(config, str | os.PathLike) else config
        if not isinstance(config, Mapping):
            raise ConfigError(f"a config is a dictionary or a path, got {type(config).__name__}")
        if OURS in config:
            if config[OURS] is None:
                raise ConfigError("this config is of a model without memory: its 'hash_spec' is empty")
            spec = cls.from_dict(config[OURS])
            return spec if tokenizer is None else spec.bind(tokenizer)
        return cls(**read(config, tokenizer))

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise ConfigError(f"variant is one of {', '.join(get_args(Variant))}, got {self.variant!r}")
        _check_geometry(self.layers, self.orders, self.num_heads)
        for name, low in (("vocab_size", 1), ("num_tokens", 1), ("seed", None)):
            value = getattr(self, name)
            if type(value) is not int or (low is not None and not low <= value < _INT64):
                raise ConfigError(f"{name} is a positive integer, got {value!r}")
        if self.layer_base not in (0, 1) or min(self.layers) < self.layer_base:
            raise ConfigError(f"layer ids {self.layers} count from layer_base={self.layer_base}, which is 0 or 1")
        for name in ("fill", "pad_token_id"):
            value, size = getattr(self, name), self.vocab_size if name == "fill" else self.num_tokens
            if value is not None and not (type(value) is int and 0 <= value < size):
                raise ConfigError(f"{name}={value!r} is outside the vocabulary of {size}")
        if not isinstance(self.segments, Segments):
            raise ConfigError(f"segments is a Segments, got {type(self.segments).__name__}")
        for token in (*self.segments.end_tokens, *self.segments.dead_tokens):
            if token >= self.num_tokens:
                raise ConfigError(f"segments names token {token}, the vocabulary has {self.num_tokens}")
        self._check_tables()
        self._check_products()
        for name in ("token_map_digest", "vocabulary_digest"):
            value = getattr(self, name)
            if value is not None and not _is_digest(value):
                raise ConfigError(f"{name} is a SHA-256 in hexadecimal or None, got {value!r}")
        if self.token_map is not None:
            found = (len(self.token_map), self.token_map.num_tokens, self.token_map.digest)
            if found != (self.vocab_size, self.num_tokens, self.token_map_digest):
                raise ConfigError(
                    f"the token map has (canonical, raw, digest) {found}, the spec says "
                    f"{(self.vocab_size, self.num_tokens, self.token_map_digest)}"
                )
            if self.fill is None:
                raise ConfigError("fill is needed once a token map is bound, got None")

    def _check_tables(self) -> None:
        columns = self.num_heads_total
        if len(self.primes) != len(self.layers) or any(len(row) != columns for row in self.primes):
            raise ConfigError(
                f"primes holds {columns} numbers for each of {len(self.layers)} layers, "
                f"got {[len(row) for row in self.primes]}"
            )
        if any(type(prime) is not int or prime < 1 for row in self.primes for prime in row):
            raise ConfigError("primes are integers from 1")
        if len(self.padded_rows) != len(self.layers):
            raise ConfigError(f"padded_rows has {len(self.padded_rows)} numbers for {len(self.layers)} layers")
        for layer, row, padded in zip(self.layers, self.primes, self.padded_rows, strict=True):
            if type(padded) is not int or not sum(row) <= padded < _INT64:
                raise ConfigError(
                    f"layer {layer} needs {sum(row)} rows and its table has {padded}; "
                    "a table has at least the rows that are hashed to, and fewer than 2**63: row numbers are int64"
                )
        if self.shared_table and (len(set(self.primes)) != 1 or len(set(self.padded_rows)) != 1):
            raise ConfigError("shared_table means one table: primes and padded_rows must be equal in all layers")

    def _check_products(self) -> None:
        highest = self.orders[-1]
        if self.variant == "longcat":
            if self.multipliers:
                raise ConfigError("longcat has no multipliers: it uses the powers of vocab_size")
            if (self.vocab_size - 1) * max(map(max, self.primes)) * highest >= _INT64:
                raise ConfigError(
                    f"{highest} tokens below {self.vocab_size} times powers below {max(map(max, self.primes))} "
                    "leave int64; ask for fewer rows"
                )
            return
        if len(self.multipliers) != len(self.layers) or any(len(row) != highest for row in self.multipliers):
            raise ConfigError(
                f"multipliers holds {highest} numbers (orders {self.orders}) for each of {len(self.layers)} layers, "
                f"got {[len(row) for row in self.multipliers]}"
            )
        for row in self.multipliers:
            for multiplier in row:
                if type(multiplier) is not int or not 1 <= multiplier < _INT64 or multiplier % 2 == 0:
                    raise ConfigError(f"multipliers are odd positive integers below 2**63, got {multiplier!r}")
                if multiplier * (self.vocab_size - 1) >= _INT64:
                    raise ConfigError(
                        f"multiplier {multiplier} times a token of a vocabulary of {self.vocab_size} leaves int64; "
                        "it was drawn for a smaller vocabulary"
                    )

    @property
    def num_heads_total(self) -> int:
        """Columns of a layer: heads over all orders, so rows read per token and layer."""
        return len(self.orders) * self.num_heads

    @property
    def blocks(self) -> tuple[int, ...]:
        """The layers as 0-based block numbers."""
        return tuple(layer - self.layer_base for layer in self.layers)

    @property
    def context(self) -> int:
        """How many earlier positions a row depends on: the highest order less one."""
        return self.orders[-1] - 1

    @property
    def looks_at_positions(self) -> bool:
        """Whether codes may hold segment starts taken from ``position_ids``."""
        return self.segments.positions

    def offsets(self, layer: int) -> tuple[int, ...]:
        """Return the first row of each column of a layer.

        Raises:
            ConfigError: The layer has no memory.
        """
        return self.offsets_at(self._index(layer))

    def offsets_at(self, index: int) -> tuple[int, ...]:
        """Return `offsets` by place in `layers`."""
        row = self.primes[index]
        return tuple(sum(row[:column]) for column in range(len(row)))

    def num_rows(self, layer: int) -> int:
        """Return how many rows a layer's table has, padding included.

        Raises:
            ConfigError: The layer has no memory.
        """
        return self.padded_rows[self._index(layer)]

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of everything that decides which row a token reads.

        Names and records (variant, seed, padding, vocabulary) are left out: two specs of one digest give equal rows.
        A spec without a bound or promised token map has a digest of its own.
        """
        decisive = self.to_dict()
        for name in ("format", "variant", "seed", "pad_token_id", "padded_rows", "shared_table", "vocabulary_digest"):
            del decisive[name]
        decisive["rule"] = "polynomial" if self.variant == "longcat" else "xor"
        return hashlib.sha256(json.dumps(decisive, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def bind(self, tokenizer: Any) -> "HashSpec":
        """Return the same spec with its token map.

        Args:
            tokenizer: The `TokenMap`, or the tokenizer to make it from, as for `from_config`.

        Raises:
            MismatchError: The map, or the vocabulary behind it, is not the one this spec was made for.
            TokenMapError: No map was promised, but a number of canonical tokens, and this map has another.
        """
        token_map = self._map_of(tokenizer)
        if self.token_map_digest not in (None, token_map.digest):
            raise MismatchError(
                f"this spec hashes with the token map {self.token_map_digest}, the given map is {token_map.digest}; "
                "pass the tokenizer the model was trained with"
            )
        if None not in (self.vocabulary_digest, token_map.vocabulary_digest) and (
            self.vocabulary_digest != token_map.vocabulary_digest
        ):
            raise MismatchError(
                f"this spec belongs to the vocabulary {self.vocabulary_digest}, the given map to "
                f"{token_map.vocabulary_digest}; pass the tokenizer the model was trained with"
            )
        if len(token_map) != self.vocab_size:
            raise TokenMapError(
                f"the config promises {self.vocab_size} canonical tokens, the tokenizer gives {len(token_map)} "
                f"(of {token_map.num_tokens}); pass the tokenizer the model was trained with"
            )
        fill = self.fill
        if self.pad_token_id is not None:
            fill = int(token_map.apply(np.array([self.pad_token_id]))[0])
        return dataclasses.replace(
            self,
            num_tokens=token_map.num_tokens,
            fill=fill,
            token_map_digest=token_map.digest,
            vocabulary_digest=self.vocabulary_digest or token_map.vocabulary_digest,
            token_map=token_map,
        )

    def encode(self, tokens: Any, attention_mask: Any = None, position_ids: Any = None) -> Any:
        """Turn raw tokens into codes, the form in which rows and histories take them.

        Args:
            tokens: Raw ids [B, L], a NumPy array (or nested lists) or a torch tensor.
            attention_mask: [B, L]; 0 marks dead positions, such as padding.
            position_ids: [B, L] or [1, L]; where they do not increase a segment starts. Used only if
                ``segments.positions``.

        Returns:
            Codes, int64 [B, L], same kind and device as the tokens: -1 for a dead position, otherwise
            ``canonical * 4 + 2 * (ends a segment) + (starts one, by position_ids)``.

        Raises:
            TokenMapError: No token map is bound.
            TokenError: A token is outside the vocabulary, or tokens are not two-dimensional integers.
            MismatchError: Mask or positions have another shape.
        """
        table = self._code_table()
        tokens = check_tokens(tokens, self.num_tokens)
        if tokens.ndim != 2:
            raise TokenError(f"tokens are [batch, length], got the shape {list(tokens.shape)}")
        codes: Any
        mask = _beside(tokens, attention_mask, "attention_mask")
        positions = _beside(tokens, position_ids if self.segments.positions else None, "position_ids")
        if is_torch(tokens):
            import torch

            codes = on_device(self._cache, "codes", table, tokens.device)[tokens]
            if positions is not None:
                starts = torch.cat([positions[:, :1] == 0, positions[:, 1:] <= positions[:, :-1]], dim=1)
                codes = torch.where(codes < 0, codes, codes | starts)
            return codes if mask is None else codes.masked_fill(mask == 0, -1)
        codes = table[tokens]
        if positions is not None:
            breaks = np.concatenate([positions[:, :1] == 0, positions[:, 1:] <= positions[:, :-1]], axis=1)
            codes = np.where(codes < 0, codes, codes | breaks)
        return codes if mask is None else np.where(mask == 0, -1, codes)

    def rows(
        self,
        tokens: Any,
        layer: int,
        history: "TokenHistory | None" = None,
        *,
        attention_mask: Any = None,
        position_ids: Any = None,
    ) -> Any:
        """Compute the rows of raw tokens in one layer's table.

        Args:
            tokens: Raw ids, [B, L], or [L] without a history. NumPy (or lists) or torch.
            layer: Published id of the layer.
            history: What came before these tokens. It is read, not advanced. None: this is the start.
            attention_mask: As for `encode`.
            position_ids: As for `encode`.

        Returns:
            Row numbers, offsets included, int64 [B, L, num_heads_total] ([L, num_heads_total] for [L]), of the same
            kind and on the same device as the tokens. NumPy in never imports torch.

        Raises:
            ConfigError: The layer has no memory.
            TokenError: A token is outside the vocabulary.
            TokenMapError: No token map is bound.
            HistoryError: The history has another batch size, or the tokens have no batch.
            MismatchError: The history belongs to another spec.
        """
        index = self._index(layer)
        tokens = tokens if is_torch(tokens) else np.asarray(tokens)
        single = tokens.ndim == 1
        if single:
            if history is not None:
                raise HistoryError(f"with a history, tokens are [batch, length], got the shape {list(tokens.shape)}")
            tokens = tokens[None]
            attention_mask, position_ids = (
                None if value is None else (value if is_torch(value) else np.asarray(value))[None]
                for value in (attention_mask, position_ids)
            )
        codes = self.encode(tokens, attention_mask, position_ids)
        rows = self._rows(codes, history, [index])[0]
        return rows[0] if single else rows

    def rows_for_layers(self, codes: Any, history: Any = None) -> dict[int, Any]:
        """Compute the rows of all layers from codes; what the layers have in common is computed once.

        Args:
            codes: From `encode`, int64 [B, L], NumPy or torch.
            history: A `TokenHistory`, or the codes of the `context` positions before, int64 [B, context]. None: start.

        Returns:
            Layer id to row numbers, offsets included, int64 [B, L, num_heads_total].

        Raises:
            HistoryError: The history has another batch size or width.
            MismatchError: The history belongs to another spec.
            TokenMapError: No token map is bound, so the fill is unknown.
        """
        return dict(zip(self.layers, self._rows(codes, history, range(len(self.layers))), strict=True))

    def _rows(self, codes: Any, history: Any, layers: Sequence[int]) -> list[Any]:
        if self.fill is None:
            raise TokenMapError(_UNBOUND)
        shape = (codes.shape[0], self.context)
        if history is None:
            if not is_torch(codes):
                return numpy_rows(self, codes, np.full(shape, -1, np.int64), layers)
            return torch_rows(self, codes, codes.new_full(shape, -1), layers)
        if hasattr(history, "codes"):
            if history.spec is not self and history.spec.digest != self.digest:
                raise MismatchError(
                    f"this history belongs to the hash {history.spec.digest}, the rows are asked of {self.digest}; "
                    "make the TokenHistory with the same spec"
                )
            history = history.codes
        if tuple(history.shape) != shape:
            raise HistoryError(
                f"the history holds {list(history.shape)} codes, the tokens need {list(shape)} "
                "([batch, context]); give each sequence of the batch its history"
            )
        if not is_torch(codes):
            context = history.cpu().numpy() if is_torch(history) else np.asarray(history)
            return numpy_rows(self, codes, context, layers)
        if not is_torch(history):
            import torch

            history = torch.as_tensor(history)
        return torch_rows(self, codes, history.to(codes.device), layers)

    def constants(
        self, device: "torch.device", layers: tuple[int, ...]
    ) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
        """Return the numbers of some layers (by place) as tensors on a device, copied there once.

        Returns:
            Primes [G, O, K] (layers, orders, heads), offsets [G, O * K], and the factor of each distance: multipliers
            [G, W + 1], or for ``longcat`` the powers of the vocabulary modulo each prime, [G, W + 1, O, K]; int64.
        """
        import torch

        key = ("constants", device.type, device.index, layers)
        found = self._cache.get(key)
        if found is None:
            if self.variant == "longcat":
                factors: Any = [
                    [[pow(self.vocab_size, s, prime) for prime in self.primes[index]] for s in range(self.orders[-1])]
                    for index in layers
                ]
            else:
                factors = [self.multipliers[index] for index in layers]
            grid = (len(self.orders), self.num_heads)
            factors = torch.tensor(factors, device=device)
            found = (
                torch.tensor([self.primes[index] for index in layers], device=device).unflatten(-1, grid),
                torch.tensor([self.offsets_at(index) for index in layers], device=device),
                factors.unflatten(-1, grid) if self.variant == "longcat" else factors,
            )
            # Under torch.compile the tensors are constants of the graph; keeping one would leak it out of the trace.
            if not torch.compiler.is_compiling():
                self._cache[key] = found
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as JSON values. Multipliers, and integers from 2**53 on, are strings: doubles lose them."""
        values: dict[str, Any] = {"format": _FORMAT}
        for field in dataclasses.fields(self):
            if field.name not in ("token_map", "_cache"):
                values[field.name] = _plain(getattr(self, field.name))
        values["segments"] = {
            field.name: _plain(getattr(self.segments, field.name)) for field in dataclasses.fields(self.segments)
        }
        values["multipliers"] = [[str(multiplier) for multiplier in row] for row in self.multipliers]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "HashSpec":
        """Make a spec from what `to_dict` returned.

        A spec that hashes raw ids is complete; one with a token map needs `bind` before it hashes.

        Raises:
            ConfigError: A key is missing, unknown or of the wrong kind, or the values are impossible.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"a hash spec is a dictionary, got {type(values).__name__}")
        if values.get("format") != _FORMAT:
            raise ConfigError(f"hash spec: expected format {_FORMAT!r}, got {values.get('format')!r}")
        names = {field.name for field in dataclasses.fields(cls)} - {"token_map", "_cache"}
        read = {name: _typed(name, value) for name, value in _known(values, names | {"format"}, "hash spec").items()}
        del read["format"]
        missing = sorted(names - set(read))
        if missing:
            raise ConfigError(f"hash spec: the key {missing[0]!r} is missing")
        spec = cls(**read)
        # The identity map needs no tokenizer, so it can be rebuilt here.
        if spec.token_map_digest is not None and spec.vocab_size == spec.num_tokens and spec.num_tokens < 2**31:
            identity = TokenMap.identity(spec.num_tokens)
            if identity.digest == spec.token_map_digest:
                return spec.bind(identity)
        return spec

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the spec as JSON, atomically. The token map is not in it; save it beside.

        Raises:
            OSError: The file cannot be written.
        """
        write_atomically(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str], token_map: TokenMap | None = None) -> "HashSpec":
        """Read a spec that `save` wrote, and bind its token map if given.

        Raises:
            ConfigError: The file is not a hash spec.
            MismatchError: The token map is another one.
            OSError: The file cannot be read.
        """
        spec = cls.from_dict(_read_json(path))
        return spec if token_map is None else spec.bind(token_map)

    def _map_of(self, tokenizer: Any) -> TokenMap:
        """Build from a tokenizer the kind of map this spec has."""
        if isinstance(tokenizer, TokenMap):
            return tokenizer
        # Canonical ids count first appearances, so a map that merges nothing is the identity.
        if self.vocab_size == self.num_tokens:
            return TokenMap.identity(self.num_tokens, tokenizer)
        return TokenMap.from_tokenizer(tokenizer)

    def _index(self, layer: int) -> int:
        if layer not in self.layers:
            raise ConfigError(
                f"layer {layer} has no memory; the layers with one are {', '.join(map(str, self.layers))}"
            )
        return self.layers.index(layer)

    def _code_table(self) -> np.ndarray:
        """Return the code of each raw id, int64 [num_tokens]: one look-up does the map and the segments."""
        if self.token_map is None:
            raise TokenMapError(_UNBOUND)
        table = self._cache.get("code_table")
        if table is None:
            table = self.token_map.canonical * 4
            table[list(self.segments.end_tokens)] |= 2
            table[list(self.segments.dead_tokens)] = -1
            self._cache["code_table"] = table
        return table


_UNBOUND = (
    "this spec hashes canonical tokens and no token map is bound; pass the tokenizer to HashSpec.from_config, "
    "or use spec.bind(TokenMap.from_tokenizer(tokenizer))"
)


def _check_geometry(layers: tuple[int, ...], orders: tuple[int, ...], heads: int) -> None:
    if not layers or any(type(layer) is not int or layer < 0 for layer in layers):
        raise ConfigError(f"layers are one or more ids from 0, got {layers!r}")
    if len(set(layers)) != len(layers):
        raise ConfigError(f"layers must differ, got {layers!r}")
    if (
        not orders
        or any(type(order) is not int or order < 2 for order in orders)
        or list(orders) != sorted(set(orders))
    ):
        raise ConfigError(f"orders are ascending integers from 2, such as (2, 3), got {orders!r}")
    if type(heads) is not int or heads < 1:
        raise ConfigError(f"heads per order is an integer from 1, got {heads!r}")


def _beside(tokens: Any, values: Any, name: str) -> Any:
    """Bring a mask or positions to the kind, device and shape of the tokens."""
    if values is None:
        return None
    if is_torch(tokens):
        import torch

        values = torch.as_tensor(values, device=tokens.device)
    else:
        values = values.cpu().numpy() if is_torch(values) else np.asarray(values)
    if values.shape == tokens.shape or (values.ndim == 2 and values.shape == (1, tokens.shape[1])):
        return values
    raise MismatchError(
        f"{name} has the shape {list(values.shape)}, the tokens {list(tokens.shape)}; "
        "pass the part that belongs to these tokens"
    )


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if type(value) is int and abs(value) >= _EXACT else value


def _typed(name: str, value: Any) -> Any:
    """Undo `_plain` for the field of that name, refusing what it cannot have made."""
    if name in ("primes", "multipliers"):
        return tuple(tuple(_integer(name, item) for item in _list(name, row)) for row in _list(name, value))
    if name in ("layers", "orders", "padded_rows", "end_tokens", "dead_tokens"):
        return tuple(_integer(name, item) for item in _list(name, value))
    if name in ("fill", "pad_token_id"):
        return None if value is None else _integer(name, value)
    if name in ("layer_base", "num_heads", "vocab_size", "num_tokens", "seed"):
        return _integer(name, value)
    if name == "segments":
        if not isinstance(value, Mapping):
            raise ConfigError(f"hash spec: segments is a dictionary, got {value!r}")
        known = _known(value, {field.name for field in dataclasses.fields(Segments)}, "hash spec segments")
        return Segments(**{key: _typed(key, item) for key, item in known.items()})
    if name in ("shared_table", "positions") and not isinstance(value, bool):
        raise ConfigError(f"hash spec: {name} is true or false, got {value!r}")
    return value


def _known(values: Mapping[str, Any], names: set[str], where: str) -> dict[str, Any]:
    for key in values:
        if key not in names:
            raise ConfigError(f"{where}: unknown key {key!r}; {suggestion(key, sorted(names))}")
    return dict(values)


def _list(name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"hash spec: {name} is a list, got {value!r}")
    return value


def _integer(name: str, value: Any) -> int:
    if type(value) is int:
        return value
    if isinstance(value, str) and len(value) < 32 and value.removeprefix("-").isdecimal():
        return int(value)
    raise ConfigError(f"hash spec: {name} holds integers (large ones as strings), got {value!r}")


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _read_json(path: str | os.PathLike[str]) -> Any:
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"there is no config at {path}; pass a JSON file or a folder with a config.json")
    return read_json(path, error=ConfigError)
