"""CKA: how alike the layers of two models represent a text."""

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from engram_lm.analysis.positions import PositionChoice, Positions
from engram_lm.analysis.protocol import Analysis, NotApplicable, PlainResult, Reading, plain
from engram_lm.analysis.subject import Subject
from engram_lm.errors import ConfigError


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
class CkaMap(PlainResult):
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
        """Align the baseline with itself, and take the result at the relative depth of each column, float64 ``[C]``.

        This is not the diagonal, because a centroid of k layers saturates near both ends.
        """
        rows, columns = self.similarity.shape
        return np.interp(np.linspace(0, rows - 1, columns), np.arange(rows), soft_alignment(self.within_rows, top_k))

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
        aligned = {"alignment": self.alignment(top_k), "control": self.control(top_k), "gain": self.gain(top_k)}
        return {**super().to_dict(), "top_k": top_k, **plain(aligned)}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class CkaFindings(PlainResult):
    """CKA of a baseline with each of the other models, at the same positions of one text."""

    also = ("streams",)
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


# Dimension key: n positions of a minibatch, W width of what is compared, E entries (1 + layers) of a model,
# R entries of the model in the rows, C of the one in the columns.

_FEWEST = 4
"""The least number of positions for which there is an unbiased estimate."""
_POOL_BYTES = 1 << 27
"""Bytes that the pools of all models together may take, if they hold more than one minibatch."""


def centered_gram(states: Tensor) -> Tensor:
    """Compute the U-centered Gram matrix of a linear kernel.

    The inner product of two such matrices is n (n - 3) times the unbiased estimate of HSIC by Song et al. (2012,
    equation 5): centering each matrix once replaces centering every pair of them.

    Args:
        states: ``[n, W]``, at least 4 positions.

    Returns:
        Float64 ``[n * n]``; the diagonal is 0.

    Source: U-centering, Székely and Rizzo 2014, "Partial distance correlation with methods for dissimilarities".
    """
    states = states.double()
    # This does not change the result, and there is less rounding if one channel is far larger than the others.
    states = states - states.mean(0)
    gram = (states @ states.T).fill_diagonal_(0)
    n = len(states)
    sums = gram.sum(0)
    gram -= (sums[:, None] + sums[None]) / (n - 2)
    gram += sums.sum() / ((n - 1) * (n - 2))
    return gram.fill_diagonal_(0).flatten()


class Cka(Analysis):
    """Compares the layers of models by linear CKA. Feed it with `engram_lm.analysis.read_text`.

    Positions of many windows are gathered in a pool. When it is full, and at the end of the text, it is divided into
    random minibatches (the same ones each time). The estimates of HSIC are summed over all minibatches before the ratio
    is taken; a minibatch of ``n`` has the weight ``n (n - 3)``, the number that its estimate is divided by. With a
    single minibatch this is the unbiased value of the whole text. Residual streams are compared by the sum of their
    kernels, which loses nothing; the paper does not say how.

    The pool is needed because positions of one window have much in common: a minibatch of neighbours would tell how
    alike two layers are within a window, which may differ much from how alike they are over the text. The larger the
    pool, and the fewer positions are taken (``one_in``), the more of the text each minibatch sees.

    Args:
        baseline: Name of the model that the others are compared with; None means the first one without memory, or the
            first of all.
        positions: See `PositionChoice`.
        min_count: See `PositionChoice`.
        one_in: See `PositionChoice`.
        minibatch_size: Positions in a minibatch.
        pool_size: Positions in the pool; None means as many minibatches as 128 MiB hold, and at least one.

    Raises:
        ConfigError: A choice or number is impossible.

    Source: linear CKA, Kornblith et al. 2019; unbiased HSIC, Song et al. 2012; sums over minibatches, Nguyen, Raghu and
    Kornblith 2021; paper, Eq. 8 and section 6.1.
    """

    wants = frozenset({"hidden"})

    def __init__(
        self,
        *,
        baseline: str | None = None,
        positions: Positions | Any = "all",
        min_count: int = 5,
        one_in: int = 1,
        minibatch_size: int = 256,
        pool_size: int | None = None,
    ) -> None:
        if type(minibatch_size) is not int or minibatch_size < _FEWEST:
            raise ConfigError(f"a minibatch has at least {_FEWEST} positions, not {minibatch_size!r}")
        if pool_size is not None and (type(pool_size) is not int or pool_size < minibatch_size):
            raise ConfigError(f"the pool holds at least one minibatch of {minibatch_size} positions, not {pool_size!r}")
        self.baseline, self.minibatch_size, self.pool_size = baseline, minibatch_size, pool_size
        self._choice = PositionChoice(positions, min_count=min_count, one_in=one_in)

    def start(self, subjects: Sequence[Subject]) -> str | None:
        """Compare the baseline with the others, or with itself; `ConfigError` if no model has its name."""
        by_name = {subject.name: subject for subject in subjects}
        plain = [subject.name for subject in subjects if not subject.memories]
        self._baseline = self.baseline or (plain or list(by_name))[0]
        if self._baseline not in by_name:
            raise ConfigError(f"no model is called {self._baseline!r}; there are {', '.join(by_name)}")
        self._subjects = by_name
        self._choice.start(subjects)
        self._pool_size = self._pool_for(subjects)
        self._pool: dict[str, Tensor] = {}  # [E, pool, W]
        self._num_waiting = self.num_not_finite = 0
        self._sums = _Sums(self._baseline)
        return None

    def held_bytes(self, subjects: Sequence[Subject]) -> int:
        """Return what the pools take, and one minibatch: all its centered Gram matrices, and its widest layer."""
        n, entries = self.minibatch_size, [subject.num_layers + 1 for subject in subjects]
        # The matrices of one model stand side by side while they are stacked.
        grams = 8 * n * n * (sum(entries) + max(entries) + 4)
        widest = max(self._position_bytes([subject]) + 24 * _width(subject) for subject in subjects)
        return self._pool_for(subjects) * self._position_bytes(subjects) + grams + n * widest

    def _pool_for(self, subjects: Sequence[Subject]) -> int:
        if self.pool_size is not None:
            return self.pool_size
        num_minibatches = _POOL_BYTES // (self._position_bytes(subjects) * self.minibatch_size)
        return self.minibatch_size * max(1, num_minibatches)

    def _position_bytes(self, subjects: Sequence[Subject]) -> int:
        return sum((subject.num_layers + 1) * _width(subject) * subject.dtype.itemsize for subject in subjects)

    def update(self, readings: Sequence[Reading]) -> None:
        """Take in some windows."""
        places = self._choice.choose(readings)
        finite = np.ones(readings[0].tokens.numel(), bool)
        for reading in readings:
            finite &= reading.finite.flatten().cpu().numpy()
        self.num_not_finite += int((~finite[places]).sum())
        places = places[finite[places]]
        while len(places):
            taken = places[: self._pool_size - self._num_waiting]
            for reading in readings:
                self._put(reading, torch.from_numpy(taken))
            self._num_waiting += len(taken)
            places = places[len(taken) :]
            if self._num_waiting == self._pool_size:
                self._empty_into(self._sums)
                self._num_waiting = 0

    def result(self) -> CkaFindings | NotApplicable:
        """Return the maps of what was read; `NotApplicable` for fewer than four positions."""
        sums = self._sums
        if self._num_waiting >= _FEWEST:
            sums = copy.deepcopy(sums)
            self._empty_into(sums)
        if not sums.num_minibatches:
            return NotApplicable(
                f"CKA compares at least {_FEWEST} positions with finite hidden states, and the text has "
                f"{self._num_waiting} ({self._choice.name}; {self.num_not_finite} more are not finite)"
            )
        others = [name for name in self._subjects if name != self._baseline] or [self._baseline]
        blocks = {name: tuple(subject.memories) for name, subject in self._subjects.items()}
        return CkaFindings(
            maps=tuple(
                CkaMap(
                    row_model=self._baseline,
                    column_model=name,
                    row_memory_blocks=blocks[self._baseline],
                    column_memory_blocks=blocks[name],
                    similarity=sums.similarity(name),
                    within_rows=sums.similarity(self._baseline),
                )
                for name in others
            ),
            positions=self._choice.name,
            minibatch_size=self.minibatch_size,
            pool_size=self._pool_size,
            num_positions=sums.num_positions,
            num_minibatches=sums.num_minibatches,
            num_not_finite=self.num_not_finite,
        )

    def _empty_into(self, sums: "_Sums") -> None:
        """Divide what waits in the pool into minibatches of nearly the same size."""
        order = torch.randperm(self._num_waiting, generator=torch.Generator().manual_seed(sums.num_minibatches))
        for part in order.tensor_split(-(-self._num_waiting // self.minibatch_size)):
            sums.add({name: states[:, part.to(states.device)] for name, states in self._pool.items()})

    def _put(self, reading: Reading, places: Tensor) -> None:
        """Add the hidden states of some positions to the pool."""
        name = reading.subject.name
        if name not in self._pool:
            kind = functools.reduce(torch.promote_types, (hidden.dtype for hidden in reading.hidden))
            shape = (len(reading.hidden), self._pool_size, _width(reading.subject))
            self._pool[name] = torch.empty(shape, dtype=kind, device=reading.hidden[0].device)
        end = self._num_waiting + len(places)
        for entry, hidden in enumerate(reading.hidden):
            states = hidden.flatten(0, 1)[places.to(hidden.device)]
            self._pool[name][entry, self._num_waiting : end] = states.flatten(1)


def _width(subject: Subject) -> int:
    return subject.hidden_size * subject.num_streams


class _Sums:
    """Inner products of centered Gram matrices, summed over minibatches."""

    def __init__(self, baseline: str) -> None:
        self.baseline = baseline
        self.products: dict[str, np.ndarray] = {}  # baseline x model, [R, C]
        self.squares: dict[str, np.ndarray] = {}  # of each entry with itself, [C]
        self.num_positions = self.num_minibatches = 0

    def add(self, states: Mapping[str, Tensor]) -> None:
        """Add a minibatch: hidden states of each model, ``[E, n, W]``."""
        rows = _grams(states[self.baseline])
        for name, columns in states.items():
            grams = rows if name == self.baseline else _grams(columns)
            self.products[name] = self.products.get(name, 0) + (rows @ grams.T).numpy()
            self.squares[name] = self.squares.get(name, 0) + grams.square().sum(1).numpy()
        self.num_positions += states[self.baseline].shape[1]
        self.num_minibatches += 1

    def similarity(self, name: str) -> np.ndarray:
        """Return the CKA of the baseline with a model, ``[R, C]``."""
        norm = np.sqrt(np.outer(self.squares[self.baseline], self.squares[name]))
        return np.divide(self.products[name], norm, out=np.full(norm.shape, np.nan), where=norm > 0)


def _grams(states: Tensor) -> Tensor:
    """Return the centered Gram matrices of all entries, float64 ``[E, n * n]``, on the CPU."""
    return torch.stack([centered_gram(entry).cpu() for entry in states])
