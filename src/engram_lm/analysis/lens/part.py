"""The logit lens' part of an analysis: how far each layer is from the final prediction."""

from collections.abc import Iterator, Mapping
from typing import Any

from engram_lm.analysis.lens.lens import LogitLens
from engram_lm.analysis.part import Part, Work
from engram_lm.analysis.protocol import Analysis
from engram_lm.page.figure import INK, MARKERS, Picture, line_legend, line_style, page_figure
from engram_lm.page.frame import section, table
from engram_lm.page.number_text import count_text, number_text

__all__ = ["LensPart"]

_ENOUGH = 16_384
"""Positions after which the lens begins to skip some; the head costs as much for each layer as for the whole model."""
_FIGURES = {
    "kl": ("Divergence from the final prediction", "KL(final‖layer), nats"),
    "agreement": ("Same most likely token", "share of positions"),
}
"""What is drawn: its title, and what the vertical axis shows."""


class LensPart(Part):
    """What each layer would predict."""

    title = "logit lens"

    def analyses(self, work: Work) -> dict[str, Analysis]:
        """Look through the lens at as many positions as are enough."""
        return {self.name: LogitLens(one_in=max(1, len(work.tokens) // _ENOUGH))}

    def summary(self, result: Mapping[str, Any]) -> Iterator[str]:
        """Return how far the embedding is from the prediction, and how soon half of that is gone."""
        for model, curve in self.by_model(result).items():
            yield (
                f"{model}: {number_text(curve['kl'][0])} nats from the final prediction at the embedding, half of it "
                f"gone after {number_text(curve['kl_depth'])} of {curve['num_layers']} layers"
            )

    def picture(self, result: Mapping[str, Any]) -> Picture | None:
        """Draw divergence and agreement side by side."""
        curves = self.by_model(result)

        def draw(figure: Any) -> None:
            for axes, key in zip(figure.subplots(1, 2), _FIGURES, strict=True):
                _draw(axes, curves, key, on_page=False)
                axes.grid(axis="y", color="0.9")
            axes.legend(frameon=False, fontsize=8)

        return self.drawn(9.6, 3.8, draw) if curves else None

    def section(self, result: Mapping[str, Any], page_only: Mapping[str, Any]) -> str:
        """Return the curves by layer, all models together."""
        curves = {name: curve for name, curve in self.by_model(result).items() if curve["num_positions"]}
        if not curves:
            return ""
        figures = [
            page_figure(
                title,
                name=f"lens-{key}",
                words="by layer. "
                + "; ".join(f"{name}: {', '.join(map(number_text, curve[key]))}" for name, curve in curves.items()),
                num_arms=len(curves),
                draw=lambda axes, key=key: _draw(axes, curves, key, on_page=True),  # type: ignore[misc]
            )
            for key, (title, _) in _FIGURES.items()
        ]
        rows = [
            [
                name,
                str(curve["num_layers"]),
                number_text(curve["kl"][0]),
                number_text(curve["kl_depth"]),
                number_text(curve["prediction_depth"]),
                count_text(curve["num_positions"]),
            ]
            for name, curve in curves.items()
        ]
        columns = (
            "Model", "Layers", "Divergence at 0", "Half of it gone after", "Prediction settled after", "Positions",
        )  # fmt: skip
        return section(
            "lens",
            "What each layer would predict",
            "<p>The model’s own head is applied to the hidden state behind every layer; the curves show how far that "
            "prediction is from the final one. Layer 0 is the embedding. If a curve falls early, the model has its "
            "answer ready early. Large points are layers that read memory.</p>"
            f'{line_legend({name: name for name in curves})}<div class="curves">{"".join(figures)}</div>'
            f"{table(columns, rows, label='The logit lens in numbers')}"
            '<p class="note">Divergence is KL(final‖layer) in nats. Depths are counted in layers.</p>',
        )


def _draw(axes: Any, curves: Mapping[str, Mapping[str, Any]], key: str, *, on_page: bool) -> None:
    """Draw a value of the logit lens against depth; layers that read memory have a large point.

    Args:
        axes: Of matplotlib.
        curves: By model, a `LensCurve` as plain values.
        key: Of `_FIGURES`.
        on_page: Whether the page sets the colors of lines.
    """
    from matplotlib.ticker import MaxNLocator

    ink = INK if on_page else "black"
    depths = {curve["num_layers"] for curve in curves.values()}
    for index, (name, curve) in enumerate(curves.items()):
        places = list(range(curve["num_layers"] + 1)) if len(depths) == 1 else curve["relative_depth"]
        values = [float("nan") if value is None else value for value in curve[key]]
        style = line_style(index, on_page=on_page)
        axes.plot(places, values, marker="o", markersize=3, label=name, **style)
        reading = [block + 1 for block in curve["memory_blocks"]]
        axes.plot(
            [places[entry] for entry in reading],
            [values[entry] for entry in reading],
            linestyle="none",
            marker=MARKERS[index % len(MARKERS)],
            markersize=7,
            color=style["color"],
        )
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=len(depths) == 1))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer" if len(depths) == 1 else "share of the layers", color=ink)
    axes.set_ylabel(_FIGURES[key][1], color=ink)
