"""The rows' part of an analysis: how full the tables are, how hot the hottest rows are, collisions, and neighbours."""

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engram_lm.analysis.part import Part, Work
from engram_lm.analysis.protocol import Analysis
from engram_lm.analysis.rows.collisions import CollisionStudy, TextNgrams, collision_study
from engram_lm.analysis.rows.neighbours import Neighbours, nearest_ngrams
from engram_lm.analysis.rows.usage import RowUse
from engram_lm.analysis.subject import Subject
from engram_lm.errors import ConfigError
from engram_lm.evaluation.token_text import spelled, visible_text
from engram_lm.page.figure import INK, Panels, Picture, line_style
from engram_lm.page.frame import escape, section, table
from engram_lm.page.number_text import NOTHING, count_text, mean_of

_HEADS = (1, 2, 4, 8)
"""Numbers of heads that are compared."""
_NUM_COMPARED = 1 << 14
"""Frequent N-grams of each order among which neighbours are searched."""
_NUM_SHOWN = 2
"""N-grams of each order whose neighbours are shown."""
_FIGURES = {
    "hits": ("Times a row is read, by rank", "times read"),
    "covered": ("Reads that the hottest rows answer", "share of reads"),
}
"""What is drawn: its title, and what the vertical axis shows."""


class RowsPart(Part):
    """How the rows are used."""

    title = "rows"

    def analyses(self, work: Work) -> dict[str, Analysis]:
        """Count the rows that are read."""
        return {self.name: RowUse(TextNgrams(work.tokens), max_bytes=work.options.count_bytes)}

    def plain(self, work: Work, result: Any) -> dict[str, Any]:
        """Add what token compression and heads do to collisions, and neighbours of frequent N-grams."""
        readers = [subject for subject in work.subjects if subject.memories]
        ngrams: TextNgrams = result.ngrams
        return {
            **result.to_dict(),
            "compression": _compression_and_heads(readers[0], ngrams).to_dict(),
            "neighbours": {
                subject.name: [found.to_dict() for found in _neighbours_of_frequent(subject, ngrams)]
                for subject in readers
            },
        }

    def summary(self, result: Mapping[str, Any]) -> Iterator[str]:
        """Return how much of each block's table is read."""
        for model, usage in self.by_model(result).items():
            for block, share in zip(usage["blocks"], usage["occupancy_by_block"], strict=True):
                yield f"{model}, block {block}: {100 * share:.1f} % of the rows read"

    def picture(self, result: Mapping[str, Any]) -> Picture | None:
        """Draw reads by rank, and what a cache would answer, side by side."""
        usages = self.by_model(result)
        return self.drawn(9.6, 3.8, _panels(_curves(usages)).in_picture) if usages else None

    def section(self, result: Mapping[str, Any], page_only: Mapping[str, Any]) -> str:
        """Return occupancy, how often the hottest rows are read, collisions, and neighbours."""
        results, usages = self.results(result), self.by_model(result)
        if not usages:
            return ""
        several, curves = len(usages) > 1, _curves(usages)
        body = [
            "<p>Which rows the text reads. N&#8209;grams are distributed as words are: a few rows are read most of the "
            "time, and a cache of the hottest rows answers most reads.</p>",
            _panels(curves).on_page(lambda key: "; ".join(f"{name}: {one['words']}" for name, one in curves.items())),
            *(_usage(name, usage, several) for name, usage in usages.items()),
            *(_compression(found["compression"]) for found in results),
            *(
                _neighbours(name if several else "", neighbours)
                for found in results
                for name, neighbours in found["neighbours"].items()
            ),
        ]
        return section("rows", "How the rows are used", "\n".join(part for part in body if part))


def _compression_and_heads(subject: Subject, ngrams: TextNgrams) -> CollisionStudy:
    """Measure what token compression and other numbers of heads would do to collisions, with the model's rows."""
    spec = subject.spec
    assert spec is not None
    rows = sum(spec.primes[0][: spec.num_heads])
    fitting = tuple(heads for heads in _HEADS if rows >= 2 * heads)
    return collision_study(subject.tokenizer, ngrams, rows_per_order=rows, orders=spec.orders, heads=fitting)


def _neighbours_of_frequent(subject: Subject, ngrams: TextNgrams) -> Iterator[Neighbours]:
    """Find what lies nearest to the most frequent N-grams of each order that hold a letter, in every block's memory."""
    spec = subject.spec
    assert spec is not None
    counted = ngrams.frequent(spec, _NUM_COMPARED)
    for order in spec.orders:
        chosen = [
            tokens
            for tokens in counted[order].tokens.tolist()
            if min(tokens) >= 0 and any(map(str.isalpha, spelled(subject.tokenizer, tokens[-1:])))
        ]
        for ngram in chosen[:_NUM_SHOWN]:
            for block in subject.memories:
                # A row that was never written has no direction.
                with contextlib.suppress(ConfigError):
                    yield nearest_ngrams(
                        subject, ngram, ngrams, block=block, k=6, min_count=2, num_promoted=4, max_ngrams=_NUM_COMPARED
                    )


def _curves(usages: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Bring the tables of all models together: ``ranks``, ``hits``, ``covered``, and what a curve says in words."""
    curves = {}
    for model, usage in usages.items():
        for place, blocks in enumerate(usage["tables"]):
            table_name = f"block{'s' * (len(blocks) > 1)} {', '.join(map(str, blocks))}"
            exponent = usage["zipf_exponent"][place]
            known = [index for index, hits in enumerate(usage["hits"][place]) if hits]
            curves[f"{model}, {table_name}" if len(usages) > 1 else table_name] = {
                "ranks": [usage["ranks"][index] for index in known],
                "hits": [usage["hits"][place][index] for index in known],
                "covered": [usage["covered"][place][index] for index in known],
                "words": "" if exponent is None else f"falls like rank to the power of −{exponent:.2f}",
            }
    return curves


def _panels(curves: Mapping[str, Mapping[str, Any]]) -> Panels:
    titles = {key: title for key, (title, _) in _FIGURES.items()}
    return Panels(name="rows", titles=titles, arms=list(curves), draw=functools.partial(_draw, curves))


def _draw(curves: Mapping[str, Mapping[str, Any]], axes: Any, *, key: str, on_page: bool) -> None:
    """Draw how often rows are read, or what the hottest ones answer, against their rank."""
    from matplotlib.ticker import LogLocator

    ink = INK if on_page else "black"
    for index, (name, curve) in enumerate(curves.items()):
        axes.plot(curve["ranks"], curve[key], label=name, **line_style(index, on_page=on_page))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(numticks=6))
    if key == "hits":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
    else:
        axes.set_ylim(0, 1.02)
    axes.minorticks_off()
    axes.set_xlabel("rank of the row, hottest first", color=ink)
    axes.set_ylabel(_FIGURES[key][1], color=ink)


def _usage(name: str, usage: Mapping[str, Any], several: bool) -> str:
    bars = "".join(
        f'<dt>block {block}</dt><dd class="track" style="--w: {100 * share:.1f}%"></dd><dd>{100 * share:.1f} %</dd>'
        for block, share in zip(usage["blocks"], usage["occupancy_by_block"], strict=True)
    )
    heading = f"Rows read at least once{f', {escape(name)}' if several else ''}"
    parts = [f'<h3>{heading}</h3><dl class="bars of-all">{bars}</dl>']
    if usage["row_share"] < 1:
        parts.append(f'<p class="note">Estimated from {100 * usage["row_share"]:.3g} % of the rows.</p>')
    if usage["collisions"] is not None:
        parts.append(_collisions(usage["collisions"]))
    return "".join(parts)


def _collisions(found: Mapping[str, Any]) -> str:
    rows = [
        [
            f"block {block}, {order}-grams",
            count_text(found["num_ngrams"][place]),
            _share(mean_of(found["by_head"][index][place])),
            _share(mean_of(found["expected_by_head"][index][place])),
            _share(found["all_heads"][index][place]),
            _share(found["expected_all_heads"][index][place]),
        ]
        for index, block in enumerate(found["blocks"])
        for place, order in enumerate(found["orders"])
    ]
    columns = ("", "Frequent", "Share a row", "Even hash", "Share all rows", "Even hash")
    return (
        f"<h3>Collisions among N-grams seen {found['min_count']} times or more</h3>"
        + table(columns, rows, label="Collisions, a wide table")
        + '<p class="note">Share a row: another frequent N&#8209;gram reads the same row of one head, on average over '
        "heads. Share all rows: it does so in all heads of the order, so the two cannot be told apart. Beside each is "
        "what a perfectly even hash would give.</p>"
    )


def _compression(study: Mapping[str, Any]) -> str:
    kinds = ["canonical" if compressed else "raw" for compressed in study["compression"]]
    rows = []
    for index, kind in enumerate(kinds):
        for place, heads in enumerate(study["heads"]):
            cells = [f"{kind} tokens, {heads} head{'s' * (heads > 1)}"]
            for one, every in zip(study["one_head"][index][place], study["all_heads"][index][place], strict=True):
                cells += [_share(one), _share(every)]
            rows.append(cells)
    columns = [""]
    for order in study["orders"]:
        columns += [f"{order}-grams: share a row", "share all rows"]
    counts = [
        ", ".join(f"{count_text(number)} {order}-grams" for order, number in zip(study["orders"], numbers, strict=True))
        for numbers in study["num_distinct"]
    ]
    distinct = "; ".join(f"{kind}: {said}" for kind, said in zip(kinds, counts, strict=True))
    return (
        "<h3>What token compression and heads do to collisions</h3>"
        + table(columns, rows, label="Collisions by compression and heads, a wide table")
        + f'<p class="note">With {count_text(study["rows_per_order"])} rows for each order, as the first model has. '
        f"Distinct N&#8209;grams of the text: {distinct}.</p>"
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
    # An indentation is shown by its length.
    shown = re.sub(r" {4,}", lambda spaces: f"␣×{len(spaces[0])}·", visible_text(text))
    return "“" + shown.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣") + "”"


def _share(value: float | None) -> str:
    if value is None:
        return NOTHING
    return "0 %" if value == 0 else f"{100 * value:.3g} %" if value > 1e-5 else "< 0.001 %"
