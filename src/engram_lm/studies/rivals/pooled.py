"""One space of rows for all orders and heads."""

import torch
from torch import Tensor

from engram_lm.memory.layer import EngramLayer
from engram_lm.studies.rivals.addresses import fingerprints, scattered


class PooledLayer(EngramLayer):
    """The paper's layer, in which each head of each order may read any row of the table.

    The orders then take of the table what they need: frequent bigrams share fewer rows with each other, and more with
    trigrams. Source: one space for all orders as in arXiv 2607.29065, with other hashes.
    """

    def read(self, rows: Tensor) -> Tensor:
        """Read rows of the whole table for what the N-grams' own rows ``[B, L, H]`` tell of them."""
        config, num_rows = self.config, self.require_table().num_rows
        ngrams_BLO = fingerprints(rows, config.num_heads)
        heads = [scattered(ngrams_BLO, head) % num_rows for head in range(config.num_heads)]
        return super().read(torch.stack(heads, dim=-1).flatten(-2))
