"""The N-grams of a text with their counts and gates, in bounded memory: exact, or exact for a sample of them."""

import dataclasses

import numpy as np

from engram_lm.hashing.splitmix64 import splitmix64

__all__ = ["NgramEntries", "NgramTable", "ngram_keys"]

# Dimension key: B windows, L length, N N-grams, O tokens of the highest order, G blocks with memory, S streams.

_MERGE_AT = 1 << 16


@dataclasses.dataclass(frozen=True, eq=False)
class NgramEntries:
    """Distinct N-grams and what was added up for each."""

    keys: np.ndarray
    """What tells them apart, uint64 ``[N]``, ascending."""
    orders: np.ndarray
    """Order, int64 ``[N]``."""
    tokens: np.ndarray
    """Raw tokens of the first occurrence, oldest first, -1 where nothing was visible, int32 ``[N, O]``."""
    counts: np.ndarray
    """Positions at which it was looked up, int64 ``[N]``."""
    fired: np.ndarray
    """Positions at which it was the one that added most to the gate's score, int64 ``[N, G]``."""
    gate_sums: np.ndarray
    """Sum of the gates at those, float64 ``[N, G, S]``."""

    def __len__(self) -> int:
        return len(self.keys)

    def chosen(self, which: np.ndarray) -> "NgramEntries":
        """Some of them, by a mask or by places."""
        return NgramEntries(*(getattr(self, field.name)[which] for field in dataclasses.fields(self)))

    @classmethod
    def joined(cls, parts: "list[NgramEntries]") -> "NgramEntries":
        """Add up the entries of each key; of its tokens the first stay."""
        columns = [np.concatenate([getattr(part, field.name) for part in parts]) for field in dataclasses.fields(cls)]
        order = np.argsort(columns[0], kind="stable")
        keys = columns[0][order]
        begins = np.flatnonzero(np.concatenate([np.ones(min(len(keys), 1), bool), keys[1:] != keys[:-1]]))
        first = order[begins]
        if not len(begins):
            return cls(*columns)
        sums = (np.add.reduceat(column[order], begins) for column in columns[3:])
        return cls(keys[begins], columns[1][first], columns[2][first], *sums)


class NgramTable:
    """Adds up N-grams as they come.

    Up to ``max_ngrams`` distinct N-grams are held. When there are more, half of them are let go, those whose key has
    one more leading bit set, and so on: what stays is a random sample of the N-grams, chosen by their keys alone, and
    for each one that stays everything is exact, as if nothing had been let go. ``share`` says how much of all N-grams
    it is.

    Args:
        max_ngrams: Distinct N-grams held at most; while merging there are twice as many in memory.
        highest_order: Tokens of the longest N-gram.
        num_blocks: Blocks with memory.
        num_streams: Gates of each.

    Source: distinct sampling, Gibbons, “Distinct Sampling for Highly-Accurate Answers to Distinct Values Queries and
    Event Reports”, VLDB 2001.
    """

    def __init__(self, max_ngrams: int, *, highest_order: int, num_blocks: int, num_streams: int) -> None:
        self.max_ngrams = max_ngrams
        self._num_bits = 0
        self._waiting: list[NgramEntries] = []
        self._held = NgramEntries(
            np.zeros(0, np.uint64),
            np.zeros(0, np.int64),
            np.zeros((0, highest_order), np.int32),
            np.zeros(0, np.int64),
            np.zeros((0, num_blocks), np.int64),
            np.zeros((0, num_blocks, num_streams), np.float64),
        )

    @property
    def share(self) -> float:
        """Share of all N-grams that is held: 1, or a power of one half."""
        return 0.5**self._num_bits

    def add(
        self, keys: np.ndarray, orders: np.ndarray, tokens: np.ndarray, fired: np.ndarray, gates: np.ndarray
    ) -> None:
        """Take in one position for each N-gram, in the order of the text.

        Args:
            keys: uint64 ``[N]``; see `ngram_keys`.
            orders: Integers ``[N]``.
            tokens: Raw tokens, oldest first, -1 where nothing is visible, ``[N, O]``.
            fired: Bool ``[N, G]``: whether it added most to the score of the block's gate.
            gates: Gates of the position, ``[N, G, S]``; counted where it fired.
        """
        ones = np.ones(len(keys), np.int64)
        sums = np.where(fired[..., None], gates, 0).astype(np.float64)
        added = NgramEntries(keys, orders.astype(np.int64), tokens.astype(np.int32), ones, fired.astype(np.int64), sums)
        self._waiting.append(NgramEntries.joined([self._sampled(added)]))
        # Merged when they have become as many as those held: each entry is then sorted a few times only.
        if sum(map(len, self._waiting)) >= min(max(len(self._held), _MERGE_AT), self.max_ngrams):
            self._merge()

    def entries(self) -> NgramEntries:
        """Return what is held."""
        self._merge()
        return self._held

    def _merge(self) -> None:
        self._held, self._waiting = NgramEntries.joined([self._held, *self._waiting]), []
        while len(self._held) > self.max_ngrams and self._num_bits < 63:
            self._num_bits += 1
            self._held = self._sampled(self._held)

    def _sampled(self, entries: NgramEntries) -> NgramEntries:
        if not self._num_bits:
            return entries
        return entries.chosen(entries.keys >> np.uint64(64 - self._num_bits) == 0)


def ngram_keys(codes: np.ndarray, visible: np.ndarray, order: int) -> np.ndarray:
    """Tell the N-grams that end at each position apart, as the hash sees them: canonical tokens, as many as visible.

    Args:
        codes: As from `HashSpec.encode`, int64 ``[B, L]``.
        visible: Tokens that each position sees, int64 ``[B, L]``.
        order: Of the N-grams.

    Returns:
        uint64 ``[B, L]``; keys of different N-grams are equal with the odds of two random numbers of 64 bits.
    """
    keys = np.full(codes.shape, order, np.uint64)
    for distance in range(order):
        seen = np.zeros(codes.shape, np.uint64)
        if distance < codes.shape[1]:
            canonical = (codes[:, : codes.shape[1] - distance] >> 2) + 1
            seen[:, distance:] = np.where(visible[:, distance:] > distance, canonical, 0)
        keys = splitmix64(keys ^ splitmix64(seen + np.uint64(distance + 1)))
    return keys
