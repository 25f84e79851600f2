"""The loss curves of a quickstart as a picture, for those who would rather paste than open a page."""

from collections.abc import Mapping, Sequence
from typing import Any

from engram_lm.page.figure import DASHES, Picture
from engram_lm.studies.curves import finite_points, loss_limits, smooth

__all__ = ["curves"]


def curves(result: Mapping[str, Any]) -> Sequence[Picture]:
    """Draw held-out and training loss of all arms side by side.

    Args:
        result: A result in the format ``engram.quickstart.1``.
    """

    def draw(figure: Any) -> None:
        kinds = {"held_out_curve": "held-out loss", "train_curve": "training loss"}
        for axes, (kind, title) in zip(figure.subplots(1, 2), kinds.items(), strict=True):
            points = []
            for index, arm in enumerate(result["arms"].values()):
                for number, run in enumerate(arm["runs"]):
                    drawn = finite_points(run[kind]) if kind == "held_out_curve" else smooth(run[kind])
                    points += drawn
                    label = arm["title"] if number == 0 else None
                    axes.plot(*zip(*drawn, strict=True), color=f"C{index}", linestyle=DASHES[index % 4], label=label)
            limits = loss_limits(points)
            if limits is not None:
                axes.set_ylim(*limits)
            axes.set(title=title, xlabel="training tokens", ylabel="nats per token")
            axes.grid(alpha=0.3)
            axes.legend()

    return [Picture(name="curves", title="Loss while training", size=(10, 4), draw=draw)]
