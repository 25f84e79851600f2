"""Where a look-back must stop: the ends of documents, and tokens that are no text."""

import dataclasses

from engram_lm.errors import ConfigError

__all__ = ["Segments"]


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
