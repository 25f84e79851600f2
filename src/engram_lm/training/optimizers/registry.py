"""The optimizers of tables, by the name that a recipe gives them."""

from engram_lm.planning.shape import TableOptimizer
from engram_lm.training.optimizers.row_wise import RowWiseAdagrad, RowWiseAdam
from engram_lm.training.optimizers.rows import RowAdam, RowOptimizer
from engram_lm.training.optimizers.sinkhorn import SinkhornMomentum

__all__ = ["TABLE_OPTIMIZERS"]

TABLE_OPTIMIZERS: dict[TableOptimizer, type[RowOptimizer]] = {
    "row_adam": RowAdam,
    "row_wise_adam": RowWiseAdam,
    "row_wise_adagrad": RowWiseAdagrad,
    "sinkhorn": SinkhornMomentum,
}
"""By name. What each keeps for a row is in `engram_lm.planning.shape.TABLE_STATE_BYTES`, under the same names."""
