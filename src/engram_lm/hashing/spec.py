"""The hash specification: everything that decides which rows a token reads, one value that travels with the weights."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from engram_lm.errors import ConfigError, HistoryError, TokenMapError
from engram_lm.files import write_atomically
from engram_lm.hashing.codes import Encoder, Segments, look_back
from engram_lm.hashing.published import OURS, read_config, read_published
from engram_lm.hashing.rules import HashRule, find_rule
from engram_lm.hashing.spec_fields import (
    check_fields,
    codes_before,
    expected_map,
    fields_from_json,
    fields_to_json,
    matching_map,
    rule_fields,
)
from engram_lm.hashing.token_map import TokenMap, is_torch

if TYPE_CHECKING:
    from engram_lm.hashing.history import TokenHistory

_NOT_DECISIVE = ("format", "variant", "seed", "pad_token_id", "padded_rows", "shared_table", "vocabulary_digest")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HashSpec:
    """Which rows of which layer's table a sequence of tokens reads.

    Make one with `build` (a new model), `from_config` (a published one) or `load`. Rows depend on the spec and the raw
    tokens only; the same spec gives the same rows in NumPy and in torch on any device, whole or in chunks.
    """

    variant: str
    """Whose hash this is, one of `engram_lm.hashing.rules.RULES`: ``longcat`` takes a polynomial modulo odd numbers,
    ``demo``, ``deepseek_v41`` and ``qwen_ple`` the XOR of odd multiples modulo primes."""
    layers: tuple[int, ...]
    """Published ids of the layers with a memory, in published order. LongCat has one, 0: its input embedding."""
    layer_base: int = 0
    """What the published ids count from: 0, or 1 (Qwen)."""
    orders: tuple[int, ...]
    """N-gram orders, ascending, from 1, which is the token alone."""
    num_heads: int
    """Hash heads per order, from 1."""
    primes: tuple[tuple[int, ...], ...]
    """Rows of each column, per layer: all heads of the first order, then of the next. For ``longcat`` odd moduli."""
    multipliers: tuple[tuple[int, ...], ...] = ()
    """Per layer, one odd integer per look-back distance from 0. Empty for ``longcat``."""
    vocab_size: int
    """Number of ids that the hash was drawn for: canonical tokens, or raw ones under the identity map."""
    num_tokens: int
    """Number of raw ids that the token map was made with; a model may embed more, see `covering`."""
    fill: int | None
    """Canonical id that stands for what cannot be seen; None while no token map is bound."""
    pad_token_id: int | None = None
    """Raw id whose canonical id is `fill`; None where the format has none (``longcat`` adds nothing instead)."""
    segments: Segments = Segments()
    """Where look-backs stop."""
    padded_rows: tuple[int, ...]
    """Rows of each layer's table, at least the sum of its primes."""
    shared_table: bool = False
    """Whether all layers read one table: equal primes, own multipliers."""
    seed: int = 0
    """The seed the multipliers were drawn with, for the record."""
    token_map_digest: str | None
    """Digest of the token map; None while none is bound and none was promised."""
    vocabulary_digest: str | None = None
    """Digest of the tokenizer's vocabulary, if known."""
    token_map: TokenMap | None = dataclasses.field(default=None, compare=False, repr=False)
    """The token map itself; None while none is bound. Not part of the value, nor of what is saved."""

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
        variant: str = "demo",
        segments: Segments | None = None,
        shared_table: bool = False,
    ) -> "HashSpec":
        """Make the spec of a new model.

        Args:
            token_map: The map of the tokenizer in use.
            layers: Ids of the layers with a memory: 0-based blocks, but 1-based for ``qwen_ple``.
            orders: N-gram orders, ascending, from 1.
            heads: Hash heads per order.
            rows_per_head: Rows asked for per head, one number or one per order; each head gets the next unused prime
                (``longcat``: column i gets ``rows_per_head + 2 i + 1``).
            seed: Seed of the multipliers.
            pad_token_id: *Raw* id that stands for what cannot be seen (ignored by ``longcat``).
            variant: Whose recipe to follow. ``demo`` and ``deepseek_v41`` are the same hash.
            segments: Where look-backs stop; by default only before the start and at masked positions.
            shared_table: Let all layers read one table: equal primes, own multipliers.

        Raises:
            ConfigError: A value is impossible.
            TokenError: ``pad_token_id`` is not in the vocabulary.

        Source: paper, section 2.2; for each variant the code named in ``docs/paper.md``, “Published variants”.
        """
        layers = tuple(layers)
        rule = find_rule(variant).new(
            orders=tuple(orders),
            num_heads=heads,
            vocab_size=len(token_map),
            layers=layers,
            rows_per_head=rows_per_head,
            seed=seed,
            shared_table=shared_table,
        )
        segments = Segments() if segments is None else segments
        options: dict[str, Any] = {"shared_table": shared_table, "seed": seed}
        return cls(**rule_fields(rule, variant, layers, token_map, segments, pad_token_id, **options))

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any] | str | os.PathLike[str],
        tokenizer: Any = None,
        *,
        token_map_digest: str | None = None,
    ) -> "HashSpec":
        """Read the spec of a model from its published config: demo, DeepSeek-V4.1, Qwen PLE, LongCat, or ours.

        Args:
            config: The config, or the path of a JSON file or of a folder with a ``config.json``.
            tokenizer: The model's tokenizer: a `TokenMap`, a fast Hugging Face tokenizer, a ``tokenizers.Tokenizer``
                or a path. Qwen and LongCat hash raw ids and need none. Without it a DeepSeek-V4.1 spec knows its
                tables but hashes nothing until `bind`.
            token_map_digest: The `TokenMap.digest` that is expected; DeepSeek's configs only promise a size.

        Raises:
            ConfigError: The config is of no known kind, or lacks or contradicts a key, which the message names.
            TokenMapError: The tokenizer is missing where one is needed, or gives another canonical vocabulary.
            MismatchError: The tokenizer is not the one our own config was saved with, or another digest is expected.

        Source: the published configs and code named in ``docs/paper.md``, “Published variants”.
        """
        config = read_config(config) if isinstance(config, str | os.PathLike) else config
        if not isinstance(config, Mapping):
            raise ConfigError(f"a config is a dictionary or a path, got {type(config).__name__}")
        if OURS in config:
            if config[OURS] is None:
                raise ConfigError("this config is of a model without memory: its 'hash_spec' is empty")
            spec = cls.from_dict(config[OURS])
            spec = spec if tokenizer is None else spec.bind(tokenizer)
        else:
            spec = cls(**read_published(config, tokenizer))
        return dataclasses.replace(spec, token_map_digest=expected_map(spec.token_map_digest, token_map_digest))

    def __post_init__(self) -> None:
        find_rule(self.variant)
        check_fields(self)
        # The rule checks its own numbers. What is cached is made now, because torch.compile cannot trace its lock.
        _ = self.rule.offsets
        if self.token_map is not None:
            _ = self._encoder

    @cached_property
    def rule(self) -> HashRule:
        """The rule that turns what a position sees into row numbers."""
        return find_rule(self.variant)(
            orders=self.orders,
            num_heads=self.num_heads,
            vocab_size=self.vocab_size,
            primes=self.primes,
            multipliers=self.multipliers,
        )

    @property
    def num_canonical(self) -> int:
        """Number of canonical tokens that can occur: `vocab_size`, and those of ids that the map `covering` added."""
        return self.vocab_size if self.token_map is None else self.token_map.num_canonical

    @property
    def num_heads_total(self) -> int:
        """Columns of a layer, which are its heads over all orders; as many rows are read per token and layer."""
        return len(self.orders) * self.num_heads

    @property
    def blocks(self) -> tuple[int, ...]:
        """The layers as 0-based block numbers."""
        return tuple(layer - self.layer_base for layer in self.layers)

    @property
    def context(self) -> int:
        """How many earlier positions a row depends on: the highest order minus one."""
        return self.orders[-1] - 1

    @property
    def looks_at_positions(self) -> bool:
        """Whether codes may hold starts of segments that were taken from ``position_ids``."""
        return self.segments.positions

    def offsets(self, layer: int) -> tuple[int, ...]:
        """Return the first row of each column of a layer, or raise a `ConfigError` if it has no memory."""
        return self.offsets_at(self._index(layer))

    def offsets_at(self, index: int) -> tuple[int, ...]:
        """Return `offsets` by place in `layers`."""
        return self.rule.offsets[index]

    def num_rows(self, layer: int) -> int:
        """Return how many rows a layer's table has, padding included, or raise a `ConfigError` if it has no memory."""
        return self.padded_rows[self._index(layer)]

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of everything that decides which row a token reads.

        Names and records (variant, seed, padding, vocabulary) are left out: two specs of one digest give equal rows.
        A spec without a bound or promised token map has a digest of its own.
        """
        decisive = self.to_dict()
        for name in _NOT_DECISIVE:
            del decisive[name]
        decisive["rule"] = self.rule.kind
        return hashlib.sha256(json.dumps(decisive, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def bind(self, tokenizer: Any) -> "HashSpec":
        """Return the same spec with its token map.

        Args:
            tokenizer: The `TokenMap`, or the tokenizer to make it from, as for `from_config`. One that has got more
                tokens since, while the ids of the old ones stayed, is accepted with a warning in the log.

        Raises:
            MismatchError: The map, or the vocabulary behind it, is not the one this spec was made for.
            TokenMapError: Only a number of canonical tokens was promised, and this map has another number.
        """
        token_map = matching_map(self, tokenizer)
        fill = self.fill
        if self.pad_token_id is not None:
            fill = int(token_map.apply(np.array([self.pad_token_id]))[0])
        return dataclasses.replace(
            self,
            num_tokens=token_map.made.num_tokens,
            fill=fill,
            token_map_digest=token_map.digest,
            vocabulary_digest=self.vocabulary_digest or token_map.vocabulary_digest,
            token_map=token_map,
        )

    def covering(self, num_tokens: int) -> "HashSpec":
        """Return the spec for a model whose embedding has `num_tokens` rows; a token map must be bound.

        Each id that the map lacks, as of a token added later, is hashed as a token of its own (`TokenMap.covering`).
        Rows of other tokens, the digest and what is saved stay as they are.
        """
        token_map = self._encoder.token_map.covering(num_tokens)
        return self if token_map == self.token_map else dataclasses.replace(self, token_map=token_map)

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
        return self._encoder.encode(tokens, attention_mask, position_ids)

    def encode_unchecked(self, tokens: Any, attention_mask: Any = None, position_ids: Any = None) -> Any:
        """Turn raw tokens into codes without checking them, for engines.

        There is no branch on the data and nothing waits for the host, so this can be compiled and captured in a CUDA
        graph once it has been called on the device. Ids that the vocabulary does not have become dead positions.

        Args:
            tokens: Raw ids [B, L], a NumPy array or a torch tensor of any integer type.
            attention_mask: Of the same kind and device, [B, L] or [1, L]; 0 marks dead positions.
            position_ids: Likewise; as for `encode`.

        Returns:
            Codes as from `encode`.

        Raises:
            TokenMapError: No token map is bound.
        """
        return self._encoder.encode_unchecked(tokens, attention_mask, position_ids)

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
            kind and on the same device as the tokens. With NumPy tokens torch is never imported.

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
        rows = self.rule.rows(self._seen(codes, history), [index])[0]
        return rows[0] if single else rows

    def rows_for_layers(
        self, codes: Any, context: Any = None, hidden_states: Sequence[Any] | None = None
    ) -> dict[int, Any]:
        """Compute the rows of all layers from codes; what the layers have in common is computed once.

        Args:
            codes: From `encode`, int64 [B, L], NumPy or torch.
            context: What came before: a `TokenHistory`, or the codes of the `context` positions before, int64
                [B, context]. None: this is the start.
            hidden_states: For each layer the hidden states that go into it, [B, L, D]; only for rules that do not read
                ahead.

        Returns:
            Layer id to row numbers, offsets included, int64 [B, L, num_heads_total].

        Raises:
            HistoryError: The context has another batch size or width.
            MismatchError: The history belongs to another spec.
            TokenMapError: No token map is bound, so the fill is unknown.
        """
        rows = self.rule.rows(self._seen(codes, context), range(len(self.layers)), hidden_states)
        return dict(zip(self.layers, rows, strict=True))

    def seen_tokens(self, codes: Any, context: Any = None) -> Any:
        """Find the canonical tokens that each position sees, for layers that look at tokens and not at rows.

        Takes what `rows_for_layers` takes, as torch tensors. Returns int64 ``[B, L, context + 1]``: the tokens at the
        distances 0, 1, …; -1 where nothing is seen.
        """
        import torch

        return torch.stack(self._seen(codes, context, fill=-1), dim=-1)

    def _seen(self, codes: Any, context: Any, fill: int | None = None) -> list[Any]:
        """What each position sees at every distance, as from `look_back`; ``fill`` where nothing, or the spec's own."""
        fill = self.fill if fill is None else fill
        if fill is None:
            raise TokenMapError(_UNBOUND)
        context = codes_before(self, codes, context)
        return look_back(codes, context, width=self.context, fill=fill, positions=self.segments.positions)

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as JSON values. Multipliers, and integers from 2**53 on, are strings: doubles lose them."""
        return fields_to_json({name: getattr(self, name) for name in self._field_names()})

    @classmethod
    def _field_names(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls) if field.name != "token_map"]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "HashSpec":
        """Make a spec from what `to_dict` returned.

        A spec that hashes raw ids is complete; one with a token map needs `bind` before it hashes.

        Raises:
            ConfigError: A key is missing, unknown or of the wrong kind, or the values are impossible.
        """
        spec = cls(**fields_from_json(values, cls._field_names()))
        # The identity map needs no tokenizer, so it can be rebuilt here.
        if spec.token_map_digest is not None and spec.vocab_size == spec.num_tokens and spec.num_tokens < 2**31:
            identity = TokenMap.identity(spec.num_tokens)
            if identity.digest == spec.token_map_digest:
                return spec.bind(identity)
        return spec

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the spec as JSON, atomically, or raise an `OSError`. The token map is not in it; save it beside."""
        write_atomically(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str], token_map: TokenMap | None = None) -> "HashSpec":
        """Read a spec that `save` wrote, and bind its token map if given.

        Raises:
            ConfigError: There is no such file, or it is not a hash spec.
            MismatchError: The token map is another one.
        """
        spec = cls.from_dict(read_config(path))
        return spec if token_map is None else spec.bind(token_map)

    def _index(self, layer: int) -> int:
        if layer not in self.layers:
            raise ConfigError(
                f"layer {layer} has no memory; the layers with one are {', '.join(map(str, self.layers))}"
            )
        return self.layers.index(layer)

    @cached_property
    def _encoder(self) -> Encoder:
        if self.token_map is None:
            raise TokenMapError(_UNBOUND)
        return Encoder(self.token_map, self.segments)


_UNBOUND = (
    "this spec hashes canonical tokens and no token map is bound; pass the tokenizer to HashSpec.from_config, "
    "or use spec.bind(TokenMap.from_tokenizer(tokenizer))"
)
