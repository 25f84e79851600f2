"""SCONE: the frequent N-grams of the training text have embeddings that a small transformer computes."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engram_lm.errors import ConfigError, MismatchError
from engram_lm.hashing.counting import frequent_ngrams
from engram_lm.hashing.spec import HashSpec
from engram_lm.memory.config import EngramConfig
from engram_lm.studies.rivals.rival_layer import RivalLayer
from engram_lm.tables.table import Table

# Dimension key: B batch, L length, N tokens of the longest f-gram, D hidden, F f-grams.

_NONE = torch.iinfo(torch.int64).max
_MULTIPLIER = 0x2545F4914F6CDD1D  # odd; of the generator xorshift64*
_KEY_BYTES, _NUMBER_BYTES = 8, 4


class FGramLayer(RivalLayer):
    """Replace a token's embedding by that of the longest frequent N-gram (f-gram) that ends with it.

    The f-grams are the ``num_f_grams`` most frequent N-grams of all orders in the training text, each at least
    ``min_count`` times among its first ``counted_tokens``. The embedding of an f-gram is what a causal transformer of
    ``blocks`` blocks gives at its last token; it reads the model's token embeddings and is trained with the model. A
    token without an f-gram keeps its own embedding. What the transformer gives can be written to a table for serving
    (`tabulate`), so that its weights and operations are those of training alone.

    Source: SCONE, arXiv 2502.01637, section 3 and algorithms 1 and 2. Their f-grams are pruned before counting, which
    only saves memory.
    """

    fields = {"layers": (0,), "token_map": "raw", "num_heads": 1}

    keys: Tensor

    def __init__(self, config: EngramConfig, table: Table | None = None) -> None:
        super().__init__(config, table)
        hidden = config.hidden_size
        self.register_buffer("keys", torch.full((config.option("num_f_grams"),), _NONE))
        self.places = nn.Embedding(config.orders[-1], hidden)
        self.encoder = nn.ModuleList(
            nn.TransformerEncoderLayer(
                hidden,
                config.option("heads"),
                4 * hidden,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.option("blocks"))
        )
        self.reset_parameters()

    @classmethod
    def check(cls, config: EngramConfig) -> None:
        """Refuse orders with gaps, options that cannot be, and what belongs to other layers."""
        super().check(config)
        if config.orders != tuple(range(2, config.orders[-1] + 1)):
            raise ConfigError(f"f-grams have all orders from 2 on, such as (2, 3, 4, 5), not {config.orders}")
        if min(config.option(name) for name in config.entry.options) < 1 or config.hidden_size % config.option("heads"):
            raise ConfigError(f"options are at least 1, and heads divide hidden_size: {dict(config.layer_options)}")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize the transformer."""
        nn.init.normal_(self.places.weight, std=self.config.projection_std)
        for name, parameter in self.encoder.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=self.config.hidden_size**-0.5)
            else:
                nn.init.constant_(parameter, float("norm" in name and name.endswith("weight")))

    @classmethod
    def count_parameters(cls, config: EngramConfig) -> int:
        """Count the numbers of the transformer and its places; the table for serving is `beside`."""
        cls.check(config)
        hidden = config.hidden_size
        block = 12 * hidden**2 + 13 * hidden  # attention and feed-forward with biases, two norms
        return int(config.orders[-1] * hidden + config.option("blocks") * block)

    @classmethod
    def count_flops(cls, config: EngramConfig) -> int:
        """Count the transformer over an f-gram of the highest order, as if every token had one: an upper bound.

        An f-gram that occurs several times in a batch is computed once.
        """
        hidden, length = config.hidden_size, config.orders[-1]
        return int(config.option("blocks") * length * (24 * hidden**2 + 4 * length * hidden))

    @classmethod
    def count_numbers_read(cls, config: EngramConfig) -> int:
        """Nothing is read from a table in training."""
        return 0

    @staticmethod
    def beside(config: EngramConfig) -> int:
        """Bytes of the table for serving: a key and an embedding in float32 for each f-gram."""
        return int(config.option("num_f_grams") * (_KEY_BYTES + _NUMBER_BYTES * config.hidden_size))

    def prepare(self, spec: HashSpec, tokens: Any) -> None:
        """Count the N-grams of the training text, and keep the keys of the most frequent ones."""
        number = self.config.option("num_f_grams")
        counted = np.asarray(tokens[: self.config.option("counted_tokens")])
        keys, counts = [], []
        for found in frequent_ngrams(spec, counted, num_ngrams=number).values():
            whole = (found.tokens >= 0).all(-1) & (found.counts >= self.config.option("min_count"))
            newest_first = torch.from_numpy(found.tokens[whole][:, ::-1].copy())
            keys.append(f_gram_keys(newest_first)[:, -1])
            counts.append(torch.from_numpy(found.counts[whole]))
        best = torch.cat(counts).argsort(descending=True, stable=True)[:number]
        self.keys.fill_(_NONE)
        self.keys[: len(best)] = torch.cat(keys)[best].sort().values

    def longest(self, tokens: Tensor) -> Tensor:
        """Tokens of the longest f-gram at each position of ``[B, L, N]`` (0 where there is none), int64 ``[B, L]``."""
        known = f_gram_keys(tokens)
        place = torch.searchsorted(self.keys, known).clamp(max=len(self.keys) - 1)
        found = (self.keys[place] == known) & (tokens >= 0)
        found[..., 0] = False  # a token alone is no f-gram
        lengths = torch.arange(1, tokens.shape[-1] + 1, device=tokens.device)
        return (found * lengths).amax(-1)

    def read(self, tokens: Tensor) -> Tensor:
        """Compute the embedding of the longest f-gram at each position, and 1 where there is one: ``[B, L, D + 1]``."""
        if self.embedding is None:
            raise MismatchError("this layer needs the token embedding of a model; build it as part of one")
        lengths = self.longest(tokens)
        places = torch.arange(tokens.shape[-1], device=tokens.device)
        is_part = places < lengths.unsqueeze(-1)
        f_grams, which = tokens.masked_fill(~is_part, -1)[lengths > 0].unique(dim=0, return_inverse=True)
        found = torch.zeros((*lengths.shape, self.config.hidden_size + 1), device=tokens.device)
        if len(f_grams):
            encoded = self.encode(f_grams).float()
            found[lengths > 0] = torch.cat([encoded, torch.ones_like(encoded[:, :1])], dim=-1)[which]
        return found

    def encode(self, f_grams: Tensor) -> Tensor:
        """Compute the embeddings of f-grams ``[F, N]``, newest token first and -1 behind the oldest: ``[F, D]``."""
        assert self.embedding is not None
        # Oldest first and the newest last, so that no token sees what stands for nothing: that comes before it.
        tokens, places = f_grams.flip(-1), self.places.weight.flip(0)
        hidden = self.embedding(tokens.clamp(min=0)) + places
        length = tokens.shape[-1]
        later = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        nothing = (tokens < 0)[:, None, :] & ~torch.eye(length, dtype=torch.bool, device=tokens.device)
        mask = (later | nothing).repeat_interleave(self.config.option("heads"), 0)
        for block in self.encoder:
            hidden = block(hidden, src_mask=mask)
        return hidden[:, -1]

    def tabulate(self, f_grams: Tensor) -> tuple[Tensor, Tensor]:
        """Write the embeddings of f-grams ``[F, N]`` to a table, as for serving: their keys, and rows ``[F, D]``."""
        lengths = (f_grams >= 0).sum(-1)
        keys = f_gram_keys(f_grams).gather(-1, lengths.unsqueeze(-1) - 1)[:, 0]
        with torch.no_grad():
            return keys, self.encode(f_grams)

    def update(self, hidden_states: Tensor, vectors: Tensor) -> Tensor:
        """Return what turns the token embedding into that of the f-gram, where there is one."""
        embedding, is_there = vectors.split([self.config.hidden_size, 1], dim=-1)
        return (embedding.to(hidden_states.dtype) - hidden_states) * is_there.to(hidden_states.dtype)


def f_gram_keys(tokens: Tensor) -> Tensor:
    """Keys of the N-grams of every order, from tokens ``[..., N]``, newest first: int64 ``[..., N]``.

    A polynomial of the tokens in 64 bits: two of a million N-grams share a key once in about 4 · 10⁷ texts.
    """
    key, keys = torch.zeros_like(tokens[..., 0]), []
    for place in range(tokens.shape[-1]):
        key = (key + tokens[..., place] + 2) * _MULTIPLIER
        key = key ^ (key >> 29)
        keys.append(key)
    return torch.stack(keys, dim=-1)
