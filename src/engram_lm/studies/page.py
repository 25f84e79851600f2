"""The page of a study: its question, what came out, its pictures, and how it was made."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engram_lm.page.frame import definitions, escape, render_page, section, table

__all__ = ["Section", "facts_section", "page_footer", "render_study"]

Section = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""A table of a page: its heading, its columns, and its rows."""

_STYLE = "figure img { max-width: 100%; background: white; border-radius: 4px }"


def render_study(
    *,
    question: str,
    headline: str,
    detail: str,
    tables: Sequence[Section],
    pictures: Mapping[str, Path],
    result: Mapping[str, Any],
) -> str:
    """Render the page of a study.

    Args:
        question: What was asked.
        headline: What came out.
        detail: What to know about the numbers.
        tables: Tables of numbers, as plain text.
        pictures: Title and PNG file of every picture; the files become part of the page.
        result: The result: of its own facts, command, machine, versions and settings are shown.

    Returns:
        An HTML page with its styles and pictures inside.
    """
    header = f'<p class="eyebrow">{escape(question)}</p><h1>{escape(headline)}</h1><p class="lead">{escape(detail)}</p>'
    sections = [
        section(f"table-{number}", escape(title), table(columns, rows, label=title))
        for number, (title, columns, rows) in enumerate(tables)
    ]
    figures = "\n".join(
        f'<figure><h3>{escape(title)}</h3><img alt="{escape(title)}" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"></figure>'
        for title, path in pictures.items()
    )
    if figures:
        sections.append(section("pictures", "Pictures", figures))
    sections.append(facts_section(result, {name: result.get(name.lower()) or {} for name in ("Data", "Settings")}))
    return render_page(
        title=f"{headline} · engram-lm",
        header=header,
        sections=sections,
        footer=page_footer(result),
        colors=[],
        style=_STYLE,
    )


def facts_section(result: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]], after: str = "") -> str:
    """Show how a result was made.

    Args:
        result: Any result with the facts of a run.
        groups: Facts to show before those of the machine, the versions and the run, by heading.
        after: HTML to put behind them.
    """
    run = {key: result[key] for key in ("started", "commit", "seeds", "interrupted") if key in result}
    if any(not isinstance(seed, int) for seed in run.get("seeds") or ()):
        run["seeds"] = len(run["seeds"])
    known = {
        **groups,
        "Machine": result.get("machine") or {},
        "Versions": result.get("versions") or {},
        "Run": run,
    }
    lists = "\n".join(f"<div><h3>{name}</h3>{definitions(values)}</div>" for name, values in known.items() if values)
    command = f'<pre class="command" tabindex="0" aria-label="Command">{escape(result.get("command", ""))}</pre>'
    return section("facts", "How it was made", f'{command}<div class="facts">{lists}</div>{after}')


def page_footer(result: Mapping[str, Any]) -> str:
    """Say where the numbers of a page are."""
    return (
        "This page is complete in itself and loads nothing. The numbers are in <code>result.json</code>, "
        f"format <code>{escape(result.get('format', ''))}</code>."
    )
