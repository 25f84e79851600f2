"""What a study found, for people: tables for a terminal, and a page."""

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as TerminalTable
from rich.text import Text

from engram_lm.page.frame import definitions, escape, render_page, section, table
from engram_lm.studies.diagnostics import diagnostics_section

_STYLE = "figure img { max-width: 100%; background: white; border-radius: 4px }"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table of numbers, as plain text."""

    title: str
    """What it shows."""
    columns: Sequence[str]
    """Headings."""
    rows: Sequence[Sequence[str]]
    """A cell for each column."""
    note: str = ""
    """What to know about the numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """What came out of a study."""

    headline: str
    """The answer, in a sentence."""
    detail: str
    """What the number of seeds allows to claim."""
    tables: Sequence[Table]
    """The numbers."""


def print_finding(finding: Finding) -> None:
    """Print a finding on the terminal."""
    console = Console()
    console.print(Text(f"\n{finding.headline}", style="bold"))
    for one in finding.tables:
        console.print(terminal_table(one))
    console.print(finding.detail)


def terminal_table(one: Table) -> TerminalTable:
    """Lay a table out for the terminal."""
    shown = TerminalTable(
        box=box.SIMPLE_HEAD, title=one.title, title_justify="left", caption=one.note, caption_justify="left"
    )
    for index, column in enumerate(one.columns):
        shown.add_column(column, justify="right" if index else "left", no_wrap=not index)
    for row in one.rows:
        shown.add_row(*map(Text, row))  # text, not markup: titles come from a file
    return shown


def render_study(question: str, finding: Finding, pictures: Mapping[str, Path], result: Mapping[str, Any]) -> str:
    """Render the page of a study: question, finding, pictures (the PNG file by title), and how it was made."""
    sections = [
        section(
            f"table-{number}",
            escape(one.title),
            table(one.columns, one.rows, label=one.title)
            + (f'<p class="note">{escape(one.note)}</p>' * bool(one.note)),
        )
        for number, one in enumerate(finding.tables)
    ]
    sections.append(diagnostics_section(result.get("diagnostics")))
    figures = "\n".join(
        f'<figure><h3>{escape(title)}</h3><img alt="{escape(title)}" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"></figure>'
        for title, path in pictures.items()
    )
    if figures:
        sections.append(section("pictures", "Pictures", figures))
    sections.append(facts_section(result, {name: result.get(name.lower()) or {} for name in ("Data", "Settings")}))
    return render_page(
        title=f"{finding.headline} · engram-lm",
        header=f'<p class="eyebrow">{escape(question)}</p><h1>{escape(finding.headline)}</h1>'
        f'<p class="lead">{escape(finding.detail)}</p>',
        sections=sections,
        footer=page_footer(result),
        colors=[],
        style=_STYLE,
    )


def facts_section(result: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]], after: str = "") -> str:
    """Show how a result was made: the groups of facts by heading, then machine, versions, run, and more HTML."""
    run = {key: result[key] for key in ("started", "commit", "seeds", "interrupted") if key in result}
    if any(not isinstance(seed, int) for seed in run.get("seeds") or ()):
        run["seeds"] = len(run["seeds"])
    known = {**groups, "Machine": result.get("machine"), "Versions": result.get("versions"), "Run": run}
    lists = "\n".join(f"<div><h3>{name}</h3>{definitions(values)}</div>" for name, values in known.items() if values)
    command = f'<pre class="command" tabindex="0" aria-label="Command">{escape(result.get("command", ""))}</pre>'
    return section("facts", "How it was made", f'{command}<div class="facts">{lists}</div>{after}')


def page_footer(result: Mapping[str, Any]) -> str:
    """Say where the numbers of a page are."""
    return (
        "This page is complete in itself and loads nothing. The numbers are in <code>result.json</code>, "
        f"format <code>{escape(result.get('format', ''))}</code>."
    )
