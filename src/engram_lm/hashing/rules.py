"""Hash rules: how row numbers follow from the tokens that a position sees.

A rule is a class. It draws its own numbers for a new model, checks them, and computes rows in three ways: in plain
Python, which says what is meant (`HashRule.rows_reference`), in NumPy and in torch. `RULES` names the rule of each
published variant; a new rule is one class and one line there.
"""

# Dimension key: B batch, L length, W context (highest order - 1), G memory layers, O orders, K heads of one, H = O * K.

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, chain, repeat
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from engram_lm.errors import ConfigError
from engram_lm.hashing.codes import look_back_reference
from engram_lm.hashing.multipliers import pcg64_multipliers, splitmix64_multipliers
from engram_lm.hashing.primes import longcat_moduli, prime_tables
from engram_lm.hashing.token_map import is_torch

if TYPE_CHECKING:
    import torch

__all__ = ["RULES", "HashRule", "PolynomialRule", "QwenRule", "XorRule", "check_layers", "find_rule"]

_INT64 = 2**63
_Row = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HashRule(abc.ABC):
    """A rule with the numbers of one model. Rules are values; a `HashSpec` makes its own from its fields."""

    orders: tuple[int, ...]
    """N-gram orders, ascending, from 2."""
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
        """Draw the numbers of a new model; the arguments are those of `HashSpec.build`.

        Raises:
            ConfigError: A value is impossible.
        """
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
    def _numpy_mixes(self, seen: Sequence[np.ndarray], place: int) -> Iterator[np.ndarray]:
        """Yield the same number for each column in turn, [B, L]."""

    @abc.abstractmethod
    def _torch_mixes(self, seen: Sequence["torch.Tensor"], factors: "torch.Tensor") -> list["torch.Tensor"]:
        """Return it for each order, [G, B, L, K], or [G, B, L, 1] where all heads share it."""

    @abc.abstractmethod
    def _factors(self, place: int) -> Sequence[Any]:
        """Return what `_torch_mixes` multiplies with in one layer, as nested sequences of integers."""

    @cached_property
    def offsets(self) -> tuple[tuple[int, ...], ...]:
        """First row of each column, per layer."""
        return tuple(tuple(accumulate(row[:-1], initial=0)) for row in self.primes)

    def rows(self, seen: Sequence[Any], places: Sequence[int], hidden_states: Sequence[Any] | None = None) -> list[Any]:
        """Compute the rows of some layers, in NumPy or torch, whichever the tokens are.

        Args:
            seen: As from `look_back`: what each position sees at the distances 0, 1, … W, int64 [B, L].
            places: Which layers, as places in the spec's list.
            hidden_states: For each of them the hidden states that go into the layer, [B, L, D]. Only rules that do not
                read ahead look at them.

        Returns:
            For each of the layers, int64 [B, L, H], offsets included, contiguous.
        """
        if is_torch(seen[0]):
            return self._torch_rows(seen, tuple(places))
        results = []
        for place in places:
            rows_BLH = np.empty((*seen[0].shape, len(self.primes[place])), np.int64)
            columns = zip(self._numpy_mixes(seen, place), self.primes[place], self.offsets[place], strict=True)
            for column, (mix_BL, prime, offset) in enumerate(columns):
                rows_BLH[..., column] = mix_BL % prime + offset
            results.append(rows_BLH)
        return results

    def rows_reference(
        self, tokens: Sequence[int | None], starts: Sequence[bool], place: int, fill: int
    ) -> list[list[int]]:
        """Compute the rows of one whole sequence in one layer, in plain Python.

        Args:
            tokens: Canonical tokens, None where a position is dead.
            starts: Whether a segment starts at each position.
            place: Place of the layer in the spec's list.
            fill: What stands for a token that cannot be seen.

        Returns:
            Per position, one row per column, offsets included.
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

    def _torch_rows(self, seen: Sequence["torch.Tensor"], places: tuple[int, ...]) -> list["torch.Tensor"]:
        """Compute rows on the device of the tokens, all layers at once. Nothing waits for the host.

        Cost: one 64-bit remainder per row, which is nearly all of the time. Multiplying by a reciprocal in float64 and
        correcting the result was measured on CPU and loses: its six passes over the rows cost more than the division.
        """
        import torch

        primes_GH, offsets_GH, factors = self._tensors(seen[0].device, places)
        mixes = self._torch_mixes(seen, factors)
        # One division over everything: it takes nearly all the time, so it is one launch on a GPU. Spelling
        # the heads out first, in place of a division that broadcasts, is a quarter faster on CPU (measured).
        mix_GBLOK = torch.stack(mixes, dim=-2).expand(*(-1,) * 4, self.num_heads)
        rows_GBLH = mix_GBLOK.flatten(-2).remainder(primes_GH[:, None, None])
        rows_GBLH += offsets_GH[:, None, None]
        return list(rows_GBLH.unbind(0))

    def _tensors(
        self, device: "torch.device", places: tuple[int, ...]
    ) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
        """Primes [G, H], offsets [G, H] and factors of some layers on a device, copied there once; int64."""
        import torch

        key = (device.type, device.index, places)
        found = self._constants.get(key)
        if found is None:
            found = (
                torch.tensor([self.primes[place] for place in places], device=device),
                torch.tensor([self.offsets[place] for place in places], device=device),
                torch.tensor([self._factors(place) for place in places], device=device),
            )
            # Under torch.compile the tensors are constants of the graph; keeping one would leak it out of the trace.
            if not torch.compiler.is_compiling():
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
        return mix

    # Each order's mix is that of the order before it and more products; its heads share it and differ in the prime.

    def _numpy_mixes(self, seen: Sequence[np.ndarray], place: int) -> Iterator[np.ndarray]:
        multipliers = self.multipliers[place]
        mix_BL, distance = seen[0] * multipliers[0], 1
        for order in self.orders:
            for s in range(distance, order):
                mix_BL = mix_BL ^ (seen[s] * multipliers[s])
            distance = order
            yield from repeat(mix_BL, self.num_heads)

    def _torch_mixes(self, seen: Sequence["torch.Tensor"], factors: "torch.Tensor") -> list["torch.Tensor"]:
        mixes = []
        mix_GBL, distance = seen[0][None] * factors[:, None, None, 0], 1
        for order in self.orders:
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

    # Every column has its own powers; all sums stay far below 2**63 (see above).

    def _numpy_mixes(self, seen: Sequence[np.ndarray], place: int) -> Iterator[np.ndarray]:
        powers = self._factors(place)
        for place_of_order, order in enumerate(self.orders):
            for head in range(self.num_heads):
                mix_BL = seen[0]
                for s in range(1, order):
                    mix_BL = mix_BL + seen[s] * powers[s][place_of_order][head]
                yield mix_BL

    def _torch_mixes(self, seen: Sequence["torch.Tensor"], factors: "torch.Tensor") -> list["torch.Tensor"]:
        mixes = []
        for place, order in enumerate(self.orders):
            mix_GBLK = seen[0][None, ..., None].expand(len(factors), *seen[0].shape, self.num_heads)
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
    """Look a variant's rule up.

    Raises:
        ConfigError: There is no such variant.
    """
    if variant not in RULES:
        raise ConfigError(f"variant is one of {', '.join(RULES)}, got {variant!r}")
    return RULES[variant]


def check_layers(layers: tuple[int, ...]) -> None:
    """Refuse impossible layer ids.

    Raises:
        ConfigError: There are none, one is negative, or two are equal.
    """
    if not layers or any(type(layer) is not int or layer < 0 for layer in layers):
        raise ConfigError(f"layers are one or more ids from 0, got {layers!r}")
    if len(set(layers)) != len(layers):
        raise ConfigError(f"layers must differ, got {layers!r}")


def _check_geometry(orders: tuple[int, ...], heads: int) -> None:
    if (
        not orders
        or any(type(order) is not int or order < 2 for order in orders)
        or list(orders) != sorted(set(orders))
    ):
        raise ConfigError(f"orders are ascending integers from 2, such as (2, 3), got {orders!r}")
    if type(heads) is not int or heads < 1:
        raise ConfigError(f"heads per order is an integer from 1, got {heads!r}")
