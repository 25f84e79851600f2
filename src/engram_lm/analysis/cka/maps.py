"""Maps of how alike layers are, and of which layer of one model corresponds to which layer of another."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from engram_lm.analysis.plain_values import plain
from engram_lm.errors import ConfigError

__all__ = ["CkaFindings", "CkaMap", "soft_alignment"]

# Dimension key: R entries (1 + layers) of the model in the rows, C of the one in the columns.


def soft_alignment(similarity: np.ndarray, top_k: int = 5) -> np.ndarray:
    """Find for each column the depth in the rows that it resembles most: the centroid of its most similar rows.

    With k rows no centroid lies closer to an end than (k - 1) / 2, so the index saturates near the first and the last
    layer by construction. `CkaMap.gain` therefore compares it with what the model of the rows gets itself.

    Args:
        similarity: ``[R, C]``; negative values, which an unbiased estimate can have, count as 0.
        top_k: Rows that count; all of them if there are fewer.

    Returns:
        Float64 ``[C]``, counted in rows; NaN for a column that has a NaN or nothing above 0.

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

    Axes R and C have one entry more than the models have layers: entry 0 is what enters the first layer (the token
    embedding, before any memory), and entry e is the output of the e-th layer. The paper's "layer j", counted from 0,
    is entry j + 1.
    """

    row_model: str
    """Name of the baseline: axis R."""
    column_model: str
    """Name of the model that is compared with it: axis C. If there is only one model, it is the baseline itself."""
    row_memory_blocks: tuple[int, ...]
    """Blocks of the baseline that read memory, counted from 0; that of block b acts between entries b and b + 1."""
    column_memory_blocks: tuple[int, ...]
    """Blocks of the column model that read memory."""
    similarity: np.ndarray
    """CKA, float64 ``[R, C]``: 1 if two entries are the same up to rotation and scale, about 0 if they have nothing in
    common (sometimes slightly below 0, because the estimate is unbiased). NaN if an entry is constant."""
    within_rows: np.ndarray
    """CKA of the baseline with itself, float64 ``[R, R]``."""

    def alignment(self, top_k: int = 5) -> np.ndarray:
        """Find the depth in the baseline to which each entry of the column model corresponds, float64 ``[C]``."""
        return soft_alignment(self.similarity, top_k)

    def control(self, top_k: int = 5) -> np.ndarray:
        """Align the baseline with itself in the same way, and take the result at the relative depth of each column.

        This is not the diagonal, because a centroid of k layers saturates near both ends.

        Returns:
            Float64 ``[C]``, in layers of the baseline.
        """
        rows, columns = self.similarity.shape
        depths = np.linspace(0, rows - 1, columns)
        return np.interp(depths, np.arange(rows), soft_alignment(self.within_rows, top_k))

    def gain(self, top_k: int = 5) -> np.ndarray:
        """Compute how many layers of the baseline the column model is ahead: `alignment` - `control`, ``[C]``.

        Above 0, an entry of the column model resembles a deeper layer of the baseline than the baseline's own layer at
        that depth does: its effective depth is larger. This is a correlation, not a cause. The control is ours.
        """
        return self.alignment(top_k) - self.control(top_k)

    def to_dict(self, top_k: int | None = None) -> dict[str, Any]:
        """Return plain values for JSON, with the alignment; ``top_k`` defaults to a third of the entries, at most 5."""
        if top_k is None:
            # In a small model the centroid of all layers would be the same for every column.
            top_k = min(5, -(-len(self.similarity) // 3))
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {"top_k": top_k, "alignment": self.alignment(top_k), "control": self.control(top_k)}
        return {name: plain(value) for name, value in {**values, "gain": self.gain(top_k)}.items()}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class CkaFindings:
    """CKA of a baseline with each of the other models, at the same positions of one text."""

    streams: ClassVar[str] = "concatenated"
    """How residual streams were compared."""

    maps: tuple[CkaMap, ...]
    """One for each model besides the baseline; if there is no other, the baseline with itself."""
    positions: str
    """Which positions were compared: a choice of `PositionChoice`, or ``"given"``."""
    minibatch_size: int
    """Positions in a minibatch, at most."""
    pool_size: int
    """Positions among which minibatches were drawn."""
    num_positions: int
    """Number of positions that were compared."""
    num_minibatches: int
    """Number of minibatches."""
    num_not_finite: int
    """Positions left out because a value of a model is NaN or infinite there."""

    def to_dict(self, top_k: int | None = None) -> dict[str, Any]:
        """Return plain values for JSON; see `CkaMap.to_dict`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**values, "streams": self.streams, "maps": [found.to_dict(top_k) for found in self.maps]}
