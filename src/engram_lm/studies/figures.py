"""Pictures of a result: PNG files to paste, which the page shows too."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engram_lm.page.figure import DASHES, MARKERS, Picture

__all__ = ["Figures", "loss_bars", "style_of", "sweep"]


Figures = Callable[[Mapping[str, Any]], Sequence[Picture]]
"""Chooses the pictures of a result."""


def style_of(index: int) -> dict[str, Any]:
    """Color, dashes and marker of the n-th arm, as keyword arguments of matplotlib's ``plot``."""
    return {"color": f"C{index}", "linestyle": DASHES[index % len(DASHES)], "marker": MARKERS[index % len(MARKERS)]}


def loss_bars(result: Mapping[str, Any]) -> Sequence[Picture]:
    """Draw the first measure of every arm as a point with its spread, and every seed as a small point."""
    measure, about = next(iter(result["measures"].items()))
    arms = list(result["arms"].values())

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for place, arm in enumerate(arms):
            found = arm["summary"][measure]
            seeds = [run["measures"][measure] for run in arm["runs"] if run["measures"].get(measure) is not None]
            axes.plot(seeds, [place] * len(seeds), ".", color="C0", alpha=0.5)
            if found["mean"] is not None:
                axes.errorbar(found["mean"], place, xerr=found["std"], fmt="o", color="C0", capsize=3)
        axes.set_yticks(range(len(arms)), [arm["title"] for arm in arms])
        axes.invert_yaxis()
        axes.set_xlabel(f"{about['title']}, {about['unit']}")
        axes.grid(axis="x", color="0.9")

    size = (6.4, 1.2 + 0.4 * len(arms))
    return [Picture(name=measure, title=f"{about['title'].capitalize()} by arm", size=size, draw=draw)]


def sweep(x: str) -> Figures:
    """Draw the first measure against the arms' places on an axis.

    Args:
        x: What the axis is.
    """

    def figures(result: Mapping[str, Any]) -> Sequence[Picture]:
        measure, about = next(iter(result["measures"].items()))
        arms = sorted((arm for arm in result["arms"].values() if arm["x"] is not None), key=lambda arm: arm["x"])

        def draw(figure: Any) -> None:
            axes = figure.subplots()
            for arm in arms:
                seeds = [run["measures"][measure] for run in arm["runs"] if run["measures"].get(measure) is not None]
                axes.plot([arm["x"]] * len(seeds), seeds, ".", color="C0", alpha=0.5)
            known = [arm for arm in arms if arm["summary"][measure]["mean"] is not None]
            means, stds = ([arm["summary"][measure][key] for arm in known] for key in ("mean", "std"))
            bars = None if None in stds else stds
            axes.errorbar([arm["x"] for arm in known], means, yerr=bars, fmt="o-", color="C0", capsize=3)
            axes.set_xlabel(x)
            axes.set_ylabel(f"{about['title']}, {about['unit']}")
            axes.grid(axis="y", color="0.9")

        title = f"{about['title'].capitalize()} by {x}"
        return [Picture(name=measure, title=title, size=(6.4, 3.8), draw=draw)]

    return figures
