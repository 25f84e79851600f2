"""RETRO: a chunk of the context finds similar chunks of a stored text, and the tokens after it attend to those."""

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
# K neighbors of a chunk, R = 2 M tokens of a neighbor, V vocabulary, E width of a frozen embedding.

_HEAD_WIDTH = 32


class RetroLayer(MemoryLayer):
    """Attend to text that was found by what stands before: chunked cross-attention to neighbors of each chunk.

    A sequence is cut into chunks of ``chunk`` tokens. For each of them the ``neighbors`` most similar chunks of a
    stored text are found, by exact search over frozen embeddings (random projections of the counts of their tokens,
    weighted by rarity). A neighbor is such a chunk and the one that follows it. An encoder reads neighbors in both
    directions, and the chunk that they were found for; the last token of that chunk and the tokens after it, up to the
    last but one of the next chunk, attend to all of them. So no output depends on a later token.

    The stored text is the beginning of the training text: whole documents, ``chunks`` chunks at most (`prepare`). It
    counts among the layer's numbers, as do the frozen embeddings, two of whose numbers take the place of one. Chunks of
    the documents that a sequence itself is part of are not found.

    It reads whole sequences, and is not for decoding. What differs from the published model: positions are learned
    vectors in place of relative ones, embeddings are no BERT's, and a neighbor has as little as one encoder block.

    Source: Borgeaud et al., “Improving language models by retrieving from trillions of tokens”, ICML 2022, section 2.
    """

    text: Tensor
    """The stored text, int32 ``[(C + 1) M]``; -1 where there is none."""

    def __init__(self, config: EngramConfig, table: Table | None = None) -> None:
        _check(config)
        super().__init__(config, table)
        width, chunk = config.hidden_size, config.option("chunk")
        heads = max(1, width // _HEAD_WIDTH)
        self.neighbor_position = nn.Parameter(torch.empty(2 * chunk, width))
        self.query_position = nn.Parameter(torch.empty(chunk, width))
        self.norms = nn.ModuleDict(
            {name: nn.RMSNorm(width, eps=config.norm_eps) for name in ("query", "own", "about", "wide", "found")}
        )
        self.own, self.about, self.found = (
            nn.MultiheadAttention(width, heads, bias=False, batch_first=True) for _ in range(3)
        )
        self.wide = nn.Sequential(
            nn.Linear(width, 2 * width, bias=False), nn.GELU(), nn.Linear(2 * width, width, bias=False)
        )
        self.register_buffer("text", torch.full(((config.option("chunks") + 1) * chunk,), -1, dtype=torch.int32))
        self.index: _Index | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize everything but the text; the update begins at zero where ``value_init`` says so."""
        for position in (self.neighbor_position, self.query_position):
            nn.init.normal_(position, std=self.config.projection_std)
        for module in self.modules():
            if isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=self.config.projection_std)
            elif isinstance(module, nn.MultiheadAttention):
                nn.init.normal_(module.in_proj_weight, std=self.config.hidden_size**-0.5)
        if self.config.value_init == "zero":
            nn.init.zeros_(self.found.out_proj.weight)

    @property
    def window_shape(self) -> tuple[int, int]:
        """It keeps nothing for decoding, which it does not do."""
        return 0, self.config.hidden_size

    @classmethod
    def count_parameters(cls, config: EngramConfig) -> int:
        """Count the numbers of the layer, without the stored text."""
        _check(config)
        width, chunk = config.hidden_size, config.option("chunk")
        return 3 * chunk * width + 5 * width + 3 * 4 * width**2 + 4 * width**2

    @classmethod
    def count_kept(cls, config: EngramConfig) -> int:
        """Count the stored text, and its embeddings, two numbers of which count as one."""
        _check(config)
        chunk, chunks = config.option("chunk"), config.option("chunks")
        return (chunks + 1) * chunk + chunks * config.option("embedding") // 2

    @classmethod
    def count_flops(cls, config: EngramConfig) -> int:
        """Count the operations of one token: its share of the search and of its chunk's neighbors, and reading."""
        _check(config)
        width, chunk, neighbors = config.hidden_size, config.option("chunk"), config.option("neighbors")
        length = 2 * chunk
        per_neighbor_token = (
            (8 + 4 + 8 + 4) * width**2  # both attentions of the encoder, its feed-forward, keys and values of the last
            + 4 * length * width  # scores and values among neighbors
            + 4 * chunk * width  # and with the chunk
            + 2 * width**2  # keys and values of a chunk, half as many as there are tokens of a neighbor
        )
        search = 2 * config.option("chunks") * config.option("embedding") // chunk
        return search + 2 * neighbors * per_neighbor_token + 4 * width**2 + 4 * neighbors * length * width

    @classmethod
    def count_numbers_read(cls, config: EngramConfig) -> int:
        """Count the numbers read for a token: its share of its chunk's neighbors."""
        return 2 * int(config.option("neighbors"))

    def prepare(self, spec: HashSpec, tokens: Any) -> None:
        """Store the beginning of the training text, raw tokens ``[num_tokens]``."""
        part = torch.from_numpy(np.asarray(tokens[: len(self.text)]).astype(np.int32))
        ends = (part == self.config.option("end_token")).nonzero()[:, 0]
        if len(ends):  # whole documents, so that the beginning of none is found by the rest of it
            part = part[: int(ends[-1]) + 1]
        self.text.fill_(-1)
        self.text[: len(part)] = part.to(self.text.device)

    def read(self, rows: Tensor) -> Tensor:
        """Find the neighbors of what each position sees, int64 ``[B, L, N]``: int64 ``[B, U, K, R]``, -1 for none."""
        chunk = self.config.option("chunk")
        if rows.shape[1] < chunk:
            return rows.new_empty(len(rows), 0, self.config.option("neighbors"), 2 * chunk)
        found = self.neighbors(rows[:, : rows.shape[1] // chunk * chunk, 0])
        return found.tokens.masked_fill(~found.is_found[..., None], -1)

    def respond(
        self, hidden_states: Tensor, vectors: Tensor, state: State, active: Tensor | None, lengths: Lengths
    ) -> EngramOutput:
        """Return what the tokens read in the neighbors of the chunk before; gates are 1.

        ``vectors`` are the neighbors as tokens, from `read`.

        Raises:
            MismatchError: A decode state is passed.
        """
        if state is not None:
            raise MismatchError("the layer 'retro' reads whole sequences and does not decode; pass use_cache=False")
        hidden_BLD = hidden_states.flatten(2)
        gates_BLS = hidden_BLD.new_ones((*hidden_BLD.shape[:2], 1), dtype=torch.float32)
        chunk, length = self.config.option("chunk"), hidden_BLD.shape[1]
        num_chunks = vectors.shape[1]
        if not num_chunks:
            return EngramOutput(torch.zeros_like(hidden_states), gates_BLS)
        query = self.norms["query"](hidden_BLD)
        encoded = self._encode(query[:, : num_chunks * chunk].unflatten(1, (num_chunks, chunk)), vectors)
        # Position chunk - 1 is the first that may read: it has seen the whole first chunk.
        readers = F.pad(query[:, chunk - 1 :], (0, 0, 0, num_chunks * chunk - (length - chunk + 1)))
        readers = readers.unflatten(1, (num_chunks, chunk)).flatten(0, 1) + self.query_position
        is_read = (vectors >= 0).flatten(2).flatten(0, 1)
        update = _attend(self.found, readers, encoded.flatten(1, 2), is_read)
        update = update.unflatten(0, (-1, num_chunks)).flatten(1, 2)[:, : length - chunk + 1]
        update = F.pad(update, (0, 0, chunk - 1, 0))
        if active is not None:
            update = update.masked_fill(~active.to(update.device, torch.bool)[..., None], 0)
        return EngramOutput(update.reshape(hidden_states.shape).to(hidden_states.dtype), gates_BLS)

    def _encode(self, chunks: Tensor, tokens: Tensor) -> Tensor:
        """Read neighbors ``[B, U, K, R]`` in the light of chunks ``[B, U, M, D]``; returns ``[B U, K, R, D]``."""
        assert self.embedding is not None, "a model gives its embedding to its layers"
        number = tokens.shape[2]
        states = self.embedding(tokens.flatten(0, 2).clamp(min=0)).to(chunks.dtype) + self.neighbor_position
        chunks = chunks.unsqueeze(2).expand(-1, -1, number, -1, -1).flatten(0, 2)
        own = self.norms["own"](states)
        states = states + _attend(self.own, own, own)
        states = states + _attend(self.about, self.norms["about"](states), chunks)
        states = states + self.wide(self.norms["wide"](states))
        return self.norms["found"](states).unflatten(0, (-1, number))

    @torch.no_grad()
    def neighbors(self, tokens: Tensor) -> "Neighbors":
        """Find the neighbors of every chunk of sequences, raw tokens int64 ``[B, U M]``."""
        options = self.config.option
        version = (id(self.text), self.text._version)
        with torch.autocast(self.text.device.type, enabled=False):  # which neighbors there are depends on no type
            if self.index is None or self.index.version != version:
                self.index = _Index(self.text, options, version)
            return self.index.search(tokens.to(self.text.device), options("neighbors"))


class Neighbors(NamedTuple):
    """What was found for chunks."""

    places: Tensor
    """Which chunks of the stored text, the most similar first, int64 ``[B, U, K]``."""
    tokens: Tensor
    """Each and the chunk after it, int64 ``[B, U, K, R]``."""
    is_found: Tensor
    """Whether there is such a chunk: False where fewer than K may be found, bool ``[B, U, K]``."""


class _Index:
    """What is computed of a stored text to search it."""

    def __init__(self, text: Tensor, options: Any, version: Any) -> None:
        self.version, self.chunk, self.text = version, options("chunk"), text.long()
        chunks = self.text.view(-1, self.chunk)
        self.chunks, follows = chunks[:-1], chunks[1:]
        self.is_text = (self.chunks >= 0).all(-1) & (follows >= 0).all(-1)
        self.weights = _signs(options("vocabulary"), options("embedding"), text.device)
        self._check(self.text)
        occurs = torch.zeros(len(self.weights), dtype=torch.float32, device=text.device)
        for some in self.chunks.clamp(min=0).split(1 << 14):
            ordered = some.sort(-1).values
            is_first = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
            occurs += torch.bincount(ordered[is_first], minlength=len(occurs))
        self.weights = self.weights * torch.log((1 + len(self.chunks)) / (1 + occurs))[:, None]
        self.embeddings = torch.cat([self.embed(some.clamp(min=0)).half() for some in self.chunks.split(1 << 14)])
        # The documents that a chunk and the one after it are of, the first and the last, counted from 0.
        ends = (self.text == options("end_token")).long()
        self.document = ends.cumsum(0) - ends
        by_chunk = self.document.view(-1, self.chunk)
        self.first_document, self.last_document = by_chunk[:-1, 0], by_chunk[1:, -1]
        # Every stretch of the text as long as a chunk, to find where sequences of the text come from.
        self.runs, self.run_starts = torch.sort(_mixed(self.text.unfold(0, self.chunk, 1)))

    def embed(self, chunks: Tensor) -> Tensor:
        """Embed chunks, int64 ``[N, M]``, as float32 ``[N, E]`` of length 1."""
        return F.normalize(F.embedding_bag(chunks, self.weights, mode="sum"), dim=-1)

    def search(self, tokens: Tensor, number: int) -> Neighbors:
        """Find the neighbors of the chunks of sequences ``[B, U M]``."""
        self._check(tokens)
        chunks = tokens.clamp(min=0).unflatten(1, (tokens.shape[1] // self.chunk, self.chunk))
        shape = chunks.shape[:2]
        similar = self.embed(chunks.flatten(0, 1)) @ self.embeddings.float().T
        similar.masked_fill_(~self.is_text, -torch.inf)
        excluded = self._own_documents(tokens)
        similar.masked_fill_(excluded.repeat_interleave(shape[1], dim=0), -torch.inf)
        number = min(number, similar.shape[1])
        near, places = similar.topk(number, dim=-1)
        near, places = near.view(*shape, number), places.view(*shape, number)
        found = self.text[places[..., None] * self.chunk + torch.arange(2 * self.chunk, device=places.device)]
        return Neighbors(places, found, near > -torch.inf)

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

    def _check(self, tokens: Tensor) -> None:
        if int(tokens.max()) >= len(self.weights):
            raise ConfigError(
                f"the text has the token {int(tokens.max())}, and the layer 'retro' was made for {len(self.weights)}; "
                "set its option vocabulary"
            )


def _attend(attention: nn.MultiheadAttention, queries: Tensor, read: Tensor, is_read: Tensor | None = None) -> Tensor:
    """Attend from queries ``[N, Q, D]`` to ``[N, S, D]``, of which only some may be read (``is_read``, ``[N, S]``)."""
    if is_read is None:
        found: Tensor = attention(queries, read, read, need_weights=False)[0]
        return found
    reads_any = is_read.any(-1)
    # Attention to nothing would give NaN, so it reads everything there and is left out afterwards.
    masked = ~(is_read | ~reads_any[:, None])
    found = attention(queries, read, read, key_padding_mask=masked, need_weights=False)[0]
    return found.masked_fill(~reads_any[:, None, None], 0)


def _signs(number: int, width: int, device: torch.device) -> Tensor:
    """Draw a vector of 1 and -1 for each token, float32 ``[V, E]``, the same everywhere."""
    return (1 - 2 * (scattered(torch.arange(number * width, device=device), 7) & 1)).view(number, width).float()


def _mixed(tokens: Tensor) -> Tensor:
    """Mix the tokens of stretches, int64 ``[N, ...]``, into a number for each, int64 ``[N]``."""
    mixed = torch.zeros_like(tokens[:, 0])
    for place in range(tokens.shape[1]):
        mixed = scattered(mixed + tokens[:, place], place)
    return mixed


def retro_memory(base: EngramConfig, vocabulary: int) -> Mapping[str, Any]:
    """Configure the layer so that it has as many numbers as another one, its stored text included."""
    fields = {"layer": "retro", "token_map": "raw", "kernel_size": 0, "gate": "none", "rows_per_head": 1}
    empty = EngramConfig.from_dict({**base.to_dict(), **fields, "layer_options": {"chunks": 1}})
    one_more = EngramConfig.from_dict({**base.to_dict(), **fields, "layer_options": {"chunks": 2}})
    per_chunk = one_more.num_parameters() - empty.num_parameters()
    chunks = 1 + max(0, base.num_parameters() - empty.num_parameters()) // per_chunk
    return {**fields, "layer_options": {"chunks": chunks, "vocabulary": vocabulary}}


def _check(config: EngramConfig) -> None:
    names = ("chunk", "chunks", "neighbors", "embedding", "vocabulary")
    few = [name for name in names if config.option(name) < 1]
    if few or config.num_streams > 1 or config.token_map != "raw" or config.option("embedding") % 2:
        raise ConfigError(
            "the layer 'retro' needs one stream, token_map='raw', an even embedding and options from 1, not "
            f"num_streams={config.num_streams}, token_map={config.token_map!r} and {dict(config.layer_options)}"
        )
