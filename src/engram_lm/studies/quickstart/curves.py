"""The loss curves of a quickstart as a picture, for those who would rather paste than open a page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engram_lm.page.figure import DASHES
from engram_lm.studies.curves import finite_points, loss_limits, smooth

__all__ = ["save_curves"]


def save_curves(result: Mapping[str, Any], path: Path) -> None:
    """Write held-out and training loss of all arms side by side.

    Args:
        result: A result in the format ``engram.quickstart.1``.
        path: The picture; its ending says of which kind.
    """
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
                drawn = finite_points(run[curve]) if curve == "held_out_curve" else smooth(run[curve])
                points += drawn
                label = arm["title"] if number == 0 else None
                axes.plot(*zip(*drawn, strict=True), color=f"C{index}", linestyle=DASHES[index % 4], label=label)
        limits = loss_limits(points)
        if limits is not None:
            axes.set_ylim(*limits)
        axes.set(title=title, xlabel="training tokens", ylabel="nats per token")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)
