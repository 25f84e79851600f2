"""Gates as colors behind the text, white to red, for the terminal and for a page."""

import html
from typing import TYPE_CHECKING

import numpy as np

from engram_lm.analysis.gates.trace import GateTrace
from engram_lm.analysis.token_text import visible_text
from engram_lm.errors import ConfigError

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["colored_gates", "colored_html", "gates_to_show"]

_RED = (227, 26, 28)
"""Color of a gate of 1. A gate of 0 is white, and between them the color is linear, as in the paper's figure."""


def gates_to_show(trace: GateTrace, block: int | None = None, stream: int | None = None) -> np.ndarray:
    """Choose one gate for each token, float32 ``[length]``; None means the mean over blocks or streams.

    Raises:
        ConfigError: There is no such block or stream.
    """
    gates = trace.gates if block is None else trace.gates[[trace.place_of(block)]]
    if stream is not None and not 0 <= stream < trace.num_streams:
        raise ConfigError(f"there is no stream {stream}; the memory has {trace.num_streams}, counted from 0")
    gates = gates if stream is None else gates[:, :, [stream]]
    mean: np.ndarray = gates.mean(axis=(0, 2))
    return mean


def colored_gates(trace: GateTrace, block: int | None = None, stream: int | None = None) -> "Text":
    """Lay the gates behind a text for the terminal: ``rich.print(colored_gates(trace))``.

    Both colors of each token are set, so the text looks the same on light and dark terminals. Where there are no colors
    (in a file, or with ``NO_COLOR``) the plain text remains.

    Args:
        trace: From `engram_lm.analysis.gate_trace`.
        block: A block that reads memory; None means the mean over all of them.
        stream: A residual stream; None means the mean over all of them.

    Raises:
        ConfigError: There is no such block or stream.

    Source: paper, Figure 7.
    """
    from rich.text import Text

    text = Text()
    for spelled, gate in zip(trace.texts, gates_to_show(trace, block, stream).tolist(), strict=True):
        red, green, blue = _color(gate)
        text.append(visible_text(spelled), style=f"black on #{red:02x}{green:02x}{blue:02x}")
    return text


def colored_html(trace: GateTrace, block: int | None = None, stream: int | None = None) -> str:
    """Lay the gates behind a text as HTML, for a notebook or a page; it needs no style sheet.

    Every token is a ``span`` whose title is its gate, inside one ``div`` that keeps line breaks.

    Args:
        trace: From `engram_lm.analysis.gate_trace`.
        block: A block that reads memory; None means the mean over all of them.
        stream: A residual stream; None means the mean over all of them.

    Raises:
        ConfigError: There is no such block or stream.

    Source: paper, Figure 7.
    """
    spans = []
    for spelled, gate in zip(trace.texts, gates_to_show(trace, block, stream).tolist(), strict=True):
        if spelled:
            style = "background:rgb({},{},{})".format(*_color(gate))
            spans.append(f'<span style="{style}" title="{gate:.3f}">{html.escape(visible_text(spelled))}</span>')
    style = "white-space:pre-wrap;overflow-wrap:anywhere;font-family:monospace;color:#000;background:#fff;padding:.5em"
    return f'<div style="{style}">{"".join(spans)}</div>'


def _color(gate: float) -> tuple[int, int, int]:
    share = min(max(gate, 0.0), 1.0) if gate == gate else 0.0
    red, green, blue = (round(255 + share * (full - 255)) for full in _RED)
    return red, green, blue
