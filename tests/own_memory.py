"""A memory with trainable tables that was not read from anywhere."""

import torch

from engram_lm.hashing import HashSpec, Segments, TokenMap
from engram_lm.memory import EngramConfig, EngramLayer, PublishedMemory
from engram_lm.tables import ParameterTable


def own_memory(variant, spec_changes=None, *, rows_per_head=60, **options):
    qwen = variant == "qwen_ple"
    config = EngramConfig(**{
        "hidden_size": 32, "layers": (0, 2), "num_streams": 2, "orders": (2, 3), "num_heads": 2, "memory_dim": 128,
        "rows_per_head": rows_per_head, "kernel_size": 4 if qwen else 0,
        "norm_weight": "zero_centered" if qwen else "plain",
    } | options)  # fmt: skip
    spec = HashSpec.build(**{
        "token_map": TokenMap.identity(50), "layers": (1, 3) if qwen else (0, 2), "orders": config.orders, "heads": 2,
        "rows_per_head": rows_per_head, "pad_token_id": 7, "variant": variant,
        "segments": Segments(end_tokens=(7,)) if qwen else Segments(),
    } | (spec_changes or {}))  # fmt: skip
    tables = [ParameterTable(rows, config.head_dim) for rows in spec.padded_rows]
    layers = {block: EngramLayer(config, table) for block, table in zip((0, 2), tables)}
    with torch.no_grad():
        for layer in layers.values():
            for parameter in layer.parameters():
                parameter.normal_()
    return PublishedMemory(variant, config, spec, layers)
