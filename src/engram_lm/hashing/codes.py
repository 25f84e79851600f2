"""Codes: all that a row needs to know of a position, in one int64.

A *code* is -1 where the position is dead or lies before the start, and otherwise
``canonical * 4 + end * 2 + start``: ``end`` says that the position ends its segment, ``start`` that its
``position_ids`` start one. Since -1 has every bit set, ``code & 2`` asks "does a look-back stop here?" of both kinds.
"""

# Dimension key: B batch, L length, W context (highest order - 1).

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from engram_lm.errors import ConfigError, MismatchError, TokenError
from engram_lm.hashing.token_map import TokenMap, is_torch, on_device


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segments:
    """The rule that says which earlier tokens an N-gram may see.

    From position t, the token at distance s is visible if none of the positions t-s..t is dead, no break lies between
    t-s and t, and t-s is not before the start. Once blocked, everything older is blocked too. An invisible token reads
    as the spec's fill, so a dead token's own N-gram is made of fills alone.

    Besides the tokens listed here, every position whose ``attention_mask`` is 0 is dead.

    Source: deepseek-ai/DeepSeek-V4.1-Flash ``inference/engram.py`` (dead tokens, latching); transformers
    ``models/qwen4_exp/modeling_qwen4_exp.py`` and meituan-longcat/LongCat-Flash-Lite modeling code (end tokens).
    """

    end_tokens: tuple[int, ...] = ()
    """Raw ids after which a new segment starts. The token itself belongs to the segment it ends."""
    dead_tokens: tuple[int, ...] = ()
    """Raw ids that stand for something other than text, such as image placeholders."""
    positions: bool = False
    """Also start a segment where ``position_ids`` do not increase, as in packed rows. The first position of a chunk has
    nothing to compare with and starts a segment if its position is 0."""

    def __post_init__(self) -> None:
        for name in ("end_tokens", "dead_tokens"):
            tokens = getattr(self, name)
            if not isinstance(tokens, tuple) or not all(type(token) is int and token >= 0 for token in tokens):
                raise ConfigError(f"Segments.{name} is a tuple of raw token ids (integers from 0), got {tokens!r}")
        if not isinstance(self.positions, bool):
            raise ConfigError(f"Segments.positions is True or False, got {self.positions!r}")


class Encoder:
    """Turns raw tokens into codes: one look-up applies the token map and the rules about segments."""

    def __init__(self, token_map: TokenMap, segments: Segments):
        self.token_map, self.segments = token_map, segments
        # The last entry is for ids outside the vocabulary.
        table = np.append(np.where(token_map.canonical < 0, -1, token_map.canonical * 4), -1)
        table[list(segments.end_tokens)] |= 2
        table[list(segments.dead_tokens)] = -1
        self._table = table
        self._tensors: dict[Any, Any] = {}

    def encode(self, tokens: Any, attention_mask: Any = None, position_ids: Any = None) -> Any:
        """Check tokens and turn them into codes; see `HashSpec.encode`."""
        tokens = self.token_map.check(tokens)
        if tokens.ndim != 2:
            raise TokenError(f"tokens are [batch, length], got the shape {list(tokens.shape)}")
        mask = _beside(tokens, attention_mask, "attention_mask")
        positions = _beside(tokens, position_ids if self.segments.positions else None, "position_ids")
        return self._codes(tokens, mask, positions)

    def encode_unchecked(self, tokens: Any, attention_mask: Any = None, position_ids: Any = None) -> Any:
        """Turn tokens into codes without checks; see `HashSpec.encode_unchecked`."""
        num_tokens = self.token_map.num_tokens
        known = (tokens >= 0) & (tokens < num_tokens)
        tokens = module_of(tokens).where(known, tokens, num_tokens)
        return self._codes(tokens, attention_mask, position_ids if self.segments.positions else None)

    def _codes(self, tokens: Any, mask: Any, positions: Any) -> Any:
        module = module_of(tokens)
        table = on_device(self._tensors, "codes", self._table, tokens.device) if is_torch(tokens) else self._table
        codes = table[tokens]
        if positions is not None:
            starts = module.concatenate([positions[:, :1] == 0, positions[:, 1:] <= positions[:, :-1]], 1)
            codes = module.where(codes < 0, codes, codes | starts)
        return codes if mask is None else module.where(mask == 0, -1, codes)


def look_back(codes: Any, context: Any = None, *, width: int, fill: int, positions: bool) -> list[Any]:
    """Find the canonical tokens that each position sees at the distances 0, 1, … ``width``, in NumPy or torch.

    Takes codes ``[B, L]`` and the codes before them ``[B, W]`` (None at the start of a text), int64. Each result is
    int64 ``[B, L]`` and holds ``fill`` where nothing can be seen. ``positions`` tells whether codes may hold starts of
    segments taken from ``position_ids``.
    """
    where, length = module_of(codes).where, codes.shape[1]
    codes = _joined(codes, context, width)
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


def encode_reference(
    token_map: TokenMap,
    segments: Segments,
    tokens: Sequence[int],
    attention_mask: Sequence[int] | None = None,
    position_ids: Sequence[int] | None = None,
) -> tuple[list[int | None], list[bool]]:
    """Map raw tokens to canonical tokens (None where dead) and tell where a segment starts, in plain Python."""
    canonical: list[int | None] = []
    starts = []
    for t, token in enumerate(tokens):
        dead = token in segments.dead_tokens or (attention_mask is not None and attention_mask[t] == 0)
        canonical.append(None if dead else int(token_map.canonical[token]))
        starts_here = t > 0 and tokens[t - 1] in segments.end_tokens
        if segments.positions and position_ids is not None:
            starts_here |= position_ids[t] == 0 if t == 0 else position_ids[t] <= position_ids[t - 1]
        starts.append(starts_here)
    return canonical, starts


def look_back_reference(tokens: Sequence[int | None], starts: Sequence[bool], t: int, distance: int, fill: int) -> int:
    """Return what position ``t`` sees ``distance`` tokens back, in plain Python: a canonical token, or the fill."""
    for s in range(distance + 1):
        if t - s < 0 or tokens[t - s] is None:
            return fill
        if s > 0 and starts[t - s + 1]:
            return fill
    token = tokens[t - distance]
    assert token is not None
    return token


def _joined(codes: Any, context: Any, width: int) -> Any:
    """Put the context, brought to the kind and device of the codes, before them; int64 [B, W + L]."""
    if is_torch(codes):
        import torch

        if context is None:
            context = codes.new_full((len(codes), width), -1)
        return torch.cat([torch.as_tensor(context).to(codes.device), codes], dim=1)
    if context is None:
        context = np.full((len(codes), width), -1, np.int64)
    return np.concatenate([context.cpu().numpy() if is_torch(context) else context, codes], axis=1)


def module_of(values: Any) -> Any:
    """The array library of some values: torch or NumPy, which name `where` and `concatenate` alike."""
    if is_torch(values):
        import torch

        return torch
    return np


def _beside(tokens: Any, values: Any, name: str) -> Any:
    """Bring a mask or positions to the kind, device and shape of the tokens."""
    if values is None:
        return None
    if is_torch(tokens):
        import torch

        values = torch.as_tensor(values, device=tokens.device)
    else:
        values = values.cpu().numpy() if is_torch(values) else np.asarray(values)
    if values.shape == tokens.shape or (values.ndim == 2 and values.shape == (1, tokens.shape[1])):
        return values
    raise MismatchError(
        f"{name} has the shape {list(values.shape)}, the tokens {list(tokens.shape)}; "
        "pass the part that belongs to these tokens"
    )
