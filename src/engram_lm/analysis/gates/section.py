"""Passages colored by gate, typed text looked up among the N-grams seen, N-grams to sort, averages."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engram_lm.analysis.gates.colored_text import visible_text
from engram_lm.analysis.gates.phrases import Phrase
from engram_lm.analysis.gates.trace import GateTrace
from engram_lm.page.frame import escape, section, table
from engram_lm.page.number_text import count_text, number_text

__all__ = ["average_sections", "gate_data", "gate_section", "ngram_section"]

_MOST_VALUES = 300_000
"""Gates and scores of passages that a page holds of one model; with more blocks or streams there are fewer passages."""


def gate_section(traces: Mapping[str, Sequence[GateTrace]]) -> str:
    """The passages, their controls, and the box for typed text; the script fills them."""
    if not traces:
        return ""
    models = "".join(f'<option value="{index}">{escape(name)}</option>' for index, name in enumerate(traces))
    model = f'<label class="choice">Model <select id="model">{models}</select></label>' if len(traces) > 1 else ""
    return section(
        "gates",
        "Where the memory fires",
        "<p>Text that was analyzed, each token colored by its gate: clear at 0, where the memory is ignored, and full "
        "at 1, where all of it is let in. What is looked up at a token is the N&#8209;gram that <em>ends</em> there, "
        "so color marks the token that completes a phrase. Point at a token, or press Tab and then the arrow keys, to "
        "read its values.</p>"
        "<noscript><p class='notice'>Colors and tables of N-grams need JavaScript; the curves and tables below do "
        "not.</p></noscript>"
        f'<div class="controls">{model}'
        '<label class="choice">Passage <select id="passage"></select></label>'
        '<span class="choice"><span id="blocks-name">Blocks</span>'
        '<span class="buttons" id="blocks" role="group" aria-labelledby="blocks-name"></span></span>'
        '<span class="choice"><span id="streams-name">Stream</span>'
        '<span class="buttons" id="streams" role="group" aria-labelledby="streams-name"></span></span>'
        '<button type="button" class="alone" id="numbers" aria-pressed="false">Show numbers</button>'
        '<span class="scale"><span>gate 0</span><span class="ramp"></span><span>1</span></span></div>'
        '<div class="text" id="passage-text" role="group" aria-label="Passage"></div>'
        '<div class="line" id="passage-line" role="status"></div>'
        '<h3><label for="typed">Your own text</label></h3>'
        '<p class="note" id="typed-note">No model runs here. What you type is looked up among the N&#8209;grams that '
        "were seen in the analyzed text, the longest that ends at each word; its last token gets their mean gate. "
        "Words without a value were not among them. The gate of a real forward pass depends on the context as well."
        "</p>"
        '<textarea id="typed" rows="3" maxlength="2000" spellcheck="false" autocomplete="off" '
        'aria-describedby="typed-note"></textarea>'
        '<div class="text" id="typed-text" role="group" aria-label="Your text, colored" hidden></div>'
        '<div class="line" id="typed-line" role="status"></div>',
    )


def ngram_section(phrases: Mapping[str, Sequence[Phrase]]) -> str:
    """The table of N-grams; the script fills and sorts it."""
    if not any(phrases.values()):
        return ""
    columns = (("text", "N-gram"), ("gate", "Mean gate"), ("count", "Times"), ("fired", "Fired"), ("order", "Order"))
    heads = "".join(
        f'<th scope="col" data-key="{key}"><button type="button" class="sort">{name}<i aria-hidden="true"></i></button>'
        "</th>"
        for key, name in columns
    )
    least = "".join(f'<option value="{number}">{number}</option>' for number in (1, 2, 5, 10, 100))
    return section(
        "ngrams",
        "N-grams",
        "<p>Where an N-gram adds more to a gate’s score than those of the other orders, it has <em>fired</em>. Choose "
        "a heading to sort by it. Blocks and streams are those chosen above. ␣ is a space, ↵ a line break.</p>"
        f'<div class="controls"><label class="choice">Fired at least <select id="least">{least}</select> times</label>'
        '<label class="choice">Find <input id="find" type="search" maxlength="80" autocomplete="off"></label>'
        '<span class="muted" id="ngram-count" role="status"></span></div>'
        '<div class="scroll tall" role="region" aria-label="N-grams, a long table" tabindex="0">'
        f'<table class="ngrams"><thead><tr>{heads}</tr></thead><tbody id="ngram-rows"></tbody></table></div>',
    )


def average_sections(entries: Sequence[Mapping[str, Any]]) -> str:
    """Mean gates by block and stream, order, frequency, and kind of token."""
    parts = []
    for entry in entries:
        models = (entry.get("result") or {}).get("models") or {}
        for name, found in models.items():
            heading = f"<h3>{escape(name)}</h3>" if len(models) > 1 or len(entries) > 1 else ""
            parts.append(heading + _averages(found))
    return section("averages", "Gates on average", "\n".join(parts)) if parts else ""


def _averages(found: Mapping[str, Any]) -> str:
    blocks = [f"Block {block}" for block in found["blocks"]]
    streams = np.array(found["mean"], dtype=float)
    rows = [
        [name, *(number_text(value, 3) for value in values)]
        for name, values in zip(blocks, streams.tolist(), strict=True)
    ]
    tables = [
        _titled(
            "By block and stream",
            ["", *(f"Stream {index}" for index in range(streams.shape[1]))],
            rows,
        ),
        _by_class(
            "By order of the N-gram",
            [f"{order}-gram" for order in found["orders"]],
            blocks,
            found,
            "by_order",
            "order_positions",
        ),
        _by_class(
            "By how often the N-gram occurs",
            found["frequency_classes"],
            blocks,
            found,
            "by_frequency",
            "frequency_positions",
        ),
        _by_class(
            "By what the token is made of",
            found["token_classes"],
            blocks,
            found,
            "by_token_class",
            "token_class_positions",
        ),
    ]
    note = f"Means over {count_text(found['num_positions'])} positions"
    if found["num_dead"]:
        note += f"; {count_text(found['num_dead'])} are left out where no N-gram ends"
    if found["num_not_finite"]:
        note += f"; {count_text(found['num_not_finite'])} are left out because a value is not finite"
    if found["ngram_share"] < 1:
        note += f"; frequencies are of a random {100 * found['ngram_share']:.3g} % of the N-grams"
    note += ". Streams are averaged but in the first table."
    return f'<div class="columns averages">{"".join(tables)}</div><p class="note">{note}</p>'


def _by_class(
    title: str, classes: Sequence[str], blocks: Sequence[str], found: Mapping[str, Any], key: str, positions: str
) -> str:
    means = np.array(found[key], dtype=float)  # [G, classes, S]
    known = np.isfinite(means)
    sums, counts = np.where(known, means, 0).sum(-1), known.sum(-1)
    values = np.divide(sums, counts, out=np.full(sums.shape, math.nan), where=counts > 0)
    numbers = np.array(found[positions])
    per_class = numbers.sum(0) if numbers.ndim > 1 else numbers
    share = 1 / len(blocks) if numbers.ndim > 1 else 1
    rows = [
        [name, *(number_text(value, 3) for value in values[:, index].tolist()), count_text(per_class[index] * share)]
        for index, name in enumerate(classes)
        if per_class[index]
    ]
    return _titled(title, ["", *blocks, "Positions"], rows)


def _titled(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return f"<div><h3>{title}</h3>{table(columns, rows, label=title)}</div>"


# What the script reads ---------------------------------------------------------------------------------------------


def gate_data(
    models: Sequence[Mapping[str, Any]],
    traces: Mapping[str, Sequence[GateTrace]],
    phrases: Mapping[str, Sequence[Phrase]],
) -> list[dict[str, Any]]:
    """Lay out passages and N-grams of each model: gates in thousandths, None where a value is not finite."""
    folds = {model["name"]: bool(model["compressed_tokens"]) for model in models}
    return [
        {
            "name": _shown(name),
            "folds": folds.get(name, False),
            "blocks": list(own[0].blocks),
            "orders": list(own[0].orders),
            "streams": own[0].num_streams,
            "passages": [_passage(trace) for trace in _some(own)],
            "phrases": [
                [
                    _shown(item.text),
                    _shown(item.last),
                    item.order,
                    item.count,
                    item.fired.tolist(),
                    _thousandths(item.gates),
                ]
                for item in phrases.get(name, ())
            ],
        }
        for name, own in traces.items()
        if own
    ]


def _some(traces: Sequence[GateTrace]) -> list[GateTrace]:
    kept: list[GateTrace] = []
    held = 0
    for trace in traces:
        held += trace.gates.size + trace.order_scores.size
        if kept and held > _MOST_VALUES:
            break
        kept.append(trace)
    return kept


def _passage(trace: GateTrace) -> dict[str, Any]:
    """``gates[block][stream][token]`` and ``scores[block][stream][order][token]`` (hundredths)."""
    return {
        "tokens": [_shown(text) for text in trace.texts],
        "visible": trace.visible.tolist(),
        "gates": _thousandths(trace.gates.transpose(0, 2, 1)),
        "scores": _scaled(trace.order_scores.transpose(0, 3, 2, 1), 100),
    }


def _shown(text: str) -> str:
    return visible_text(text.encode("utf-8", "replace").decode())


def _thousandths(values: np.ndarray) -> Any:
    return _scaled(values, 1000)


def _scaled(values: np.ndarray, factor: int) -> Any:
    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        return round(value * factor) if math.isfinite(value) else None

    return plain(np.asarray(values, float).tolist())
