"""How far rounded rows are from the exact ones: what quantization costs."""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from engram_lm.errors import MismatchError
from engram_lm.tables.layout import RowLayout
from engram_lm.tables.tiers.mapped import MappedTable

MOST_ROWS = 2**24
"""Rows measured at most: quantiles need one number of every row in memory."""

_ROWS_AT_ONCE = 2**14


@dataclasses.dataclass(frozen=True)
class RowError:
    """Error of a table against an exact one of the same rows, over all rows or a sample.

    The relative error of a row is the length of the difference divided by the length of the exact row. An exact row of
    zeros has the error 0 if the other row is zero too, else infinity; rows of zeros have no cosine.
    """

    num_rows: int
    """Rows compared."""
    all_rows: bool
    """Whether these are all rows."""
    relative_error_mean: float
    """Mean over rows of the relative error."""
    relative_error_p50: float
    """Its median."""
    relative_error_p99: float
    """99 of 100 rows have at most this."""
    relative_error_max: float
    """Its largest value."""
    cosine_mean: float
    """Mean over rows of the cosine between both vectors; 1 where all rows are zeros."""
    cosine_min: float
    """Its smallest value."""


def measure_row_error(exact: RowLayout, other: RowLayout, *, sample: int | None = None, seed: int = 0) -> RowError:
    """Compare the rows of two tables as numbers, in float64: all, or ``sample`` rows drawn evenly, 2 ** 24 at most.

    Raises:
        MismatchError: Tables of different sizes.
        CheckpointError: A file is missing or has been cut.
    """
    if (exact.num_rows, exact.codec.width) != (other.num_rows, other.codec.width):
        raise MismatchError(
            f"tables of {exact.num_rows} rows of {exact.codec.width} and {other.num_rows} rows of {other.codec.width} "
            "numbers cannot be compared"
        )
    count = min(exact.num_rows, MOST_ROWS if sample is None else min(sample, MOST_ROWS))
    numbers = sampled(exact.num_rows, count, seed)
    errors, cosines = [], []
    tables = MappedTable(exact, torch.float32), MappedTable(other, torch.float32)
    for start in range(0, count, _ROWS_AT_ONCE):
        rows = torch.from_numpy(numbers[start : start + _ROWS_AT_ONCE])
        relative, cosine = _compare(*(table.gather(rows).double() for table in tables))
        errors.append(relative)
        cosines.append(cosine)
    error, cosine = torch.cat(errors), torch.cat(cosines)
    quantiles = np.quantile(error.numpy(), [0.5, 0.99], method="inverted_cdf").tolist()
    return RowError(
        num_rows=count,
        all_rows=count == exact.num_rows,
        relative_error_mean=float(error.mean()),
        relative_error_p50=quantiles[0],
        relative_error_p99=quantiles[1],
        relative_error_max=float(error.max()),
        cosine_mean=float(cosine.mean()) if len(cosine) else 1.0,
        cosine_min=float(cosine.min()) if len(cosine) else 1.0,
    )


def sampled(size: int, count: int, seed: int) -> np.ndarray:
    """Draw distinct numbers below ``size``, ascending, int64 ``[count]``; all of them where ``count`` is ``size``."""
    if count == size:
        return np.arange(size)
    generator = np.random.default_rng(seed)
    found = np.empty(0, dtype=np.int64)
    # Drawn until enough are distinct: a permutation would take memory for the whole table.
    while len(found) < count:
        found = np.union1d(found, generator.integers(0, size, 2 * (count - len(found)) + 16))
    return np.sort(generator.permutation(found)[:count])


def _compare(exact: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Relative error of each row, ``[n]``, and cosine of those rows that have one."""
    lengths, others = exact.norm(dim=1), other.norm(dim=1)
    distance = (exact - other).norm(dim=1)
    relative = torch.where(distance == 0, 0, distance / lengths)
    both = (lengths > 0) & (others > 0)
    return relative, ((exact * other).sum(dim=1)[both] / (lengths * others)[both]).clamp(-1, 1)
