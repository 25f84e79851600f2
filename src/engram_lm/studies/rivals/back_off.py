"""Longest match: an N-gram that the training text does not have often lends its rows to the N-gram inside it."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_lm.errors import ConfigError
from engram_lm.hashing.primes import prime_tables
from engram_lm.hashing.spec import HashSpec
from engram_lm.memory.config import EngramConfig
from engram_lm.memory.layer import EngramLayer
from engram_lm.studies.rivals.addresses import fingerprints, frequent_fingerprints, scattered
from engram_lm.tables.table import Table

# Dimension key: B batch, L length, O orders, K heads of one, N N-grams.

_WORD_BITS = 32
_BITS_PER_NGRAM = 8
_NUM_PROBES = 5
"""Bits that are set for each N-gram. With 8 bits for each, one N-gram in 45 that is not known passes for known."""


class BackOffLayer(EngramLayer):
    """The paper's layer, in which only frequent N-grams have rows of their own beyond the lowest order.

    The heads of a higher order read its rows where the N-gram is among the most frequent of the training text, and
    otherwise rows of the longest N-gram inside it that is, or that is of the lowest order: other rows than those that
    its own heads read. Which N-grams are known stands in a Bloom filter of ``filter_bits`` bits, 8 for each N-gram. It
    is made of the training text before the first step (`prepare`), is saved with the weights, and is counted with the
    table's numbers, 32 bits for one.

    Source: longest match as in SCONE, arXiv 2502.01637, with hashed rows; ours.
    """

    known: Tensor
    """The filter, int32, 32 bits in each number."""

    def __init__(self, config: EngramConfig, table: Table | None = None) -> None:
        _check(config)
        super().__init__(config, table)
        words = config.option("filter_bits") // _WORD_BITS
        self.register_buffer("known", torch.zeros(words, dtype=torch.int32))

    @classmethod
    def count_kept(cls, config: EngramConfig) -> int:
        """Count the numbers that the filter takes the place of."""
        _check(config)
        return int(config.option("filter_bits")) // _WORD_BITS

    def prepare(self, spec: HashSpec, tokens: Any) -> None:
        """Put the most frequent N-grams of each higher order into the filter; those that occur once are left out."""
        number = self.known.numel() * _WORD_BITS // (_BITS_PER_NGRAM * len(spec.orders[1:]))
        for place, (ngrams, _) in enumerate(frequent_fingerprints(spec, tokens, number)):
            if place:
                self._add(ngrams.to(self.known.device))

    def _add(self, ngrams: Tensor) -> None:
        """Set the bits of N-grams, given by their fingerprints ``[N]``."""
        bits = self._probes(ngrams).flatten().unique()
        is_set = torch.zeros(self.known.numel() * _WORD_BITS, dtype=torch.bool, device=bits.device)
        is_set[bits] = True
        powers = torch.ones((), dtype=torch.int64, device=bits.device) << torch.arange(_WORD_BITS, device=bits.device)
        words = (is_set.view(-1, _WORD_BITS) * powers).sum(-1)
        self.known |= torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)

    def is_known(self, ngrams: Tensor) -> Tensor:
        """Whether N-grams, given by their fingerprints ``[...]``, are in the filter; some are that were not put in."""
        bits = self._probes(ngrams)
        words = self.known[bits // _WORD_BITS].long()
        return ((words >> (bits % _WORD_BITS)) & 1).all(-1)

    def _probes(self, ngrams: Tensor) -> Tensor:
        """Places of each N-gram's bits, ``[..., probes]``."""
        probes = torch.stack([scattered(ngrams, 100 + probe) for probe in range(_NUM_PROBES)], dim=-1)
        return probes % (self.known.numel() * _WORD_BITS)

    def read(self, rows: Tensor) -> Tensor:
        """Read the rows ``[B, L, O * K]`` that N-grams hash to, or those that they back off to."""
        return super().read(self.backed_off(rows))

    def backed_off(self, rows: Tensor) -> Tensor:
        """Find the rows that are read, int64 ``[B, L, O * K]``, for those that N-grams hash to."""
        config, heads = self.config, self.config.num_heads
        sizes = prime_tables(config.rows_per_order, heads, 1)[0]
        starts = np.cumsum((0, *sizes[:-1])).tolist()
        ngrams = fingerprints(rows, heads)
        read, longest = [rows[..., :heads]], ngrams[..., 0]
        for order in range(1, len(config.orders)):
            columns = slice(order * heads, (order + 1) * heads)
            known = self.is_known(ngrams[..., order])
            other = [
                scattered(longest, column) % sizes[column] + starts[column]
                for column in range(columns.start, columns.stop)
            ]
            read.append(torch.where(known[..., None], rows[..., columns], torch.stack(other, dim=-1)))
            longest = torch.where(known, ngrams[..., order], longest)
        return torch.cat(read, dim=-1)


def _check(config: EngramConfig) -> None:
    bits = config.option("filter_bits")
    if len(config.orders) < 2 or len(config.layers) > 1 or bits < _WORD_BITS or bits % _WORD_BITS:
        raise ConfigError(
            f"back-off needs two orders or more, one layer and a filter of a multiple of {_WORD_BITS} bits, not "
            f"orders={config.orders}, layers={config.layers} and filter_bits={bits}"
        )
