"""Codes: all that a row needs to know of a position, in one int64.

A *code* is -1 where the position is dead or lies before the start, and otherwise
``canonical * 4 + end * 2 + start``: ``end`` says that the position ends its segment, ``start`` that its
``position_ids`` start one. Since -1 has every bit set, ``code & 2`` asks "does a look-back stop here?" of both kinds.
"""

# Dimension key: B batch, L length, W context (highest order - 1).

from typing import Any

import numpy as np

from engram_lm.hashing.token_map import is_torch

__all__ = ["look_back"]


def look_back(codes: Any, *, width: int, fill: int, positions: bool) -> list[Any]:
    """Find the canonical tokens that each position sees at every distance, in NumPy or torch.

    Args:
        codes: The codes of what came before and of the positions themselves, int64 ``[B, W + L]``.
        width: The largest distance, W.
        fill: What stands for a token that cannot be seen.
        positions: Whether codes may hold segment starts taken from ``position_ids``.

    Returns:
        For the distances 0, 1, … W: canonical tokens, or the fill, int64 ``[B, L]``.
    """
    if is_torch(codes):
        import torch

        where: Any = torch.where
    else:
        where = np.where
    length = codes.shape[1] - width
    tokens, stops = codes >> 2, (codes[:, :-1] & 2) != 0
    if positions:
        stops = stops | ((codes[:, 1:] & 1) != 0)
    visible = codes[:, width:] >= 0
    seen = [where(visible, tokens[:, width:], fill)]
    for distance in range(1, width + 1):
        before = slice(width - distance, width - distance + length)
        visible = visible & ~stops[:, before]
        seen.append(where(visible, tokens[:, before], fill))
    return seen
