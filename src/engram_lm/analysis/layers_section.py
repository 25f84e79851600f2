"""What the layers predict, and which layers of two models resemble each other."""

from collections.abc import Mapping, Sequence
from typing import Any

from engram_lm.analysis.figures import draw_lens
from engram_lm.page.figure import INK, arm_color, line_legend, page_axes, page_svg
from engram_lm.page.frame import escape, section, table
from engram_lm.page.number_text import count_text, number_text

__all__ = ["cka_section", "lens_section"]

_WIDTH_INCHES, _HEIGHT_INCHES = 5.4, 3.5


def lens_section(entries: Sequence[Mapping[str, Any]]) -> str:
    """Curves of divergence and agreement by layer, all models together."""
    curves = {
        name: curve
        for entry in entries
        for name, curve in ((entry.get("result") or {}).get("models") or {}).items()
        if curve["num_positions"]
    }
    if not curves:
        return ""
    figures = []
    for key, title in (("kl", "Divergence from the final prediction"), ("agreement", "Same most likely token")):
        with page_axes(_WIDTH_INCHES, _HEIGHT_INCHES) as axes:
            draw_lens(axes, curves, key, colors=[arm_color(index) for index in range(len(curves))], ink=INK)
            words = "; ".join(
                f"{name}: " + ", ".join(number_text(v) for v in curve[key]) for name, curve in curves.items()
            )
            label = escape(f"{title} by layer. {words}")
            svg = page_svg(axes.figure, name=f"lens-{key}", label=label, num_arms=len(curves))
        figures.append(f"<figure><h3>{title}</h3>{svg}</figure>")
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
    columns = ("Model", "Layers", "Divergence at 0", "Half of it gone after", "Prediction settled after", "Positions")
    return section(
        "lens",
        "What each layer would predict",
        "<p>The model’s own head, applied to the hidden state behind every layer: how far its prediction is from the "
        "final one. Layer 0 is the embedding. A curve that falls early belongs to a model that has its answer ready "
        "early. Large points are layers that read memory.</p>"
        f'{line_legend({name: name for name in curves})}<div class="curves">{"".join(figures)}</div>'
        f"{table(columns, rows, label='The logit lens in numbers')}"
        '<p class="note">Divergence is KL(final‖layer) in nats. Depths are counted in layers.</p>',
    )


def cka_section(entries: Sequence[Mapping[str, Any]]) -> str:
    """A map for each pair of models, with the line of the layers that answer to each other."""
    results = [entry["result"] for entry in entries if "result" in entry]
    if not results:
        return ""
    maps = "\n".join(_map(found, result) for result in results for found in result["maps"])
    positions = ", ".join(count_text(result["num_positions"]) for result in results)
    return section(
        "cka",
        "Which layers are alike",
        "<p>How alike two layers represent the same tokens, by linear CKA: 0 where they have nothing in common, 1 "
        "where they are the same but for a rotation and a scale. The line shows which depth of the model at the left "
        "each layer of the one below answers to; the dotted one is what the left model gets against itself. Where the "
        "line is above the dotted one, a layer does what comes later in the other model. Point at a cell, or move to a "
        "map with Tab and walk it with the arrow keys.</p>"
        f'<div class="maps">{maps}</div>'
        f'<p class="note">Unbiased estimate over {positions} positions. Entry 0 is the embedding, entry n the output '
        f"of layer n. The line is {_line(results)}.</p>",
    )


def _line(results: Sequence[Mapping[str, Any]]) -> str:
    numbers = sorted({found["top_k"] for result in results for found in result["maps"]})
    if numbers == [1]:
        return "at the most similar layer"
    return f"the center of the {' or '.join(map(str, numbers))} most similar layers, so it cannot reach the ends"


_CELL = 20
_AHEAD = {True: "further on", False: "before"}


def _map(found: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    similarity = found["similarity"]
    num_rows, num_columns = len(similarity), len(similarity[0])
    own = found["row_model"] == found["column_model"]
    row_model, column_model = escape(found["row_model"]), escape(found["column_model"])
    font = max(num_columns, num_rows, 6) * _CELL * 0.036
    left, bottom = 3.6 * font, 3.6 * font
    width, height = num_columns * _CELL, num_rows * _CELL
    cells, numbers = [], []
    for row in reversed(range(num_rows)):  # entry 0 at the bottom, as on any vertical axis
        for column, value in enumerate(similarity[row]):
            x, y = column * _CELL, (num_rows - 1 - row) * _CELL
            label = f"{row_model} {row}, {column_model} {column}: {number_text(value)}"
            cells.append(
                f'<rect class="cell" x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" aria-label="{label}" '
                f'fill="rgb(var(--gate) / {max(0.0, min(1.0, value or 0.0)):.3f})"/>'
            )
            if max(num_rows, num_columns) <= _MOST_NUMBERS:
                numbers.append(
                    f'<text class="inside" x="{x + _CELL / 2}" y="{y + _CELL / 2 + 0.35 * 0.8 * font:.1f}" '
                    f'font-size="{0.8 * font:.1f}" text-anchor="middle">{number_text(value)}</text>'
                )
    lines = _path(found["control"], num_rows, "control") + ("" if own else _path(found["alignment"], num_rows, "soft"))
    what = f"CKA of {row_model} with itself" if own else f"CKA of {row_model} with {column_model}"
    gains = [value for value in found["gain"] if value is not None]
    ahead = sum(gains) / len(gains) if gains else 0.0
    said = (
        "" if own or not gains else f"On average, layers answer to ones {abs(ahead):.2f} layers {_AHEAD[ahead >= 0]}."
    )
    label = f"{what}, {num_rows} by {num_columns} layers; walk over it with the arrow keys"
    axes = _ticks(num_rows, num_columns, font)
    return (
        f'<figure class="map"><h3>{what}</h3>'
        f'<svg viewBox="{-left:.0f} {-0.5 * font:.0f} {width + left + 2:.0f} {height + bottom + 0.5 * font:.0f}" '
        f'tabindex="0" role="application" aria-label="{label}" data-columns="{num_columns}">'
        f"{''.join(cells)}{''.join(numbers)}{lines}{axes}"
        f'<text x="{width / 2}" y="{height + 3.1 * font:.1f}" font-size="{font:.1f}" text-anchor="middle">'
        f"layers of {column_model}</text>"
        f'<text transform="translate({-2.5 * font:.1f} {height / 2}) rotate(-90)" font-size="{font:.1f}" '
        f'text-anchor="middle">layers of {row_model}</text></svg>'
        f'<p class="line note" role="status">{said}</p></figure>'
    )


_MOST_NUMBERS = 9
"""Layers up to which each cell shows its number."""
_MOST_TICKS = 9


def _ticks(num_rows: int, num_columns: int, font: float) -> str:
    height = num_rows * _CELL
    parts = [
        f'<text x="{(column + 0.5) * _CELL}" y="{height + 1.4 * font:.1f}" font-size="{font:.1f}" '
        f'text-anchor="middle">{column}</text>'
        for column in range(0, num_columns, -(-num_columns // _MOST_TICKS))
    ]
    step = -(-num_rows // _MOST_TICKS)
    for row in range(0, num_rows, step):
        y = height - (row + 0.5) * _CELL + 0.35 * font
        parts.append(f'<text x="{-0.6 * font:.1f}" y="{y:.1f}" font-size="{font:.1f}" text-anchor="end">{row}</text>')
    return "".join(parts)


def _path(values: Sequence[float | None], num_rows: int, kind: str) -> str:
    """A line over the columns at a depth in the rows; broken where it is not known."""
    commands, drawing = [], False
    for column, value in enumerate(values):
        if value is None:
            drawing = False
            continue
        x, y = (column + 0.5) * _CELL, (num_rows - 0.5 - value) * _CELL
        commands.append(f"{'L' if drawing else 'M'}{x:.1f} {y:.1f}")
        drawing = True
    return f'<path class="{kind}" d="{"".join(commands)}"/>' if commands else ""
