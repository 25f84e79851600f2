"""Learning rate over the steps of a run: a pure function of the step."""

import dataclasses
import itertools
import math
from typing import Literal

from engram_lm.errors import ConfigError

_KINDS = ("cosine", "step", "wsd", "constant")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """How the learning rate changes during training. All kinds begin with a linear warm-up."""

    kind: Literal["cosine", "step", "wsd", "constant"] = "cosine"
    """``"cosine"``: half a cosine from 1 to ``final``. ``"step"``: 1, then ``step_factors`` from ``step_at`` on (paper,
    Table 5, which says step decay as in DeepSeek-LLM; factors and places from the mHC paper's model of the same size).
    ``"wsd"``: 1, then a fall to ``final`` over the last ``decay`` (warm-up, stable, decay). ``"constant"``: 1."""
    warmup: float = 0.05
    """Steps over which the rate rises: below 1 a share of all steps, from 1 on their number (mHC paper: 2000)."""
    final: float = 0.1
    """Factor at the end, in [0, 1], of ``"cosine"`` and ``"wsd"``."""
    step_at: tuple[float, ...] = (0.8, 0.9)
    """Shares of the steps, ascending, at which ``"step"`` falls."""
    step_factors: tuple[float, ...] = (0.316, 0.1)
    """Factor from each of ``step_at`` on, in (0, 1]."""
    decay: float = 0.2
    """Steps over which ``"wsd"`` falls at the end: below 1 a share of all steps, from 1 on their number."""
    decay_shape: Literal["linear", "sqrt"] = "linear"
    """Shape of the fall of ``"wsd"``, where p is the progress: ``1 - p``, or ``1 - sqrt(p)`` (arXiv 2405.18392)."""

    def __post_init__(self) -> None:
        # Written so that NaN is refused too.
        if self.kind not in _KINDS:
            raise ConfigError(f"a schedule's kind must be one of {', '.join(_KINDS)}, not {self.kind!r}")
        if self.decay_shape not in ("linear", "sqrt"):
            raise ConfigError(f"decay_shape must be 'linear' or 'sqrt', not {self.decay_shape!r}")
        if not (0 <= self.warmup < math.inf and 0 <= self.decay < math.inf and 0 <= self.final <= 1):
            raise ConfigError(
                f"a schedule needs warmup >= 0, decay >= 0 and final in [0, 1], not {self.warmup}, {self.decay} and "
                f"{self.final}"
            )
        for name in ("warmup", "decay"):
            value = getattr(self, name)
            if value >= 1 and value != int(value):
                raise ConfigError(f"{name} is a share below 1 or a whole number of steps, not {value}")
        ascending = all(a < b for a, b in itertools.pairwise(self.step_at))
        if not (
            len(self.step_at) == len(self.step_factors)
            and ascending
            and all(0 <= share <= 1 for share in self.step_at)
            and all(0 < factor <= 1 for factor in self.step_factors)
        ):
            raise ConfigError(
                f"step_at must be ascending shares in [0, 1] with one of step_factors in (0, 1] each, not "
                f"{self.step_at} and {self.step_factors}"
            )


def learning_rate_factor(step: int, num_steps: int, options: ScheduleOptions | None = None) -> float:
    """Compute the factor of the peak learning rate in a step.

    It is in (0, 1]. The first step, 0, already moves: the warm-up rises from ``1 / warm-up steps`` to 1 in its last
    step. Steps beyond the run have the factor of its last step.

    Raises:
        ConfigError: ``step`` is negative, or ``num_steps`` is less than 1.
    """
    options = options or ScheduleOptions()
    if step < 0 or num_steps < 1:
        raise ConfigError(f"a schedule needs step >= 0 and num_steps >= 1, not {step} and {num_steps}")
    step = min(step, num_steps - 1)
    warmup_steps = max(1, _steps(options.warmup, num_steps))
    rise = min(1.0, (step + 1) / warmup_steps)
    if options.kind == "constant":
        return rise
    if options.kind == "step":
        # The fall is counted from the run's first step, warm-up included.
        falls = zip(options.step_at, options.step_factors, strict=True)
        passed = [1.0, *(factor for share, factor in falls if step >= share * num_steps)]
        return rise * passed[-1]
    if options.kind == "cosine":
        if rise < 1:
            return rise
        progress = max(0, step - warmup_steps) / max(1, num_steps - warmup_steps)
        return options.final + (1 - options.final) * 0.5 * (1 + math.cos(math.pi * progress))
    decay_steps = _steps(options.decay, num_steps)
    # The last step comes one before the end of the fall, so that it still moves in a fall to 0.
    progress = max(0, step - (num_steps - decay_steps)) / max(1, decay_steps)
    fall = 1 - (math.sqrt(progress) if options.decay_shape == "sqrt" else progress)
    return rise * (options.final + (1 - options.final) * fall)


def _steps(amount: float, num_steps: int) -> int:
    """Number of steps that an amount means: a share of them below 1."""
    return round(amount * num_steps) if amount < 1 else int(amount)
