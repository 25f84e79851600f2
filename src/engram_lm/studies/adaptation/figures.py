"""The pictures of an adaptation: what was learned against what was forgotten, and how it was learned."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from engram_lm.page.figure import INK, MARKERS, arm_color, line_legend, marker_legend, page_figure
from engram_lm.studies.adaptation.finding import (
    arm_runs,
    arm_title,
    change_on_old_text,
    finite_loss,
    loss_before,
    share_kept,
)
from engram_lm.studies.curves import curve_figure, finite_points

_CLOSER = 0.5
"""Share of the way from the base to the farthest run below which the runs get a picture of their own."""

GOALS = {"retained": 0.01, "tasks": 0.99}
"""What an adaptation that hurts nothing keeps to: the rise of the loss on unlike text, in nats per token, at most, and
the share of the benchmarks' scores at least. Lines of the pictures."""


class Point(NamedTuple):
    """A trained model in a picture of the trade."""

    kept: float
    """What became of the rest: the change on the old text, or the share of the benchmarks that is left."""
    loss: float
    """Domain loss, in nats per token."""
    is_chosen: bool
    """Whether its learning rate is the one that was chosen for the arm; others were only tried."""


def trade_points(result: Mapping[str, Any], measure: str) -> dict[str, list[Point]]:
    """Find, for every arm, what each seed and each rate that was tried gained and kept.

    ``measure`` is ``"retained"``, for the change of the loss on the old text, or ``"tasks"``, for the share of the
    benchmarks' scores that is left. What has not both numbers is left out.
    """
    found: dict[str, list[Point]] = {}
    for name, arm in (result.get("arms") or {}).items():
        tried = [(trial, False) for trial in arm.get("trials") or () if trial.get("lr") != arm.get("lr")]
        found[name] = []
        for entry, is_chosen in (*((run, True) for run in arm_runs(arm)), *tried):
            loss = finite_loss(entry.get("domain"))
            kept = change_on_old_text(result, entry) if measure == "retained" else share_kept(result, entry)
            if loss is not None and kept is not None:
                found[name].append(Point(kept, loss, is_chosen))
    return found


def trade_figures(result: Mapping[str, Any]) -> str:
    """Draw the trade: domain loss against what the model lost elsewhere, every seed and rate of every arm a point.

    Elsewhere is the old text, and the benchmarks where there are some. The old text is drawn closer too, where runs
    crowd. The HTML is empty where no run has both numbers.
    """
    titles = {name: arm_title(arm, name) for name, arm in (result.get("arms") or {}).items()}
    before = loss_before(result, "domain")
    figures = []
    for measure, at_base, form, axis in (
        ("retained", 0.0, "+.3f", "change of loss on the old text, nats per token"),
        ("tasks", 1.0, ".1%", "share of the benchmarks’ scores that is left"),
    ):
        points = trade_points(result, measure)
        drawn = [point for some in points.values() for point in some]
        if not drawn:
            continue
        said = "; ".join(
            f"{titles[name]}: " + ", ".join(f"{point.kept:{form}} and {point.loss:.3f}" for point in some)
            for name, some in points.items()
            if some
        )
        base = None if before is None else Point(at_base, before, True)
        what = "Change on the old text" if measure == "retained" else "Share of the benchmarks left"
        about: dict[str, Any] = {"axis": axis, "goal": GOALS[measure]}
        if base:
            words = f"{what} and domain loss, with the base at {at_base:g} and {before:.3f}. {said}"
            title = "From the base" if measure == "retained" else "Benchmarks"
            name = "forgetting" if measure == "retained" else "benchmarks"
            figures.append(_scatter(title, points, base, name=name, words=words, **about))
        # If all runs moved the same way from the base, their differences are too small to be seen beside it.
        if measure == "retained" and (not base or _crowded(drawn, base)):
            words = f"{what} and domain loss. {said}"
            figures.append(_scatter("Closer", points, None, name="closer", words=words, **about))
    return f'{marker_legend(titles)}\n<div class="curves">{"".join(figures)}</div>' if figures else ""


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


def _scatter(
    title: str,
    points: Mapping[str, Sequence[Point]],
    base: Point | None,
    *,
    name: str,
    words: str,
    axis: str,
    goal: float,
) -> str:
    def draw(axes: Any) -> None:
        for index, some in enumerate(points.values()):
            marker, color = MARKERS[index % len(MARKERS)], arm_color(index)
            for point in some:
                filled = {"markersize": 7} if point.is_chosen else {"markersize": 5, "markerfacecolor": "none"}
                axes.plot(point.kept, point.loss, linestyle="", marker=marker, color=color, alpha=0.8, **filled)
        if base is not None:
            axes.plot(base.kept, base.loss, linestyle="", marker="*", markersize=12, color=INK)
            at = (base.kept, base.loss)
            axes.annotate("base", at, xytext=(9, 0), textcoords="offset points", va="center", color=INK)
        axes.grid(axis="x", color=axes.spines["bottom"].get_edgecolor(), linewidth=0.8)
        axes.margins(0.12)
        low, high = axes.get_xlim()
        if low <= goal <= high:
            axes.axvline(goal, color=INK, linewidth=1, linestyle=":")
        axes.set_xlabel(axis, color=INK)
        axes.set_ylabel("domain loss, nats per token", color=INK)

    return page_figure(title, name=name, words=words, num_arms=len(points), draw=draw)


def _crowded(points: Sequence[Point], base: Point) -> bool:
    for values, origin in (
        ([point.kept for point in points], base.kept),
        ([point.loss for point in points], base.loss),
    ):
        extent = max(*values, origin) - min(*values, origin)
        if len(points) > 1 and extent > 0 and max(values) - min(values) < _CLOSER * extent:
            return True
    return False
