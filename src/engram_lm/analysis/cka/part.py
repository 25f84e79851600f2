"""The part of an analysis that compares layers: a map of CKA for each pair of models."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from engram_lm.analysis.cka.cka import Cka
from engram_lm.analysis.part import Entry, Part, Work
from engram_lm.analysis.protocol import Analysis
from engram_lm.analysis.subject import Subject
from engram_lm.page.figure import Picture
from engram_lm.page.frame import escape, section
from engram_lm.page.number_text import count_text, mean_of, number_text

_ENOUGH = 32_768
"""Positions after which CKA begins to skip some."""
_MINIBATCH = 256
"""Positions that are compared with each other."""
_LARGEST_POOL = 32 * _MINIBATCH


class CkaPart(Part):
    """Which layers are alike."""

    title = "CKA"

    def analyses(self, work: Work) -> dict[str, Analysis]:
        """Compare layers, with a pool of positions that takes a quarter of what the windows may take."""
        position = sum(
            (one.num_layers + 1) * one.num_streams * one.hidden_size * one.dtype.itemsize for one in work.subjects
        )
        pool = min(max(_MINIBATCH, work.options.window_bytes // 4 // position), _LARGEST_POOL)
        one_in = max(1, len(work.tokens) // _ENOUGH)
        return {self.name: Cka(one_in=one_in, minibatch_size=_MINIBATCH, pool_size=pool)}

    def across(self, groups: Sequence[Sequence[Subject]]) -> Iterable[Entry]:
        """Say why models of different vocabularies are not compared."""
        if len(groups) < 2:
            return
        sizes = "; ".join(
            f"{', '.join(one.name for one in group)}: {len(group[0].tokenizer)} tokens, {group[0].vocabulary_digest}"
            for group in groups
        )
        reason = f"models of different vocabularies have no tokens in common at which to compare them ({sizes})"
        yield {"models": [subject.name for group in groups for subject in group], "not_applicable": reason}

    def summary(self, result: Mapping[str, Any]) -> Iterator[str]:
        """Return how far the layers of each model are ahead of the baseline's."""
        for found in self._maps(result):
            if found["row_model"] == found["column_model"]:
                continue
            ahead = mean_of(found["gain"])
            yield (
                f"layers of {found['column_model']} and {found['row_model']} cannot be aligned"
                if ahead is None
                else f"layers of {found['column_model']} correspond to layers of {found['row_model']} that lie "
                f"{abs(ahead):.2f} layers {_AHEAD[ahead >= 0]}, on average"
            )

    def picture(self, result: Mapping[str, Any]) -> Picture | None:
        """Draw the maps side by side."""
        maps = self._maps(result)
        return self.drawn(4.8 * len(maps), 4.4, lambda figure: _draw_maps(figure, maps)) if maps else None

    def section(self, result: Mapping[str, Any], page_only: Mapping[str, Any]) -> str:
        """Return a map for each pair of models, with the line of the layers that correspond to each other."""
        results = self.results(result)
        if not results:
            return ""
        positions = ", ".join(count_text(found["num_positions"]) for found in results)
        return section(
            "cka",
            "Which layers are alike",
            "<p>How alike two layers represent the same tokens, by linear CKA: 0 where they have nothing in common, 1 "
            "where they are the same up to a rotation and a scale. The line shows, for each layer of the model below, "
            "the depth of the model at the left that it corresponds to; the dotted line shows the same for the left "
            "model and itself. Where the line is above the dotted one, a layer does what the other model does later. "
            "Point at a cell, or move to a map with Tab and walk through it with the arrow keys.</p>"
            f'<div class="maps">{chr(10).join(map(_map, self._maps(result)))}</div>'
            f'<p class="note">Unbiased estimate over {positions} positions. Entry 0 is the embedding, entry n the '
            f"output of layer n. The line is {_line(self._maps(result))}.</p>",
        )

    def _maps(self, result: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [found for one in self.results(result) for found in one["maps"]]


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


def _line(maps: Sequence[Mapping[str, Any]]) -> str:
    numbers = sorted({found["top_k"] for found in maps})
    if numbers == [1]:
        return "at the most similar layer"
    return f"the center of the {' or '.join(map(str, numbers))} most similar layers, so it cannot reach the ends"


_CELL = 20
_AHEAD = {True: "further on", False: "further back"}


def _map(found: Mapping[str, Any]) -> str:
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
    ahead = None if own else mean_of(found["gain"])
    said = (
        ""
        if ahead is None
        else f"On average, layers correspond to layers that lie {abs(ahead):.2f} layers {_AHEAD[ahead >= 0]}."
    )
    label = f"{what}, {num_rows} by {num_columns} layers; walk through it with the arrow keys"
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
