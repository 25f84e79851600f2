"""What ``engram-lm analyze`` looks at, how much of the text it reads, and how much memory it may use."""

import dataclasses

from engram_lm.analysis.registry import PARTS
from engram_lm.errors import ConfigError
from engram_lm.evaluation.tasks import TaskItem

__all__ = ["AnalyzeOptions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalyzeOptions:
    """The choices that all parts of an analysis share."""

    parts: tuple[str, ...] = tuple(PARTS)
    """What to look at: names of `PARTS`."""
    length: int | None = None
    """Tokens that a model sees at once, at least 1; None means what the models were trained with, at most 512."""
    max_tokens: int | None = None
    """Tokens to read, from the start of the text, at least 1; None means all of them."""
    suppression_tokens: int = 16_384
    """Tokens of the text that go through the suppressed models, once for each way of suppressing; at least 1."""
    budget_bytes: int = 1 << 30
    """Bytes that may be kept at once: half for hidden states and predictions of the models (see `read_text`), a quarter
    for counts of N-grams, and a quarter for counts of rows. What a forward pass itself needs comes on top."""
    batch_size: int = 16
    """Windows of the text that are read at once, at most; at least 1."""
    items: tuple[TaskItem, ...] = ()
    """Questions to ask the suppressed models, besides measuring their loss."""

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            what = f"{unknown[0]!r} is not one of them" if unknown else "name at least one"
            raise ConfigError(f"the parts of an analysis are {', '.join(PARTS)}; {what}")
        for name in ("length", "max_tokens", "suppression_tokens", "budget_bytes", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")

    @property
    def window_bytes(self) -> int:
        """Bytes for what is kept of the windows that are read at once: half of the budget."""
        return max(1, self.budget_bytes // 2)

    @property
    def count_bytes(self) -> int:
        """Bytes for counts of N-grams, and again for counts of rows: a quarter of the budget each."""
        return max(1, self.budget_bytes // 4)
