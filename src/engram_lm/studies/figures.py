"""Pictures of a result: PNG files to paste, which the page shows too."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engram_lm.page.figure import Picture

Figures = Callable[[Mapping[str, Any]], Sequence[Picture]]
"""Chooses the pictures of a result."""


def loss_bars(result: Mapping[str, Any]) -> Sequence[Picture]:
    """Draw the first measure of every arm as a point with its spread, and every seed as a small point."""
    arms = list(result["arms"].values())

    def draw(axes: Any, measure: str, label: str) -> None:
        for place, arm in enumerate(arms):
            found, seeds = arm["summary"][measure], _seeds(arm, measure)
            axes.plot(seeds, [place] * len(seeds), ".", color="C0", alpha=0.5)
            if found["mean"] is not None:
                axes.errorbar(found["mean"], place, xerr=found["std"], fmt="o", color="C0", capsize=3)
        axes.set_yticks(range(len(arms)), [arm["title"] for arm in arms])
        axes.invert_yaxis()
        axes.set_xlabel(label)

    return _first_measure(result, "arm", 1.2 + 0.4 * len(arms), draw)


def sweep(x: str) -> Figures:
    """Draw the first measure against the arms' places on an axis, which shows ``x``."""

    def figures(result: Mapping[str, Any]) -> Sequence[Picture]:
        arms = sorted((arm for arm in result["arms"].values() if arm["x"] is not None), key=lambda arm: arm["x"])

        def draw(axes: Any, measure: str, label: str) -> None:
            known = [arm for arm in arms if arm["summary"][measure]["mean"] is not None]
            for arm in known:
                seeds = _seeds(arm, measure)
                axes.plot([arm["x"]] * len(seeds), seeds, ".", color="C0", alpha=0.5)
            means, spreads = ([arm["summary"][measure][key] for arm in known] for key in ("mean", "std"))
            bars = None if None in spreads else spreads
            axes.errorbar([arm["x"] for arm in known], means, yerr=bars, fmt="o-", color="C0", capsize=3)
            axes.set(xlabel=x, ylabel=label)

        return _first_measure(result, x, 3.8, draw)

    return figures


def _first_measure(
    result: Mapping[str, Any], by: str, height: float, draw: Callable[[Any, str, str], None]
) -> Sequence[Picture]:
    measure, about = next(iter(result["measures"].items()))

    def drawn(figure: Any) -> None:
        axes = figure.subplots()
        draw(axes, measure, f"{about['title']}, {about['unit']}")
        axes.grid(color="0.9")

    return [Picture(name=measure, title=f"{about['title'].capitalize()} by {by}", size=(6.4, height), draw=drawn)]


def _seeds(arm: Mapping[str, Any], measure: str) -> list[float]:
    return [run["measures"][measure] for run in arm["runs"] if run["measures"].get(measure) is not None]
