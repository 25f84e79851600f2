"""The pictures of an analysis, for a page or as PNG."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engram_lm.files import replacing
from engram_lm.page.figure import DASHES, MARKERS

__all__ = ["draw_lens", "draw_rows", "row_curves", "save_figures"]

_LENS_AXES = {"kl": "KL(final‖layer), nats", "agreement": "share of positions"}


def draw_lens(axes: Any, curves: Mapping[str, Mapping[str, Any]], key: str, *, colors: Sequence[str], ink: str) -> None:
    """Draw a value of the logit lens against depth; layers that read memory have a large point.

    Args:
        axes: Of matplotlib.
        curves: By model, a `LensCurve` as plain values.
        key: ``kl`` or ``agreement``.
        colors: One for each model.
        ink: Color of labels.
    """
    depths = {curve["num_layers"] for curve in curves.values()}
    for index, (name, curve) in enumerate(curves.items()):
        places = list(range(curve["num_layers"] + 1)) if len(depths) == 1 else curve["relative_depth"]
        values = [float("nan") if value is None else value for value in curve[key]]
        style = {"color": colors[index], "linestyle": DASHES[index % len(DASHES)], "linewidth": 1.8}
        axes.plot(places, values, marker="o", markersize=3, label=name, **style)
        reading = [block + 1 for block in curve["memory_blocks"]]
        axes.plot(
            [places[entry] for entry in reading],
            [values[entry] for entry in reading],
            linestyle="none",
            marker=MARKERS[index % len(MARKERS)],
            markersize=7,
            color=colors[index],
        )
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=len(depths) == 1))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer" if len(depths) == 1 else "share of the layers", color=ink)
    axes.set_ylabel(_LENS_AXES[key], color=ink)


_ROW_AXES = {"hits": "times read", "covered": "share of reads"}


def row_curves(usages: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Bring the tables of all models together: ``ranks``, ``hits``, ``covered``, and what a curve says in words.

    Args:
        usages: By model, a `RowUsage` as plain values.
    """
    curves = {}
    for model, usage in usages.items():
        for place, blocks in enumerate(usage["tables"]):
            table = f"block{'s' * (len(blocks) > 1)} {', '.join(map(str, blocks))}"
            exponent = usage["zipf_exponent"][place]
            slope = "" if exponent is None else f"falls like rank to the power of −{exponent:.2f}"
            known = [index for index, hits in enumerate(usage["hits"][place]) if hits]
            curves[f"{model}, {table}" if len(usages) > 1 else table] = {
                "ranks": [usage["ranks"][index] for index in known],
                "hits": [usage["hits"][place][index] for index in known],
                "covered": [usage["covered"][place][index] for index in known],
                "words": slope,
            }
    return curves


def draw_rows(axes: Any, curves: Mapping[str, Mapping[str, Any]], key: str, *, colors: Sequence[str], ink: str) -> None:
    """Draw how often rows are read, or what the hottest ones answer, against their rank.

    Args:
        axes: Of matplotlib.
        curves: Of `row_curves`.
        key: ``hits`` or ``covered``.
        colors: One for each curve.
        ink: Color of labels.
    """
    from matplotlib.ticker import LogLocator

    for index, (name, curve) in enumerate(curves.items()):
        style = {"color": colors[index], "linestyle": DASHES[index % len(DASHES)], "linewidth": 1.8}
        axes.plot(curve["ranks"], curve[key], label=name, **style)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(numticks=6))
    if key == "hits":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
    else:
        axes.set_ylim(0, 1.02)
    axes.minorticks_off()
    axes.set_xlabel("rank of the row, hottest first", color=ink)
    axes.set_ylabel(_ROW_AXES[key], color=ink)


def save_figures(result: Mapping[str, Any], folder: Path) -> list[str]:
    """Write a PNG for each part that has something to show.

    Args:
        result: In the format ``engram_lm.analysis.1``.
        folder: Where to.

    Returns:
        Names of the files.
    """
    saved = []
    for name, size, draw in _pictures(result):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained", dpi=140)
        FigureCanvasAgg(figure)
        draw(figure)
        with replacing(folder / name) as aside:
            figure.savefig(aside, format="png")
        saved.append(name)
    return saved


_Picture = tuple[str, tuple[float, float], Callable[[Any], None]]


def _pictures(result: Mapping[str, Any]) -> Iterator[_Picture]:
    parts = result["parts"]
    gates = {name: found for entry in _found(parts, "gates") for name, found in entry["models"].items()}
    if gates:
        yield "gates.png", (6.4, 3.6), lambda figure: _draw_histograms(figure.subplots(), gates)
    curves = {name: curve for entry in _found(parts, "lens") for name, curve in entry["models"].items()}
    if curves:
        yield "lens.png", (9.6, 3.8), lambda figure: _draw_lenses(figure, curves)
    maps = [found for entry in _found(parts, "cka") for found in entry["maps"]]
    if maps:
        yield "cka.png", (4.8 * len(maps), 4.4), lambda figure: _draw_maps(figure, maps)
    effects = {entry["models"][0]: entry["result"] for entry in parts.get("suppression") or () if "result" in entry}
    if effects:
        rows = sum(len(effect["conditions"]) - 1 for effect in effects.values())
        yield "suppression.png", (7.2, 1.0 + 0.36 * rows), lambda figure: _draw_losses(figure.subplots(), effects)
    usages = {name: usage for entry in _found(parts, "rows") for name, usage in entry["models"].items()}
    if usages:
        yield "rows.png", (9.6, 3.8), lambda figure: _draw_row_curves(figure, row_curves(usages))


def _found(parts: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    return [entry["result"] for entry in parts.get(name) or () if "result" in entry]


def _draw_histograms(axes: Any, gates: Mapping[str, Mapping[str, Any]]) -> None:
    index = 0
    for name, found in gates.items():
        for place, block in enumerate(found["blocks"]):
            counts = [sum(values) for values in zip(*found["histogram"][place], strict=True)]
            total = sum(counts) or 1
            label = f"{name}, block {block}" if len(gates) > 1 else f"block {block}"
            style = {"color": f"C{index % 10}", "linestyle": DASHES[index % len(DASHES)]}
            axes.stairs([count / total for count in counts], found["bin_edges"], label=label, linewidth=1.6, **style)
            index += 1
    axes.set_xlim(0, 1)
    axes.set_xlabel("gate")
    axes.set_ylabel("share of positions and streams")
    axes.legend(frameon=False, fontsize=8)


def _draw_lenses(figure: Any, curves: Mapping[str, Mapping[str, Any]]) -> None:
    colors = [f"C{index % 10}" for index in range(len(curves))]
    for axes, key in zip(figure.subplots(1, 2), _LENS_AXES, strict=True):
        draw_lens(axes, curves, key, colors=colors, ink="black")
        axes.grid(axis="y", color="0.9")
    axes.legend(frameon=False, fontsize=8)


def _draw_row_curves(figure: Any, curves: Mapping[str, Mapping[str, Any]]) -> None:
    colors = [f"C{index % 10}" for index in range(len(curves))]
    for axes, key in zip(figure.subplots(1, 2), _ROW_AXES, strict=True):
        draw_rows(axes, curves, key, colors=colors, ink="black")
        axes.grid(axis="y", color="0.9")
    axes.legend(frameon=False, fontsize=8)


def _draw_maps(figure: Any, maps: Sequence[Mapping[str, Any]]) -> None:
    image = None
    every = figure.subplots(1, len(maps), squeeze=False)[0]
    for axes, found in zip(every, maps, strict=True):
        values = [[float("nan") if value is None else value for value in row] for row in found["similarity"]]
        image = axes.imshow(values, origin="lower", vmin=0, vmax=1, cmap="Oranges", aspect="auto")
        for key, style in (("control", "k:"), ("alignment", "k--")):
            line = [float("nan") if value is None else value for value in found[key]]
            if key == "control" or found["row_model"] != found["column_model"]:
                axes.plot(range(len(line)), line, style, linewidth=1.2)
        axes.set_xlabel(f"layers of {found['column_model']}")
        axes.set_ylabel(f"layers of {found['row_model']}")
    figure.colorbar(image, ax=every.tolist(), label="CKA")


def _draw_losses(axes: Any, effects: Mapping[str, Mapping[str, Any]]) -> None:
    names, added = [], []
    for name, effect in effects.items():
        for condition, loss in zip(effect["conditions"][1:], effect["loss"][1:], strict=True):
            if loss is not None and effect["loss"][0] is not None:
                names.append(f"{name}: {condition['name']}" if len(effects) > 1 else condition["name"])
                added.append(loss - effect["loss"][0])
    axes.barh(range(len(names)), added, color="C0")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.set_xlabel("nats per token added to the loss")
