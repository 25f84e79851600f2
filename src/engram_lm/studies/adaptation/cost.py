"""What rank of LoRA costs as much as a memory."""

from typing import Any

from engram_lm.memory import EngramConfig

__all__ = ["matched_rank"]


def matched_rank(model: Any, targets: list[str], memory: EngramConfig) -> int:
    """Choose the LoRA rank whose matrices hold as many weights, and so cost as many operations, as the memory's.

    Args:
        model: The base model.
        targets: Names of the matrices that get low-rank ones, from `lora_targets`.
        memory: Geometry of the memory; its tables are read and not multiplied, so they count as none.

    Returns:
        The nearest whole rank, at least 1.
    """
    per_rank = sum(sum(model.get_submodule(name).weight.shape) for name in targets)
    wanted = len(memory.layers) * memory.memory_dim * (memory.num_streams + 1) * memory.hidden_size
    return max(1, round(wanted / per_rank))
