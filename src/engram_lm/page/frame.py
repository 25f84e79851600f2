"""A page that opens offline and asks nothing of the network: its frame, its look, and text made safe for it."""

import datetime
import html
import importlib.resources
import json
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class Html(str):
    """Text that is HTML already, which `escape` leaves as it is."""


def render_page(
    *,
    title: str,
    header: str,
    sections: Sequence[str],
    footer: str,
    colors: Sequence[str],
    style: str,
    script: str = "",
    data: Any = None,
) -> str:
    """Put an HTML page together, with its styles, scripts and pictures inside.

    The title and the names of the CSS variables with the colors of the arms (the n-th becomes ``--arm-n``) are plain
    text, ``script`` is JavaScript that reads ``data`` as JSON from the element of that name, and all else is HTML;
    ``style`` follows the CSS of all pages. Without a script, the page forbids all scripts.
    """
    elements = ""
    if script:
        # Inside a script element only "<" could end it or open a comment.
        plain = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
        elements = f'<script type="application/json" id="data">{plain}</script>\n<script>\n{script}</script>'
    frame = importlib.resources.files(__package__).joinpath("frame.html").read_text(encoding="utf-8")
    return string.Template(frame).substitute(
        title=escape(title),
        scripts="script-src 'unsafe-inline'; " if script else "",
        style=style,
        colors="; ".join(f"--arm-{index}: var(--{name})" for index, name in enumerate(colors)),
        header=header,
        sections="\n".join(section for section in sections if section),
        footer=footer,
        script=elements,
    )


def section(name: str, title: str, body: str) -> str:
    """Put a part of the page under a heading; the name and the title must be our own text, not a file's."""
    heading = f'<h2 id="{name}-title">{title}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">{heading}\n{body}\n</section>'


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    label: str,
    kind: str = "",
    key_columns: Iterable[str] = (),
    row_headings: bool = True,
) -> str:
    """Make a table that scrolls sideways if the window is narrow.

    Cells are plain text or `Html`, and ``label`` says what the table is for those who cannot see it. ``kind`` is a CSS
    class; ``key_columns`` name the columns to stress, and ``row_headings`` make the first cell name its row.
    """
    keys = set(key_columns)
    lines = []
    for row in rows:
        cells = [
            f'<th scope="row">{escape(cell)}</th>'
            if row_headings and index == 0
            else f'<td class="key">{escape(cell)}</td>'
            if column in keys
            else f"<td>{escape(cell)}</td>"
            for index, (column, cell) in enumerate(zip(columns, row, strict=True))
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "\n".join(lines)
    return (
        f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0"><table class="{kind}">'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    )


def definitions(values: Mapping[str, Any]) -> str:
    """Make a list of names and values of any kind."""
    entries = "".join(
        f"<dt>{escape(str(name).replace('_', ' '))}</dt><dd>{escape(plain_text(value))}</dd>"
        for name, value in values.items()
    )
    return f"<dl>{entries}</dl>"


def plain_text(value: Any) -> str:
    """Write any value of a result for people."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, str):
        return _date(value) or value
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain_text(item)}" for key, item in value.items()) or "none"
    if isinstance(value, Iterable):
        return ", ".join(map(plain_text, value)) or "none"
    return str(value)


def escape(value: Any) -> str:
    """Make any text safe for the page: markup is escaped, and characters that HTML cannot hold become visible signs."""
    if isinstance(value, Html):
        return value
    text = str(value).encode("utf-8", "replace").decode()
    text = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda match: chr(0x2400 + ord(match[0])), text)
    return html.escape(re.sub(r"[\x7f-\x9f]", "\ufffd", text))


def _date(value: str) -> str | None:
    if not re.match(r"\d{4}-\d\d-\d\dT", value):
        return None
    try:
        moment = datetime.datetime.fromisoformat(value)
    except ValueError:
        return None
    return f"{moment:%Y-%m-%d %H:%M} {moment:%Z}".strip()
