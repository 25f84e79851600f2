"""How many windows of a text fit into a budget of bytes."""

from collections.abc import Sequence

from engram_lm.analysis.gates.scores import score_bytes_per_token
from engram_lm.analysis.protocol import Analysis
from engram_lm.analysis.subject import Subject
from engram_lm.errors import ConfigError

__all__ = ["bytes_needed", "bytes_per_token", "choose_batch_size"]


def bytes_per_token(subjects: Sequence[Subject], analyses: Sequence[Analysis]) -> int:
    """Return the bytes for each token of the windows read at once: what is kept of every model, and scratch."""
    wants = frozenset[str]().union(*(analysis.wants for analysis in analyses))
    kept, splitting = 0, 0
    for subject in subjects:
        size = subject.dtype.itemsize
        if wants & {"hidden", "predict"}:
            kept += (subject.num_layers + 1) * subject.num_streams * subject.hidden_size * size
        if wants & {"logits", "predict"}:
            kept += subject.vocab_size * size
        if "predict" in wants:
            # The check of the first windows predicts once more, one window at a time.
            splitting = max(splitting, 2 * subject.vocab_size * size)
        for memory in subject.memories.values():
            config = memory.config
            kept += 8 * config.num_heads_total + 4 * config.num_streams
            if "order_scores" in wants:
                kept += 4 * config.num_streams * (len(config.orders) + 1)
                splitting = max(splitting, score_bytes_per_token(memory))
    scratch = (analysis.scratch_bytes_per_token(subjects) for analysis in analyses)
    return kept + max(splitting, *scratch, 0)


def bytes_needed(subjects: Sequence[Subject], analyses: Sequence[Analysis], num_tokens: int) -> int:
    """Return the bytes that windows of some tokens together need, with what does not depend on their number."""
    held = sum(analysis.held_bytes(subjects) for analysis in analyses)
    return num_tokens * bytes_per_token(subjects, analyses) + held


def choose_batch_size(
    subjects: Sequence[Subject], analyses: Sequence[Analysis], *, length: int, budget_bytes: int
) -> int:
    """Find how many windows fit into a budget.

    Raises:
        ConfigError: Not even one window fits.
    """
    each = max(1, bytes_per_token(subjects, analyses))
    left = budget_bytes - bytes_needed(subjects, analyses, 0)
    if left < each * length:
        shorter = f"a length of at most {left // each}, " if left >= each else ""
        raise ConfigError(
            f"one window of {length} tokens needs {each * length + budget_bytes - left:,} bytes for what the analyses "
            f"want to see, and the budget is {budget_bytes:,}; choose {shorter}a larger budget, or fewer analyses or "
            "models at a time"
        )
    return left // (each * length)
