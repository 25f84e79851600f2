"""Maps of how alike layers are, and which layer of one model answers to which of another."""

import dataclasses
from typing import Any

import numpy as np

from engram_lm.analysis.plain_values import plain
from engram_lm.errors import ConfigError

__all__ = ["CkaFindings", "CkaMap", "soft_alignment"]

# Dimension key: R entries (1 + layers) of the model in the rows, C of the one in the columns.


def soft_alignment(similarity: np.ndarray, top_k: int = 5) -> np.ndarray:
    """Find for each column the depth in the rows that it is most alike to: the centroid of its most similar rows.

    With k rows no centroid lies closer to an end than (k - 1) / 2, so near the first and the last layer the index
    cannot follow: it saturates by construction. `CkaMap.gain` compares with what the rows' own model gets.

    Args:
        similarity: ``[R, C]``; negative values (an unbiased estimate may be) count as 0.
        top_k: Rows that count; all of them where there are fewer.

    Returns:
        Float64 ``[C]``, in rows; NaN where a column has a NaN or nothing above 0.

    Raises:
        ConfigError: ``top_k`` is below 1.

    Source: paper, Eq. 9, with k = 5.
    """
    if top_k < 1:
        raise ConfigError(f"top_k is how many rows count, at least 1, not {top_k}")
    best = np.argsort(-similarity, axis=0, kind="stable")[:top_k]
    weights = np.maximum(np.take_along_axis(similarity, best, 0), 0)
    totals = weights.sum(0)
    good = np.isfinite(similarity).all(0) & (totals > 0)
    return np.divide((weights * best).sum(0), totals, out=np.full(similarity.shape[1], np.nan), where=good)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class CkaMap:
    """CKA between all layers of two models.

    Axes R and C have an entry more than the models have layers: entry 0 is what enters the first layer (the token
    embedding, before any memory), entry e the output of the e-th layer; so places are layers that lie behind. The
    paper's "layer j", counted from 0, is entry j + 1.
    """

    row_model: str
    """The baseline, axis R."""
    column_model: str
    """The model that is compared with it, axis C; the baseline itself where only one model was looked at."""
    row_memory_blocks: tuple[int, ...]
    """Its blocks that read memory, counted from 0; the memory of block b works between entries b and b + 1."""
    column_memory_blocks: tuple[int, ...]
    """Those of the column model."""
    similarity: np.ndarray
    """CKA, float64 ``[R, C]``: 1 for the same up to rotation and scale, about 0 for nothing in common (a little below
    too: the estimate is unbiased). NaN where an entry is constant."""
    within_rows: np.ndarray
    """CKA of the row model with itself, float64 ``[R, R]``."""

    def alignment(self, top_k: int = 5) -> np.ndarray:
        """Find the depth in the row model that each entry of the column model answers to: `soft_alignment`, ``[C]``."""
        return soft_alignment(self.similarity, top_k)

    def control(self, top_k: int = 5) -> np.ndarray:
        """Align the row model with itself in the same way, and read that off at the relative depth of each column.

        It is not the diagonal: a centroid of k layers saturates near both ends.

        Returns:
            Float64 ``[C]``, in layers of the row model.
        """
        rows, columns = self.similarity.shape
        depths = np.linspace(0, rows - 1, columns)
        return np.interp(depths, np.arange(rows), soft_alignment(self.within_rows, top_k))

    def gain(self, top_k: int = 5) -> np.ndarray:
        """Compute how many layers of the row model the column model is ahead: `alignment` - `control`, ``[C]``.

        Above 0 an entry of the column model is like a deeper layer of the row model than the row model's own layer at
        that depth is: its effective depth is larger. It is a correlation, not a cause. The control is ours.
        """
        return self.alignment(top_k) - self.control(top_k)

    def to_dict(self, top_k: int | None = None) -> dict[str, Any]:
        """Plain values for JSON, with the alignment; ``top_k`` is a third of the row model's entries, 5 at most."""
        if top_k is None:
            # The centroid of all layers of a small model would say the same of every column.
            top_k = min(5, -(-len(self.similarity) // 3))
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {"top_k": top_k, "alignment": self.alignment(top_k), "control": self.control(top_k)}
        return {name: plain(value) for name, value in {**values, "gain": self.gain(top_k)}.items()}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class CkaFindings:
    """CKA of a baseline with each of the other models, at the same positions of one text."""

    maps: tuple[CkaMap, ...]
    """One for each model beside the baseline; the baseline with itself where there is no other."""
    positions: str
    """Which positions were compared: a choice of `PositionChoice`, or ``"given"``."""
    streams: str
    """How residual streams were compared."""
    minibatch_size: int
    """Positions in a minibatch, at most."""
    pool_size: int
    """Positions among which minibatches were drawn."""
    num_positions: int
    """Positions that count."""
    num_minibatches: int
    """Minibatches they were in."""
    num_not_finite: int
    """Positions left out because something of a model is NaN or infinite there."""

    def to_dict(self, top_k: int | None = None) -> dict[str, Any]:
        """Plain values for JSON; see `CkaMap.to_dict`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**values, "maps": [found.to_dict(top_k) for found in self.maps]}
