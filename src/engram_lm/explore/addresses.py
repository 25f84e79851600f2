"""Where a memory looks a text up: tokens → canonical tokens → N-grams → row numbers, and who shares the rows."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from engram_lm.analysis.reading import visible_tokens
from engram_lm.analysis.rows.collisions import TextNgrams
from engram_lm.errors import ConfigError, TokenMapError
from engram_lm.evaluation.token_text import spelled, token_texts
from engram_lm.hashing import HashSpec
from engram_lm.hashing.counting import ngram_rows, ngrams_of

# Dimension key: L length, O highest order, H heads of all orders, K heads of one order.

FREQUENT_POSITIONS = 2
"""An N-gram of the reference text that occurs at this many positions or more is called frequent."""
_MOST_MERGED = 12
"""Other tokens of one canonical token that are named, at most."""


class Sharer(NamedTuple):
    """A frequent N-gram that reads some of the rows of another one."""

    text: str
    """What it spells."""
    num_positions: int
    """Positions of the reference text at which it occurs."""
    num_heads: int
    """Heads in which both read the same row."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Lookup:
    """One N-gram that a block looks up at a position."""

    order: int
    """Tokens in an N-gram of this order."""
    block: int
    """Block that reads it, counted from 0."""
    tokens: tuple[int, ...]
    """The raw tokens that it sees, oldest first: fewer than its order where it is cut at the start of a segment."""
    rows: tuple[int, ...]
    """Row numbers, offsets included, one for each head."""
    num_positions: int
    """Positions of the reference text at which the same N-gram occurs, of those N-grams that were counted."""
    sharers: tuple[Sharer, ...]
    """Other frequent N-grams that read one of the rows, those with most rows in common first, then the frequent."""
    num_sharers: int
    """How many there are, named or not."""

    @property
    def is_cut(self) -> bool:
        """Whether it is cut at the start of a segment."""
        return len(self.tokens) < self.order


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Addresses:
    """What a hash makes of a text. Made by `find_addresses`."""

    spec: HashSpec
    """The hash."""
    tokens: np.ndarray
    """Raw tokens, int64 ``[L]``."""
    canonical: np.ndarray
    """Canonical tokens, int64 ``[L]``; -1 at dead positions, where nothing is read."""
    visible: np.ndarray
    """Tokens that an N-gram sees, its own included; 0 at dead positions; int64 ``[L]``."""
    ngrams: np.ndarray
    """The N-grams of the highest order, canonical tokens, oldest first, int64 ``[L, O]``."""
    rows: Mapping[int, np.ndarray]
    """For each block the rows that it reads, int64 ``[L, H]``."""

    def same_ngram(self, position: int, order: int) -> np.ndarray:
        """Find the positions at which the N-gram of an order that ends at a position is looked up, bool ``[L]``."""
        ngrams = self.ngrams[:, -order:]
        return (ngrams == ngrams[position]).all(-1) & (self.visible > 0)

    def lookups(
        self, position: int, block: int, tokenizer: Any, reference: TextNgrams | None = None, *, num_sharers: int = 5
    ) -> tuple[Lookup, ...]:
        """List the N-grams that a block looks up at a position, order by order; none at a dead position.

        Args:
            position: A position of the text.
            block: A block with memory, counted from 0.
            tokenizer: Spells tokens; None writes their ids.
            reference: A text whose frequent N-grams are compared.
            num_sharers: N-grams to name for each, at most.

        Raises:
            ConfigError: The block has no memory.
        """
        if block not in self.rows:
            raise ConfigError(f"block {block} reads no memory; those that do are {', '.join(map(str, self.rows))}")
        if not self.visible[position]:
            return ()
        layer = self.spec.layers[self.spec.blocks.index(block)]
        frequent = {} if reference is None else reference.frequent(self.spec)
        found = []
        for place, order in enumerate(self.spec.orders):
            start = position + 1 - min(order, int(self.visible[position]))
            tokens = tuple(self.tokens[start : position + 1].tolist())
            rows_K = self.rows[block][position, place * self.spec.num_heads : (place + 1) * self.spec.num_heads]
            count, num_sharing, sharers = 0, 0, []
            if order in frequent:
                every = frequent[order]
                own = int(every.find(self.ngrams[position : position + 1, -order:])[0])
                count = int(every.counts[own]) if own >= 0 else 0
                some = every.first(int((every.counts >= FREQUENT_POSITIONS).sum()))
                shared = (ngram_rows(self.spec, some, layer) == rows_K).sum(-1)
                if 0 <= own < len(shared):
                    shared[own] = 0
                others = np.flatnonzero(shared)
                num_sharing = len(others)
                # The frequent ones come first in the count, so the place decides among equals.
                for one in others[np.lexsort([others, -shared[others]])][:num_sharers].tolist():
                    text = spell(tokenizer, some.tokens[one])
                    sharers.append(Sharer(text, int(some.counts[one]), int(shared[one])))
            found.append(
                Lookup(
                    order=order,
                    block=block,
                    tokens=tokens,
                    rows=tuple(rows_K.tolist()),
                    num_positions=count,
                    sharers=tuple(sharers),
                    num_sharers=num_sharing,
                )
            )
        return tuple(found)


def find_addresses(spec: HashSpec, tokens: np.ndarray) -> Addresses:
    """Hash the raw tokens ``[L]`` of one text.

    Raises:
        TokenError: A token is outside the vocabulary.
        TokenMapError: The spec has no token map.
    """
    codes = spec.encode(np.asarray(tokens, np.int64)[None])
    rows = spec.rows_for_layers(codes)
    return Addresses(
        spec=spec,
        tokens=np.asarray(tokens, np.int64),
        canonical=np.where(codes[0] < 0, -1, codes[0] >> 2),
        visible=visible_tokens(torch.from_numpy(codes), spec.orders[-1])[0].numpy(),
        ngrams=ngrams_of(spec, codes)[0],
        rows={block: rows[layer][0] for block, layer in zip(spec.blocks, spec.layers, strict=True)},
    )


def merged_with(spec: HashSpec, token: int) -> tuple[list[int], int]:
    """List some of the other raw tokens that are one canonical token with a token, and count all of them."""
    if spec.token_map is None:
        raise TokenMapError("this hash has no token map; bind the model's tokenizer to it")
    canonical = spec.token_map.canonical
    others = np.flatnonzero(canonical == canonical[token])
    others = others[others != token]
    return others[:_MOST_MERGED].tolist(), len(others)


def spell(tokenizer: Any, tokens: Sequence[int] | np.ndarray) -> str:
    """Write tokens as text, or as their ids where there is no tokenizer."""
    if tokenizer is None:
        return " ".join(str(token) for token in np.asarray(tokens).tolist() if token >= 0)
    return spelled(tokenizer, tokens)


def spell_each(tokenizer: Any, tokens: np.ndarray) -> tuple[str, ...]:
    """Write each token as its part of the text, or as its id where there is no tokenizer."""
    if tokenizer is None:
        return tuple(str(token) for token in tokens.tolist())
    return tuple(token_texts(tokenizer, tokens.tolist()))
