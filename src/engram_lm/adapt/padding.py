"""Which positions of a forward pass are text, told from whatever kind of attention mask the model is given."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from engram_lm.errors import MismatchError

__all__ = ["real_positions"]

# Dimension key: B batch, L length of this pass, K keys that attention sees.


def real_positions(mask: Any, tokens: Tensor, cache: Cache | None) -> Tensor | None:
    """Find the positions that are not padding, bool ``[B, L]``; None where every position is real.

    ``generate`` hands over ``[B, past + L]`` with a growing cache, but a mask of pairs ``[B, 1, L, K]`` (bool, or
    floating and added) with a static one, or several of them by kind of attention. In those a real position sees
    itself, and padding does not. The cache says which column of a mask of pairs a position has.

    Raises:
        MismatchError: A mask of another kind, or of another size than the tokens ``[B, L]``.
    """
    sliding = None
    if isinstance(mask, Mapping):
        kind = "full_attention" if "full_attention" in mask else next(iter(mask), None)
        sliding, mask = kind != "full_attention", mask.get(kind)
    if mask is None:
        return None
    batch_size, length = tokens.shape
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= length:
        return mask[:, -length:] != 0
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[2] != length:
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise MismatchError(
            f"attention_mask is {found} for tokens {tuple(tokens.shape)}; a model with memory needs "
            "[batch, past + length] with 0 at padding, or a mask of pairs [batch, 1, length, keys]"
        )
    start: Any = mask.shape[-1] - length
    if cache is not None:
        kinds = cache.is_sliding
        layer = kinds.index(sliding) if sliding in kinds else 0
        start = cache.get_seq_length(layer) - cache.get_mask_sizes(length, layer)[1]
    columns = (torch.arange(length, device=mask.device) + start).expand(mask.shape[0], length)
    seen = mask[:, 0].gather(-1, columns.unsqueeze(-1)).squeeze(-1)
    real = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
    return real.expand(batch_size, length)
