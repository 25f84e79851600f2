"""The result of a quickstart as one page that opens offline and asks nothing of the network."""

import datetime
import html
import importlib.resources
import json
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engram.analysis.gates import GateTrace, strongest
from engram.studies.quickstart.curves import curve_svg, describe_curves, smooth
from engram.studies.quickstart.summary import COLUMNS, arm_rows, count_text, headline, run_rows

__all__ = ["render_report"]

_RUN_COLUMNS = ("Model", "Seed", "Tokens", "Held-out loss", "Perplexity", "Bits per byte", "Tokens/s", "Minutes")
_KEY_COLUMNS = {"Held-out loss", "Perplexity", "Gain over twin"}
_ARM_COLORS = ("memory", "twin", "random_table", "wide")
# As matplotlib draws the n-th arm.
_DASHES = ("", "8 4", "2 4", "8 4 2 4")
_NUM_NGRAMS = 12
_ENOUGH_POSITIONS = 400
"""Positions above which an N-gram seen once is no longer worth a line."""


def render_report(result: Mapping[str, Any], gate_texts: Sequence[GateTrace]) -> str:
    """Render the whole report.

    Args:
        result: A result in the format ``engram.quickstart.1``; numbers may be None and arms may be missing.
        gate_texts: Held-out texts seen through one model's gates; the sections about gates are left out without any.

    Returns:
        An HTML page with its styles, scripts and pictures inside.
    """
    template = importlib.resources.files(__package__).joinpath("report_template.html").read_text(encoding="utf-8")
    sections = [
        _arms(result),
        _curves(result),
        _gates(gate_texts),
        _ngrams(gate_texts),
        _samples(result),
        _facts(result),
    ]
    return string.Template(template).substitute(
        title=_escape(f"{headline(result).title} · engram quickstart"),
        arm_colors="; ".join(
            f"--arm-{index}: var(--{name if name in _ARM_COLORS else 'other'})"
            for index, name in enumerate(result["arms"])
        ),
        header=_header(result),
        sections="\n".join(section for section in sections if section),
        footer=_footer(result),
        data=_json(_gate_data(gate_texts)),
    )


# Sections, from top to bottom --------------------------------------------------------------------------------------


def _header(result: Mapping[str, Any]) -> str:
    said, arms, data = headline(result), result["arms"], result.get("data") or {}
    parts = []
    if {"memory", "twin"} <= arms.keys():
        costs = [count_text(arms[name].get("flops_per_token")) for name in ("memory", "twin")]
        parts.append(
            f"A model with memory ({costs[0]} active FLOPs per token) against its memory-less twin ({costs[1]})."
        )
    if data.get("train_tokens") is not None:
        parts.append(
            f"Trained on {data.get('source')} ({_plain(data['train_tokens'])} tokens in "
            f"{_plain(data.get('train_files'))} files), judged on {_plain(data.get('held_out_tokens'))} tokens in "
            f"{_plain(data.get('held_out_files'))} files held out."
        )
    lines = [
        '<p class="eyebrow">engram quickstart</p>',
        f"<h1>{_escape(said.title)}</h1>",
        f'<p class="lead">{_escape(said.detail).replace(" ± ", "&nbsp;±&nbsp;")}</p>',
        f'<p class="muted">{_escape(" ".join(parts))}</p>',
    ]
    if result.get("interrupted"):
        lines.append(
            '<p class="notice">The run was interrupted. What follows is what there was when it stopped; '
            "all models had seen the same text.</p>"
        )
    return "\n".join(lines)


def _arms(result: Mapping[str, Any]) -> str:
    rows = arm_rows(result)
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{_escape(column)}</th>' for column in ("Model", *COLUMNS))
    body = "\n".join(
        f'<tr><th scope="row">{_escape(title)}</th>'
        + "".join(
            f'<td class="key">{_escape(cell)}</td>' if column in _KEY_COLUMNS else f"<td>{_escape(cell)}</td>"
            for column, cell in zip(COLUMNS, cells, strict=True)
        )
        + "</tr>"
        for title, cells in rows
    )
    about = "\n".join(
        f"<li><strong>{_escape(arm['title'])}</strong>: {_escape(arm['about'])}</li>"
        for arm in result["arms"].values()
        if arm.get("about")
    )
    seeds = len(result.get("seeds") or ())
    note = "Loss and gain are in nats per token; a positive gain is a lower loss than the twin’s."
    if seeds > 1:
        note += f" Values are means over {seeds} seeds, ± the standard deviation."
    return _section(
        "arms",
        "The models",
        f'<div class="scroll" role="region" aria-label="The models, a wide table" tabindex="0">'
        f'<table class="arms"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
        f'<p class="note">{note}</p>' + (f'<ul class="note">{about}</ul>' if about else ""),
    )


def _curves(result: Mapping[str, Any]) -> str:
    arms = result["arms"]
    titles = {name: str(arm["title"]) for name, arm in arms.items()}
    held_out, training = (
        {name: [smooth(run.get(kind) or ()) for run in arm.get("runs") or ()] for name, arm in arms.items()}
        for kind in ("held_out_curve", "train_curve")
    )
    figures = []
    for kind, title, curves, markers in (
        ("held-out", "Held-out loss", held_out, True),
        ("training", "Training loss, smoothed", training, False),
    ):
        if any(run for runs in curves.values() for run in runs):
            label = f"{title}. {describe_curves(curves, titles)}"
            svg = curve_svg(curves, name=kind, label=_escape(label), markers=markers)
            figures.append(f"<figure><h3>{title}</h3>{svg}</figure>")
    if not figures:
        return ""
    legend = "\n".join(
        f'<li><svg viewBox="0 0 28 8" aria-hidden="true"><path d="M0 4H28" stroke="var(--arm-{index})" '
        f'stroke-width="2.2" stroke-dasharray="{_DASHES[index % len(_DASHES)] or "none"}"/></svg>{_escape(title)}</li>'
        for index, title in enumerate(titles.values())
    )
    several = " Each seed is a line." if len(result.get("seeds") or ()) > 1 else ""
    return _section(
        "curves",
        "While training",
        f'<ul class="legend">{legend}</ul>\n<div class="curves">{"".join(figures)}</div>'
        f'<p class="note">The vertical axis leaves out the first tenth of the tokens, where the loss is far higher.'
        f"{several}</p>",
    )


def _gates(traces: Sequence[GateTrace]) -> str:
    if not traces:
        return ""
    first = traces[0]
    controls = _choice("block", "Block", [str(block) for block in first.blocks])
    if first.num_streams > 1:
        controls += _choice("stream", "Stream", [str(stream) for stream in range(first.num_streams)])
    texts = "\n".join(
        f"<h3>Text {number} of {len(traces)}</h3>\n"
        f'<div class="text" role="group" aria-label="Text {number}, {len(trace.tokens)} tokens">{_tokens(trace)}</div>'
        for number, trace in enumerate(traces, start=1)
    )
    return _section(
        "gates",
        "Where the memory fires",
        "<p>Held-out text, each token colored by its gate: clear at 0, where the memory is ignored, and full at 1, "
        "where all of it is let in. What is looked up at a token is the N&#8209;gram that <em>ends</em> there, so "
        "color marks the token that completes a phrase. Point at a token, or press Tab and then the arrow keys, to see "
        "which N&#8209;gram added most to the gate’s score.</p>"
        f'<div class="controls">{controls}<span class="scale"><span>gate 0</span><span class="ramp"></span>'
        f"<span>1</span></span></div>\n{texts}\n"
        '<div id="panel" role="status" hidden></div>'
        '<p class="note">Blocks are counted from 0. A score is split exactly between the orders, because it is linear '
        "in what was looked up; the gate is a sigmoid of (the signed root of) the sum.</p>",
    )


def _tokens(trace: GateTrace) -> str:
    spans = []
    for position, (text, gate) in enumerate(zip(trace.texts, trace.gates[0, :, 0].tolist(), strict=True)):
        kind = " piece" if not text else " line" if "\n" in text else ""
        tab = 0 if position == 0 else -1
        spans.append(
            f'<span class="t{kind}" data-i="{position}" tabindex="{tab}" style="--g:{round(gate, 3)}">'
            f"{_escape(text)}</span>"
        )
    return "".join(spans)


def _choice(name: str, label: str, values: Sequence[str]) -> str:
    buttons = "".join(
        f'<button type="button" data-choice="{name}" value="{index}" aria-pressed="{str(index == 0).lower()}">'
        f"{_escape(value)}</button>"
        for index, value in enumerate(values)
    )
    return (
        f'<span class="choice"><span id="choice-{name}">{label}</span>'
        f'<span class="buttons" role="group" aria-labelledby="choice-{name}">{buttons}</span></span>'
    )


def _ngrams(traces: Sequence[GateTrace]) -> str:
    if not traces:
        return ""
    min_count = 2 if sum(len(trace.tokens) for trace in traces) >= _ENOUGH_POSITIONS else 1
    tables = []
    for block in traces[0].blocks:
        ranked = strongest(traces, block, _NUM_NGRAMS, min_count=min_count)
        rows = "\n".join(
            f'<tr><td><span class="ngram">{_visible(item.text)}</span></td><td>{item.order}</td>'
            f"<td>{item.mean_gate:.2f}</td><td>{item.num_positions}</td></tr>"
            for item in ranked
        )
        tables.append(
            f'<div><h3>Block {block}</h3><div class="scroll"><table class="ngrams"><thead><tr><th scope="col">N-gram'
            '</th><th scope="col">Order</th><th scope="col">Mean gate</th><th scope="col">Times</th></tr></thead>\n'
            f"<tbody>{rows}</tbody></table></div></div>"
        )
    times = "more than once" if min_count > 1 else "at least once"
    return _section(
        "ngrams",
        "N-grams with the highest mean gate",
        f'<p class="muted">In the texts above, among those that fired {times}. ␣ is a space, ↵ a line break.</p>'
        f'<div class="columns">{"".join(tables)}</div>',
    )


def _samples(result: Mapping[str, Any]) -> str:
    blocks = []
    for sample in result.get("samples") or ():
        columns = "".join(
            f"<div><h3>{_escape(result['arms'].get(name, {}).get('title', name))}</h3>"
            f'<pre><span class="prompt">{_escape(sample["prompt"])}</span>{_escape(text)}</pre></div>'
            for name, text in sample["continuations"].items()
        )
        blocks.append(f'<div class="sample columns">{columns}</div>')
    if not blocks:
        return ""
    note = '<p class="muted">The prompt is gray; what follows it is the model’s.</p>'
    return _section("samples", "What the models write", note + "\n".join(blocks))


def _facts(result: Mapping[str, Any]) -> str:
    data = dict(result.get("data") or {})
    skipped = data.pop("skipped", None) or {}
    # Reasons come from the corpus, so they get a prefix rather than a place among our own words.
    facts = {**data, **{f"skipped: {reason}": count for reason, count in skipped.items()}}
    if not skipped:
        facts["skipped"] = 0
    run = {key: result.get(key) for key in ("started", "commit", "seeds", "interrupted")}
    groups = (
        ("Data", facts),
        ("Settings", result.get("settings") or {}),
        ("Machine", result.get("machine") or {}),
        ("Versions", result.get("versions") or {}),
        ("Run", run),
    )
    lists = "\n".join(f"<div><h3>{name}</h3>{_definitions(values)}</div>" for name, values in groups if values)
    runs = run_rows(result)
    table = ""
    if runs:
        head = "".join(f'<th scope="col">{column}</th>' for column in _RUN_COLUMNS)
        body = "\n".join("<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in row) + "</tr>" for row in runs)
        table = (
            '<details><summary>Every run</summary><div class="scroll" role="region" aria-label="Every run" '
            f'tabindex="0"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div></details>'
        )
    command = f'<pre class="command" tabindex="0" aria-label="Command">{_escape(result.get("command", ""))}</pre>'
    return _section("facts", "How it was made", f'{command}<div class="facts">{lists}</div>{table}')


def _footer(result: Mapping[str, Any]) -> str:
    return (
        "This page is complete in itself and loads nothing. The numbers are in <code>result.json</code>, "
        f"format <code>{_escape(result.get('format', ''))}</code>."
    )


# Pieces ------------------------------------------------------------------------------------------------------------


def _section(name: str, title: str, body: str) -> str:
    heading = f'<h2 id="{name}-title">{title}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-title">{heading}\n{body}\n</section>'


def _definitions(values: Mapping[str, Any]) -> str:
    entries = "".join(
        f"<dt>{_escape(str(name).replace('_', ' '))}</dt><dd>{_escape(_plain(value))}</dd>"
        for name, value in values.items()
    )
    return f"<dl>{entries}</dl>"


def _plain(value: Any) -> str:
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
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items()) or "none"
    if isinstance(value, Iterable):
        return ", ".join(map(_plain, value)) or "none"
    return str(value)


def _date(value: str) -> str | None:
    if not re.match(r"\d{4}-\d\d-\d\dT", value):
        return None
    try:
        moment = datetime.datetime.fromisoformat(value)
    except ValueError:
        return None
    return f"{moment:%Y-%m-%d %H:%M} {moment:%Z}".strip()


def _visible(text: str) -> str:
    shown = _escape(text)
    return shown.replace(" ", "<i>␣</i>").replace("\n", "<i>↵</i>").replace("\t", "<i>⇥</i>") or "<i>·</i>"


def _escape(value: Any) -> str:
    """Make any text part of the page: markup escaped, what HTML cannot hold replaced by a visible sign."""
    text = str(value).encode("utf-8", "replace").decode()
    text = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda match: chr(0x2400 + ord(match[0])), text)
    return html.escape(re.sub(r"[\x7f-\x9f]", "\ufffd", text))


def _json(value: Any) -> str:
    # Inside a script element only "<" could end it or open a comment.
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _gate_data(traces: Sequence[GateTrace]) -> dict[str, Any]:
    """Lay out what the script reads: ``gates[block][stream][token]``, ``scores[block][stream][order][token]``."""
    if not traces:
        return {}
    return {
        "blocks": traces[0].blocks,
        "orders": traces[0].orders,
        "streams": traces[0].num_streams,
        "traces": [
            {
                "tokens": trace.texts,
                "visible": trace.visible.tolist(),
                "gates": [[[round(g, 3) for g in stream] for stream in block.T.tolist()] for block in trace.gates],
                "scores": [
                    [[[round(s, 2) for s in order] for order in stream] for stream in block.transpose(2, 1, 0).tolist()]
                    for block in trace.order_scores
                ],
            }
            for trace in traces
        ],
    }
