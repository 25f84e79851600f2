"""The rows of one block's memory, on whatever tier its table is, and the N-grams of a text that read them."""

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engram_lm.analysis.subject import Subject
from engram_lm.analysis.token_text import spelled
from engram_lm.errors import ConfigError, MismatchError
from engram_lm.hashing import HashSpec
from engram_lm.hashing.counting import FrequentNgrams, ngram_rows
from engram_lm.memory.layer import EngramLayer, row_signs

__all__ = ["MemoryRows", "RowReaders", "TextNgram", "memory_rows"]

# Dimension key: N rows or N-grams, E row width, K heads of one order.


class TextNgram(NamedTuple):
    """An N-gram of a text."""

    text: str
    """What it spells where it first occurs; empty if all it saw was the start of the text."""
    order: int
    """Tokens in it."""
    num_positions: int
    """Positions at which it occurs."""
    block: int
    """Block that reads with it, counted from 0."""

    @classmethod
    def of(cls, subject: Subject, block: int, counted: FrequentNgrams, place: int) -> "TextNgram":
        """Describe the N-gram at a place of those counted, for a block that reads with it."""
        text = spelled(subject.tokenizer, counted.tokens[place])
        return cls(text, counted.order, int(counted.counts[place]), block)


@dataclasses.dataclass(frozen=True, eq=False)
class MemoryRows:
    """The memory of one block, on whatever tier its table is."""

    block: int
    """The block, counted from 0."""
    layer: EngramLayer
    """Its memory."""
    spec: HashSpec
    """How it hashes."""
    layer_id: int
    """The layer's published id."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as it is read."""
        assert self.layer.table is not None
        return self.layer.table.row_bytes

    @torch.no_grad()
    def gather(self, rows: np.ndarray) -> Tensor:
        """Return rows as they are stored, float32 ``[N, E]``, on the CPU."""
        assert self.layer.table is not None
        return self.layer.table.gather(torch.from_numpy(np.ascontiguousarray(rows, np.int64))).float().cpu()

    def vectors(self, rows: np.ndarray) -> Tensor:
        """Return the memory of N-grams of one order: rows ``[N, K]`` with their signs, float32 ``[N, K * E]``."""
        found = self.gather(rows)
        if self.layer.config.signs == "hashed":
            found = found * row_signs(torch.from_numpy(rows), self.spec.num_heads).unsqueeze(-1)
        return found.flatten(1)

    def channels(self, column: int, number: int) -> slice:
        """Return where some columns lie in the memory vector."""
        width = self.layer.config.head_dim
        return slice(column * width, (column + number) * width)


class RowReaders:
    """Tells which frequent N-grams of a text read which row of one head, in all blocks that share the table."""

    def __init__(
        self, subject: Subject, memory: MemoryRows, order: int, head: int, counted: FrequentNgrams | None
    ) -> None:
        self._subject, self._counted, spec = subject, counted, memory.spec
        places = range(len(spec.layers)) if spec.shared_table else [spec.layers.index(memory.layer_id)]
        self._blocks = [spec.blocks[place] for place in places]
        columns = [np.zeros(0, np.int64)]
        if counted is not None:
            columns += [ngram_rows(spec, counted, spec.layers[place])[:, head] for place in places]
        joined = np.concatenate(columns)
        # The sort is stable, so the N-grams of one row stay in the order of their counts, block by block.
        self._order = np.argsort(joined, kind="stable")
        self._sorted = joined[self._order]
        self.rows = np.unique(joined)

    def _entries(self, row: int) -> np.ndarray:
        low, high = np.searchsorted(self._sorted, [row, row + 1])
        return self._order[low:high]

    def count(self, row: int) -> int:
        """Return how many N-grams read a row."""
        return len(self._entries(row))

    def first(self, row: int, number: int) -> tuple[TextNgram, ...]:
        """Return the N-grams that read a row, the most frequent first."""
        if self._counted is None:
            return ()
        entries = (divmod(entry, len(self._counted.counts)) for entry in self._entries(row).tolist())
        ranked = sorted((place, block) for block, place in entries)[:number]
        return tuple(TextNgram.of(self._subject, self._blocks[block], self._counted, place) for place, block in ranked)


def memory_rows(subject: Subject, block: int | None = None) -> MemoryRows:
    """Find the memory of a block; None means the first block that has memory.

    Raises:
        MismatchError: The model has no memory, or its tables are not at hand.
        ConfigError: The block has no memory.
    """
    if subject.spec is None or not subject.memories:
        raise MismatchError(f"{subject.name} has no memory, so it has no rows; pass a model with memory")
    block = next(iter(subject.memories)) if block is None else block
    if block not in subject.memories:
        there = ", ".join(map(str, subject.memories))
        raise ConfigError(f"block {block} reads no memory; those that do are {there}")
    layer = subject.memories[block]
    if layer.table is None:
        raise MismatchError(f"the memory of block {block} has no table to look into; load the model with its tables")
    return MemoryRows(block, layer, subject.spec, subject.spec.layers[subject.spec.blocks.index(block)])
