"""Loss curves: as SVG that takes its colors from the page it stands in, and as a picture."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["curve_svg", "describe_curves", "save_curves", "smooth"]

_WIDTH_INCHES, _HEIGHT_INCHES = 5.4, 3.5
# Colors that matplotlib writes and nothing else contains; each becomes a CSS variable.
_INK, _FAINT = "#010203", "#010204"
_ARM_COLOR = "#0102{:02x}"
_FIRST_ARM = 16
_DASHES = ("-", "--", ":", "-.")

Curves = Mapping[str, Sequence[Sequence[tuple[float, float]]]]
"""For every arm, a curve of (tokens, loss) for every run."""


def smooth(curve: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Average each point with its neighbors, over a 25th of the curve."""
    points = _finite(curve)
    half = len(points) // 50
    neighbors = [points[max(0, i - half) : i + half + 1] for i in range(len(points))]
    return [
        (tokens, sum(loss for _, loss in near) / len(near)) for (tokens, _), near in zip(points, neighbors, strict=True)
    ]


def curve_svg(curves: Curves, *, name: str, label: str, markers: bool) -> str:
    """Draw curves against training tokens.

    The frame leaves out the steep beginning, the first tenth of the tokens, where everything looks alike.

    Args:
        curves: What to draw. The n-th arm has the CSS variable ``--arm-n`` as its color and the n-th dash style.
        name: Prefix of the ids in the SVG, so that several can stand in one page.
        label: What the vertical axis shows, and what is read out instead of the picture.
        markers: Whether to mark the points.

    Returns:
        An ``<svg>`` element without reference to anything outside; the same bytes for the same curves.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    style = {"svg.fonttype": "none", "svg.hashsalt": "engram", "font.size": 11, "path.simplify": True}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_WIDTH_INCHES, _HEIGHT_INCHES), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for index, runs in enumerate(curves.values()):
            for run in runs:
                tokens, losses = zip(*run, strict=True) if run else ((), ())
                axes.plot(
                    tokens,
                    losses,
                    color=_ARM_COLOR.format(_FIRST_ARM + index),
                    linestyle=_DASHES[index % len(_DASHES)],
                    linewidth=1.8,
                    marker="o" if markers else None,
                    markersize=3.5,
                )
        limits = _limits([point for runs in curves.values() for run in runs for point in run])
        if limits is not None:
            axes.set_ylim(*limits)
        axes.set_xlim(left=0)
        axes.set_xlabel("training tokens", color=_INK)
        axes.set_ylabel("nats per token", color=_INK)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.grid(axis="y", color=_FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelcolor=_INK, pad=6)
        for side in axes.spines:
            axes.spines[side].set_visible(side == "bottom")
            axes.spines[side].set_color(_FAINT)
        out = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    return _for_the_page(out.getvalue(), name=name, label=label, num_arms=len(curves))


def save_curves(result: Mapping[str, Any], path: Path) -> None:
    """Write held-out and training loss of all arms as a picture, for those who would rather paste than open a page."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    for axes, curve, title in zip(
        figure.subplots(1, 2), ("held_out_curve", "train_curve"), ("held-out loss", "training loss"), strict=True
    ):
        points = []
        for index, arm in enumerate(result["arms"].values()):
            for number, run in enumerate(arm["runs"]):
                drawn = _finite(run[curve]) if curve == "held_out_curve" else smooth(run[curve])
                points += drawn
                label = arm["title"] if number == 0 else None
                axes.plot(*zip(*drawn, strict=True), color=f"C{index}", linestyle=_DASHES[index % 4], label=label)
        limits = _limits(points)
        if limits is not None:
            axes.set_ylim(*limits)
        axes.set(title=title, xlabel="training tokens", ylabel="nats per token")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)


def describe_curves(curves: Curves, titles: Mapping[str, str]) -> str:
    """Say in words where each curve starts and ends."""
    parts = []
    for arm, runs in curves.items():
        drawn = [run for run in runs if run]
        if drawn:
            first, last = (np.mean([run[end][1] for run in drawn]) for end in (0, -1))
            parts.append(f"{titles[arm]}: from {first:.2f} to {last:.2f} at {drawn[0][-1][0]:,.0f} tokens")
    return "; ".join(parts) or "nothing was recorded"


def _finite(curve: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    return [(point[0], point[1]) for point in curve if point[1] is not None and math.isfinite(point[1])]


def _limits(points: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    if not points:
        return None
    last = max(tokens for tokens, _ in points)
    shown = [loss for tokens, loss in points if tokens >= last / 10]
    low, high = min(shown), max(shown)
    margin = (high - low) * 0.06 or 0.1
    return low - margin, high + margin


def _for_the_page(svg: str, *, name: str, label: str, num_arms: int) -> str:
    """Make matplotlib's file an element of a page: its colors, font and ids, and nothing from elsewhere."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\1{name}-", svg)
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r"font-family: [^;]*;", "", svg)
    colors = {_INK: "currentColor", _FAINT: "var(--line)"}
    colors |= {_ARM_COLOR.format(_FIRST_ARM + index): f"var(--arm-{index})" for index in range(num_arms)}
    for written, color in colors.items():
        svg = svg.replace(written, color)
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None, "matplotlib writes a viewBox"
    # matplotlib escapes what it draws; the label is ours to escape, and the caller has.
    return f'<svg {view_box[0]} role="img" aria-label="{label}">' + svg[svg.index(">") + 1 :].strip()
