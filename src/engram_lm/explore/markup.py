"""What was found, as HTML for the page. All text of models and visitors is escaped here."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engram_lm.adapt.row_patch_proof import RowPatchProof
from engram_lm.analysis.rows.neighbours import Neighbours
from engram_lm.evaluation.token_text import visible_text
from engram_lm.explore.addresses import FREQUENT_POSITIONS, Lookup, merged_with
from engram_lm.explore.explorer import BEFORE_EDITS, Explorer, TokenView, View
from engram_lm.explore.predictions import FactAnswer, Prediction
from engram_lm.hashing import HashSpec
from engram_lm.page.frame import escape
from engram_lm.page.number_text import count_text, number_text, signed_text

_MOST_PROMOTED = 6


def shown(text: str) -> str:
    """Escape a token's text, with signs for spaces, line breaks and for nothing."""
    signs = visible_text(text).replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")
    return escape(signs) or "·"


def code(text: str) -> str:
    """Write a token's text in a box."""
    return f"<code>{shown(text)}</code>"


def header(explorer: Explorer, memory: str) -> str:
    """Say what the page looks at, with the numbers of one memory."""
    spec = explorer.spec(memory)
    facts: list[tuple[str, str]] = []
    if spec is not None:
        # Layers with a shared table read the same rows.
        rows = spec.num_rows(spec.layers[0]) if spec.shared_table else sum(map(spec.num_rows, spec.layers))
        blocks = spec.blocks
        named = ", ".join(map(str, blocks)) if len(blocks) <= 6 else f"{len(blocks)}, from {blocks[0]} to {blocks[-1]}"
        facts = [
            ("blocks with memory", named),
            ("orders", ", ".join(map(str, spec.orders))),
            ("heads of an order", str(spec.num_heads)),
            ("rows", count_text(rows)),
            ("tokens, hashed as they are", f"{spec.num_tokens:,}")
            if _hashes_raw(spec)
            else ("canonical tokens", f"{spec.num_canonical:,} of {spec.num_tokens:,}"),
        ]
    entries = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    kind = "model without memory" if spec is None else "model"
    kind = kind if spec is None or explorer.model is not None else f"addresses alone, without weights ({spec.variant})"
    return (
        f'<header class="engram-header"><p class="eyebrow">engram-lm explore · {kind}</p>'
        f"<h1>{escape(explorer.name)}</h1><dl>{entries}</dl></header>"
    )


def notices(sentences: Sequence[str], *, kind: str = "note") -> str:
    """Show sentences that a reader must know; read out as they appear."""
    items = "".join(f"<p>{escape(one)}</p>" for one in sentences)
    return f'<div class="engram-notice {kind}" role="status">{items}</div>' if items else ""


def strip(view: View) -> str:
    """Lay out the tokens of a text, with the numbers that their colors are made of."""
    trace, visible = view.trace, None if view.addresses is None else view.addresses.visible
    values: dict[str, Any] = {
        "blocks": [] if view.addresses is None else list(view.addresses.spec.blocks),
        "gated": [] if trace is None else list(trace.blocks),
        "streams": 0 if trace is None else trace.num_streams,
        "gates": [] if trace is None else _plain(trace.gates.transpose(0, 2, 1)),
        "changed": None if view.changed is None else _plain(view.changed),
    }
    spans = []
    for place, text in enumerate(view.texts):
        marks = ["t"]
        marks += ["silent"] if visible is not None and not visible[place] else []
        marks += ["edited"] if view.edited[place] else []
        marks += ["piece"] if not text else []
        shown_text = shown(text) if not text.strip(" ") or "\n" in text or "\t" in text else escape(visible_text(text))
        spans.append(
            f'<span class="{" ".join(marks)}" data-i="{place}" tabindex="{-1 if place else 0}" role="option" '
            f'aria-selected="false">{shown_text}</span>' + ("<br>" if text.endswith("\n") else "")
        )
    data = escape(json.dumps(values, separators=(",", ":")))
    return (
        f'<div class="engram-strip" data-values="{data}">{_controls(values)}'
        f'<div class="tokens" role="listbox" aria-label="Tokens of the text" aria-orientation="horizontal">'
        f"{''.join(spans)}</div></div>"
    )


def _controls(values: Mapping[str, Any]) -> str:
    """Selects for what colors the tokens, and the legend."""
    colors = [("gate", "how far the gate opens")] if values["gates"] else []
    colors += [("changed", "how far memory changes the prediction")] if values["changed"] is not None else []
    if not colors and len(values["blocks"]) < 2:
        return ""

    def choice(name: str, label: str, options: Sequence[tuple[Any, str]]) -> str:
        inside = "".join(f'<option value="{value}">{text}</option>' for value, text in options)
        return f'<label>{label} <select data-choice="{name}">{inside}</select></label>'

    parts = [choice("color", "Color", colors)] if colors else []
    blocks = [(place, f"block {block}") for place, block in enumerate(values["blocks"])]
    if len(blocks) > 1:
        parts.append(choice("block", "Memory of", blocks))
    if values["streams"] > 1:
        streams: list[tuple[Any, str]] = [("", "mean of all")]
        streams += [(place, f"stream {place}") for place in range(values["streams"])]
        parts.append(choice("stream", "Stream", streams))
    if colors:
        parts.append(
            '<span class="scale"><span data-low>0</span><span class="ramp"></span><span data-high>1</span></span>'
        )
    return f'<div class="controls">{"".join(parts)}</div>'


def token_panel(explorer: Explorer, view: View, token: TokenView) -> str:
    """Say what is known of one token."""
    place = token.position
    parts = [f"<h3>Token {place} {code(view.texts[place])}</h3>", _identity(explorer, view, place)]
    addresses = view.addresses
    if addresses is None:
        parts.append("<p>This model has no memory, so nothing is looked up.</p>")
    elif not token.lookups:
        parts.append("<p>The memory is not read here: this token is dead for the hash.</p>")
    elif view.trace is not None:
        parts.append(_gates(view, place))
    parts.append(f'<div class="lookups">{"".join(_lookup(explorer, view, token, one) for one in token.lookups)}</div>')
    reference = explorer.reference if token.lookups else None
    if reference is not None:
        said = f"The reference text: {len(reference.tokens):,} tokens of {explorer.reference_name}. "
        said += f"N-grams that occur {FREQUENT_POSITIONS} times in it, or more often, are called frequent."
        parts.append(f'<p class="sub reference">{escape(said)}</p>')
    return f'<section class="engram-panel" aria-label="The chosen token">{"".join(parts)}</section>'


def _identity(explorer: Explorer, view: View, place: int) -> str:
    token, said = int(view.tokens[place]), ""
    if view.addresses is not None and view.addresses.canonical[place] >= 0 and not _hashes_raw(view.addresses.spec):
        others, number = merged_with(view.addresses.spec, token)
        same = " ".join(code(explorer.spell(one)) for one in others) if explorer.tokenizer is not None else ""
        more = f" and {number - len(others):,} more" if number > len(others) else ""
        said = f" · canonical token {int(view.addresses.canonical[place]):,}"
        said += f", as are {same}{more}" if same else ", and no other" if not number else f", with {number:,} others"
    return f"<p>token {token:,}{said}</p>"


def _gates(view: View, place: int) -> str:
    trace = view.trace
    assert trace is not None
    head = "".join(f'<th scope="col">stream {stream}</th>' for stream in range(trace.num_streams))
    rows = "".join(
        f'<tr><th scope="row">block {block}</th>'
        + "".join(_gate_cell(float(gate)) for gate in trace.gates[index, place])
        + "</tr>"
        for index, block in enumerate(trace.blocks)
    )
    if trace.num_streams == 1:
        head = '<th scope="col">gate</th>'
    table = f'<table class="gates"><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<div class="scroll" tabindex="0" role="region" aria-label="Gates">{table}</div>'


def _gate_cell(gate: float) -> str:
    if not math.isfinite(gate):
        return '<td class="none">not finite</td>'
    return f'<td style="--g:{gate:.3f}">{gate:.3f}</td>'


def _lookup(explorer: Explorer, view: View, token: TokenView, lookup: Lookup) -> str:
    spec = _spec(view)
    score = ""
    if view.trace is not None and lookup.block in view.trace.blocks:
        parts = view.trace.order_scores[view.trace.place_of(lookup.block), token.position]
        value = float(parts[spec.orders.index(lookup.order)].sum())
        score = f" · adds {signed_text(value)} to the gate’s score" if math.isfinite(value) else " · score not finite"
    chips = "".join(code(explorer.spell(one)) for one in lookup.tokens)
    cut = " (cut at the start of the text)" if lookup.is_cut else ""
    lines = [
        f'<h4>{lookup.order}-gram <span class="chips">{chips}</span></h4>',
        f'<p class="sub">block {lookup.block}{score}{cut}</p>',
        f'<p>Rows <span class="rows">{" ".join(f"{row:,}" for row in lookup.rows)}</span></p>',
    ]
    if explorer.reference is not None:
        lines.append(_shared(lookup, spec))
    found = token.neighbours.get(lookup.order)
    if isinstance(found, Neighbours):
        lines.append(_near(found))
    elif found:
        lines.append(f'<p class="sub">{escape(found)}</p>')
    return f'<div class="lookup">{"".join(lines)}</div>'


def _shared(lookup: Lookup, spec: HashSpec) -> str:
    number = lookup.num_positions
    times = "does not occur" if not number else "occurs once" if number == 1 else f"occurs {number:,} times"
    times = f"It {times} in the reference text"
    if not lookup.num_sharers:
        return f"<p>{times}, and no other N-gram that is frequent there reads any of its rows.</p>"
    names = ", ".join(
        f'{code(one.text)} <span class="sub">×{one.num_positions:,}'
        + (f", {one.num_heads} heads" if one.num_heads > 1 else "")
        + "</span>"
        for one in lookup.sharers
    )
    rest = lookup.num_sharers - len(lookup.sharers)
    others = "other frequent N-gram reads" if lookup.num_sharers == 1 else "other frequent N-grams read"
    more = f" and {rest:,} more" if rest else ""
    shared = f"{lookup.num_sharers:,} {others} at least one of its {spec.num_heads} rows"
    return f"<p>{times}. {shared}: {names}{more}.</p>"


def _near(found: Neighbours) -> str:
    rows = []
    for place, cosine in enumerate(found.cosines.tolist()):
        promoted = " ".join(code(one.text) for one in found.promoted[place][:_MOST_PROMOTED])
        name = "this N-gram" if not place else code(found.ngrams[place][0].text)
        near = "" if not place else f"{cosine:.2f}"
        rows.append(f'<tr><th scope="row">{name}</th><td>{near}</td><td>{promoted or "nothing"}</td></tr>')
    head = '<th scope="col">nearest</th><th scope="col">cosine</th><th scope="col">its rows promote</th>'
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Neighbors and what they promote">'
        f'<table class="near"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def prediction_panel(view: View, token: TokenView) -> str:
    """Set the predictions after a token side by side."""
    if not token.predictions:
        return ""
    columns = "".join(_prediction(name, one) for name, one in token.predictions.items())
    said = ""
    if view.changed is not None:
        nats = float(view.changed[token.position])
        said = f"<p class='sub'>Memory changes this prediction by {number_text(nats, 3)} nats.</p>"
    title = f"<h3>What comes after {code(view.texts[token.position])}</h3>"
    body = f'{title}{said}<div class="columns">{columns}</div>'
    return f'<section class="engram-panel" aria-label="Predictions">{body}</section>'


def _prediction(name: str, prediction: Prediction) -> str:
    if not prediction.candidates:
        return f"<div><h4>{escape(name)}</h4><p>The model’s numbers are not finite here.</p></div>"
    best = prediction.candidates[0].probability or 1.0
    bars = "".join(
        f'<li><span class="bar" style="--p:{one.probability / best:.3f}"></span>{code(one.text)}'
        f"<span>{percent(one.probability)}</span></li>"
        for one in prediction.candidates
    )
    kind = "edits" if name == BEFORE_EDITS else "memory" if name.startswith("with ") else "other"
    return f'<div class="{kind}"><h4>{escape(name)}</h4><ol>{bars}</ol></div>'


def percent(share: float) -> str:
    """Write a share of one in percent."""
    return f"{100 * share:.1f} %" if share >= 0.0005 or not share else "<0.1 %".replace("<", "&lt;")


def facts_panel(answers: Mapping[str, FactAnswer], proof: RowPatchProof | None) -> str:
    """Say what the visitor's facts have changed, and what not."""
    if not answers:
        return ""
    rows = []
    for prompt, answer in answers.items():
        said = "written" if answer.is_as_asked else "not learned"
        cells = "".join(f"<td>{cell}</td>" for cell in (_best(answer.before), _best(answer.now), said))
        rows.append(f'<tr><th scope="row">{escape(prompt)}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{name}</th>' for name in ("prompt", "went on with", "goes on with", ""))
    parts = [
        '<div class="scroll" tabindex="0" role="region" aria-label="Facts"><table class="near"><thead><tr>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    ]
    if proof is not None:
        parts.append(f"<p>{_proved(proof)}</p>")
    return f'<section class="engram-panel" aria-label="Your facts">{"".join(parts)}</section>'


def _best(prediction: Prediction) -> str:
    if not prediction.candidates:
        return "numbers that are not finite"
    best = prediction.candidates[0]
    return f'{code(best.text)} <span class="sub">{percent(best.probability)}</span>'


def _proved(proof: RowPatchProof) -> str:
    said = (
        f"{len(proof.rows):,} rows changed ({proof.num_bytes:,} bytes). In {proof.num_reference_tokens:,} tokens of "
        f"the reference text {proof.num_touched_positions:,} positions read one of them. "
    )
    if proof.num_windows_changed:
        return said + f"{proof.num_windows_changed} windows that read none of them changed all the same."
    if not proof.num_windows_apart:
        return said + "No window of it reads none of them, so nothing could be compared."
    return said + (
        f"{proof.num_windows_apart} windows of {proof.window_tokens} tokens that read none of them were computed "
        "again: <strong>every logit is the same, bit for bit</strong>."
    )


def _hashes_raw(spec: HashSpec) -> bool:
    """Whether every token is its own canonical token."""
    return spec.token_map is not None and spec.token_map.is_identity


def _spec(view: View) -> HashSpec:
    assert view.addresses is not None
    return view.addresses.spec


def _plain(values: np.ndarray) -> Any:
    """Turn numbers into lists for JSON, rounded to three digits, None where one is not finite."""
    if values.ndim > 1:
        return [_plain(part) for part in values]
    return [round(value, 3) if math.isfinite(value) else None for value in values.tolist()]
