"""NGM: means of the last token embeddings, let in by their cosine to the hidden state. It learns nothing of its own."""

import torch
import torch.nn.functional as F
from torch import Tensor

from engram_lm.errors import MismatchError
from engram_lm.memory.config import EngramConfig
from engram_lm.studies.rivals.rival_layer import RivalLayer

# Dimension key: B batch, L length, N tokens that are seen, D hidden, O orders.


class NgramMeanLayer(RivalLayer):
    """Add, for each order n, the mean embedding of the last n tokens, times ``relu`` of its cosine to the hidden state.

    Tokens that cannot be seen are left out of the mean. There is no table and there are no parameters. How the orders
    are put together is not in the abstract; here their terms are averaged.

    Source: NGM, arXiv 2605.16893, by its abstract: causal means of the model's own embeddings, a cosine gate with ReLU.
    """

    fields = {"token_map": "raw"}

    def reset_parameters(self) -> None:
        """There is nothing to initialize."""

    @classmethod
    def count_parameters(cls, config: EngramConfig) -> int:
        """It has none."""
        cls.check(config)
        return 0

    @classmethod
    def count_flops(cls, config: EngramConfig) -> int:
        """Count sums, means, cosines and products."""
        return config.hidden_size * (config.orders[-1] + 9 * len(config.orders))

    @classmethod
    def count_numbers_read(cls, config: EngramConfig) -> int:
        """Nothing is read from a table."""
        return 0

    def read(self, tokens: Tensor) -> Tensor:
        """Average the embeddings of the last tokens ``[B, L, N]`` for each order: ``[B, L, O, D]``."""
        if self.embedding is None:
            raise MismatchError("this layer needs the token embedding of a model; build it as part of one")
        seen = (tokens >= 0).unsqueeze(-1)
        sums = (self.embedding(tokens.clamp(min=0)) * seen).cumsum(-2)
        means = sums / seen.cumsum(-2).clamp(min=1)
        return means[..., [order - 1 for order in self.config.orders], :]

    def update(self, hidden_states: Tensor, vectors: Tensor) -> Tensor:
        """Weigh the means by their cosines."""
        cosine = F.cosine_similarity(hidden_states.unsqueeze(-2).float(), vectors.float(), dim=-1)
        return torch.einsum("blo,blod->bld", cosine.relu().to(vectors.dtype), vectors) / len(self.config.orders)
