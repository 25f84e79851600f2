"""What is lost without the memory, and how its rows are used."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from engram_lm.analysis.figures import draw_rows, row_curves
from engram_lm.analysis.gates.colored_text import visible_text
from engram_lm.page.figure import INK, arm_color, line_legend, page_axes, page_svg
from engram_lm.page.frame import escape, section, table
from engram_lm.page.number_text import NOTHING, count_text, number_text

__all__ = ["row_section", "suppression_section"]


def suppression_section(entries: Sequence[Mapping[str, Any]]) -> str:
    """Bars of the loss that each way of suppressing adds, and a table with the questions."""
    found = {entry["models"][0]: entry["result"] for entry in entries if "result" in entry}
    if not found:
        return ""
    body = [
        "<p>The memory’s output is set to zero, or each row is replaced by another one of the same head, while the "
        "rest of the model stays as it is. This is no comparison with a model that was trained without memory: the "
        "rest still counts on it.</p>"
    ]
    for name, effect in found.items():
        heading = f"<h3>{escape(name)}</h3>" if len(found) > 1 else ""
        body.append(heading + _bars(effect) + _effect_table(effect))
    return section("suppression", "Without the memory", "\n".join(body))


def _bars(effect: Mapping[str, Any]) -> str:
    full = effect["loss"][0]
    added = [
        (condition["name"], loss - full)
        for condition, loss in zip(effect["conditions"][1:], effect["loss"][1:], strict=True)
        if loss is not None and full is not None
    ]
    most = max((value for _, value in added), default=0.0)
    if most <= 0:
        return ""
    bars = "".join(
        f'<dt>{escape(name)}</dt><dd class="track" style="--w: {100 * max(value, 0) / most:.1f}%"></dd>'
        f"<dd>{value:+.3f}</dd>".replace(">-", ">−")
        for name, value in added
    )
    tokens = count_text(effect.get("num_tokens"))
    return (
        f'<dl class="bars">{bars}</dl><p class="note">Nats per token added to the loss of {full:.3f}, over {tokens} '
        "tokens.</p>"
    )


def _effect_table(effect: Mapping[str, Any]) -> str:
    families = effect["families"]
    if not families:
        return ""
    columns = ["Memory", "Loss"]
    for family, number in zip(families, effect["num_items"], strict=True):
        columns += [f"{family}: right of {number:,}", f"{family}: retained"]
    rows = []
    for index, condition in enumerate(effect["conditions"]):
        row = [condition["name"], number_text(effect["loss"][index], 3)]
        for family in range(len(families)):
            row += [_percent(effect["exact_match"][index][family]), _percent(effect["retained"][index][family])]
        rows.append(row)
    return table(columns, rows, label="Questions answered with the memory suppressed, a wide table")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def row_section(entries: Sequence[Mapping[str, Any]]) -> str:
    """Occupancy, how often the hottest rows are read, collisions, neighbours."""
    results = [entry["result"] for entry in entries if "result" in entry]
    usages = {name: usage for result in results for name, usage in result["models"].items()}
    if not usages:
        return ""
    body = [
        "<p>Which rows the text reads. N&#8209;grams are as frequent as words are: a few rows are read most of the "
        "time, and a cache of the hottest answers most reads.</p>",
        _zipf(usages),
        *(_usage(name, usage, len(usages) > 1) for name, usage in usages.items()),
        *(_compression(result["compression"]) for result in results),
    ]
    for result in results:
        for name, found in result["neighbours"].items():
            body.append(_neighbours(name if len(usages) > 1 else "", found))
    return section("rows", "How the rows are used", "\n".join(part for part in body if part))


def _zipf(usages: Mapping[str, Mapping[str, Any]]) -> str:
    figures = []
    curves = row_curves(usages)
    for key, title in (("hits", "Times a row is read, by rank"), ("covered", "Reads that the hottest rows answer")):
        with page_axes(5.4, 3.5) as axes:
            draw_rows(axes, curves, key, colors=[arm_color(index) for index in range(len(curves))], ink=INK)
            words = "; ".join(f"{name}: {curve['words']}" for name, curve in curves.items())
            label = escape(f"{title}. {words}")
            svg = page_svg(axes.figure, name=f"rows-{key}", label=label, num_arms=len(curves))
        figures.append(f"<figure><h3>{title}</h3>{svg}</figure>")
    return f'{line_legend({name: name for name in curves})}<div class="curves">{"".join(figures)}</div>'


def _usage(name: str, usage: Mapping[str, Any], several: bool) -> str:
    bars = "".join(
        f'<dt>block {block}</dt><dd class="track" style="--w: {100 * share:.1f}%"></dd><dd>{100 * share:.1f} %</dd>'
        for block, share in zip(usage["blocks"], usage["occupancy_by_block"], strict=True)
    )
    heading = f"Rows read at least once{f', {escape(name)}' if several else ''}"
    parts = [f'<h3>{heading}</h3><dl class="bars of-all">{bars}</dl>']
    if usage["row_share"] < 1:
        parts.append(f'<p class="note">Estimated from {100 * usage["row_share"]:.3g} % of the rows.</p>')
    found = usage["collisions"]
    if found is not None:
        rows = [
            [
                f"block {block}, {order}-grams",
                count_text(found["num_ngrams"][place]),
                _share(_mean(found["by_head"][index][place])),
                _share(_mean(found["expected_by_head"][index][place])),
                _share(found["all_heads"][index][place]),
                _share(found["expected_all_heads"][index][place]),
            ]
            for index, block in enumerate(found["blocks"])
            for place, order in enumerate(found["orders"])
        ]
        columns = ("", "Frequent", "Share a row", "Even hash", "Share all rows", "Even hash")
        parts.append(
            f"<h3>Collisions among N-grams seen {found['min_count']} times or more</h3>"
            + table(columns, rows, label="Collisions, a wide table")
            + '<p class="note">Share a row: another frequent N&#8209;gram reads the same row of one head, on average '
            "over heads. Share all rows: in all heads of the order, so the two cannot be told apart. Beside it what "
            "a perfectly even hash would give.</p>"
        )
    return "".join(parts)


def _compression(study: Mapping[str, Any]) -> str:
    rows = []
    for index, compressed in enumerate(study["compression"]):
        for place, heads in enumerate(study["heads"]):
            cells = [f"{'canonical' if compressed else 'raw'} tokens, {heads} head{'s' * (heads > 1)}"]
            for order in range(len(study["orders"])):
                cells.append(_share(study["one_head"][index][place][order]))
                cells.append(_share(study["all_heads"][index][place][order]))
            rows.append(cells)
    columns = [""]
    for order in study["orders"]:
        columns += [f"{order}-grams: share a row", "share all rows"]
    distinct = "; ".join(
        f"{'canonical' if compressed else 'raw'}: "
        + ", ".join(
            f"{count_text(number)} {order}-grams" for order, number in zip(study["orders"], numbers, strict=True)
        )
        for compressed, numbers in zip(study["compression"], study["num_distinct"], strict=True)
    )
    return (
        "<h3>What token compression and heads do to collisions</h3>"
        + table(columns, rows, label="Collisions by compression and heads, a wide table")
        + f'<p class="note">With {count_text(study["rows_per_order"])} rows for each order, as the first model has. '
        f"Distinct N&#8209;grams of the text; {distinct}.</p>"
    )


def _neighbours(name: str, found: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for one in found:
        own, *others = [ngrams[0]["text"] if ngrams else NOTHING for ngrams in one["ngrams"]]
        near = ", ".join(
            f"{_visible(text)} {cosine:.2f}" for text, cosine in zip(others[:5], one["cosines"][1:6], strict=False)
        )
        promoted = ", ".join(_visible(token["text"]) for token in (one["promoted"][0] if one["promoted"] else ()))
        rows.append([_visible(own), str(one["block"]), near or NOTHING, promoted or NOTHING])
    if not rows:
        return ""
    columns = ("N-gram", "Block", "Nearest in memory, with cosine", "Adds to the prediction")
    heading = f"Neighbours of frequent N-grams{f', {escape(name)}' if name else ''}"
    return f"<h3>{heading}</h3>" + table(columns, rows, label="Neighbours, a wide table", kind="words")


def _visible(text: str) -> str:
    # An indentation is told by its length.
    shown = re.sub(r" {4,}", lambda spaces: f"␣×{len(spaces[0])}·", visible_text(text))
    return "“" + shown.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣") + "”"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _share(value: float | None) -> str:
    if value is None:
        return NOTHING
    return "0 %" if value == 0 else f"{100 * value:.3g} %" if value > 1e-5 else "< 0.001 %"
