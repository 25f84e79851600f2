"""What came out of the study: averages over seeds, in words, rows and a picture."""

from collections.abc import Mapping, Sequence
from typing import Any

from engram_lm.page.figure import Picture
from engram_lm.studies.page import Finding, Table
from engram_lm.studies.summary import seeds_note, spread


def summarize(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Average over seeds, whose ``run.effect`` is a `SuppressionEffect` as plain values.

    By condition and family there are mean and standard deviation (None of one seed) of ``exact_match``, ``retained``
    (relative to memory on), ``accuracy`` and ``answer_loss``; and by condition ``reading_minus_recall``, what both
    families retain subtracted.
    """
    effects = [seed["run"]["effect"] for seed in seeds]
    families = effects[0]["families"]
    table: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    for row, name in enumerate(condition["name"] for condition in effects[0]["conditions"]):
        table[name] = {
            family: {
                key: spread(effect[key][row][column] for effect in effects)
                for key in ("exact_match", "retained", "accuracy", "answer_loss")
            }
            for column, family in enumerate(families)
        }
        if row and {"recall", "reading"} <= set(families):
            recall, reading = families.index("recall"), families.index("reading")
            kept = [effect["retained"][row] for effect in effects]
            known = [one[reading] - one[recall] for one in kept if None not in (one[reading], one[recall])]
            differences[name] = {**spread(known), "per_seed": known}
    summary = {"conditions": table, "reading_minus_recall": differences}
    if all("twin" in seed for seed in seeds):
        summary["twin"] = {
            family: {
                key: spread(seed["twin"]["scores"][family][key] for seed in seeds)
                for key in ("exact_match", "accuracy", "answer_loss")
            }
            for family in families
        }
    return summary


def markdown_table(result: Mapping[str, Any]) -> str:
    """Write the table as Markdown, ending in a line break."""
    header, *cells = _rows(result)
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def suppression_finding(result: Mapping[str, Any]) -> Finding:
    """Say which family depends more on memory, and list all conditions of an ``engram.suppression.1``."""
    differences = result["summary"]["reading_minus_recall"]
    known = {name: found["mean"] for name, found in differences.items() if found["mean"] is not None}
    headline = "The model learned too little to say what suppression takes away"
    if known:
        name, mean = next(iter(known.items()))
        more = "more" if mean > 0 else "less"
        headline = f"With {name}, reading retains {abs(100 * mean):.0f} points {more} than recall"
    columns, *cells = _rows(result)
    share, seeds = result.get("reading_by_copying_any"), len(result["seeds"])
    note = "Exact match of greedy decoding. Retained: relative to memory on."
    note += "" if share is None else f" Reading by copying any value of the context: {100 * share:.0f} %."
    table = Table(title="Right answers, and the share retained", columns=columns, rows=cells, note=note)
    return Finding(headline=headline, detail=seeds_note(seeds), tables=[table])


def figures(result: Mapping[str, Any]) -> Sequence[Picture]:
    """Draw bars of what each family retains, condition by condition."""
    return [suppression_bars(result["summary"]["conditions"])]


def suppression_bars(conditions: Mapping[str, Any]) -> Picture:
    """Draw bars of what each family retains, of `summarize`'s ``conditions``."""
    conditions = {name: row for name, row in conditions.items() if name != "memory on"}
    families = list(next(iter(conditions.values())))
    height = 0.8 / len(families)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for index, family in enumerate(families):
            shown = [row[family]["retained"] for row in conditions.values()]
            places = [place + (index - (len(families) - 1) / 2) * height for place in range(len(conditions))]
            lengths, spreads = ([100 * (one[key] or 0.0) for one in shown] for key in ("mean", "std"))
            bars = axes.barh(
                places, lengths, height * 0.9, xerr=spreads, label=family, color=f"C{index}", error_kw={"linewidth": 1}
            )
            texts = ["–" if one["mean"] is None else f"{100 * one['mean']:.0f}" for one in shown]
            axes.bar_label(bars, texts, padding=2, fontsize=8)
        axes.set_yticks(range(len(conditions)), conditions)
        axes.invert_yaxis()
        axes.set_xlim(0, 115)
        axes.set_xlabel("right answers retained, % of those with memory on")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12 - 0.3 / len(conditions)), ncols=3, frameon=False)

    size = (6.8, 0.8 + 0.75 * len(conditions))
    return Picture(name="retained", title="Right answers retained", size=size, draw=draw)


def _rows(result: Mapping[str, Any]) -> list[list[str]]:
    """The table's cells, the header first."""
    summary = result["summary"]
    conditions = summary["conditions"]
    families = list(next(iter(conditions.values())))
    found = [["memory", *(title for family in families for title in (family, "retained"))]]
    for name, row in conditions.items():
        cells = [percent_text(row[family][key]) for family in families for key in ("exact_match", "retained")]
        found.append([name, *cells])
    if "twin" in summary:
        # One by one: a model has learned a family or has not, and what lies between is no seed's.
        scores = [seed["twin"]["scores"] for seed in result["seeds"]]
        each = [", ".join(f"{100 * score[family]['exact_match']:.0f}" for score in scores) for family in families]
        found.append(["trained without memory", *(cell for told in each for cell in (f"{told} %", ""))])
    return found


def percent_text(value: Mapping[str, float | None]) -> str:
    """Write a mean share and its standard deviation in percent."""
    if value["mean"] is None:
        return "–"
    spread = "" if value["std"] is None else f" ± {100 * value['std']:.0f}"
    return f"{100 * value['mean']:.0f}{spread} %"
