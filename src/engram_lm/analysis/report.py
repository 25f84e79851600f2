"""The report of an analysis as one page that opens offline and asks nothing of the network."""

import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import Any

from engram_lm.analysis.gates.phrases import Phrase
from engram_lm.analysis.gates.section import average_sections, gate_data, gate_section, ngram_section
from engram_lm.analysis.gates.trace import GateTrace
from engram_lm.analysis.layers_section import cka_section, lens_section
from engram_lm.analysis.memory_section import row_section, suppression_section
from engram_lm.analysis.summary import headline, remarks
from engram_lm.page.frame import definitions, escape, plain_text, render_page, section, table

__all__ = ["render_report"]

_COLORS = ("memory", "twin", "random_table", "wide", "other")


def render_report(
    result: Mapping[str, Any],
    traces: Mapping[str, Sequence[GateTrace]],
    phrases: Mapping[str, Sequence[Phrase]],
) -> str:
    """Render the whole report.

    Args:
        result: In the format ``engram_lm.analysis.1``; parts may be missing or not applicable.
        traces: By model, passages seen through its gates.
        phrases: By model, N-grams of the text.

    Returns:
        An HTML page with its styles, scripts and pictures inside.
    """
    own = importlib.resources.files(__package__)
    parts = result["parts"]
    # A curve for each model, or for each memory; after the first five colors begin again, with another dash.
    num_curves = max(len(result["models"]), sum(len(model["memory_blocks"]) for model in result["models"]))
    data = gate_data(result["models"], traces, phrases)
    return render_page(
        title=f"{', '.join(model['name'] for model in result['models'])} · engram-lm analyze",
        header=_header(result),
        sections=[
            gate_section(traces),
            ngram_section(phrases) if traces else "",
            average_sections(parts.get("gates") or ()),
            lens_section(parts.get("lens") or ()),
            cka_section(parts.get("cka") or ()),
            suppression_section(parts.get("suppression") or ()),
            row_section(parts.get("rows") or ()),
            _facts(result),
        ],
        footer="This page is complete in itself and loads nothing. The numbers are in <code>analysis.json</code>, "
        f"format <code>{escape(result['format'])}</code>.",
        colors=[_COLORS[index % len(_COLORS)] for index in range(num_curves)],
        style=own.joinpath("page.css").read_text(encoding="utf-8"),
        script=f'<script type="application/json" id="data">{_json(data)}</script>\n'
        f"<script>\n{own.joinpath('page.js').read_text(encoding='utf-8')}</script>",
    )


def _header(result: Mapping[str, Any]) -> str:
    said = headline(result)
    notices = "".join(f"<li>{escape(remark)}</li>" for remark in remarks(result))
    return "\n".join(
        [
            '<p class="eyebrow">engram-lm analyze</p>',
            f"<h1>{escape(said.title)}</h1>",
            f'<p class="lead">{escape(said.detail)}</p>' if said.detail else "",
            f'<ul class="notice">{notices}</ul>' if notices else "",
        ]
    )


def _facts(result: Mapping[str, Any]) -> str:
    columns = ("Model", "Layers", "Width", "Streams", "Vocabulary", "Blocks with memory", "Orders", "Heads")
    rows = [
        [
            model["name"],
            *(plain_text(model[key]) for key in ("layers", "hidden_size", "streams", "vocabulary")),
            *(plain_text(model[key]) for key in ("memory_blocks", "orders", "heads")),
        ]
        for model in result["models"]
    ]
    texts = {
        ", ".join(text["models"]): f"{text['num_tokens']:,} tokens"
        + ("" if text["all"] else ", the first of them")
        + f", in windows of {text['length']:,}"
        for text in result["texts"]
    }
    run = {key: result.get(key) for key in ("started", "seconds", "commit")}
    groups = (
        ("Text", {**(result.get("data") or {}), **texts}),
        ("Settings", result.get("settings") or {}),
        ("Machine", result.get("machine") or {}),
        ("Versions", result.get("versions") or {}),
        ("Run", run),
    )
    lists = "\n".join(f"<div><h3>{name}</h3>{definitions(values)}</div>" for name, values in groups if values)
    command = f'<pre class="command" tabindex="0" aria-label="Command">{escape(result.get("command", ""))}</pre>'
    models = table(columns, rows, label="The models, a wide table")
    return section("facts", "How it was made", f'{command}{models}<div class="facts">{lists}</div>')


def _json(value: Any) -> str:
    # Inside a script element only "<" could end it or open a comment.
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
