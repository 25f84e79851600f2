"""Loss curves of several arms, for a page or a PNG file."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engram_lm.page.figure import INK, line_style, page_figure

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
    """Draw curves against what was trained on, with the titles of the arms for a legend where there are some.

    The frame leaves out the steep beginning, the first tenth of the tokens, where everything looks alike.
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


def curve_figure(
    title: str,
    curves: Curves,
    titles: Mapping[str, str],
    *,
    name: str,
    markers: bool,
    of: str = "",
    unit: str = "tokens",
) -> str:
    """Draw curves for a page, under a heading; see `draw_curves` and `page_figure`.

    Args:
        title: The heading, as plain text.
        curves: What to draw; the n-th arm has the n-th color and dashes.
        titles: Names of the arms, for those who cannot see the picture.
        name: Prefix of the ids in the SVG, so that several can stand in one page.
        markers: Whether to mark the points.
        of: What the curves show, for those who cannot see it, where the heading does not say it.
        unit: What the horizontal axis counts.
    """
    parts = [of] * bool(of)
    for arm, runs in curves.items():
        drawn = [run for run in runs if run]
        if drawn:
            first, last = (np.mean([run[end][1] for run in drawn]) for end in (0, -1))
            parts.append(f"{titles[arm]}: from {first:.2f} to {last:.2f} at {drawn[0][-1][0]:,.0f} {unit}")

    def draw(axes: Any) -> None:
        from matplotlib.ticker import EngFormatter

        draw_curves(axes, curves, on_page=True, markers=markers, titles={})
        axes.set_xlabel(f"training {unit}", color=INK)
        axes.set_ylabel("nats per token", color=INK)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))

    return page_figure(title, name=name, words="; ".join(parts), num_arms=len(curves), draw=draw)
