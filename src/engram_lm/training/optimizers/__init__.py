"""Optimizers: Muon or AdamW for the backbone, row optimizers for tables, one object around both.

Reading order: ``options.py`` (what a recipe says), ``exact_state.py`` (what all of ours share), ``rows.py`` (what all
row optimizers share, and Adam on touched rows), ``row_wise.py`` (one second moment per row), ``sinkhorn.py`` (the
balanced momentum of DeepSeek-V4.1), ``muon.py`` (matrices), ``groups.py`` (which parameter is trained how),
``combined.py`` (all of them as one optimizer, by the names of a recipe), ``clipping.py`` (the global norm).
"""

from engram_lm.training.optimizers.clipping import clip_gradients
from engram_lm.training.optimizers.combined import CombinedOptimizer, build_optimizer
from engram_lm.training.optimizers.groups import (
    SortedParameters,
    is_trainable_table,
    plain_name,
    sort_parameters,
)
from engram_lm.training.optimizers.muon import Muon, orthogonalize
from engram_lm.training.optimizers.options import OptimizerOptions
from engram_lm.training.optimizers.row_wise import RowWiseAdagrad, RowWiseAdam
from engram_lm.training.optimizers.rows import RowAdam, RowOptimizer, merge_rows
from engram_lm.training.optimizers.sinkhorn import SinkhornMomentum

__all__ = [
    "CombinedOptimizer",
    "Muon",
    "OptimizerOptions",
    "RowAdam",
    "RowOptimizer",
    "RowWiseAdagrad",
    "RowWiseAdam",
    "SinkhornMomentum",
    "SortedParameters",
    "build_optimizer",
    "clip_gradients",
    "is_trainable_table",
    "merge_rows",
    "orthogonalize",
    "plain_name",
    "sort_parameters",
]
