"""The logit lens: what the model's head makes of every layer's hidden state, and how far that is from what it says."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_lm.analysis.part import Part, Work
from engram_lm.analysis.positions import thinned
from engram_lm.analysis.protocol import Analysis, ModelAnalysis, ModelFindings, PlainResult, Reading, plain
from engram_lm.analysis.subject import Subject
from engram_lm.errors import ConfigError, check_whole
from engram_lm.page.figure import INK, MARKERS, Panels, Picture, line_style
from engram_lm.page.frame import section, table
from engram_lm.page.number_text import count_text, number_text

# Dimension key: E entries (1 + layers), P positions, S streams, D hidden, V vocabulary.

_CHUNK_BYTES = 1 << 22
"""Bytes of float32 logits that are computed at once; few, so that they stay in the processor's caches."""
_FEWEST = 32
"""The least number of positions that are computed at once; fewer would read the head's weights too often."""
_NUM_COPIES = 7
"""Arrays of that size that are alive at the peak: both distributions, their logarithms, and those of the head."""
_ENOUGH = 16_384
"""Positions after which the lens begins to skip some; the head costs as much for each layer as for the whole model."""
_FIGURES = {
    "kl": ("Divergence from the final prediction", "KL(final‖layer), nats"),
    "agreement": ("Same most likely token", "share of positions"),
}
"""What is drawn: its title, and what the vertical axis shows."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LensCurve(PlainResult):
    """What each layer of one model would predict. A mean over no positions is NaN (None in `to_dict`).

    Axis E has one entry more than there are layers: entry 0 is what enters the first layer (the token embedding, before
    any memory), and entry e is the output of the e-th layer. The paper's "layer l", counted from 0, is entry l + 1. The
    memory of block b acts between entries b and b + 1.
    """

    also = ("relative_depth",)

    num_layers: int
    """Number of layers of the model: E - 1."""
    memory_blocks: tuple[int, ...]
    """Blocks that read memory, counted from 0; empty without memory."""
    kl: np.ndarray
    """Mean KL divergence KL(final || entry) in nats, float64 ``[E]``: what is lost if the entry's prediction replaces
    the model's own. Exactly 0 at the last entry."""
    kl_error: np.ndarray
    """Standard error of `kl`, float64 ``[E]``, from the spread between windows (positions of one window are not
    independent); NaN for fewer than two windows."""
    entropy: np.ndarray
    """Mean entropy of the entry's prediction in nats, float64 ``[E]``."""
    agreement: np.ndarray
    """Share of positions at which the entry's most likely token is the model's, float64 ``[E]``."""
    prediction_depth: float
    """Number of layers after which the most likely token is the model's and remains so, averaged over positions: from 0
    (at the embedding) to `num_layers`. Source: prediction depth, Baldock, Maennel and Neyshabur 2021, with the model's
    own head in place of their nearest neighbours."""
    num_positions: int
    """Number of positions that count."""
    num_windows: int
    """Number of windows in which they lie."""
    num_not_finite: int
    """Positions left out because a hidden state, a gate or a logit is NaN or infinite."""

    @property
    def relative_depth(self) -> np.ndarray:
        """Depth of each entry as a share of all layers, float64 ``[E]``: 0 for the embedding, 1 for the last layer.

        On this axis models of different depth are compared.
        """
        return np.arange(self.num_layers + 1) / max(self.num_layers, 1)

    def kl_depth(self, share: float = 0.5) -> float:
        """Find how many layers it takes until only a share of the divergence, in (0, 1], is left.

        This is where the curve of `kl`, drawn with straight lines between entries, first falls to ``share`` times its
        value at the embedding, from 0 to `num_layers`; NaN if there are no positions. The smaller it is, the earlier
        the model is ready to predict. Raises `ConfigError` for an impossible share.
        """
        if not 0 < share <= 1:
            raise ConfigError(f"share is the part of the divergence that is left, above 0 and at most 1, not {share}")
        target = share * self.kl[0]
        for entry in np.flatnonzero(self.kl <= target)[:1].tolist():
            before, after = self.kl[entry - 1] if entry else target, self.kl[entry]
            return float(entry - (target - after) / (before - after)) if before > after else float(entry)
        return float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with `kl_depth`."""
        return {**super().to_dict(), "kl_depth": plain(self.kl_depth())}


class LogitLens(ModelAnalysis):
    """Sends every layer's hidden state through the model's own head. Feed it with `engram_lm.analysis.read_text`.

    Streams are combined as before the model's head (`Subject.predict`); the paper does not say how it does that. The
    lens does not apply to a model whose head is not understood, which is checked on the first windows.

    Args:
        one_in: Look at one of this many positions, spread over the text; see `thinned`. For each layer the head costs
            as much as it costs the model once, so a part of a long text is enough.

    Raises:
        ConfigError: ``one_in`` is below 1.

    Source: logit lens, nostalgebraist 2020; KL(final || layer) as in the tuned lens, Belrose et al. 2023; paper,
    section 6.1 and Figure 4a.
    """

    wants = frozenset({"predict"})

    def __init__(self, *, one_in: int = 1) -> None:
        check_whole(one_in=one_in)
        self.one_in = one_in

    def sums_for(self, subject: Subject, applied: Sequence[Subject]) -> "_Sums":
        """Return empty sums."""
        return _Sums(subject, self.one_in)

    def scratch_bytes_per_token(self, subjects: Sequence[Subject]) -> int:
        """Return the bytes of three numbers for every entry, and as much again while they are added up."""
        return max(6 * 8 * (subject.num_layers + 1) for subject in subjects)

    def held_bytes(self, subjects: Sequence[Subject]) -> int:
        """Return what the positions that are computed at once take; the models come one after the other."""
        return max(_NUM_COPIES * 4 * _chunk(subject) * subject.vocab_size for subject in subjects)

    def result(self) -> ModelFindings[LensCurve]:
        """Return the curves of what was read."""
        return ModelFindings({name: sums.curve() for name, sums in self.sums.items()})


class _Sums:
    """What is added up for one model."""

    def __init__(self, subject: Subject, one_in: int) -> None:
        self.subject, self.one_in = subject, one_in
        entries = subject.num_layers + 1
        self.totals = np.zeros((3, entries))  # divergence, entropy, agreement
        self.depth = 0.0
        self.num_positions = self.num_windows = self.num_not_finite = 0
        # For the standard error of a ratio of sums over windows: squares and products of a window's two sums.
        self.squares, self.products, self.count_squares = np.zeros(entries), np.zeros(entries), 0

    def add(self, reading: Reading) -> None:
        num_windows, length = reading.tokens.shape
        chosen = np.flatnonzero(thinned(reading.start + np.arange(num_windows * length), self.one_in))
        finite = reading.finite.flatten().cpu().numpy()[chosen]
        places = chosen[finite]
        step = _chunk(self.subject)
        parts = [torch.from_numpy(places[begin : begin + step]) for begin in range(0, len(places), step)]
        measured = [_measure(reading, part).cpu().numpy() for part in parts]
        values = np.concatenate([np.zeros((3, self.subject.num_layers + 1, 0)), *measured], axis=-1)
        # A layer in the middle may overflow in half precision although the model itself does not.
        good = np.isfinite(values).all((0, 1))
        values, places = values[..., good], places[good]
        self.num_not_finite += len(chosen) - len(places)
        self.num_positions += len(places)
        self.totals += values.sum(-1)
        wrong = values[2] == 0
        # The entry behind the last one that is wrong; the last entry never is.
        self.depth += float((len(wrong) - np.argmax(wrong[::-1], axis=0))[wrong.any(0)].sum())
        counts = np.bincount(places // length, minlength=num_windows)
        sums = np.stack([np.bincount(places // length, row, minlength=num_windows) for row in values[0]])
        self.num_windows += int((counts > 0).sum())
        self.squares += np.square(sums).sum(1)
        self.products += (sums * counts).sum(1)
        self.count_squares += int(np.square(counts).sum())

    def curve(self) -> LensCurve:
        count, windows = self.num_positions, self.num_windows
        kl, entropy, agreement = self.totals / count if count else np.full_like(self.totals, np.nan)
        error = np.full_like(kl, np.nan)
        if windows > 1:
            spread = self.squares - 2 * kl * self.products + np.square(kl) * self.count_squares
            error = np.sqrt(np.maximum(spread, 0) * windows / (windows - 1)) / count
        return LensCurve(
            num_layers=self.subject.num_layers,
            memory_blocks=tuple(self.subject.memories),
            kl=kl,
            kl_error=error,
            entropy=entropy,
            agreement=agreement,
            prediction_depth=self.depth / count if count else float("nan"),
            num_positions=count,
            num_windows=windows,
            num_not_finite=self.num_not_finite,
        )


def _chunk(subject: Subject) -> int:
    return max(_FEWEST, _CHUNK_BYTES // (4 * subject.vocab_size))


def _measure(reading: Reading, places: Tensor) -> Tensor:
    """Compare all entries with the model's own prediction at some positions, float64 ``[3, E, P]``."""
    assert reading.logits is not None
    device = reading.logits.device
    final_PV = torch.log_softmax(reading.logits.flatten(0, 1)[places.to(device)].float(), -1)
    shares_PV, best_P = final_PV.exp(), final_PV.argmax(-1)
    found = torch.zeros(3, len(reading.hidden), len(places), dtype=torch.float64, device=device)
    for entry, hidden in enumerate(reading.hidden[:-1]):
        logits = reading.subject.predict(hidden.flatten(0, 1)[places.to(hidden.device)]).to(device)
        layer_PV = torch.log_softmax(logits.float(), -1)
        del logits
        found[1, entry] = -layer_PV.exp().mul_(layer_PV).sum(-1, dtype=torch.float64)
        found[2, entry] = layer_PV.argmax(-1) == best_P
        # The difference of logarithms first: where both distributions are alike, nothing large is left to cancel.
        found[0, entry] = -layer_PV.sub_(final_PV).mul_(shares_PV).sum(-1, dtype=torch.float64)
    # The last layer's prediction is the model's own.
    found[1, -1] = -shares_PV.mul_(final_PV).sum(-1, dtype=torch.float64)
    found[2, -1] = 1
    return found


class LensPart(Part):
    """What each layer would predict."""

    title = "logit lens"

    def analyses(self, work: Work) -> dict[str, Analysis]:
        """Look through the lens at as many positions as are enough."""
        return {self.name: LogitLens(one_in=max(1, len(work.tokens) // _ENOUGH))}

    def summary(self, result: Mapping[str, Any]) -> Iterator[str]:
        """Return how far the embedding is from the prediction, and how soon half of that is gone."""
        for model, curve in self.by_model(result).items():
            yield (
                f"{model}: {number_text(curve['kl'][0])} nats from the final prediction at the embedding, half of it "
                f"gone after {number_text(curve['kl_depth'])} of {curve['num_layers']} layers"
            )

    def picture(self, result: Mapping[str, Any]) -> Picture | None:
        """Draw divergence and agreement side by side."""
        curves = self.by_model(result)
        return self.drawn(9.6, 3.8, _panels(curves).in_picture) if curves else None

    def section(self, result: Mapping[str, Any], page_only: Mapping[str, Any]) -> str:
        """Return the curves by layer, all models together."""
        curves = {name: curve for name, curve in self.by_model(result).items() if curve["num_positions"]}
        if not curves:
            return ""

        def words(key: str) -> str:
            values = (f"{name}: {', '.join(map(number_text, curve[key]))}" for name, curve in curves.items())
            return f"By layer. {'; '.join(values)}"

        rows = [
            [
                name,
                str(curve["num_layers"]),
                number_text(curve["kl"][0]),
                number_text(curve["kl_depth"]),
                number_text(curve["prediction_depth"]),
                count_text(curve["num_positions"]),
            ]
            for name, curve in curves.items()
        ]
        columns = (
            "Model", "Layers", "Divergence at 0", "Half of it gone after", "Prediction settled after", "Positions",
        )  # fmt: skip
        return section(
            "lens",
            "What each layer would predict",
            "<p>The model’s own head is applied to the hidden state behind every layer; the curves show how far that "
            "prediction is from the final one. Layer 0 is the embedding. If a curve falls early, the model has its "
            "answer ready early. Large points are layers that read memory.</p>"
            f"{_panels(curves).on_page(words)}"
            f"{table(columns, rows, label='The logit lens in numbers')}"
            '<p class="note">Divergence is KL(final‖layer) in nats. Depths are counted in layers.</p>',
        )


def _panels(curves: Mapping[str, Mapping[str, Any]]) -> Panels:
    titles = {key: title for key, (title, _) in _FIGURES.items()}
    return Panels(name="lens", titles=titles, arms=list(curves), draw=functools.partial(draw_lens, curves))


def draw_lens(curves: Mapping[str, Mapping[str, Any]], axes: Any, *, key: str, on_page: bool) -> None:
    """Draw a value of the logit lens against depth; layers that read memory have a large point."""
    from matplotlib.ticker import MaxNLocator

    ink = INK if on_page else "black"
    depths = {curve["num_layers"] for curve in curves.values()}
    for index, (name, curve) in enumerate(curves.items()):
        places = list(range(curve["num_layers"] + 1)) if len(depths) == 1 else curve["relative_depth"]
        values = [float("nan") if value is None else value for value in curve[key]]
        style = line_style(index, on_page=on_page)
        axes.plot(places, values, marker="o", markersize=3, label=name, **style)
        reading = [block + 1 for block in curve["memory_blocks"]]
        axes.plot(
            [places[entry] for entry in reading],
            [values[entry] for entry in reading],
            linestyle="none",
            marker=MARKERS[index % len(MARKERS)],
            markersize=7,
            color=style["color"],
        )
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=len(depths) == 1))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer" if len(depths) == 1 else "share of the layers", color=ink)
    axes.set_ylabel(_FIGURES[key][1], color=ink)
