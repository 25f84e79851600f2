"""Loss curves of several arms, as SVG that takes its colors from the page it stands in."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from engram_lm.page.figure import DASHES, INK, arm_color, page_axes, page_svg

__all__ = ["Curves", "curve_svg", "describe_curves", "finite_points", "loss_limits", "smooth"]

_WIDTH_INCHES, _HEIGHT_INCHES = 5.4, 3.5

Curves = Mapping[str, Sequence[Sequence[tuple[float, float]]]]
"""For every arm, a curve of (tokens, loss) for every run."""


def finite_points(curve: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Leave out the points without a finite loss."""
    return [(point[0], point[1]) for point in curve if point[1] is not None and math.isfinite(point[1])]


def smooth(curve: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Average each point with its neighbors, over a 25th of the curve."""
    points = finite_points(curve)
    half = len(points) // 50
    neighbors = [points[max(0, i - half) : i + half + 1] for i in range(len(points))]
    return [
        (tokens, sum(loss for _, loss in near) / len(near)) for (tokens, _), near in zip(points, neighbors, strict=True)
    ]


def curve_svg(curves: Curves, *, name: str, label: str, markers: bool, amount: str = "training tokens") -> str:
    """Draw curves against training tokens.

    The frame leaves out the steep beginning, the first tenth of the tokens, where everything looks alike.

    Args:
        curves: What to draw. The n-th arm has the CSS variable ``--arm-n`` as its color and the n-th dash style.
        name: Prefix of the ids in the SVG, so that several can stand in one page.
        label: What the vertical axis shows, and what is read out instead of the picture.
        markers: Whether to mark the points.
        amount: What the horizontal axis counts, if not tokens.

    Returns:
        An ``<svg>`` element without reference to anything outside; the same bytes for the same curves.
    """
    from matplotlib.ticker import EngFormatter

    with page_axes(_WIDTH_INCHES, _HEIGHT_INCHES) as axes:
        for index, runs in enumerate(curves.values()):
            for run in runs:
                tokens, losses = zip(*run, strict=True) if run else ((), ())
                axes.plot(
                    tokens,
                    losses,
                    color=arm_color(index),
                    linestyle=DASHES[index % len(DASHES)],
                    linewidth=1.8,
                    marker="o" if markers else None,
                    markersize=3.5,
                )
        limits = loss_limits([point for runs in curves.values() for run in runs for point in run])
        if limits is not None:
            axes.set_ylim(*limits)
        axes.set_xlim(left=0)
        axes.set_xlabel(amount, color=INK)
        axes.set_ylabel("nats per token", color=INK)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        return page_svg(axes.figure, name=name, label=label, num_arms=len(curves))


def describe_curves(curves: Curves, titles: Mapping[str, str], unit: str = "tokens") -> str:
    """Say in words where each curve starts and ends."""
    parts = []
    for arm, runs in curves.items():
        drawn = [run for run in runs if run]
        if drawn:
            first, last = (np.mean([run[end][1] for run in drawn]) for end in (0, -1))
            parts.append(f"{titles[arm]}: from {first:.2f} to {last:.2f} at {drawn[0][-1][0]:,.0f} {unit}")
    return "; ".join(parts) or "nothing was recorded"


def loss_limits(points: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Lowest and highest loss of a frame that leaves out the first tenth of the tokens; None without points."""
    if not points:
        return None
    last = max(tokens for tokens, _ in points)
    shown = [loss for tokens, loss in points if tokens >= last / 10]
    low, high = min(shown), max(shown)
    margin = (high - low) * 0.06 or 0.1
    return low - margin, high + margin
