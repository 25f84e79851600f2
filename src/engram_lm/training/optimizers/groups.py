"""Sorts parameters by how they are trained, which the class of their module decides."""

import dataclasses

from torch import nn
from torch.nn.modules.conv import _ConvNd

from engram_lm.memory.layer import EngramLayer
from engram_lm.model.experts import Router
from engram_lm.model.streams import StreamHead, StreamMixer
from engram_lm.tables import Table
from engram_lm.tables.tiers.sharded import ShardedTable

# Parts that wrappers put into names: torch.compile, activation checkpointing, FSDP.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


@dataclasses.dataclass(frozen=True)
class SortedParameters:
    """A model's trainable parameters by how they are trained, each under its name without what wrappers add to it."""

    matrices: dict[str, nn.Parameter]
    """Matrices ``[out, in]`` of hidden layers and stacks of them ``[n, out, in]``, for Muon."""
    decayed: dict[str, nn.Parameter]
    """Other parameters of two or more dimensions: the output head, routers, stream mixers, convolution kernels."""
    plain: dict[str, nn.Parameter]
    """Without weight decay: norms, biases, embeddings, and the memory's convolution."""
    tables: dict[str, nn.Parameter]
    """Memory tables whose gradients are sparse."""
    dense_tables: dict[str, nn.Parameter]
    """Memory tables made with ``gradient="dense"``."""
    num_sharded: int
    """Number of tables, of both kinds, of which this process has only some rows."""


def is_trainable_table(module: nn.Module) -> bool:
    """Whether a module is a trainable table. Its class decides, because a mark would be lost in a copy."""
    return isinstance(module, Table) and isinstance(module, nn.Module) and hasattr(module, "weight")


def plain_name(name: str) -> str:
    """Remove from a parameter's name what wrappers add to it, except the prefix of DistributedDataParallel."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def sort_parameters(model: nn.Module) -> SortedParameters:
    """Sort any model's trainable parameters by how they are trained. Tied ones count once, by their first name."""
    while isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module
    plain: set[int] = set()
    decayed: set[int] = set()
    tables: set[int] = set()
    dense_tables: set[int] = set()
    num_sharded = 0
    for module in model.modules():
        own = {id(parameter) for parameter in module.parameters(recurse=False)}
        if is_trainable_table(module):
            (tables if getattr(module, "gradient", "sparse") == "sparse" else dense_tables).update(own)
            num_sharded += isinstance(module, ShardedTable)
        elif isinstance(module, EngramLayer | nn.Embedding):
            plain |= own  # norms of several streams and the convolution are 2-D but not matrices
        elif isinstance(module, Router | StreamMixer | StreamHead | _ConvNd):
            decayed |= own
        head = getattr(module, "get_output_embeddings", None)
        head = head() if callable(head) else None
        if isinstance(head, nn.Module):
            decayed |= {id(parameter) for parameter in head.parameters(recurse=False)}
    found: dict[str, dict[str, nn.Parameter]] = {
        field.name: {} for field in dataclasses.fields(SortedParameters) if field.name != "num_sharded"
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in tables:
            kind = "tables"
        elif id(parameter) in dense_tables:
            kind = "dense_tables"
        elif parameter.dim() < 2 or id(parameter) in plain or name.endswith(("_norm", "conv_weight")):
            kind = "plain"
        elif id(parameter) in decayed or parameter.dim() > 3 or min(parameter.shape[-2:]) < 2:
            kind = "decayed"
        else:
            kind = "matrices"
        found[kind][plain_name(name)] = parameter
    return SortedParameters(**found, num_sharded=num_sharded)
