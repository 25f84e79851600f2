"""Hash rules: how row numbers follow from the tokens that a position sees.

A rule is a class. It draws its own numbers for a new model, checks them, and computes rows in two ways: in plain
Python, which says what is meant (`HashRule.rows_reference`), and fast, in NumPy or torch. `RULES` names the rule of
each published variant; a new rule is one class and one line there.
"""

# Dimension key: B batch, L length, W context (highest order - 1), G memory layers, O orders, K heads of one, H = O * K.

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate, chain
from typing import Any, ClassVar, Self

import numpy as np

from engram_lm.errors import ConfigError
from engram_lm.hashing.codes import look_back_reference, module_of
from engram_lm.hashing.multipliers import pcg64_multipliers, splitmix64_multipliers
from engram_lm.hashing.primes import longcat_moduli, prime_tables
from engram_lm.hashing.token_map import is_torch

_INT64 = 2**63
_Row = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HashRule(abc.ABC):
    """A rule with the numbers of one model. Rules are values; a `HashSpec` makes its own from its fields."""

    orders: tuple[int, ...]
    """N-gram orders, ascending, from 1, which is the token alone."""
    num_heads: int
    """Hash heads per order."""
    vocab_size: int
    """Number of ids that are hashed."""
    primes: tuple[tuple[int, ...], ...]
    """Rows of each column, per layer: all heads of the first order, then of the next."""
    multipliers: tuple[tuple[int, ...], ...] = ()
    """Per layer, one odd integer per look-back distance from 0; empty for rules without multipliers."""
    _constants: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, compare=False, repr=False)

    kind: ClassVar[str]
    """The rule's name in digests."""
    reads_ahead: ClassVar[bool] = True
    """Whether rows follow from the tokens alone, so that they can be fetched before the model reaches the layer."""
    has_fill: ClassVar[bool] = True
    """Whether a token that cannot be seen is hashed as the pad token; otherwise it counts as id 0."""
    layer_base: ClassVar[int] = 0
    """What published layer ids count from: 0 or 1."""

    def __post_init__(self) -> None:
        _check_geometry(self.orders, self.num_heads)

    @classmethod
    def new(
        cls,
        *,
        orders: tuple[int, ...],
        num_heads: int,
        vocab_size: int,
        layers: tuple[int, ...],
        rows_per_head: int | Sequence[int],
        seed: int = 0,
        shared_table: bool = False,
    ) -> Self:
        """Draw the numbers of a new model; arguments and errors are those of `HashSpec.build`."""
        check_layers(layers)
        _check_geometry(orders, num_heads)
        bases = (rows_per_head,) * len(orders) if isinstance(rows_per_head, int) else tuple(rows_per_head)
        if len(bases) != len(orders) or any(type(base) is not int or base < 1 for base in bases):
            raise ConfigError(f"rows_per_head is one positive number or one per order {orders}, got {rows_per_head!r}")
        if any(base >= _INT64 for base in bases):
            raise ConfigError(f"row numbers are int64, got rows_per_head={rows_per_head!r}; ask for fewer rows")
        primes, multipliers = cls._draw(bases, orders[-1], num_heads, vocab_size, layers, seed, shared_table)
        return cls(orders=orders, num_heads=num_heads, vocab_size=vocab_size, primes=primes, multipliers=multipliers)

    @classmethod
    @abc.abstractmethod
    def _draw(
        cls, bases: _Row, count: int, num_heads: int, vocab_size: int, layers: _Row, seed: int, shared: bool
    ) -> tuple[tuple[_Row, ...], tuple[_Row, ...]]:
        """Return `primes`, at or above the base of each order, and ``count`` `multipliers` per layer."""

    @abc.abstractmethod
    def _mix_reference(self, seen: Sequence[int], place: int, column: int) -> int:
        """Compute the number whose remainder by the column's prime is the row, in plain Python."""

    @abc.abstractmethod
    def _mixes(self, seen: Sequence[Any], factors: Any) -> list[Any]:
        """Compute it for each order in NumPy or torch, [G, B, L, K], or [G, B, L, 1] where all heads share it."""

    @abc.abstractmethod
    def _factors(self, place: int) -> Sequence[Any]:
        """Return what `_mixes` multiplies with in one layer, as nested sequences of integers."""

    @cached_property
    def offsets(self) -> tuple[tuple[int, ...], ...]:
        """First row of each column, per layer."""
        return tuple(tuple(accumulate(row[:-1], initial=0)) for row in self.primes)

    def rows(self, seen: Sequence[Any], places: Sequence[int], hidden_states: Sequence[Any] | None = None) -> list[Any]:
        """Compute the rows of some layers, given by their places in the spec's list, in NumPy or torch.

        Takes what each position sees at the distances 0, 1, … W, int64 [B, L] each, and, for rules that do not read
        ahead, the hidden states [B, L, D] that go into each layer. Returns a contiguous int64 [B, L, H] for each layer,
        offsets included.

        Cost: one 64-bit remainder per row, which is nearly all of the time; torch waits for nothing. Multiplying by a
        reciprocal in float64 and correcting the result was measured on CPU and loses: its six passes over the rows cost
        more than the division.
        """
        primes, offsets_GH, factors = self._numbers(seen[0], tuple(places))
        mix = module_of(seen[0]).stack(self._mixes(seen, factors), -2)  # [G, B, L, O, K or 1]
        shape = (*mix.shape[:3], offsets_GH.shape[1])
        if is_torch(mix):
            # Spelling the heads out, in place of a division that broadcasts, is a quarter faster on CPU (measured).
            mix, primes = mix.expand(*mix.shape[:-1], self.num_heads).reshape(shape), primes.flatten(1)
        # One division over everything, because it takes nearly all the time: one launch on a GPU.
        rows_GBLH = (mix % primes[:, None, None]).reshape(shape)
        rows_GBLH += offsets_GH[:, None, None]
        return [rows_GBLH[index] for index in range(len(rows_GBLH))]

    def rows_reference(
        self, tokens: Sequence[int | None], starts: Sequence[bool], place: int, fill: int
    ) -> list[list[int]]:
        """Compute the rows of one whole sequence in one layer, in plain Python: at each position one row per column.

        Takes canonical tokens, None where a position is dead, and whether a segment starts at each position.
        """
        sequence = []
        for t in range(len(tokens)):
            rows, offset = [], 0
            for column, prime in enumerate(self.primes[place]):
                order = self.orders[column // self.num_heads]
                seen = [look_back_reference(tokens, starts, t, distance, fill) for distance in range(order)]
                rows.append(self._mix_reference(seen, place, column) % prime + offset)
                offset += prime
            sequence.append(rows)
        return sequence

    def _numbers(self, like: Any, places: tuple[int, ...]) -> tuple[Any, Any, Any]:
        """Primes [G, O, K], offsets [G, H] and factors of some layers, int64, on the device of a tensor or in NumPy."""
        key = (like.device.type, like.device.index, places) if is_torch(like) else places
        found = self._constants.get(key)
        if found is None:
            grid = (len(places), len(self.orders), self.num_heads)
            arrays = (
                np.array([self.primes[place] for place in places]).reshape(grid),
                np.array([self.offsets[place] for place in places]),
                np.array([self._factors(place) for place in places]),
            )
            found = arrays
            if is_torch(like):
                import torch

                found = tuple(torch.as_tensor(values, device=like.device) for values in arrays)
                if torch.compiler.is_compiling():
                    # The tensors are constants of the graph; keeping one would leak it out of the trace.
                    return found
            self._constants[key] = found
        return found


class XorRule(HashRule):
    """The XOR of odd multiples of the tokens, modulo primes: the paper's rule, also DeepSeek-V4.1's.

    Each head has the next unused prime of rows; each layer has its own multipliers.

    Source: deepseek-ai/Engram ``engram_demo_v1.py``; deepseek-ai/DeepSeek-V4.1-Flash ``inference/engram.py``.
    """

    kind = "xor"

    def __post_init__(self) -> None:
        super().__post_init__()
        highest, num_layers = self.orders[-1], len(self.primes)
        if len(self.multipliers) != num_layers or any(len(row) != highest for row in self.multipliers):
            raise ConfigError(
                f"multipliers holds {highest} numbers (orders {self.orders}) for each of {num_layers} layers, "
                f"got {[len(row) for row in self.multipliers]}"
            )
        for multiplier in chain(*self.multipliers):
            if type(multiplier) is not int or not 1 <= multiplier < _INT64 or multiplier % 2 == 0:
                raise ConfigError(f"multipliers are odd positive integers below 2**63, got {multiplier!r}")
            if multiplier * (self.vocab_size - 1) >= _INT64:
                raise ConfigError(
                    f"multiplier {multiplier} times a token of a vocabulary of {self.vocab_size} leaves int64; "
                    "it was drawn for a smaller vocabulary"
                )

    @classmethod
    def _draw(
        cls, bases: _Row, count: int, num_heads: int, vocab_size: int, layers: _Row, seed: int, shared: bool
    ) -> tuple[tuple[_Row, ...], tuple[_Row, ...]]:
        primes = prime_tables(bases, num_heads, len(layers), shared=shared)
        drawn = (cls._multipliers(vocab_size, count, place, layer, seed) for place, layer in enumerate(layers))
        return primes, tuple(drawn)

    @staticmethod
    def _multipliers(vocab_size: int, count: int, place: int, layer: int, seed: int) -> _Row:
        return pcg64_multipliers(vocab_size, count, layer, seed)

    def _mix_reference(self, seen: Sequence[int], place: int, column: int) -> int:
        mix = 0
        for token, multiplier in zip(seen, self.multipliers[place], strict=False):
            mix ^= token * multiplier
        # Products of tokens that were added later may leave int64, and wrap.
        return (mix + _INT64) % (2 * _INT64) - _INT64

    def _mixes(self, seen: Sequence[Any], factors: Any) -> list[Any]:
        mixes = []
        mix_GBL, distance = seen[0][None] * factors[:, None, None, 0], 1
        for order in self.orders:
            # Each order is the one before it and more products; its heads share the mix and differ in the prime.
            for s in range(distance, order):
                mix_GBL = mix_GBL ^ (seen[s][None] * factors[:, None, None, s])
            distance = order
            mixes.append(mix_GBL[..., None])
        return mixes

    def _factors(self, place: int) -> Sequence[Any]:
        return self.multipliers[place]


class QwenRule(XorRule):
    """The XOR rule with Qwen's multipliers and its layer ids, which count from 1.

    Source: transformers ``models/qwen4_exp/modeling_qwen4_exp.py``.
    """

    layer_base = 1

    @staticmethod
    def _multipliers(vocab_size: int, count: int, place: int, layer: int, seed: int) -> _Row:
        return splitmix64_multipliers(vocab_size, count, place, seed)


class PolynomialRule(HashRule):
    """The tokens as digits of a number in base ``vocab_size``, modulo odd numbers: LongCat's rule.

    Column i has ``rows_per_head + 2 i + 1`` rows, and there are no multipliers.

    Source: meituan-longcat/LongCat-Flash-Lite modeling code; arXiv 2601.21204.
    """

    kind = "polynomial"
    has_fill = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.multipliers:
            raise ConfigError("longcat has no multipliers: it uses the powers of vocab_size")
        highest, largest = self.orders[-1], max(map(max, self.primes))
        if (self.vocab_size - 1) * largest * highest >= _INT64:
            raise ConfigError(
                f"{highest} tokens below {self.vocab_size} times powers below {largest} leave int64; ask for fewer rows"
            )

    @classmethod
    def _draw(
        cls, bases: _Row, count: int, num_heads: int, vocab_size: int, layers: _Row, seed: int, shared: bool
    ) -> tuple[tuple[_Row, ...], tuple[_Row, ...]]:
        if len(set(bases)) != 1:
            raise ConfigError(f"longcat has one rows_per_head for all orders, got {bases!r}")
        return (longcat_moduli(bases[0], len(bases) * num_heads),) * len(layers), ()

    def _mix_reference(self, seen: Sequence[int], place: int, column: int) -> int:
        return sum(token * self.vocab_size**s for s, token in enumerate(seen))

    def _mixes(self, seen: Sequence[Any], factors: Any) -> list[Any]:
        mixes = []
        for place, order in enumerate(self.orders):
            # Every column has its own powers; all sums stay far below 2**63 (see above).
            mix_GBLK = seen[0][None, ..., None]
            for s in range(1, order):
                mix_GBLK = mix_GBLK + seen[s][None, ..., None] * factors[:, None, None, s, place]
            mixes.append(mix_GBLK)
        return mixes

    def _factors(self, place: int) -> list[list[list[int]]]:
        """Powers of the vocabulary's size modulo each prime, [W + 1, O, K]."""
        moduli, heads = self.primes[place], self.num_heads
        columns = [moduli[first : first + heads] for first in range(0, len(moduli), heads)]
        return [
            [[pow(self.vocab_size, s, modulus) for modulus in column] for column in columns]
            for s in range(self.orders[-1])
        ]


RULES: Mapping[str, type[HashRule]] = {
    "demo": XorRule,
    "deepseek_v41": XorRule,
    "qwen_ple": QwenRule,
    "longcat": PolynomialRule,
}
"""The rule of each published variant. ``demo`` and ``deepseek_v41`` are one hash under two names."""


def find_rule(variant: str) -> type[HashRule]:
    """Look a variant's rule up, or raise a `ConfigError`."""
    if variant not in RULES:
        raise ConfigError(f"variant is one of {', '.join(RULES)}, got {variant!r}")
    return RULES[variant]


def check_layers(layers: tuple[int, ...]) -> None:
    """Refuse impossible layer ids with a `ConfigError`."""
    if not layers or any(type(layer) is not int or layer < 0 for layer in layers):
        raise ConfigError(f"layers are one or more ids from 0, got {layers!r}")
    if len(set(layers)) != len(layers):
        raise ConfigError(f"layers must differ, got {layers!r}")


def _check_geometry(orders: tuple[int, ...], heads: int) -> None:
    if (
        not orders
        or any(type(order) is not int or order < 1 for order in orders)
        or list(orders) != sorted(set(orders))
    ):
        raise ConfigError(f"orders are ascending integers from 1, such as (2, 3), got {orders!r}")
    if type(heads) is not int or heads < 1:
        raise ConfigError(f"heads per order is an integer from 1, got {heads!r}")
