"""The models of the study: no memory, one memory module at each depth, and its budget divided between two depths."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from engram_lm.errors import ConfigError
from engram_lm.hashing import TokenMap
from engram_lm.memory import EngramConfig
from engram_lm.model import EngramForCausalLM, EngramLMConfig
from engram_lm.studies.quickstart.arms import share_initialization, widened

__all__ = ["BASELINE", "DepthArm", "build_arm", "default_split", "plan_arms", "table_config"]

BASELINE = "baseline"
"""Name of the model without memory."""


@dataclasses.dataclass(frozen=True)
class DepthArm:
    """One of the models compared."""

    name: str
    """``baseline``, ``block-N`` or ``blocks-N-M``; also its folder."""
    blocks: tuple[int, ...]
    """Blocks that read memory at their start, counted from 0; empty without memory."""

    @property
    def title(self) -> str:
        """For people."""
        if not self.blocks:
            return "no memory"
        return f"memory in block{'s' * (len(self.blocks) > 1)} {' and '.join(map(str, self.blocks))}"


def plan_arms(num_blocks: int, split: tuple[int, ...], *, sweep: bool) -> tuple[DepthArm, ...]:
    """Name the models of the study, the one without memory first.

    Args:
        num_blocks: Transformer blocks of each.
        split: Two blocks that divide the budget between them; none such where empty.
        sweep: Whether to insert memory at every block; at the second one alone, the paper's best, where not.
    """
    blocks = range(num_blocks) if sweep else [min(1, num_blocks - 1)]
    arms = [DepthArm(BASELINE, ()), *(DepthArm(f"block-{block}", (block,)) for block in blocks)]
    if split:
        arms.append(DepthArm(f"blocks-{'-'.join(map(str, split))}", split))
    return tuple(arms)


def default_split(num_blocks: int) -> tuple[int, ...]:
    """The second block and the one before the middle, as layers 2 and 6 of 12 are in the paper; none of two blocks."""
    return (1, max(2, num_blocks // 2 - 1)) if num_blocks > 2 else ()


def table_config(arm: DepthArm, memory: EngramConfig) -> EngramConfig | None:
    """Configure an arm's memory from that of one module.

    Two modules have rows of half the width, and as many of them each, so that the tables of all arms hold as much (but
    for the primes, which differ by some rows) and their projections cost as much.

    Raises:
        ConfigError: The width cannot be halved.
    """
    if not arm.blocks:
        return None
    if memory.memory_dim % (len(arm.blocks) * memory.num_heads_total):
        raise ConfigError(
            f"--memory-dim {memory.memory_dim} is divided among {len(arm.blocks)} modules of {memory.num_heads_total} "
            f"heads; choose a multiple of {len(arm.blocks) * memory.num_heads_total}"
        )
    return dataclasses.replace(memory, layers=arm.blocks, memory_dim=memory.memory_dim // len(arm.blocks))


def build_arm(
    arm: DepthArm,
    memory: EngramConfig,
    backbone: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    token_map: TokenMap,
    *,
    seed: int,
) -> EngramForCausalLM:
    """Build one model with its initial weights.

    What two arms have in common starts as the same numbers: the backbone of all of them, and memory wherever it is
    inserted. The feed-forward of the model without memory is wider by what one module's operations are.

    Args:
        arm: Which model.
        memory: Memory of one module.
        backbone: Fields of ``DeepseekV3Config``.
        tokenizer: Tokenizer of all of them.
        token_map: Its canonical tokens.
        seed: Decides the weights.
    """

    def build(config: EngramLMConfig) -> EngramForCausalLM:
        torch.manual_seed(seed)
        return EngramForCausalLM(config)

    def with_memory(config: EngramConfig) -> EngramForCausalLM:
        return build(EngramLMConfig.for_tokenizer(tokenizer, config, token_map=token_map, **backbone))

    per_width = 6 * backbone["hidden_size"] * backbone["num_hidden_layers"]
    one_module = dataclasses.replace(memory, layers=(0,))
    baseline = build(widened(tokenizer, backbone, by=round(one_module.flops_per_token() / per_width)))
    config = table_config(arm, memory)
    if config is None:
        return baseline
    model = with_memory(config)
    share_initialization(baseline, model)
    if len(arm.blocks) == 1:
        # Its own draw would be another one at every depth, because the blocks before it are drawn first.
        for source, target in zip(_memory(with_memory(one_module)), _memory(model), strict=True):
            share_initialization(source, target)
    return model


def _memory(model: Any) -> Iterator[torch.nn.Module]:
    """The table and the layer of a model with one memory module."""
    (block,) = model.config.memory_config.layers
    yield model.tables[str(block)]
    yield model.model.layers[block].memory
