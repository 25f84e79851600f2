"""The pictures of an adaptation: what was learned against what was forgotten, and how it was learned."""

from collections.abc import Mapping, Sequence
from typing import Any

from engram_lm.page.figure import INK, MARKERS, arm_color, line_legend, marker_legend, page_figure
from engram_lm.studies.adaptation.finding import arm_runs, arm_title, forgetting, loss_before, losses
from engram_lm.studies.curves import curve_figure, finite_points

_CLOSER = 0.5
"""Share of the way from the base to the farthest run below which the runs get a picture of their own."""

Points = Mapping[str, Sequence[tuple[float, float]]]
"""For every arm, (change on the old text, domain loss) of every seed."""


def forgetting_figures(result: Mapping[str, Any]) -> str:
    """Draw domain loss against forgetting: every seed of every arm, and the base; closer too, where runs crowd.

    The HTML is empty where no run has both numbers.
    """
    arms = result.get("arms") or {}
    titles = {name: arm_title(arm, name) for name, arm in arms.items()}
    points: dict[str, list[tuple[float, float]]] = {}
    for name, arm in arms.items():
        learned, changes = losses(arm), forgetting(result, arm)
        points[name] = [(changes[seed], loss) for seed, loss in learned.items() if seed in changes]
    drawn = [point for seeds in points.values() for point in seeds]
    if not drawn:
        return ""
    words = "; ".join(
        f"{titles[name]}: " + ", ".join(f"{change:+.3f} and {loss:.3f}" for change, loss in seeds)
        for name, seeds in points.items()
        if seeds
    )
    before = loss_before(result, "domain")
    base = None if before is None else (0.0, before)
    figures = []
    if base:
        label = f"Change on the old text and domain loss, with the base at 0 and {before:.3f}. {words}"
        figures.append(_scatter("From the base", points, base, name="forgetting", words=label))
    # If all runs moved the same way from the base, their differences are too small to be seen beside it.
    if not base or _crowded(drawn, base):
        label = f"Change on the old text and domain loss. {words}"
        figures.append(_scatter("Closer", points, None, name="closer", words=label))
    return f'{marker_legend(titles)}\n<div class="curves">{"".join(figures)}</div>'


def curve_figures(result: Mapping[str, Any]) -> str:
    """Draw domain loss while training, by tokens and, where arms differ in cost, by compute.

    The HTML is empty where no curve has two points.
    """
    arms = result.get("arms") or {}
    titles = {name: arm_title(arm, name) for name, arm in arms.items()}
    costs = {name: arm.get("flops_per_token") for name, arm in arms.items()}
    curves = {name: [finite_points(run.get("curve") or ()) for run in arm_runs(arm)] for name, arm in arms.items()}
    if not any(len(run) > 1 for runs in curves.values() for run in runs):
        return ""
    pictures = [("By tokens", "by-tokens", "tokens", curves)]
    if all(costs.values()) and len(set(costs.values())) > 1:
        before = {name: arm.get("preparation_flops") or 0.0 for name, arm in arms.items()}
        by_compute = {
            name: [[(before[name] + tokens * costs[name], loss) for tokens, loss in run] for run in runs]
            for name, runs in curves.items()
        }
        pictures.append(("By compute", "by-compute", "FLOPs", by_compute))
    figures = [
        curve_figure(title, drawn, titles, name=name, markers=True, of="domain loss", unit=unit)
        for title, name, unit, drawn in pictures
    ]
    return f'{line_legend(titles)}\n<div class="curves">{"".join(figures)}</div>'


def _scatter(title: str, points: Points, base: tuple[float, float] | None, *, name: str, words: str) -> str:
    def draw(axes: Any) -> None:
        for index, seeds in enumerate(points.values()):
            if seeds:
                marker, color = MARKERS[index % len(MARKERS)], arm_color(index)
                axes.plot(*zip(*seeds, strict=True), linestyle="", marker=marker, markersize=7, color=color, alpha=0.8)
        if base is not None:
            axes.plot(*base, linestyle="", marker="*", markersize=12, color=INK)
            axes.annotate("base", base, xytext=(9, 0), textcoords="offset points", va="center", color=INK)
        axes.grid(axis="x", color=axes.spines["bottom"].get_edgecolor(), linewidth=0.8)
        axes.margins(0.12)
        axes.set_xlabel("change of loss on the old text, nats per token", color=INK)
        axes.set_ylabel("domain loss, nats per token", color=INK)

    return page_figure(title, name=name, words=words, num_arms=len(points), draw=draw)


def _crowded(points: Sequence[tuple[float, float]], base: tuple[float, float]) -> bool:
    for values, origin in zip(zip(*points, strict=True), base, strict=True):
        extent = max(*values, origin) - min(*values, origin)
        if len(points) > 1 and extent > 0 and max(values) - min(values) < _CLOSER * extent:
            return True
    return False
