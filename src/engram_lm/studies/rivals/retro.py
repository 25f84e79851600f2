"""RETRO: a chunk of the context finds similar chunks of a stored text, and the tokens after it attend to those."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram_lm.errors import ConfigError
from engram_lm.memory.config import EngramConfig
from engram_lm.studies.rivals.addresses import scattered
from engram_lm.studies.rivals.stored_text import (
    PASSES,
    Neighbors,
    StoredText,
    StoredTextLayer,
    attend,
    feed_forward,
    num_heads,
)
from engram_lm.tables.table import Table

# Dimension key: B batch, L length, D hidden, U chunks of a sequence, M tokens of a chunk, C chunks of the stored text,
# K neighbors of a chunk, R = 2 M tokens of a neighbor, V vocabulary, E width of a frozen embedding.


class RetroLayer(StoredTextLayer):
    """Attend to text that was found by what stands before: chunked cross-attention to neighbors of each chunk.

    Chunks are found by exact search over frozen embeddings: random projections of the counts of their tokens, weighted
    by rarity. An encoder reads neighbors in both directions, and the chunk that they were found for; the positions that
    may read attend to all of them. See `StoredTextLayer` for which chunks there are, and which positions read them. The
    frozen embeddings count among the layer's numbers, two of them as one. Chunks of the documents that a sequence
    itself is part of are not found.

    What differs from the published model: positions are learned vectors in place of relative ones, embeddings are no
    BERT's, and a neighbor has as little as one encoder block.

    Source: Borgeaud et al., “Improving language models by retrieving from trillions of tokens”, ICML 2022, section 2.
    """

    def __init__(self, config: EngramConfig, table: Table | None = None) -> None:
        super().__init__(config, table)
        width, chunk = config.hidden_size, config.option("chunk")
        heads = num_heads(width)
        self.neighbor_position = nn.Embedding(2 * chunk, width)
        self.query_position = nn.Embedding(chunk, width)
        self.norms = nn.ModuleDict(
            {name: nn.RMSNorm(width, eps=config.norm_eps) for name in ("query", "own", "about", "wide", "found")}
        )
        self.own, self.about, self.found = (
            nn.MultiheadAttention(width, heads, bias=False, batch_first=True) for _ in range(3)
        )
        self.wide = feed_forward(width)
        self.index: _Index | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize everything but the text; the update begins at zero where ``value_init`` says so."""
        for position in (self.neighbor_position, self.query_position):
            nn.init.normal_(position.weight, std=self.config.projection_std)
        for module in self.modules():
            if isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=self.config.projection_std)
            elif isinstance(module, nn.MultiheadAttention):
                nn.init.normal_(module.in_proj_weight, std=self.config.hidden_size**-0.5)
        if self.config.value_init == "zero":
            nn.init.zeros_(self.found.out_proj.weight)

    @classmethod
    def count_parameters(cls, config: EngramConfig) -> int:
        """Count the numbers of the layer, without the stored text."""
        cls.check(config)
        width, chunk = config.hidden_size, config.option("chunk")
        return 3 * chunk * width + 5 * width + 3 * 4 * width**2 + 4 * width**2

    @classmethod
    def count_flops(cls, config: EngramConfig) -> int:
        """Count the operations of one token: its share of the search and of its chunk's neighbors, and reading.

        Searching is a forward pass alone, so a third of it counts, as training is counted as three forward passes.
        """
        return cls._reading_flops(config) + cls._search_flops(config) // PASSES

    @classmethod
    def _reading_flops(cls, config: EngramConfig) -> int:
        """Count the operations of one token for its share of its chunk's neighbors, and for reading them."""
        cls.check(config)
        width, chunk, neighbors = config.hidden_size, config.option("chunk"), config.option("neighbors")
        length = 2 * chunk
        per_neighbor_token = (
            (8 + 4 + 8 + 4) * width**2  # both attentions of the encoder, its feed-forward, keys and values of the last
            + 4 * length * width  # scores and values among neighbors
            + 4 * chunk * width  # and with the chunk
            + 2 * width**2  # keys and values of a chunk, half as many as there are tokens of a neighbor
        )
        return 2 * neighbors * per_neighbor_token + 4 * width**2 + 4 * neighbors * length * width

    def find(self, tokens: Tensor) -> Tensor:
        """Find the neighbors of every chunk: int64 ``[B, U, K, R]``, -1 for none."""
        found = self.neighbors(tokens)
        return found.tokens.masked_fill(~found.is_found[..., None], -1)

    def update(self, readers: Tensor, chunks: Tensor, tokens: Tensor) -> Tensor:
        """Attend to all tokens of the neighbors ``[B, U, K, R]``."""
        encoded = self._encode(chunks, tokens)
        return attend(self.found, readers, encoded.flatten(1, 2), (tokens >= 0).flatten(2).flatten(0, 1))

    def _encode(self, chunks: Tensor, tokens: Tensor) -> Tensor:
        """Read neighbors ``[B, U, K, R]`` in the light of chunks ``[B, U, M, D]``; returns ``[B U, K, R, D]``."""
        assert self.embedding is not None, "a model gives its embedding to its layers"
        number = tokens.shape[2]
        states = self.embedding(tokens.flatten(0, 2).clamp(min=0)).to(chunks.dtype) + self.neighbor_position.weight
        chunks = chunks.unsqueeze(2).expand(-1, -1, number, -1, -1).flatten(0, 2)
        own = self.norms["own"](states)
        states = states + attend(self.own, own, own)
        states = states + attend(self.about, self.norms["about"](states), chunks)
        states = states + self.wide(self.norms["wide"](states))
        return self.norms["found"](states).unflatten(0, (-1, number))

    @torch.no_grad()
    def neighbors(self, tokens: Tensor) -> Neighbors:
        """Find the neighbors of every chunk of sequences, raw tokens int64 ``[B, U M]``."""
        options = self.config.option
        with torch.autocast(self.text.device.type, enabled=False):  # which neighbors there are depends on no type
            if self.index is None or self.index.stored is not self.stored:
                self.index = _Index(self.stored, options)
            return self.index.search(tokens.to(self.text.device), options("neighbors"))


class _Index:
    """The frozen embeddings of a stored text."""

    def __init__(self, stored: StoredText, options: Any) -> None:
        self.stored = stored
        self.weights = _signs(options("vocabulary"), options("embedding"), stored.text.device)
        self._check(stored.text)
        occurs = torch.zeros(len(self.weights), dtype=torch.float32, device=stored.text.device)
        for some in stored.chunks.clamp(min=0).split(1 << 14):
            ordered = some.sort(-1).values
            is_first = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
            occurs += torch.bincount(ordered[is_first], minlength=len(occurs))
        self.weights = self.weights * torch.log((1 + len(stored.chunks)) / (1 + occurs))[:, None]
        self.embeddings = torch.cat([self.embed(some.clamp(min=0)).half() for some in stored.chunks.split(1 << 14)])

    def embed(self, chunks: Tensor) -> Tensor:
        """Embed chunks, int64 ``[N, M]``, as float32 ``[N, E]`` of length 1."""
        return F.normalize(F.embedding_bag(chunks, self.weights, mode="sum"), dim=-1)

    def search(self, tokens: Tensor, number: int) -> Neighbors:
        """Find the neighbors of the chunks of sequences ``[B, U M]``."""
        self._check(tokens)
        similar = self.embed(tokens.clamp(min=0).reshape(-1, self.stored.chunk)) @ self.embeddings.float().T
        return self.stored.nearest(similar, tokens, number)

    def _check(self, tokens: Tensor) -> None:
        if int(tokens.max()) >= len(self.weights):
            raise ConfigError(
                f"the text has the token {int(tokens.max())}, and the layer 'retro' was made for {len(self.weights)}; "
                "set its option vocabulary"
            )


def _signs(number: int, width: int, device: torch.device) -> Tensor:
    """Draw a vector of 1 and -1 for each token, float32 ``[V, E]``, the same everywhere."""
    return (1 - 2 * (scattered(torch.arange(number * width, device=device), 7) & 1)).view(number, width).float()
