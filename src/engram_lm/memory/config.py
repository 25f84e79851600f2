"""The choices of conditional memory, and what they cost. Does not import torch."""

import dataclasses
import functools
import itertools
import math
import typing
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from engram_lm.errors import ConfigError, suggestion
from engram_lm.memory.registry import LayerEntry, check_layer, check_options, layer_class, layer_entry

if TYPE_CHECKING:
    from engram_lm.hashing import HashSpec, Segments, TokenMap


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngramConfig:
    """Conditional memory of one model: where it sits, how large its tables are, how its layers read them.

    Frozen, comparable, and able to price itself without building anything.

    Example:
        >>> config = EngramConfig(hidden_size=2560, layers=(1, 14), num_streams=4, memory_dim=1280,
        ...                       rows_per_head=2_262_400)
        >>> config.table_parameters()  # the paper's Engram-27B: "5.7B"
        5792338560

    Source: paper, section 2 and Table 5; the options that the paper lacks: ``docs/paper.md``, “Published variants”.
    """

    hidden_size: int
    """Width D of one residual stream."""
    layers: tuple[int, ...] = (1,)
    """Blocks that read memory at their start, counted from 0. The paper counts from 1: its [2, 15] is (1, 14)."""
    num_streams: int = 1
    """Residual streams S (M in the paper, also called ``hc_mult``); 1 is an ordinary residual model."""
    orders: tuple[int, ...] = (2, 3)
    """Orders of the suffix N-grams that are looked up, increasing; 1 is the token alone, which the paper leaves out."""
    num_heads: int = 8
    """Hash heads per order (K in the paper)."""
    memory_dim: int = 1280
    """Width of the concatenated memory vector (d_mem); each row is memory_dim / (orders x heads) wide."""
    rows_per_head: int | tuple[int, ...] = 100_000
    """Rows asked for per head, one number or one for each order; the next unused prime is taken. Also called
    ``engram_vocab_size``."""
    token_map: Literal["canonical", "raw"] = "canonical"
    """Which tokens make N-grams: canonical ones, in which a word is the same with or without capitals and the space
    before it (paper, section 2.2), or the tokenizer's own."""
    tables: Literal["per_layer", "shared"] = "per_layer"
    """One table for each layer, or one for all of them, which each layer then addresses by its own multipliers."""
    signs: Literal["none", "hashed"] = "none"
    """``"hashed"`` multiplies every row by +1 or -1, decided by the N-gram's row in the next head: two N-grams that
    collide in one head then cancel as often as they add."""
    gate: Literal["signed_sqrt", "plain", "none"] = "signed_sqrt"
    """Squashing before the sigmoid: signed square root (all released code), none (Eq. 4), or no gate at all."""
    kernel_size: int = 4
    """Taps of the short convolution; 0 leaves the convolution out."""
    dilation: int | None = None
    """Distance between taps in tokens; the highest order where None."""
    bias: bool = False
    """Whether the key and value projections have a bias (the paper's demo does, the released models do not)."""
    norm_eps: float = 1e-6
    """Added to the mean square inside every normalization of the layer."""
    norm_weight: Literal["plain", "zero_centered"] = "plain"
    """Whether a norm multiplies by its weight (starting at 1) or by 1 + weight (starting at 0)."""
    table_std: float = 1.0
    """Standard deviation of the initial rows; not zero, because rows feed normalized keys."""
    projection_std: float = 0.02
    """Standard deviation of the initial key and value projections."""
    value_init: Literal["normal", "zero"] = "normal"
    """``"zero"`` starts the value projection at zero, so that the layer begins as the identity."""
    table_gradient: Literal["sparse", "dense"] = "sparse"
    """Whether a table's gradient holds the rows that were read (for `engram_lm.training.optimizers.RowAdam`) or all of
    them (what ordinary optimizers, ``clip_grad_norm_`` and ``transformers.Trainer`` need; only for small tables)."""
    occupancy: Literal["none", "rows", "ngrams"] = "none"
    """Whether memory speaks only where training has written rows; a row of zeros was never written. With ``"rows"``
    each written row counts, and a token that reads none gets no update. With ``"ngrams"`` the rows of an N-gram count
    if all of them (one for each head) were written: training writes them together, so any other N-gram is one that it
    has not met, and that shares some of its rows by chance."""
    seed: int = 0
    """Seed of the hash multipliers, and of first numbers with ``occupancy``."""
    layer: str = "engram"
    """Name of the layer that reads memory, one of `engram_lm.memory.registry.LAYERS`."""
    layer_options: Mapping[str, int | float | str] = dataclasses.field(default_factory=dict, hash=False)
    """Options that this layer alone has, in place of its defaults; see `engram_lm.memory.registry.LayerEntry`."""

    def __post_init__(self) -> None:
        for name in ("layers", "orders"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Iterable):
                raise ConfigError(f"{name} is a sequence of whole numbers, not {value!r}")
            object.__setattr__(self, name, tuple(value))
            if any(type(item) is not int for item in getattr(self, name)):
                raise ConfigError(f"{name} is a sequence of whole numbers, not {value!r}")
        for name in ("hidden_size", "num_streams", "num_heads", "memory_dim"):
            _whole(name, getattr(self, name), at_least=1)
        rows = tuple(self.rows_per_head) if isinstance(self.rows_per_head, list | tuple) else (self.rows_per_head,)
        for number in rows:
            _whole("rows_per_head", number, at_least=1)
        if len(rows) not in (1, len(self.orders)):
            raise ConfigError(f"rows_per_head is one number, or one for each of the orders {self.orders}, not {rows}")
        object.__setattr__(self, "rows_per_head", rows[0] if len(set(rows)) == 1 else rows)
        _whole("kernel_size", self.kernel_size, at_least=0)
        if type(self.bias) is not bool:
            raise ConfigError(f"bias must be true or false, not {self.bias!r}")
        _whole("seed", self.seed, at_least=0)
        if self.dilation is not None:
            _whole("dilation", self.dilation, at_least=1)
        for name in ("norm_eps", "table_std", "projection_std"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                hint = _ZERO_TABLE if name == "table_std" else ""
                raise ConfigError(f"{name} must be a finite number above 0, not {value!r}{hint}")
        if len(set(self.layers)) != len(self.layers) or any(layer < 0 for layer in self.layers) or not self.layers:
            raise ConfigError(f"layers must be distinct block numbers counted from 0, not {self.layers}")
        if not self.orders or self.orders[0] < 1 or any(b <= a for a, b in itertools.pairwise(self.orders)):
            raise ConfigError(f"orders must increase and start at 1 or above, not {self.orders}")
        heads = self.num_heads_total
        if self.orders[-1] > _HIGHEST_ORDER or heads * len(self.layers) > _MOST_HEADS:
            raise ConfigError(
                f"orders reach {self.orders[-1]} and {heads * len(self.layers)} heads in all are asked for; an order "
                f"is at most {_HIGHEST_ORDER}, heads over all orders and layers at most {_MOST_HEADS}"
            )
        if self.memory_dim % heads:
            raise ConfigError(
                f"memory_dim {self.memory_dim} does not divide into {len(self.orders)} orders x {self.num_heads} "
                f"heads; the nearest that does is {max(1, round(self.memory_dim / heads)) * heads}"
            )
        if self.signs == "hashed" and self.num_heads < 2:
            raise ConfigError(
                "signs='hashed' takes the sign from the next head of the order, so num_heads must be 2 or more"
            )
        if self.occupancy != "none" and self.table_gradient == "dense":
            raise ConfigError(
                f"occupancy={self.occupancy!r} needs table_gradient='sparse': an optimizer of dense gradients changes "
                "rows that no text has read (by weight decay, for example), and they would count as written; train "
                "with engram_lm.training.huggingface.MemoryTrainer, or with the optimizer of "
                "engram_lm.training.optimizers.build_optimizer"
            )
        self._check_layer()
        for name, kind in typing.get_type_hints(EngramConfig).items():
            allowed = typing.get_args(kind)
            if typing.get_origin(kind) is Literal and getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {getattr(self, name)!r}")

    def _check_layer(self) -> None:
        """Refuse a layer that there is not, and what it does not have."""
        check_layer(self.layer)
        if not isinstance(self.layer_options, Mapping):
            raise ConfigError(f"layer_options are names and values, not {self.layer_options!r}")
        check_options(self.layer, self.layer_options)
        object.__setattr__(self, "layer_options", dict(self.layer_options))
        if self.entry.reads != "rows" and (self.signs, self.occupancy) != ("none", "none"):
            raise ConfigError(f"the layer {self.layer!r} reads no hashed rows, so signs and occupancy must be 'none'")
        if not self.entry.has_table and self.rows_per_head != 1:
            raise ConfigError(f"the layer {self.layer!r} has no table; set rows_per_head=1")

    @property
    def entry(self) -> LayerEntry:
        """What is known of the layer without importing it."""
        return layer_entry(self.layer)

    def option(self, name: str) -> Any:
        """Return an option that the layer alone has, or its default."""
        return self.layer_options.get(name, self.entry.options[name])

    @property
    def rows_per_order(self) -> tuple[int, ...]:
        """Rows asked for per head, for each order."""
        rows = self.rows_per_head
        return (rows,) * len(self.orders) if isinstance(rows, int) else rows

    @property
    def num_heads_total(self) -> int:
        """Hash heads over all orders: the rows read per token and layer."""
        return len(self.orders) * self.num_heads

    @property
    def head_dim(self) -> int:
        """Width of one row."""
        return self.memory_dim // self.num_heads_total

    @property
    def conv_dilation(self) -> int:
        """Distance between the taps of the convolution, in tokens."""
        return self.dilation if self.dilation is not None else max(self.orders)

    @property
    def conv_context(self) -> int:
        """Positions before the current one that the convolution reads, and that decoding keeps."""
        return max(self.kernel_size - 1, 0) * self.conv_dilation

    @property
    def look_back(self) -> int:
        """Positions before the current one that a layer depends on, by its N-grams or by its convolution."""
        return max(self.orders[-1] - 1, self.conv_context)

    def hash_spec(self, token_map: "TokenMap", *, pad_token_id: int, segments: "Segments | None" = None) -> "HashSpec":
        """Build the hash that addresses these tables for a tokenizer.

        Args:
            token_map: Canonical tokens of the tokenizer.
            pad_token_id: Raw id that stands for everything before the start of a segment.
            segments: Which look-backs are blocked; nothing beyond the start of the sequence where None.
        """
        from engram_lm.hashing import HashSpec, Segments

        return HashSpec.build(
            token_map,
            layers=self.layers,
            orders=self.orders,
            heads=self.num_heads,
            rows_per_head=self.rows_per_order,
            seed=self.seed,
            pad_token_id=pad_token_id,
            segments=Segments() if segments is None else segments,
            shared_table=self.tables == "shared",
        )

    def hash_spec_for(
        self, tokenizer: Any, *, token_map: "TokenMap | None" = None, segments: "Segments | None" = None
    ) -> "HashSpec":
        """Build the hash that addresses these tables for a Hugging Face tokenizer.

        Args:
            tokenizer: A fast tokenizer. Its pad token, or else its end-of-text token, stands for everything before the
                start of a segment.
            token_map: Canonical tokens; those of the field ``token_map`` where None, made of the tokenizer by the
                published normalization.
            segments: Which look-backs are blocked; by default N-grams do not cross an end-of-text token.

        Raises:
            ConfigError: It is not a Hugging Face tokenizer, or has neither a pad nor an end-of-text token.
            TokenMapError: The tokenizer has no Rust backend.
        """
        from engram_lm.hashing import Segments, TokenMap
        from engram_lm.hashing.token_map import read_vocabulary

        check_tokenizer_kind(tokenizer)
        end = tokenizer.eos_token_id
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
        if pad is None:
            raise ConfigError(
                "the tokenizer has neither a pad nor an end-of-text token, and one of them must stand for the "
                "positions before the start of a text; set tokenizer.pad_token first"
            )
        if token_map is None and self.token_map == "raw":
            token_map = TokenMap.identity(len(read_vocabulary(tokenizer)), tokenizer)
        return self.hash_spec(
            TokenMap.from_tokenizer(tokenizer) if token_map is None else token_map,
            pad_token_id=pad,
            segments=Segments(end_tokens=() if end is None else (end,)) if segments is None else segments,
        )

    # What it costs -------------------------------------------------------------------------------------------------

    def num_table_rows(self) -> tuple[int, ...]:
        """Rows of each table: one number per layer, or a single one where the layers share a table."""
        if not self.entry.has_table:
            return ()
        return _table_rows(self.rows_per_order, self.num_heads, self._num_tables)

    def table_parameters(self) -> int:
        """Numbers in all tables."""
        return sum(self.num_table_rows()) * self.head_dim

    def layer_parameters(self) -> int:
        """Numbers in one layer besides its table."""
        return int(layer_class(self.layer).count_parameters(self))

    def kept_numbers(self) -> int:
        """What all layers keep of the training text beside their parameters, as numbers of four bytes; usually 0."""
        return len(self.layers) * int(layer_class(self.layer).count_kept(self))

    def num_parameters(self) -> int:
        """All numbers: tables, layers, and what these keep of the training text."""
        return self.table_parameters() + len(self.layers) * self.layer_parameters() + self.kept_numbers()

    def table_bytes(self, bytes_per_number: float = 2) -> int:
        """Bytes of all tables, in bfloat16 unless told otherwise."""
        return int(self.table_parameters() * bytes_per_number)

    def bytes_read_per_token(self, bytes_per_number: float = 2) -> int:
        """Bytes of rows read for one token over all layers."""
        return int(self.numbers_read_per_token() * bytes_per_number)

    def numbers_read_per_token(self) -> int:
        """Numbers of the tables that are read for one token over all layers."""
        if self.entry.reads == "rows":
            return len(self.layers) * self.memory_dim
        return len(self.layers) * int(layer_class(self.layer).count_numbers_read(self))

    def flops_per_token(self) -> int:
        """Floating-point operations of one token's forward pass over all layers; a training step takes three times it.

        A multiplication and an addition count as two. Reading rows and hashing count as none.
        """
        return len(self.layers) * int(layer_class(self.layer).count_flops(self))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON. What a file of version 0.1 does not have is left out where it is as there."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}
        usual = {"layer": "engram", "layer_options": {}, "occupancy": "none", "token_map": "canonical"}
        return {name: value for name, value in values.items() if name not in usual or value != usual[name]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote.

        Raises:
            ConfigError: An unknown key, with the nearest known one.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise ConfigError(f"EngramConfig has no field {key!r}; {suggestion(key, sorted(known))}")
        return cls(**values)

    @property
    def _num_tables(self) -> int:
        return 1 if self.tables == "shared" else len(self.layers)


def check_tokenizer_kind(tokenizer: Any) -> None:
    """Refuse, by a ConfigError, what is not a tokenizer of transformers."""
    if not hasattr(tokenizer, "pad_token_id"):
        raise ConfigError(
            f"the tokenizer must be a Hugging Face one, as from AutoTokenizer.from_pretrained(...), not "
            f"{type(tokenizer).__name__}"
        )


def _whole(name: str, value: object, *, at_least: int) -> None:
    if type(value) is not int or not at_least <= value < 2**62:
        raise ConfigError(f"{name} must be a whole number, at least {at_least}, not {value!r:.40}")


_HIGHEST_ORDER = 64
_MOST_HEADS = 16_384  # each has a prime to be found

_ZERO_TABLE = ": a table of zeros has no gradient through its keys; use value_init='zero' to begin as the identity"


@functools.lru_cache(maxsize=64)
def _table_rows(rows_per_order: tuple[int, ...], num_heads: int, num_tables: int) -> tuple[int, ...]:
    from engram_lm.hashing.primes import distinct_primes

    used: set[int] = set()
    tables = (distinct_primes(rows_per_order, num_heads, used) for _ in range(num_tables))
    return tuple(sum(primes) for primes in tables)
