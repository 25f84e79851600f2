"""What an analysis found, in words: a summary for the terminal, and one page that opens offline."""

import importlib.resources
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from engram_lm.analysis.part import load_parts
from engram_lm.page.frame import definitions, escape, plain_text, render_page, section, table
from engram_lm.page.number_text import count_text

if TYPE_CHECKING:
    from rich.console import Console

_COLORS = ("memory", "twin", "random_table", "wide", "other")


def headline(result: Mapping[str, Any]) -> tuple[str, str]:
    """Return the main finding, from the first part that has a headline, and a few more sentences, or none."""
    parts = load_parts(result["parts"])
    names = [model["name"] for model in result["models"]]
    details = [_read(text) for text in result["texts"]] + [said for part in parts for said in part.details(result)]
    titles = filter(None, (part.headline(result) for part in parts))
    title = next(titles, f"What {', '.join(names)} {'does' if len(names) == 1 else 'do'} with a text")
    return title, " ".join(details)


def remarks(result: Mapping[str, Any]) -> list[str]:
    """Say what a reader must know: parts that do not apply and why, and positions that were left out."""
    parts = load_parts(result["parts"])
    left_out: dict[tuple[str, str], list[str]] = {}
    for part in parts:
        for entry in result["parts"][part.name]:
            reasons = dict((entry.get("result") or {}).get("left_out", {}))
            if "not_applicable" in entry:
                reasons[", ".join(entry["models"])] = entry["not_applicable"]
            for name, reason in reasons.items():
                left_out.setdefault((name, reason), []).append(part.title)
    said = [f"{', '.join(titles)} left out for {name}: {reason}" for (name, reason), titles in left_out.items()]
    return said + [warning for part in parts for warning in part.warnings(result)]


def print_summary(result: Mapping[str, Any], console: "Console") -> None:
    """Print the findings, a few lines for each part."""
    lines = [*headline(result), ""]
    for part in load_parts(result["parts"]):
        lines += [f"{part.title:<14}{line}" for line in part.summary(result)]
    lines += [f"{'note':<14}{remark}" for remark in remarks(result)]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _read(text: Mapping[str, Any]) -> str:
    amount = f"{count_text(text['num_tokens'])} tokens" + ("" if text["all"] else " from the start of the text")
    return f"Read {amount} with {', '.join(text['models'])}."


def render_report(result: Mapping[str, Any], page_only: Mapping[str, Mapping[str, Any]]) -> str:
    """Render the report of a result in the format ``engram.analysis.1`` as one HTML page with everything inside.

    Parts may be missing or not applicable; ``page_only`` holds for each part what it shows on the page alone.
    """
    parts = load_parts(result["parts"])
    # There is a curve for each model, or for each memory. After five colors they start again, with other dashes.
    num_curves = max(len(result["models"]), sum(len(model["memory_blocks"]) for model in result["models"]))
    data = [one for part in parts for one in part.script_data(result, page_only.get(part.name, {}))]
    scripts = "\n".join(filter(None, (part.script() for part in parts)))
    return render_page(
        title=f"{', '.join(model['name'] for model in result['models'])} · engram-lm analyze",
        header=_header(result),
        sections=[*(part.section(result, page_only.get(part.name, {})) for part in parts), _facts(result)],
        footer="This page is complete and loads nothing else. The numbers are in <code>analysis.json</code>, "
        f"format <code>{escape(result['format'])}</code>.",
        colors=[_COLORS[index % len(_COLORS)] for index in range(num_curves)],
        style=importlib.resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8"),
        script=scripts,
        data=data,
    )


def _header(result: Mapping[str, Any]) -> str:
    title, detail = headline(result)
    notices = "".join(f"<li>{escape(remark)}</li>" for remark in remarks(result))
    return "\n".join(
        [
            '<p class="eyebrow">engram-lm analyze</p>',
            f"<h1>{escape(title)}</h1>",
            f'<p class="lead">{escape(detail)}</p>' if detail else "",
            f'<ul class="notice">{notices}</ul>' if notices else "",
        ]
    )


def _facts(result: Mapping[str, Any]) -> str:
    columns = ("Model", "Layers", "Width", "Streams", "Vocabulary", "Blocks with memory", "Orders", "Heads")
    keys = ("layers", "hidden_size", "streams", "vocabulary", "memory_blocks", "orders", "heads")
    rows = [[model["name"], *(plain_text(model[key]) for key in keys)] for model in result["models"]]
    texts = {
        ", ".join(text["models"]): f"{text['num_tokens']:,} tokens"
        + ("" if text["all"] else ", the first of them")
        + f", in windows of {text['length']:,}"
        for text in result["texts"]
    }
    groups = (
        ("Text", {**(result.get("data") or {}), **texts}),
        ("Settings", result.get("settings") or {}),
        ("Machine", result.get("machine") or {}),
        ("Versions", result.get("versions") or {}),
        ("Run", {key: result.get(key) for key in ("started", "seconds", "commit")}),
    )
    lists = "\n".join(f"<div><h3>{name}</h3>{definitions(values)}</div>" for name, values in groups if values)
    command = f'<pre class="command" tabindex="0" aria-label="Command">{escape(result.get("command", ""))}</pre>'
    models = table(columns, rows, label="The models, a wide table")
    return section("facts", "How it was made", f'{command}{models}<div class="facts">{lists}</div>')
