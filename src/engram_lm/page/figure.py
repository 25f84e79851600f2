"""Matplotlib figures: as elements of a page, which take their colors and font from it, and as PNG files."""

import dataclasses
import functools
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engram_lm.files import replacing
from engram_lm.page.frame import escape

# Colors that matplotlib writes and nothing else contains; each becomes a CSS variable.
INK, FAINT = "#010203", "#010204"
"""Colors of text and of grid lines."""
_ARM_COLOR = "#0102{:02x}"
_FIRST_ARM = 16

DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (9, 3)), (0, (1.2, 1.2)), (0, (6, 2, 1.2, 2, 1.2, 2)))
"""How matplotlib draws the line of the n-th arm; after the last style the first one follows again."""
_LEGEND_DASHES = ("none", "8 4", "2 4", "8 4 2 4", "12 4", "2 2", "9 3 2 3 2 3")

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""How matplotlib marks the n-th arm."""
_MARKER_PATHS = (
    "M1.5 6a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
    "M2 2h8v8H2z",
    "M6 1.5L10.8 10H1.2z",
    "M6 .8L11.2 6 6 11.2.8 6z",
    "M6 10.5L1.2 2h9.6z",
    "M4.4 1.2h3.2v3.2h3.2v3.2H7.6v3.2H4.4V7.6H1.2V4.4h3.2z",
    "M3.4 1.2L6 3.8l2.6-2.6 2.2 2.2L8.2 6l2.6 2.6-2.2 2.2L6 8.2l-2.6 2.6-2.2-2.2L3.8 6 1.2 3.4z",
)

_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "engram", "font.size": 11, "path.simplify": True}


def arm_color(index: int) -> str:
    """Return the color that becomes the CSS variable ``--arm-INDEX``."""
    return _ARM_COLOR.format(_FIRST_ARM + index)


@contextmanager
def page_axes(width_inches: float, height_inches: float) -> Iterator[Any]:
    """Yield empty matplotlib axes in the page's look; draw in the block and give their figure to `page_svg`."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.grid(axis="y", color=FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelcolor=INK, pad=6)
        for side in axes.spines:
            axes.spines[side].set_visible(side == "bottom")
            axes.spines[side].set_color(FAINT)
        yield axes


def page_svg(figure: Any, *, name: str, label: str, num_arms: int) -> str:
    """Write a figure of `page_axes`, inside its block, as an ``<svg>`` with the page's colors and font and its own ids.

    ``name`` is the prefix of the ids, so that several can stand in one page; ``label`` is read out in place of the
    picture and has been escaped. It refers to nothing outside, and is the same bytes for the same figure.
    """
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\1{name}-", svg)
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r"font-family: [^;]*;", "", svg)
    colors = {INK: "currentColor", FAINT: "var(--line)"}
    colors |= {arm_color(index): f"var(--arm-{index})" for index in range(num_arms)}
    for written, color in colors.items():
        svg = svg.replace(written, color)
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None, "matplotlib writes a viewBox"
    # matplotlib escapes what it draws; the label is ours to escape, and the caller has.
    return f'<svg {view_box[0]} role="img" aria-label="{label}">' + svg[svg.index(">") + 1 :].strip()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture of a result."""

    name: str
    """Name of its file, without the ending."""
    title: str
    """What it shows, for the page and for those who cannot see it."""
    size: tuple[float, float]
    """Width and height in inches."""
    draw: Callable[[Any], None]
    """Draws it into an empty matplotlib figure."""


def page_figure(title: str, *, name: str, words: str, num_arms: int, draw: Callable[[Any], None]) -> str:
    """Draw a ``<figure>`` for a page, under a heading; ``words`` say what it shows, for those who cannot see it."""
    with page_axes(5.4, 3.5) as axes:
        draw(axes)
        svg = page_svg(axes.figure, name=name, label=escape(f"{title}. {words}"), num_arms=num_arms)
    return f"<figure><h3>{escape(title)}</h3>{svg}</figure>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panels:
    """Figures side by side with the same lines, one for each arm: for a page, or as a picture."""

    name: str
    """Prefix of the ids in the SVG, so that several can stand in one page."""
    titles: Mapping[str, str]
    """The title of each figure, as plain text, by a key that tells what it shows."""
    arms: Sequence[str]
    """Names of the lines, as plain text."""
    draw: Callable[..., None]
    """Draws one figure: called with axes, the key, and whether it is ``on_page``; see `line_style`."""

    def on_page(self, words: Callable[[str], str]) -> str:
        """Return a legend and the figures as HTML; ``words`` say what each shows, for those who cannot see it."""
        figures = []
        for key, title in self.titles.items():
            draw = functools.partial(self.draw, key=key, on_page=True)
            figures.append(
                page_figure(title, name=f"{self.name}-{key}", words=words(key), num_arms=len(self.arms), draw=draw)
            )
        return f'{line_legend({name: name for name in self.arms})}<div class="curves">{"".join(figures)}</div>'

    def in_picture(self, figure: Any) -> None:
        """Draw in a matplotlib figure."""
        for axes, key in zip(figure.subplots(1, len(self.titles)), self.titles, strict=True):
            self.draw(axes, key=key, on_page=False)
            axes.grid(axis="y", color="0.9")
        axes.legend(frameon=False, fontsize=8)


def save_pictures(pictures: Iterable[Picture], folder: Path) -> list[Path]:
    """Write pictures as PNG files, each of them whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    saved = []
    for picture in pictures:
        figure = Figure(figsize=picture.size, layout="constrained", dpi=140)
        FigureCanvasAgg(figure)
        picture.draw(figure)
        path = folder / f"{picture.name}.png"
        with replacing(path) as aside:
            figure.savefig(aside, format="png")
        saved.append(path)
    return saved


def line_style(index: int, *, on_page: bool) -> dict[str, Any]:
    """Return the color, dashes and width of the line of an arm, for ``axes.plot``."""
    color = arm_color(index) if on_page else f"C{index % 10}"
    return {"color": color, "linestyle": DASHES[index % len(DASHES)], "linewidth": 1.8}


def line_legend(titles: Mapping[str, str]) -> str:
    """Make a legend of the lines of `DASHES`, one for each arm."""
    return _legend(
        f'<svg viewBox="0 0 28 8" aria-hidden="true"><path d="M0 4H28" stroke="var(--arm-{index})" '
        f'stroke-width="2.2" stroke-dasharray="{_LEGEND_DASHES[index % len(_LEGEND_DASHES)]}"/></svg>{escape(title)}'
        for index, title in enumerate(titles.values())
    )


def marker_legend(titles: Mapping[str, str]) -> str:
    """Make a legend of the points of `MARKERS`, one for each arm."""
    return _legend(
        f'<svg class="marker" viewBox="0 0 12 12" aria-hidden="true"><path fill="var(--arm-{index})" '
        f'd="{_MARKER_PATHS[index % len(_MARKER_PATHS)]}"/></svg>{escape(title)}'
        for index, title in enumerate(titles.values())
    )


def _legend(entries: Iterator[str]) -> str:
    return '<ul class="legend">' + "\n".join(f"<li>{entry}</li>" for entry in entries) + "</ul>"
