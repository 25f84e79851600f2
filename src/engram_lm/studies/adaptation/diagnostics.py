"""What a memory does, in numbers: which rows are in use, how many N-grams share them, how far the gates open."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_lm.adapt import MemoryAdapter
from engram_lm.hashing.collisions import row_collisions
from engram_lm.memory.gate_recorder import record_gates
from engram_lm.training.held_out import held_out_loss

__all__ = ["collisions", "gate_statistics", "occupancy"]

_GATE_TOKENS = 16_384
"""Held-out tokens whose gates are looked at."""


def occupancy(adapter: MemoryAdapter, touched: dict[str, Tensor]) -> dict[str, float] | None:
    """Say which share of the rows that each block can read some step has trained.

    Args:
        adapter: The memory.
        touched: By table, 1 for each such row: `TableUse.touched`.

    Returns:
        By block; None where the tables were not trained.
    """
    found = {}
    for block in adapter.spec.blocks:
        table = "shared" if adapter.spec.shared_table else str(block)
        rows = [used for name, used in touched.items() if name.endswith(f"memory_tables.{table}")]
        if not rows:
            return None
        found[str(block)] = float(rows[0].float().mean())
    return found


def collisions(adapter: MemoryAdapter, tokens: np.ndarray) -> dict[str, dict[str, float]]:
    """Count how many distinct N-grams of the domain meet in a row.

    Args:
        adapter: The memory.
        tokens: Of the domain, integers ``[num_sequences, length]``.

    Returns:
        By block: ``num_tokens`` looked at, ``rows_hit``, ``ngrams_per_row`` (mean over the rows hit), ``shared`` (share
        of the rows hit by two N-grams or more) and ``shared_positions`` (share of the reads that go to such a row).
    """
    spec, found = adapter.spec, {}
    for block, layer in zip(spec.blocks, spec.layers, strict=True):
        counted = row_collisions(spec, layer, tokens)
        hit = counted.num_ngrams > 0
        several = counted.num_ngrams > 1
        found[str(block)] = {
            "num_tokens": tokens.size,
            "rows_hit": int(hit.sum()),
            "ngrams_per_row": float(counted.num_ngrams.sum() / max(1, hit.sum())),
            "shared": float(several.sum() / max(1, hit.sum())),
            "shared_positions": float(counted.num_positions[several].sum() / max(1, counted.num_positions.sum())),
        }
    return found


def gate_statistics(
    model: Any, adapter: MemoryAdapter, tokens: np.ndarray, *, length: int, dtype: str
) -> dict[str, dict[str, float]]:
    """Look at the gates on text that was not trained on.

    Args:
        model: The model with the memory.
        adapter: The memory.
        tokens: Held-out tokens ``[num_tokens]``; the first 16,384 are looked at.
        length: Tokens in a sequence.
        dtype: Type of matrix products.

    Returns:
        By block: ``mean``, ``p10``, ``p50``, ``p90`` and ``share_above_half``.
    """
    layers: dict[int, Any] = {int(block): layer for block, layer in adapter.layers.items()}
    gates: dict[int, list[Tensor]] = {block: [] for block in layers}
    with record_gates(layers, lambda block, values: gates[block].append(values.float().cpu().flatten())):
        held_out_loss(model, tokens, length=length, max_tokens=_GATE_TOKENS, dtype=dtype)
    found = {}
    for block, parts in gates.items():
        values = torch.cat(parts)
        low, middle, high = torch.quantile(values, values.new_tensor([0.1, 0.5, 0.9])).tolist()
        found[str(block)] = {
            "mean": float(values.mean()),
            "p10": low,
            "p50": middle,
            "p90": high,
            "share_above_half": float((values > 0.5).float().mean()),
        }
    return found
