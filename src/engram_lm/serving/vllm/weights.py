"""From our checkpoint to the modules of vLLM: names are ours, but vLLM keeps some products of matrices as one."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import fused_moe_make_expert_params_mapping
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from engram_lm.errors import CheckpointError
from engram_lm.model.table_place import TABLES

# Dimension key: E experts, I intermediate, D hidden.

_EXPERTS = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)$")
_HALVES = {"gate_proj": 0, "up_proj": 1}


def is_table(name: str) -> bool:
    """Whether a tensor of the checkpoint is a memory table, which is opened where it lies."""
    return TABLES in name.split(".")


def load_parameters(model: nn.Module, weights: Iterable[tuple[str, Tensor]], *, num_experts: int) -> set[str]:
    """Fill a model's parameters from tensors named as in our checkpoints.

    Args:
        model: The model.
        weights: Name and tensor, tables and token map left out.
        num_experts: Routed experts of a mixture; 0 where there is none.

    Returns:
        Names of the parameters that were filled.

    Raises:
        CheckpointError: The model has no such parameter.
    """
    parameters = dict(model.named_parameters())
    places: dict[tuple[str, int], list[tuple[str, str]]] = {}
    if num_experts:
        mapping = fused_moe_make_expert_params_mapping(model, "gate_proj", "down_proj", "up_proj", num_experts)
        for parameter, weight, expert, shard in mapping:
            kind = weight.split(".")[-2]
            places.setdefault((kind, expert), []).append((parameter, shard))
    loaded = set()
    load: Any
    for name, weight in weights:
        match = _EXPERTS.match(name)
        if match:
            for kind, expert, part in _each_expert(match[2], weight):
                for parameter, shard in places[kind, expert]:
                    target = f"{match[1].removesuffix('experts')}{parameter}weight"
                    load = getattr(parameters[target], "weight_loader")  # noqa: B009 - parameters of vLLM have one
                    load(parameters[target], part, target, shard_id=shard, expert_id=expert)
                    loaded.add(target)
            continue
        *path, last, kind = name.split(".")
        half = _HALVES.get(last)
        target = name if half is None else ".".join([*path, "gate_up_proj", kind])
        if target not in parameters:
            raise CheckpointError(
                f"the checkpoint holds {name}, and the model that its configuration describes does not"
            )
        load = getattr(parameters[target], "weight_loader", default_weight_loader)
        load(parameters[target], weight, *([] if half is None else [half]))
        loaded.add(target)
    return loaded


def _each_expert(kind: str, weight: Tensor) -> Iterator[tuple[str, int, Tensor]]:
    """Take the stacked weights of all experts apart: ``[E, 2 I, D]`` or ``[E, D, I]``."""
    for expert, matrix in enumerate(weight):
        if kind == "down_proj":
            yield kind, expert, matrix
        else:
            gate, up = matrix.chunk(2)
            yield "gate_proj", expert, gate
            yield "up_proj", expert, up
