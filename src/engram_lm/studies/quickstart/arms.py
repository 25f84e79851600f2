"""The models that the quickstart compares, and what makes the comparison fair."""

import copy
import dataclasses
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from engram_lm.hashing import TokenMap
from engram_lm.memory import EngramConfig
from engram_lm.model import EngramForCausalLM, EngramLMConfig
from engram_lm.planning.sizes import ModelSizes, model_sizes

__all__ = ["Arm", "build_arms", "share_initialization", "widened"]


@dataclasses.dataclass
class Arm:
    """One of the models compared."""

    name: str
    """``memory``, ``twin``, ``random_table`` or ``wide``."""
    title: str
    """For people, in two or three words."""
    about: str
    """What is special about it, in a sentence."""
    model: Any
    """An `EngramForCausalLM`."""
    sizes: ModelSizes
    """What it holds and costs."""


def build_arms(
    tokenizer: PreTrainedTokenizerFast,
    token_map: TokenMap,
    memory: EngramConfig,
    backbone: dict[str, Any],
    *,
    context: int,
    seed: int,
    controls: bool,
) -> dict[str, Arm]:
    """Build the model with memory, its memory-less twin, and the controls.

    The twin's feed-forward is wider, so that both spend the same operations on a token. Weights that two models have in
    common start as the same numbers, and those of the twin's extra width as others.

    Args:
        tokenizer: Tokenizer of all of them.
        token_map: Its canonical tokens.
        memory: Memory of the first.
        backbone: Fields of ``DeepseekV3Config``.
        context: Tokens in a sequence, for the operations that attention takes.
        seed: Decides the initial weights.
        controls: Whether to add the two arms that show what a gain is made of.

    Returns:
        Arms by name, the model with memory first.
    """

    def build(config: EngramLMConfig) -> Any:
        torch.manual_seed(seed)
        return EngramForCausalLM(config)

    def arm(name: str, title: str, about: str, model: Any) -> Arm:
        return Arm(name, title, about, model, model_sizes(model.config, context=context))

    config = EngramLMConfig.for_tokenizer(tokenizer, memory, token_map=token_map, **backbone)
    with_memory = build(config)
    arms = [
        arm("memory", "with memory", f"reads {memory.num_heads_total * len(memory.layers)} rows per token", with_memory)
    ]

    flops = memory.flops_per_token()
    per_width = 6 * config.hidden_size * config.num_hidden_layers
    twin = build(widened(tokenizer, backbone, by=round(flops / per_width)))
    share_initialization(with_memory, twin)
    arms.append(
        arm(
            "twin", "without memory", "its feed-forward is wider, so that it spends the same operations per token", twin
        )
    )
    if controls:
        frozen = copy.deepcopy(with_memory)
        for table in frozen.tables.values():
            table.weight.requires_grad_(False)
        arms.append(arm("random_table", "random table", "the same model, but its table stays as it was drawn", frozen))
        per_width = 3 * config.hidden_size * config.num_hidden_layers
        wide = build(widened(tokenizer, backbone, by=round(memory.num_parameters() / per_width)))
        share_initialization(with_memory, wide)
        arms.append(
            arm("wide", "wide feed-forward", "no memory; the table's bytes went into a wider feed-forward", wide)
        )
    return {one.name: one for one in arms}


def widened(tokenizer: PreTrainedTokenizerFast, backbone: dict[str, Any], *, by: int) -> EngramLMConfig:
    """Configure the memory-less model whose feed-forward is wider by so many channels in every block."""
    width = backbone["intermediate_size"] + by
    return EngramLMConfig.for_tokenizer(tokenizer, None, **{**backbone, "intermediate_size": width})


@torch.no_grad()
def share_initialization(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Start the weights that both models have as the source's; of a larger matrix, the part that the smaller has."""
    ours = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        if name in ours:
            common = tuple(slice(0, min(a, b)) for a, b in zip(ours[name].shape, parameter.shape, strict=True))
            parameter[common] = ours[name][common]
