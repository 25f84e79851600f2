"""Latent attention whose values are changed by memory, for the layers that write there."""

from typing import Any

from torch import Tensor, cat
from transformers.cache_utils import Cache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from engram_lm.model.cache import CACHE_NAME

# Dimension key: B batch, L length, P positions so far, H heads of attention, V width of a head's value, R latent width.


class ValueAttention(DeepseekV3Attention):
    """Multi-head latent attention that adds something to the value of every position, and keeps it in the cache.

    A cache holds latents, from which keys and values are made anew in every step. What is added to values stands beside
    the latents there, ``H * V`` numbers for each position.

    Source: value embeddings, KellerJordan/modded-nanogpt; with N-grams X-gram, arXiv 2604.21724.
    """

    def forward(self, *args: Any, values: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Attend; ``values`` are added to those of the positions, ``[B, L, H * V]``, and the rest is as usual."""
        kwargs[CACHE_NAME] = _Beside(values, kwargs.get(CACHE_NAME))
        result: tuple[Tensor, Tensor | None] = super().forward(*args, **kwargs)
        return result

    def expand_kv(self, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        """Make keys and values of latents that have the added values beside them, ``[B, 1, P, R + H * V]``."""
        latents, added = kv_nope.split([self.kv_lora_rank, self.num_heads * self.v_head_dim], dim=-1)
        keys_BHPK, values_BHPV = super().expand_kv(latents, k_rot)
        return keys_BHPK, values_BHPV + added.squeeze(1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class _Beside:
    """The cache of one call, or none, which puts values beside the latents that the call keeps."""

    def __init__(self, values: Tensor, cache: Cache | None) -> None:
        self.values, self.cache = values, cache

    def update(self, latents: Tensor, rotated: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # In the latents' type, which autocast may have lowered.
        beside = cat([latents, self.values.unsqueeze(1).to(latents)], dim=-1)
        if self.cache is None:
            return beside, rotated
        result: tuple[Tensor, Tensor] = self.cache.update(beside, rotated, *args, **kwargs)
        return result
