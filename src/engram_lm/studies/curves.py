"""Loss curves of several arms, for a page or a PNG file."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engram_lm.page.figure import INK, line_style, page_axes, page_svg

__all__ = ["Curves", "curve_svg", "describe_curves", "draw_curves", "finite_points", "smooth"]

Curves = Mapping[str, Sequence[Sequence[tuple[float, float]]]]
"""For every arm, a curve of (tokens, loss) for every run."""


def finite_points(curve: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Leave out the points without a finite loss."""
    return [(point[0], point[1]) for point in curve if point[1] is not None and math.isfinite(point[1])]


def smooth(curve: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Average each finite point with its neighbors, over a 25th of the curve."""
    points = finite_points(curve)
    half = len(points) // 50
    neighbors = [points[max(0, i - half) : i + half + 1] for i in range(len(points))]
    return [
        (tokens, sum(loss for _, loss in near) / len(near)) for (tokens, _), near in zip(points, neighbors, strict=True)
    ]


def draw_curves(axes: Any, curves: Curves, *, on_page: bool, markers: bool, titles: Mapping[str, str]) -> None:
    """Draw curves against what was trained on.

    The frame leaves out the steep beginning, the first tenth of the tokens, where everything looks alike.

    Args:
        axes: Axes of matplotlib.
        curves: What to draw.
        on_page: Whether for a page, which sets the colors.
        markers: Whether to mark the points.
        titles: Names of the arms for a legend; without one, there are no names.
    """
    for index, (arm, runs) in enumerate(curves.items()):
        style = line_style(index, on_page=on_page) | {"marker": "o" if markers else None, "markersize": 3.5}
        for number, run in enumerate(runs):
            label = titles.get(arm) if number == 0 else None
            axes.plot(*(zip(*run, strict=True) if run else ((), ())), label=label, **style)
    points = [point for runs in curves.values() for run in runs for point in run]
    if points:
        last = max(tokens for tokens, _ in points)
        shown = [loss for tokens, loss in points if tokens >= last / 10]
        margin = (max(shown) - min(shown)) * 0.06 or 0.1
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set_xlim(left=0)


def curve_svg(curves: Curves, *, name: str, label: str, markers: bool, amount: str = "training tokens") -> str:
    """Draw curves for a page; see `draw_curves`.

    Args:
        curves: What to draw. The n-th arm has the CSS variable ``--arm-n`` as its color and the n-th dash style.
        name: Prefix of the ids in the SVG, so that several can stand in one page.
        label: What is read out instead of the picture, as HTML.
        markers: Whether to mark the points.
        amount: What the horizontal axis counts.

    Returns:
        An ``<svg>`` element without reference to anything outside; the same bytes for the same curves.
    """
    from matplotlib.ticker import EngFormatter

    with page_axes(5.4, 3.5) as axes:
        draw_curves(axes, curves, on_page=True, markers=markers, titles={})
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
