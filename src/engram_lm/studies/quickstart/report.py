"""The result of a quickstart as one page that opens offline and asks nothing of the network."""

import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Any

from engram_lm.analysis.gates.trace import GateTrace, strongest
from engram_lm.page.figure import Picture, line_legend
from engram_lm.page.frame import Html, escape, plain_text, render_page, section, table
from engram_lm.page.number_text import count_text
from engram_lm.studies.curves import curve_figure, draw_curves, smooth
from engram_lm.studies.diagnostics import diagnostics_section
from engram_lm.studies.page import facts_section, page_footer
from engram_lm.studies.quickstart.summary import COLUMNS, arm_rows, headline, run_rows

_RUN_COLUMNS = ("Model", "Seed", "Tokens", "Held-out loss", "Perplexity", "Bits per byte", "Tokens/s", "Minutes")
_KEY_COLUMNS = {"Held-out loss", "Perplexity", "Gain over twin"}
_ARM_COLORS = ("memory", "twin", "random_table", "wide")
_NUM_NGRAMS = 12
_ENOUGH_POSITIONS = 400
"""Positions above which an N-gram seen once is no longer worth a line."""


def render_report(result: Mapping[str, Any], gate_texts: Sequence[GateTrace]) -> str:
    """Render the whole report of an ``engram.quickstart.1``; numbers may be None and arms may be missing.

    Without ``gate_texts``, held-out texts seen through one model's gates, the sections about gates are left out.
    """
    own = importlib.resources.files(__package__)
    return render_page(
        title=f"{headline(result)[0]} · engram-lm quickstart",
        header=_header(result),
        sections=[
            _arms(result),
            _curves(result),
            diagnostics_section(result.get("diagnostics")),
            *((_gates(gate_texts), _ngrams(gate_texts)) if gate_texts else ()),
            _samples(result),
            _facts(result),
        ],
        footer=page_footer(result),
        colors=[name if name in _ARM_COLORS else "other" for name in result["arms"]],
        style=own.joinpath("report.css").read_text(encoding="utf-8"),
        script=own.joinpath("report.js").read_text(encoding="utf-8"),
        data=_gate_data(gate_texts),
    )


def _header(result: Mapping[str, Any]) -> str:
    (title, detail), arms, data = headline(result), result["arms"], result.get("data") or {}
    parts = []
    if {"memory", "twin"} <= arms.keys():
        costs = [count_text(arms[name].get("flops_per_token")) for name in ("memory", "twin")]
        parts.append(
            f"A model with memory ({costs[0]} active FLOPs per token) against its memory-less twin ({costs[1]})."
        )
    if data.get("train_tokens") is not None:
        parts.append(
            f"Trained on {data.get('source')} ({plain_text(data['train_tokens'])} tokens in "
            f"{plain_text(data.get('train_files'))} files), judged on {plain_text(data.get('held_out_tokens'))} "
            f"tokens in {plain_text(data.get('held_out_files'))} files held out."
        )
    lines = [
        '<p class="eyebrow">engram-lm quickstart</p>',
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(detail).replace(" ± ", "&nbsp;±&nbsp;")}</p>',
        f'<p class="muted">{escape(" ".join(parts))}</p>',
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
    models = table(
        ("Model", *COLUMNS),
        ([title, *cells] for title, cells in rows),
        label="The models, a wide table",
        kind="arms",
        key_columns=_KEY_COLUMNS,
    )
    about = "\n".join(
        f"<li><strong>{escape(arm['title'])}</strong>: {escape(arm['about'])}</li>"
        for arm in result["arms"].values()
        if arm.get("about")
    )
    seeds = len(result.get("seeds") or ())
    note = "Loss and gain are in nats per token; a positive gain is a lower loss than the twin’s."
    if seeds > 1:
        note += f" Values are means over {seeds} seeds, ± the standard deviation."
    return section(
        "arms",
        "The models",
        f'{models}<p class="note">{note}</p>' + (f'<ul class="note">{about}</ul>' if about else ""),
    )


_CURVES = (("held_out_curve", "Held-out loss", True), ("train_curve", "Training loss, smoothed", False))
"""Key of a run, title, and whether its points are marked."""


def _curves_of(result: Mapping[str, Any], kind: str) -> dict[str, list[list[tuple[float, float]]]]:
    return {name: [smooth(run[kind]) for run in arm["runs"]] for name, arm in result["arms"].items()}


def _titles(result: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(arm["title"]) for name, arm in result["arms"].items()}


def curve_pictures(result: Mapping[str, Any]) -> Sequence[Picture]:
    """Draw held-out and training loss of all arms side by side, for those who would rather paste than open a page."""
    titles = _titles(result)

    def draw(figure: Any) -> None:
        for axes, (kind, title, markers) in zip(figure.subplots(1, 2), _CURVES, strict=True):
            draw_curves(axes, _curves_of(result, kind), on_page=False, markers=markers, titles=titles)
            axes.set(title=title, xlabel="training tokens", ylabel="nats per token")
            axes.grid(alpha=0.3)
            axes.legend()

    return [Picture(name="curves", title="Loss while training", size=(10, 4), draw=draw)]


def _curves(result: Mapping[str, Any]) -> str:
    titles = _titles(result)
    figures = []
    for kind, title, markers in _CURVES:
        curves = _curves_of(result, kind)
        if any(run for runs in curves.values() for run in runs):
            figures.append(curve_figure(title, curves, titles, name=kind, markers=markers))
    if not figures:
        return ""
    several = " Each seed is a line." if len(result.get("seeds") or ()) > 1 else ""
    return section(
        "curves",
        "While training",
        f'{line_legend(titles)}\n<div class="curves">{"".join(figures)}</div>'
        f'<p class="note">The vertical axis leaves out the first tenth of the tokens, where the loss is far higher.'
        f"{several}</p>",
    )


def _gates(traces: Sequence[GateTrace]) -> str:
    first = traces[0]
    controls = _choice("block", "Block", [str(block) for block in first.blocks])
    if first.num_streams > 1:
        controls += _choice("stream", "Stream", [str(stream) for stream in range(first.num_streams)])
    texts = "\n".join(
        f"<h3>Text {number} of {len(traces)}</h3>\n"
        f'<div class="text" role="group" aria-label="Text {number}, {len(trace.tokens)} tokens">{_tokens(trace)}</div>'
        for number, trace in enumerate(traces, start=1)
    )
    return section(
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
            f"{escape(text)}</span>"
        )
    return "".join(spans)


def _choice(name: str, label: str, values: Sequence[str]) -> str:
    buttons = "".join(
        f'<button type="button" data-choice="{name}" value="{index}" aria-pressed="{str(index == 0).lower()}">'
        f"{escape(value)}</button>"
        for index, value in enumerate(values)
    )
    return (
        f'<span class="choice"><span id="choice-{name}">{label}</span>'
        f'<span class="buttons" role="group" aria-labelledby="choice-{name}">{buttons}</span></span>'
    )


def _ngrams(traces: Sequence[GateTrace]) -> str:
    min_count = 2 if sum(len(trace.tokens) for trace in traces) >= _ENOUGH_POSITIONS else 1
    tables = []
    for block in traces[0].blocks:
        rows = [
            (_visible(one.text), str(one.order), f"{one.mean_gate:.2f}", str(one.num_positions))
            for one in strongest(traces, block, _NUM_NGRAMS, min_count=min_count)
        ]
        columns, label = ("N-gram", "Order", "Mean gate", "Times"), f"N-grams of block {block}"
        tables.append(
            f"<div><h3>Block {block}</h3>{table(columns, rows, label=label, kind='ngrams', row_headings=False)}</div>"
        )
    times = "more than once" if min_count > 1 else "at least once"
    return section(
        "ngrams",
        "N-grams with the highest mean gate",
        f'<p class="muted">In the texts above, among those that fired {times}. ␣ is a space, ↵ a line break.</p>'
        f'<div class="columns">{"".join(tables)}</div>',
    )


def _samples(result: Mapping[str, Any]) -> str:
    blocks = []
    for sample in result.get("samples") or ():
        columns = "".join(
            f"<div><h3>{escape(result['arms'].get(name, {}).get('title', name))}</h3>"
            f'<pre><span class="prompt">{escape(sample["prompt"])}</span>{escape(text)}</pre></div>'
            for name, text in sample["continuations"].items()
        )
        blocks.append(f'<div class="sample columns">{columns}</div>')
    if not blocks:
        return ""
    note = '<p class="muted">The prompt is gray; what follows it is the model’s.</p>'
    return section("samples", "What the models write", note + "\n".join(blocks))


def _facts(result: Mapping[str, Any]) -> str:
    data = dict(result.get("data") or {})
    skipped = data.pop("skipped", None) or {}
    # Reasons come from the corpus, so they get a prefix rather than a place among our own words.
    data |= {f"skipped: {reason}": count for reason, count in skipped.items()} if skipped else {"skipped": 0}
    runs, every = run_rows(result), ""
    if runs:
        every = table(_RUN_COLUMNS, runs, label="Every run", row_headings=False)
        every = f"<details><summary>Every run</summary>{every}</details>"
    return facts_section(result, {"Data": data, "Settings": result.get("settings") or {}}, after=every)


def _visible(text: str) -> Html:
    shown = escape(text)
    shown = shown.replace(" ", "<i>␣</i>").replace("\n", "<i>↵</i>").replace("\t", "<i>⇥</i>") or "<i>·</i>"
    return Html(f'<span class="ngram">{shown}</span>')


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
                "gates": trace.gates.transpose(0, 2, 1).astype(float).round(3).tolist(),
                "scores": trace.order_scores.transpose(0, 3, 2, 1).astype(float).round(2).tolist(),
            }
            for trace in traces
        ],
    }
