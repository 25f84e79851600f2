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
        axes.locator_params(axis="x", nbins=5)  # losses that are close have long numbers

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


def forest(
    rows: Sequence[tuple[str, Mapping[str, Any], Sequence[float]]],
    groups: Sequence[str],
    *,
    name: str,
    title: str,
    label: str,
) -> Picture:
    """Draw differences as points with intervals, one below the other; the groups of rows have colors and gaps.

    Args:
        rows: For each arm its title, ``value`` and ``interval`` (None where it is not known), and every seed's value.
        groups: The group of each row.
        name: Name of the file.
        title: What it shows.
        label: What the horizontal axis shows.
    """
    colors = {group: f"C{number % 10}" for number, group in enumerate(dict.fromkeys(groups))}
    gaps = [index > 0 and groups[index] != groups[index - 1] for index in range(len(rows))]
    places = [index + 0.6 * sum(gaps[: index + 1]) for index in range(len(rows))]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for place, group, (_, found, seeds) in zip(places, groups, rows, strict=True):
            color, value, interval = colors[group], found["value"], found["interval"]
            axes.plot(seeds, [place] * len(seeds), ".", color=color, alpha=0.4)
            sides = None if interval is None else [[value - interval[0]], [interval[1] - value]]
            axes.errorbar(value, place, xerr=sides, fmt="o", color=color, capsize=3)
        axes.axvline(0, color="0.3", linewidth=0.8)
        axes.set_yticks(places, [words for words, _, _ in rows])
        axes.invert_yaxis()
        axes.grid(axis="x", color="0.9")
        axes.set_xlabel(label)
        # Most changes are small: one arm that is far off, such as no memory, must not hide the others.
        ends = sorted(abs(found["value"]) for _, found, _ in rows)
        if ends and ends[-1] > 10 * (linear := ends[len(ends) // 2] or ends[-1]):
            axes.set_xscale("symlog", linthresh=2 * linear)

    return Picture(name=name, title=title, size=(7.2, 1.2 + 0.3 * (places[-1] + 1 if places else 1)), draw=draw)


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
