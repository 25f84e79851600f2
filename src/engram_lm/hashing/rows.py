"""Row numbers from codes, fast: in NumPy and in torch, both equal to the loops in `engram_lm.hashing.reference`.

A *code* is all a row needs to know of a position, in one int64: -1 if it is dead (or before the start), otherwise
``canonical * 4 + end * 2 + start``, where ``end`` says that the position ends its segment and ``start`` that its
``position_ids`` start one. Since -1 has every bit set, ``code & 2`` asks "does a look-back stop here?" of both kinds.
"""

# Dimension key: B batch, L length, W context (highest order - 1), G memory layers, O orders, K heads of one, H = O * K.

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engram_lm.hashing.codes import look_back

if TYPE_CHECKING:
    import torch

    from engram_lm.hashing.spec import HashSpec

__all__ = ["numpy_rows", "torch_rows"]


def numpy_rows(spec: "HashSpec", codes: np.ndarray, context: np.ndarray, layers: Sequence[int]) -> list[np.ndarray]:
    """Compute rows in NumPy.

    Args:
        spec: The hash.
        codes: int64 [B, L].
        context: Codes of what came before, int64 [B, W].
        layers: Which layers, as places in ``spec.layers``.

    Returns:
        For each of them, int64 [B, L, H], offsets included.
    """
    sight = _sight(spec, np.concatenate([context, codes], axis=1))
    results = []
    for index in layers:
        primes, offsets = spec.primes[index], spec.offsets_at(index)
        rows_BLH = np.empty((*codes.shape, len(primes)), np.int64)
        for column, (prime, offset) in enumerate(zip(primes, offsets, strict=True)):
            order = spec.orders[column // spec.num_heads]
            if spec.variant == "longcat":
                mix_BL = sum(sight[s] * pow(spec.vocab_size, s, prime) for s in range(order))
            elif column % spec.num_heads == 0:
                # Heads of one order share the mix and differ only in the prime.
                mix_BL = sight[0] * spec.multipliers[index][0]
                for s in range(1, order):
                    mix_BL = mix_BL ^ (sight[s] * spec.multipliers[index][s])
            rows_BLH[..., column] = mix_BL % prime + offset
        results.append(rows_BLH)
    return results


def torch_rows(
    spec: "HashSpec", codes: "torch.Tensor", context: "torch.Tensor", layers: Sequence[int]
) -> list["torch.Tensor"]:
    """Compute rows in torch, on the device of the codes, all layers at once. Nothing waits for the host.

    Args:
        spec: The hash.
        codes: int64 [B, L].
        context: Codes of what came before, int64 [B, W].
        layers: Which layers, as places in ``spec.layers``.

    Returns:
        For each of them, int64 [B, L, H], offsets included, contiguous.

    Cost: one 64-bit remainder per row, which is nearly all of the time. Multiplying by a reciprocal in float64 and
    correcting the result was measured on CPU and loses: its six passes over the rows cost more than the division.
    """
    import torch

    sight = _sight(spec, torch.cat([context, codes], dim=1))
    primes_GOK, offsets_GH, factors = spec.constants(codes.device, tuple(layers))
    mixes: list[torch.Tensor] = []
    if spec.variant == "longcat":
        # Every column has its own powers; all sums stay far below 2**63 (checked by the spec).
        for place, order in enumerate(spec.orders):
            mix_GBLK = sight[0][None, ..., None].expand(len(layers), *codes.shape, spec.num_heads)
            for s in range(1, order):
                mix_GBLK = mix_GBLK + sight[s][None, ..., None] * factors[:, None, None, s, place]
            mixes.append(mix_GBLK)
    else:
        mix_GBL = sight[0][None] * factors[:, None, None, 0]
        distance = 1
        for order in spec.orders:
            # Each order is the one before it and more products; its heads share the mix and differ only in the prime.
            for s in range(distance, order):
                mix_GBL = mix_GBL ^ (sight[s][None] * factors[:, None, None, s])
            distance = order
            mixes.append(mix_GBL[..., None])
    # One division over everything: it takes nearly all the time, so it is one launch on a GPU. Spelling
    # the heads out first, in place of a division that broadcasts, is a quarter faster on CPU (measured).
    mix_GBLOK = torch.stack(mixes, dim=-2).expand(*(-1,) * 4, spec.num_heads)
    rows_GBLH = mix_GBLOK.flatten(-2).remainder(primes_GOK.flatten(1)[:, None, None])
    rows_GBLH += offsets_GH[:, None, None]
    return list(rows_GBLH.unbind(0))


def _sight(spec: "HashSpec", codes: Any) -> list[Any]:
    assert spec.fill is not None
    return look_back(codes, width=spec.context, fill=spec.fill, positions=spec.looks_at_positions)
