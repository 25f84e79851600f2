"""REALM: a learned retriever finds documents by latent retrieval, and what is read is averaged over them by p(z|x)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram_lm.hashing.spec import HashSpec
from engram_lm.memory.config import EngramConfig
from engram_lm.studies.rivals.stored_text import (
    PASSES,
    Neighbors,
    StoredTextLayer,
    attend,
    feed_forward,
    num_heads,
)
from engram_lm.tables.table import Table

# Dimension key: B batch, L length, D hidden, U chunks of a sequence, M tokens of a chunk, C chunks of the stored text,
# K documents that are found for a chunk, R = 2 M tokens of a document, E width of an embedding, A heads.

_AT_ONCE = 1 << 10
"""Documents that are embedded at a time when the index is rebuilt."""


class RealmLayer(StoredTextLayer):
    """Read documents z that a learned retriever finds for a chunk x, averaged by p(z|x).

    An encoder of one block reads documents, and chunks as queries. p(z|x) is the softmax of the inner products of
    learned embeddings, ``W_input`` of the mean of a query's encoded tokens and ``W_doc`` of a document's, over the
    ``neighbors`` best documents and an empty one, which says nothing. The best are found by exact search in an index of
    all documents' embeddings, which the next search rebuilds with the encoder as it then is once ``refresh_tokens``
    tokens have been trained on; until then it is stale. The documents that were found are embedded anew, so that p(z|x)
    is that of the present weights and its gradient trains query and document embeddings: a document that helps more
    than the others becomes more probable.

    Train it without gradient checkpointing, which would search twice and count tokens twice: the second search may
    rebuild the index and find other documents.

    A document is a chunk of the stored text and the one that follows it; see `StoredTextLayer` for which there are,
    and which positions read them.

    What differs from the published model: p(y|x) = Σ p(z|x) p(y|x, z) averages the probabilities of the next token,
    which takes the rest of the model and its head once for each document. Here the updates of the hidden state are
    averaged in the same way, and the rest of the model runs once: the marginal likelihood itself is not what is
    maximized. Tokens attend to a document's tokens in place of an encoder that reads both together. Retriever and
    reader share one encoder, a block in place of BERT. Queries are chunks of the text before and not sentences with
    masks. Scores are divided by the root of E. In place of the inverse cloze task, which the published retriever begins
    with, ``W_doc`` begins equal to ``W_input``, so that the first documents found are those with similar tokens.

    Source: Guu et al., “REALM: Retrieval-Augmented Language Model Pre-Training”, ICML 2020, sections 3.1 to 3.4.
    """

    index: Tensor
    """Embeddings of all documents when it was last rebuilt, float16 ``[C, E]``."""
    tokens_since: Tensor
    """Tokens that were trained on since then, int32 ``[1]``; -1 where it was never built."""

    def __init__(self, config: EngramConfig, table: Table | None = None) -> None:
        super().__init__(config, table)
        width, chunk, embedding = config.hidden_size, config.option("chunk"), config.option("embedding")
        self.num_heads = num_heads(width)
        self.token_position = nn.Embedding(2 * chunk, width)
        self.query_position = nn.Embedding(chunk, width)
        self.norms = nn.ModuleDict(
            {name: nn.RMSNorm(width, eps=config.norm_eps) for name in ("query", "own", "wide", "found")}
        )
        self.own = nn.MultiheadAttention(width, self.num_heads, bias=False, batch_first=True)
        self.wide = feed_forward(width)
        self.embed_input, self.embed_document = (nn.Linear(width, embedding, bias=False) for _ in range(2))
        self.empty_document = nn.Parameter(torch.empty(embedding))
        self.reader = nn.Linear(width, width, bias=False)
        self.document_key, self.document_value = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.reader_output = nn.Linear(width, width, bias=False)
        self.register_buffer("index", torch.zeros(config.option("chunks"), embedding, dtype=torch.float16))
        self.register_buffer("tokens_since", torch.full((1,), -1, dtype=torch.int32))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize everything but text and index; the update begins at zero where ``value_init`` says so."""
        width = self.config.hidden_size
        for position in (self.token_position, self.query_position):
            nn.init.normal_(position.weight, std=self.config.projection_std)
        for module in self.modules():
            if isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=self.config.projection_std)
        for matrix in (
            self.own.in_proj_weight, self.reader.weight, self.document_key.weight, self.document_value.weight,
            self.embed_input.weight,
        ):  # fmt: skip
            nn.init.normal_(matrix, std=width**-0.5)
        self.embed_document.weight.copy_(self.embed_input.weight)
        nn.init.zeros_(self.empty_document)
        if self.config.value_init == "zero":
            nn.init.zeros_(self.reader_output.weight)

    @classmethod
    def count_parameters(cls, config: EngramConfig) -> int:
        """Count the numbers of the layer, without the stored text and the index."""
        cls.check(config)
        width, chunk, embedding = config.hidden_size, config.option("chunk"), config.option("embedding")
        return 3 * chunk * width + 4 * width + 12 * width**2 + (2 * width + 1) * embedding

    @classmethod
    def count_kept(cls, config: EngramConfig) -> int:
        """Count the stored text, the index (two float16 numbers count as one) and its age."""
        return super().count_kept(config) + 1

    @classmethod
    def count_flops(cls, config: EngramConfig) -> int:
        """Count the operations of one token: its share of search, encoding and rebuilding the index; and reading.

        Searching and rebuilding are a forward pass alone, so a third of them counts, as training is counted as three
        forward passes.
        """
        rebuilding = config.option("chunks") * cls._document_flops(config) // config.option("refresh_tokens")
        return cls._reading_flops(config) + (cls._search_flops(config) + rebuilding) // PASSES

    @classmethod
    def _search_flops(cls, config: EngramConfig) -> int:
        """Count the operations of one token's share of a search, which no gradient goes through."""
        return super()._search_flops(config) + cls._query_flops(config)

    @classmethod
    def _reading_flops(cls, config: EngramConfig) -> int:
        """Count the operations of one token for its share of its chunk's query and documents, and for reading them."""
        cls.check(config)
        option, width = config.option, config.hidden_size
        chunk, number = option("chunk"), option("neighbors")
        documents = number * (cls._document_flops(config) + 2 * chunk * 4 * width**2) // chunk
        scores = 2 * (number + 1) * option("embedding") // chunk
        reading = 4 * width**2 + number * (4 * 2 * chunk * width + 2 * width)
        return int(cls._query_flops(config) + documents + scores + reading)

    @classmethod
    def _query_flops(cls, config: EngramConfig) -> int:
        """Count the operations of one token's share of encoding a chunk as a query."""
        width, chunk = config.hidden_size, config.option("chunk")
        return int(16 * width**2 + 4 * chunk * width + 2 * width * config.option("embedding") // chunk)

    @classmethod
    def _document_flops(cls, config: EngramConfig) -> int:
        """Count the operations of encoding and embedding one document."""
        width, length = config.hidden_size, 2 * config.option("chunk")
        return int(length * (16 * width**2 + 4 * length * width) + 2 * width * config.option("embedding"))

    def prepare(self, spec: HashSpec, tokens: Any) -> None:
        """Store the beginning of the training text, raw tokens ``[num_tokens]``. The next search builds its index."""
        super().prepare(spec, tokens)
        self.tokens_since.fill_(-1)

    def find(self, tokens: Tensor) -> Tensor:
        """Find the documents for every chunk: int64 ``[B, U, 1 + K, R]``, -1 for none; the first is the chunk itself.

        It rebuilds the index first when it is time to, which training alone brings nearer.
        """
        limit = self.config.option("refresh_tokens")
        age = int(self.tokens_since)
        if age < 0 or age >= limit:
            self.refresh()
            age = 0
        if self.training and torch.is_grad_enabled():
            self.tokens_since.fill_(min(age + tokens.numel(), limit))
        found = self.neighbors(tokens)
        chunks = tokens.unflatten(1, (-1, self.config.option("chunk")))[:, :, None]
        documents = found.tokens.masked_fill(~found.is_found[..., None], -1)
        return torch.cat([F.pad(chunks, (0, chunks.shape[-1]), value=-1), documents], 2)

    @torch.no_grad()
    def refresh(self) -> None:
        """Rebuild the index with the encoder as it is."""
        with torch.autocast(self.text.device.type, enabled=False):
            places = torch.arange(len(self.index), device=self.text.device)
            for some in places.split(_AT_ONCE):
                self.index[some] = self.embed_documents(self.encode(self.stored.take(some))).to(self.index.dtype)
        self.tokens_since.fill_(0)

    @torch.no_grad()
    def neighbors(self, tokens: Tensor) -> Neighbors:
        """Find the documents of highest score in the index for every chunk of sequences, raw tokens ``[B, U M]``."""
        with torch.autocast(self.text.device.type, enabled=False):  # which documents there are depends on no type
            query = self.embed_query(tokens.reshape(-1, self.config.option("chunk")))
            return self.stored.nearest(query.float() @ self.index.float().T, tokens, self.config.option("neighbors"))

    def encode(self, tokens: Tensor) -> Tensor:
        """Encode stretches of tokens, each alone, int64 ``[N, T]`` with T up to R: ``[N, T, D]``."""
        assert self.embedding is not None, "a model gives its embedding to its layers"
        states = self.embedding(tokens.clamp(min=0)) + self.token_position.weight[: tokens.shape[1]]
        own = self.norms["own"](states)
        states = states + attend(self.own, own, own)
        states = states + self.wide(self.norms["wide"](states))
        encoded: Tensor = self.norms["found"](states)
        return encoded

    def embed_query(self, tokens: Tensor) -> Tensor:
        """Embed chunks ``[N, M]`` as queries: ``[N, E]``."""
        query: Tensor = self.embed_input(self.encode(tokens).mean(1))
        return query

    def embed_documents(self, encoded: Tensor) -> Tensor:
        """Embed encoded documents ``[..., R, D]``: ``[..., E]``."""
        embedded: Tensor = self.embed_document(encoded.mean(-2))
        return embedded

    def probabilities(self, query: Tensor, documents: Tensor, is_found: Tensor) -> Tensor:
        """Compute p(z|x) of embeddings ``[N, E]`` and ``[N, K, E]``: float32 ``[N, K]``, which the empty one adds to 1.

        A document that was not found (``is_found``, bool ``[N, K]``) has the probability 0.
        """
        known = torch.cat([documents, self.empty_document.to(documents).expand(len(documents), 1, -1)], 1)
        scores = torch.einsum("ne,nke->nk", query, known).float() * query.shape[-1] ** -0.5
        scores = scores.masked_fill(~F.pad(is_found, (0, 1), value=True), -torch.inf)
        return scores.softmax(-1)[:, :-1]

    def update(self, readers: Tensor, chunks: Tensor, tokens: Tensor) -> Tensor:
        """Read each document, and average what was read by p(z|x); ``tokens`` are those of `find`."""
        tokens = tokens.flatten(0, 1)  # [B U, 1 + K, R]
        documents = tokens[:, 1:]
        encoded = self.encode(documents.flatten(0, 1)).unflatten(0, documents.shape[:2])
        query = self.embed_query(tokens[:, 0, : self.config.option("chunk")])
        share = self.probabilities(query, self.embed_documents(encoded), documents[..., 0] >= 0)
        heads = (self.num_heads, -1)
        asked = self.reader(readers).unflatten(-1, heads).transpose(1, 2)[:, None]  # [B U, 1, A, M, D / A]
        keys, values = (  # [B U, K, A, R, D / A]
            project(encoded).unflatten(-1, heads).transpose(2, 3)
            for project in (self.document_key, self.document_value)
        )
        read = F.scaled_dot_product_attention(asked.expand(-1, keys.shape[1], -1, -1, -1), keys, values)
        mixed = torch.einsum("nk,nkamd->nmad", share.to(read.dtype), read).flatten(-2)
        output: Tensor = self.reader_output(mixed)
        return output
