"""A later stage of training on longer sequences: YaRN stretches the positions that the weights know."""

import dataclasses
import math
from typing import Any

from engram_lm.errors import ConfigError, check_whole
from engram_lm.model import EngramLMConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageOptions:
    """How ``model.weights`` go on with longer sequences than they were trained on: their positions are stretched.

    Source: Peng et al., “YaRN” (arXiv 2309.00071); the defaults are those of the Engram paper, section 5, which takes a
    factor of 10 from 4,096 to 32,768 tokens.
    """

    factor: float | None = None
    """How far positions are stretched (also called s), above 1; None leaves them as they are."""
    original_length: int | None = None
    """Tokens that the weights were trained on in one sequence; where None, what their config.json says."""
    beta_fast: float = 32.0
    """Rotations within the original length from which a frequency is left as it is."""
    beta_slow: float = 1.0
    """Rotations within it up to which a frequency is divided by the whole factor; above 0."""
    mscale: float = 0.707
    """How much sharper attention becomes: its scores are multiplied by (0.1 · mscale · ln factor + 1)²; above 0.
    DeepSeek-V3 has 1. Written as ``mscale`` and as ``mscale_all_dim``, as DeepSeek-V3 does."""

    def __post_init__(self) -> None:
        if self.factor is not None and not 1 < self.factor < math.inf:
            raise ConfigError(f"factor is a finite number above 1, not {self.factor}")
        check_whole(original_length=self.original_length)
        if not 0 < self.beta_slow < self.beta_fast < math.inf:
            raise ConfigError(
                f"beta_slow is above 0 and below beta_fast, not {self.beta_slow} and {self.beta_fast}: slow rotations "
                "are stretched, fast ones stay"
            )
        if not 0 < self.mscale < math.inf:
            raise ConfigError(f"mscale is a finite number above 0, not {self.mscale}")
        others = (field for field in dataclasses.fields(self) if getattr(self, field.name) != field.default)
        if self.factor is None and any(others):
            raise ConfigError("set factor, or the rest of [stage] changes nothing")

    def apply(self, config: EngramLMConfig, *, sequence_length: int) -> None:
        """Change the configuration of the weights in place, if there is a factor.

        The longest position becomes ``sequence_length``, unless the weights know a longer one.

        Raises:
            ConfigError: The sequences are longer than the factor reaches.
        """
        if self.factor is None:
            return
        before: dict[str, Any] = dict(config.rope_parameters or {})
        original = self.original_length or before.get("original_max_position_embeddings")
        original = original or config.max_position_embeddings
        if sequence_length > self.factor * original:
            raise ConfigError(
                f"data.sequence_length {sequence_length} is more than stage.factor {self.factor:g} times the "
                f"{original} tokens that the weights were trained on; take a factor of "
                f"{math.ceil(sequence_length / original)} or more, or shorter sequences"
            )
        config.rope_parameters = {
            "rope_type": "yarn",
            "rope_theta": before.get("rope_theta", 10000.0),
            "factor": float(self.factor),
            "original_max_position_embeddings": original,
            "beta_fast": self.beta_fast,
            "beta_slow": self.beta_slow,
            "mscale": self.mscale,
            "mscale_all_dim": self.mscale,
        }
        config.max_position_embeddings = max(config.max_position_embeddings, sequence_length)
