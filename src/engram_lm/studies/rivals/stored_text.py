"""What layers share that store a part of the training text, find chunks of it for a sequence, and read them."""

import abc
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram_lm.errors import ConfigError, MismatchError
from engram_lm.hashing.spec import HashSpec
from engram_lm.memory.config import EngramConfig
from engram_lm.memory.interface import EngramOutput, Lengths, MemoryLayer, State
from engram_lm.studies.rivals.addresses import scattered
from engram_lm.tables.table import Table

# Dimension key: B batch, L length, D hidden, U chunks of a sequence, M tokens of a chunk, C chunks of the stored text,
# K neighbors of a chunk, R = 2 M tokens of a neighbor.

PASSES = 3
"""Forward passes that training on a token is counted as. Searching is one pass and no more."""


class StoredTextLayer(MemoryLayer):
    """A layer that reads neighbors: chunks of a stored text, found for each chunk of a sequence.

    A sequence is cut into chunks of ``chunk`` tokens, and for each of them `find` finds ``neighbors`` chunks of the
    stored text, each with the one that follows it. The last token of the chunk and the tokens after it, up to the last
    but one of the next chunk, read them in `update`. So no output depends on a later token.

    The stored text is the beginning of the training text: whole documents, ``chunks`` chunks at most (`prepare`). It
    counts among the layer's numbers. It reads whole sequences, and is not for decoding.
    """

    text: Tensor
    """The stored text, int32 ``[(C + 1) M]``; -1 where there is none."""
    norms: nn.ModuleDict
    """The norm ``query`` of the hidden states that read, and others."""
    query_position: nn.Embedding
    """Added to those that read, ``[M, D]``."""

    def __init__(self, config: EngramConfig, table: Table | None = None) -> None:
        self.check(config)
        super().__init__(config, table)
        length = (config.option("chunks") + 1) * config.option("chunk")
        self.register_buffer("text", torch.full((length,), -1, dtype=torch.int32))
        self._stored: StoredText | None = None

    @classmethod
    def check(cls, config: EngramConfig) -> None:
        """Refuse what belongs to other layers, and options that cannot be."""
        few = [name for name in config.entry.options if name != "end_token" and config.option(name) < 1]
        if few or config.num_streams > 1 or config.token_map != "raw" or config.option("embedding") % 2:
            raise ConfigError(
                f"the layer {config.layer!r} needs one stream, token_map='raw', an even embedding and options from 1, "
                f"not num_streams={config.num_streams}, token_map={config.token_map!r} and "
                f"{dict(config.layer_options)}"
            )

    @property
    def window_shape(self) -> tuple[int, int]:
        """It keeps nothing for decoding, which it does not do."""
        return 0, self.config.hidden_size

    @classmethod
    def count_kept(cls, config: EngramConfig) -> int:
        """Count the stored text, and the embeddings of its chunks, two numbers of which count as one."""
        cls.check(config)
        chunk, chunks = config.option("chunk"), config.option("chunks")
        return (chunks + 1) * chunk + chunks * config.option("embedding") // 2

    @classmethod
    def count_numbers_read(cls, config: EngramConfig) -> int:
        """Count the numbers read for a token: its share of its chunk's neighbors."""
        return 2 * int(config.option("neighbors"))

    @classmethod
    def _search_flops(cls, config: EngramConfig) -> int:
        """Count the operations of one token's share of comparing its chunk with every chunk of the stored text."""
        return int(2 * config.option("chunks") * config.option("embedding") // config.option("chunk"))

    def prepare(self, spec: HashSpec, tokens: Any) -> None:
        """Store the beginning of the training text, raw tokens ``[num_tokens]``."""
        part = torch.from_numpy(np.asarray(tokens[: len(self.text)]).astype(np.int32))
        ends = (part == self.config.option("end_token")).nonzero()[:, 0]
        if len(ends):  # whole documents, so that the beginning of none is found by the rest of it
            part = part[: int(ends[-1]) + 1]
        self.text.fill_(-1)
        self.text[: len(part)] = part.to(self.text.device)

    @property
    def stored(self) -> "StoredText":
        """The stored text as it is now, ready to be searched."""
        version = (id(self.text), self.text._version)
        if self._stored is None or self._stored.version != version:
            self._stored = StoredText(self.text, self.config.option("chunk"), self.config.option("end_token"), version)
        return self._stored

    def read(self, rows: Tensor) -> Tensor:
        """Find what the chunks of sequences read, by the tokens that each position sees, int64 ``[B, L, N]``."""
        chunk = self.config.option("chunk")
        num_chunks = rows.shape[1] // chunk
        if not num_chunks:
            return rows.new_empty(len(rows), 0, 1, 2 * chunk)
        return self.find(rows[:, : num_chunks * chunk, 0])

    @abc.abstractmethod
    def find(self, tokens: Tensor) -> Tensor:
        """Find neighbors for raw tokens, int64 ``[B, U M]``: int64 ``[B, U, …, R]``, -1 where there is no token."""

    @abc.abstractmethod
    def update(self, readers: Tensor, chunks: Tensor, tokens: Tensor) -> Tensor:
        """Read what was found.

        Args:
            readers: Normalized hidden states that read, ``[B U, M, D]``; the first saw the whole chunk.
            chunks: Those of the chunk itself, ``[B, U, M, D]``.
            tokens: From `find`.

        Returns:
            The update of those that read, ``[B U, M, D]``.
        """

    def respond(
        self, hidden_states: Tensor, vectors: Tensor, state: State, active: Tensor | None, lengths: Lengths
    ) -> EngramOutput:
        """Return what the tokens read in the neighbors of the chunk before; gates are 1.

        ``vectors`` are the neighbors as tokens, from `read`.

        Raises:
            MismatchError: A decode state is passed.
        """
        if state is not None:
            raise MismatchError(
                f"the layer {self.config.layer!r} reads whole sequences and does not decode; pass use_cache=False"
            )
        hidden_BLD = hidden_states.flatten(2)
        gates_BLS = hidden_BLD.new_ones((*hidden_BLD.shape[:2], 1), dtype=torch.float32)
        chunk, length = self.config.option("chunk"), hidden_BLD.shape[1]
        num_chunks = vectors.shape[1]
        if not num_chunks:
            return EngramOutput(torch.zeros_like(hidden_states), gates_BLS)
        query = self.norms["query"](hidden_BLD)
        # Position chunk - 1 is the first that may read: it has seen the whole first chunk.
        readers = F.pad(query[:, chunk - 1 :], (0, 0, 0, num_chunks * chunk - (length - chunk + 1)))
        readers = readers.unflatten(1, (num_chunks, chunk)).flatten(0, 1) + self.query_position.weight
        update = self.update(readers, query[:, : num_chunks * chunk].unflatten(1, (num_chunks, chunk)), vectors)
        update = update.unflatten(0, (-1, num_chunks)).flatten(1, 2)[:, : length - chunk + 1]
        update = F.pad(update, (0, 0, chunk - 1, 0))
        if active is not None:
            update = update.masked_fill(~active.to(update.device, torch.bool)[..., None], 0)
        return EngramOutput(update.reshape(hidden_states.shape).to(hidden_states.dtype), gates_BLS)


class Neighbors(NamedTuple):
    """What was found for chunks."""

    places: Tensor
    """Which chunks of the stored text, the most similar first, int64 ``[B, U, K]``."""
    tokens: Tensor
    """Each and the chunk after it, int64 ``[B, U, K, R]``."""
    is_found: Tensor
    """Whether there is such a chunk: False where fewer than K may be found, bool ``[B, U, K]``."""


class StoredText:
    """A stored text that can be searched. A sequence never finds chunks of a document that it is itself a part of."""

    def __init__(self, text: Tensor, chunk: int, end_token: int, version: Any) -> None:
        self.version, self.chunk, self.text = version, chunk, text.long()
        chunks = self.text.view(-1, chunk)
        self.chunks, follows = chunks[:-1], chunks[1:]
        self.is_text = (self.chunks >= 0).all(-1) & (follows >= 0).all(-1)
        # The documents that a chunk and the one after it are of, the first and the last, counted from 0.
        ends = (self.text == end_token).long()
        self.document = ends.cumsum(0) - ends
        by_chunk = self.document.view(-1, chunk)
        self.first_document, self.last_document = by_chunk[:-1, 0], by_chunk[1:, -1]
        # Every stretch of the text as long as a chunk, to find where sequences of the text come from.
        self.runs, self.run_starts = torch.sort(_mixed(self.text.unfold(0, chunk, 1)))

    def take(self, places: Tensor) -> Tensor:
        """Take chunks and those that follow them, int64 ``[...]``: int64 ``[..., R]``."""
        return self.text[places[..., None] * self.chunk + torch.arange(2 * self.chunk, device=places.device)]

    def nearest(self, similar: Tensor, tokens: Tensor, number: int) -> "Neighbors":
        """Find the most similar chunks that may be found.

        Args:
            similar: How similar each chunk is to the chunks of sequences, ``[B U, C]``; changed in place.
            tokens: The sequences, int64 ``[B, U M]``.
            number: Chunks to find for each.
        """
        shape = (len(tokens), tokens.shape[1] // self.chunk)
        similar.masked_fill_(~self.is_text, -torch.inf)
        excluded = self._own_documents(tokens)
        similar.masked_fill_(excluded.repeat_interleave(shape[1], dim=0), -torch.inf)
        number = min(number, similar.shape[1])
        near, places = similar.topk(number, dim=-1)
        near, places = near.view(*shape, number), places.view(*shape, number)
        return Neighbors(places, self.take(places), near > -torch.inf)

    def _own_documents(self, tokens: Tensor) -> Tensor:
        """Say which chunks are of the documents that a sequence is a part of, bool ``[B, C]``.

        These are the documents in which the first chunk of the sequence stands, wherever that is, and those after them
        that the sequence and the chunk behind it reach.
        """
        excluded = torch.zeros(len(tokens), len(self.chunks), dtype=torch.bool, device=tokens.device)
        wanted = _mixed(tokens[:, : self.chunk])
        firsts, lasts = (torch.searchsorted(self.runs, wanted, right=right).tolist() for right in (False, True))
        for row, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
            if first == last:
                continue
            start = self.run_starts[first:last]
            low = self.document[start]
            high = self.document[(start + tokens.shape[1] + self.chunk - 1).clamp(max=len(self.document) - 1)]
            own = torch.zeros(int(self.document[-1]) + 3, dtype=torch.int64, device=tokens.device)
            own.index_add_(0, low + 1, torch.ones_like(low)).index_add_(0, high + 2, -torch.ones_like(high))
            own_before = (own.cumsum(0) > 0).cumsum(0)  # own documents among the first 0, 1, 2, ...
            excluded[row] = own_before[self.last_document + 1] > own_before[self.first_document]
        return excluded


def num_heads(width: int) -> int:
    """Choose the number of attention heads for a width: one for every 32 channels."""
    return max(1, width // 32)


def feed_forward(width: int) -> nn.Sequential:
    """Build the feed-forward network of an encoder, twice as wide inside."""
    return nn.Sequential(nn.Linear(width, 2 * width, bias=False), nn.GELU(), nn.Linear(2 * width, width, bias=False))


def attend(attention: nn.MultiheadAttention, queries: Tensor, read: Tensor, is_read: Tensor | None = None) -> Tensor:
    """Attend from queries ``[N, Q, D]`` to ``[N, S, D]``, of which only some may be read (``is_read``, ``[N, S]``)."""
    if is_read is None:
        found: Tensor = attention(queries, read, read, need_weights=False)[0]
        return found
    reads_any = is_read.any(-1)
    # Attention to nothing would give NaN, so it reads everything there and is left out afterwards.
    masked = ~(is_read | ~reads_any[:, None])
    found = attention(queries, read, read, key_padding_mask=masked, need_weights=False)[0]
    return found.masked_fill(~reads_any[:, None, None], 0)


def _mixed(tokens: Tensor) -> Tensor:
    """Mix the tokens of stretches, int64 ``[N, ...]``, into a number for each, int64 ``[N]``."""
    mixed = torch.zeros_like(tokens[:, 0])
    for place in range(tokens.shape[1]):
        mixed = scattered(mixed + tokens[:, place], place)
    return mixed


def stored_text_memory(base: EngramConfig, layer: str, **options: int) -> Mapping[str, Any]:
    """Configure a layer so that it has as many numbers as another one, its stored text included."""
    fields = {"layer": layer, "token_map": "raw", "kernel_size": 0, "gate": "none", "rows_per_head": 1}
    empty, one_more = (
        EngramConfig.from_dict({**base.to_dict(), **fields, "layer_options": {"chunks": chunks, **options}})
        for chunks in (1, 2)
    )
    per_chunk = one_more.num_parameters() - empty.num_parameters()
    chunks = 1 + max(0, base.num_parameters() - empty.num_parameters()) // per_chunk
    return {**fields, "layer_options": {"chunks": chunks, **options}}
