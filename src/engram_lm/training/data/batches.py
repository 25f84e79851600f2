"""Tokens → batches, as a pure function of (seed, step, sample)."""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from engram_lm.errors import ConfigError, DataError
from engram_lm.hashing.multipliers import GAMMA, splitmix64
from engram_lm.training.data.shards import TokenShards

_ROUNDS = 8


@dataclasses.dataclass(frozen=True)
class Batch:
    """Some samples of a step."""

    inputs: Tensor
    """Tokens, int64 ``[samples, length]``."""
    targets: Tensor
    """The token that follows each, int64 ``[samples, length]``."""
    position_ids: Tensor | None
    """Positions counted from the start of the document or of the sequence, whichever is nearer, int64
    ``[samples, length]``; None unless positions restart with documents."""

    def to(self, device: torch.device) -> "Batch":
        """Move it to a device."""
        positions = None if self.position_ids is None else self.position_ids.to(device)
        return Batch(self.inputs.to(device), self.targets.to(device), positions)


@dataclasses.dataclass(frozen=True)
class Batches:
    """Fixed-length sequences of a packed corpus, shuffled anew each time through it.

    Sequence i is tokens ``[i * length, (i + 1) * length]``: its last target is the first input of the next one. The
    tokens behind the last whole sequence, about ``length`` at most, are not used. With a ``beginning`` of one token,
    sequence i is that token and then ``[i * length, (i + 1) * length)``, so a sequence that starts in the middle of a
    document begins like one that starts with it.

    A step's samples depend on nothing but these fields and the step, so a run that resumes, on any number of ranks,
    sees what it would have seen without the stop. The order is computed, not stored: a sample costs the same in a
    corpus of any size.
    """

    tokens: np.ndarray | TokenShards
    """Packed tokens, integers ``[num_tokens]``, in memory or on disk."""
    batch_size: int
    """Sequences in a batch, over all ranks."""
    length: int
    """Tokens in a sequence."""
    seed: int
    """Decides the order; at least 0."""
    restart_documents: bool = False
    """Whether to give ``position_ids`` that restart with each document. With them, and with ``use_cache=False`` and no
    attention mask, attention stays inside a document, and so do N-grams if ``Segments.positions`` or ``end_tokens``
    say so. The memory's short convolution crosses documents."""
    num_tokens: int | None = None
    """Tokens to use, from the start; all where None."""
    beginning: tuple[int, ...] = ()
    """What every sequence begins with, from `engram_lm.tokenizing.beginning_tokens`; these tokens count in `length`."""

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("length", max(1, len(self.beginning))), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"Batches.{name} must be at least {least}, not {getattr(self, name)}")
        if self.restart_documents and not isinstance(self.tokens, TokenShards):
            raise ConfigError(
                "restart_documents needs to know where documents end, and an array of tokens does not say; pack the "
                "text with pack_to_shards"
            )
        if self.num_sequences < 1:
            raise DataError(
                f"the text gives {self._num_tokens} tokens, one sequence needs {self.length + 1}; "
                "give more text, or shorter sequences with --sequence-length"
            )

    @property
    def num_sequences(self) -> int:
        """Number of sequences in one pass through the corpus."""
        return max(0, (self._num_tokens - max(1, len(self.beginning))) // self._stride)

    @property
    def _stride(self) -> int:
        """Tokens of the text from the start of a sequence to the start of the next."""
        return self.length + 1 - max(1, len(self.beginning))

    @property
    def _num_tokens(self) -> int:
        return len(self.tokens) if self.num_tokens is None else min(self.num_tokens, len(self.tokens))

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Make the inputs of a step and the tokens that follow them, both int64 ``[batch_size, length]``."""
        batch = self.part(step, 0, self.batch_size)
        return batch.inputs, batch.targets

    def part(self, step: int, start: int, stop: int) -> Batch:
        """Make samples [start, stop) of a step; the parts of any division together make up the batch.

        Steps count without end: after the last sequence, all sequences come again in another order.

        Raises:
            IndexError: A negative step, or samples outside the batch.
            DataError: Shards on disk cannot be read.
        """
        if step < 0 or not 0 <= start <= stop <= self.batch_size:
            raise IndexError(f"samples {start} to {stop} of step {step}: a step has {self.batch_size}, from 0")
        firsts, given = self.sequences(step)[start:stop] * self._stride, len(self.beginning)
        windows = np.empty((len(firsts), self.length + 1), dtype=np.int64)
        for number, first in enumerate(firsts.tolist()):
            found = self.tokens[first : first + self.length + 1]
            if given and tuple(found[:given].tolist()) == self.beginning:
                windows[number] = found
            else:
                windows[number] = [*self.beginning, *found[: self.length + 1 - given].tolist()]
                firsts[number] -= given
        batch = torch.from_numpy(windows)
        positions = torch.from_numpy(self._positions(firsts)) if self.restart_documents else None
        return Batch(batch[:, :-1].contiguous(), batch[:, 1:].contiguous(), positions)

    def sequences(self, step: int) -> np.ndarray:
        """List the numbers of the sequences that make up a step, int64 ``[batch_size]``."""
        samples = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)
        epochs, places = np.divmod(samples, self.num_sequences)
        result = np.empty_like(places)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            inside = epochs == epoch
            result[inside] = shuffled(places[inside], self.num_sequences, (self.seed, epoch))
        return result

    def _positions(self, firsts: np.ndarray) -> np.ndarray:
        assert isinstance(self.tokens, TokenShards)
        ends = (self.tokens.document_ends(first, first + self.length - 1) - first for first in firsts.tolist())
        rows = [restarting_positions(self.length, some) for some in ends]
        return np.array(rows, dtype=np.int64).reshape(len(firsts), self.length)


def restarting_positions(length: int, document_ends: np.ndarray) -> np.ndarray:
    """Count positions, int64 ``[length]``, anew from every document end (from 0 to ``length - 1``)."""
    starts = np.zeros(length, dtype=np.int64)
    starts[document_ends] = document_ends
    positions: np.ndarray = np.arange(length) - np.maximum.accumulate(starts)
    return positions


def shuffled(places: np.ndarray, count: int, key: tuple[int, ...]) -> np.ndarray:
    """Look up places, int64 ``[n]``, in a random order of 0 to ``count - 1``, without making the order.

    A Feistel network permutes the numbers below the next power of 4; a result that is not below ``count`` is put in
    again until it is, which takes fewer than 4 turns on average and keeps it a permutation. The integers of ``key``,
    from 0, choose the order.

    Source: Black and Rogaway, “Ciphers with Arbitrary Finite Domains” (2002), cycle walking.
    """
    half = np.uint64(max(1, -(-(count - 1).bit_length() // 2)))
    keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)
    low = np.uint64((1 << int(half)) - 1)

    def permute(values: np.ndarray) -> np.ndarray:
        left, right = values >> half, values & low
        for round_key in keys:
            # The generator's increment is taken back: only its scrambling is wanted.
            left, right = right, left ^ (splitmix64((right ^ round_key) - np.uint64(GAMMA)) & low)
        return (left << half) | right

    result = permute(places.astype(np.uint64))
    while (outside := result >= np.uint64(count)).any():
        result[outside] = permute(result[outside])
    return result.astype(np.int64)
