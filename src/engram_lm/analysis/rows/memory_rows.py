"""The rows of one block's memory, on whatever tier its table is, and the N-grams of a text that read them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engram_lm.analysis.subject import Subject
from engram_lm.analysis.token_text import spelled, text_tokens
from engram_lm.errors import ConfigError, MismatchError
from engram_lm.hashing import HashSpec
from engram_lm.hashing.counting import FrequentNgrams, frequent_ngrams, ngram_rows
from engram_lm.memory.layer import EngramLayer, row_signs

__all__ = ["MemoryRows", "RowReaders", "TextNgram", "counted_ngrams", "memory_rows"]

# Dimension key: N rows or N-grams, E row width, K heads of one order.


class TextNgram(NamedTuple):
    """An N-gram of a text."""

    text: str
    """What it spells where it first occurs; empty where all it saw was the start of the text."""
    order: int
    """Tokens in it."""
    num_positions: int
    """Positions at which it occurs."""
    block: int
    """Block that reads with it, from 0."""

    @classmethod
    def of(cls, subject: Subject, block: int, counted: FrequentNgrams, place: int) -> "TextNgram":
        """Describe the N-gram at a place of those counted, for a block that reads with it."""
        text = spelled(subject.tokenizer, counted.tokens[place])
        return cls(text, counted.order, int(counted.counts[place]), block)


@dataclasses.dataclass(frozen=True, eq=False)
class MemoryRows:
    """The memory of one block, on whatever tier its table is."""

    block: int
    """From 0."""
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
        """Rows as they are stored, float32 [N, E], on the CPU."""
        assert self.layer.table is not None
        return self.layer.table.gather(torch.from_numpy(np.ascontiguousarray(rows, np.int64))).float().cpu()

    def vectors(self, rows: np.ndarray) -> Tensor:
        """Memory of N-grams of one order: rows [N, K] side by side with their signs, float32 [N, K * E]."""
        found = self.gather(rows)
        if self.layer.config.signs == "hashed":
            found = found * row_signs(torch.from_numpy(rows), self.spec.num_heads).unsqueeze(-1)
        return found.flatten(1)

    def channels(self, column: int, number: int) -> slice:
        """Where some columns lie in the memory vector."""
        width = self.layer.config.head_dim
        return slice(column * width, (column + number) * width)


class RowReaders:
    """Which of the text's frequent N-grams read which row of one head; of all blocks that share the table."""

    def __init__(
        self, subject: Subject, memory: MemoryRows, order: int, head: int, counted: Mapping[int, FrequentNgrams] | None
    ) -> None:
        self._subject, self._counted = subject, None if counted is None else counted[order]
        spec = memory.spec
        places = range(len(spec.layers)) if spec.shared_table else [spec.layers.index(memory.layer_id)]
        columns: list[np.ndarray] = []
        self._blocks = [spec.blocks[place] for place in places]
        if self._counted is not None:
            columns = [ngram_rows(spec, self._counted, spec.layers[place])[:, head] for place in places]
        joined = np.concatenate(columns) if columns else np.zeros(0, np.int64)
        # Stable, so the N-grams of one row stay in the order of their counts, block by block.
        self._order = np.argsort(joined, kind="stable")
        self._sorted = joined[self._order]
        self.rows = np.unique(joined)

    def count(self, row: int) -> int:
        """How many N-grams read a row."""
        low, high = np.searchsorted(self._sorted, [row, row + 1])
        return int(high - low)

    def first(self, row: int, number: int) -> tuple[TextNgram, ...]:
        """The N-grams that read a row, the most frequent first."""
        counted = self._counted
        if counted is None:
            return ()
        low, high = np.searchsorted(self._sorted, [row, row + 1])
        entries = (divmod(int(entry), len(counted.counts)) for entry in self._order[low:high])
        ranked = sorted((place, block) for block, place in entries)[:number]
        return tuple(TextNgram.of(self._subject, self._blocks[block], counted, place) for place, block in ranked)


def memory_rows(subject: Subject, block: int | None = None) -> MemoryRows:
    """Find the memory of a block; the first one that reads some where None.

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


def counted_ngrams(subject: Subject, text: Any, max_ngrams: int) -> Mapping[int, FrequentNgrams] | None:
    """Count the N-grams of a text, unless that was done before.

    Args:
        subject: The model.
        text: A text, its tokens, what `frequent_ngrams` returned for it, or None.
        max_ngrams: Take so many of the most frequent of each order at most.

    Returns:
        By order; None for no text.

    Raises:
        MismatchError: What was counted before is of other orders or another vocabulary.
        DataError: The text has no tokens.
        TokenError: A token is outside the vocabulary.
    """
    spec = subject.spec
    assert spec is not None
    if text is None:
        return None
    if not isinstance(text, Mapping):
        tokens = text_tokens(subject.tokenizer, text) if isinstance(text, str) else np.asanyarray(text)
        return frequent_ngrams(spec, tokens, num_ngrams=max_ngrams)
    sizes = {one.vocab_size for one in text.values()}
    if not set(spec.orders) <= set(text) or sizes != {spec.vocab_size}:
        raise MismatchError(
            f"these N-grams have the orders {sorted(text)} and vocabularies of {sorted(sizes)} canonical tokens, the "
            f"memory reads {list(spec.orders)} and {spec.vocab_size}; count them with the model's own spec"
        )
    return text
