"""What came out of the study of writing: gains on the stream, what is forgotten, what is remembered, and the cost."""

from collections.abc import Mapping, Sequence
from typing import Any

from engram_lm.page.figure import MARKERS, Picture, line_style
from engram_lm.page.number_text import NOTHING, count_text, mean_of, signed_text, spread_text
from engram_lm.studies.page import Finding, Table
from engram_lm.studies.summary import difference_cells, paired_difference, seeds_note, spread
from engram_lm.studies.writing.measure import CACHE, PLAIN, title_of

_MEASURES = ("loss", "old_after", "back")
_ARMS = {"dense": "no memory", "engram": "with memory"}
_COMPARED = ("rows", "rows_adam", "rows_and_cache", "rows_adam_and_cache")


def summarize(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Average over seeds and streams.

    Args:
        runs: What each seed gave: for each of its ``arms``, what `engram_lm.studies.writing.measure.measured` returns.

    Returns:
        By arm and way: ``loss``, ``old_after`` and ``back``, each with its ``difference`` to no update and ``to_cache``
        to the cache alone, paired by seed and stream; ``by_domain`` the loss with the same differences, paired by seed;
        the spread of ``forgotten`` nats, of facts ``known_before`` and ``known``, and of an ``answer``; the mean
        ``seconds`` per token, ``slowness`` against no update in the same model, and numbers ``kept``.
    """
    return {arm: _of_arm([run["arms"][arm] for run in runs]) for arm in runs[0]["arms"]} if runs else {}


def _of_arm(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    sources = list(seeds[0]["domains"])

    def taken(way: str, measure: str, source: str | None = None) -> dict[int, Any]:
        """A number of each stream, by a number for its seed and source."""
        return {
            number * len(sources) + place: seed["domains"][one][way][measure]
            for number, seed in enumerate(seeds)
            for place, one in enumerate(sources)
            if source in (None, one)
        }

    def compared(way: str, measure: str, source: str | None = None) -> dict[str, Any]:
        ours = taken(way, measure, source)
        known = {name: paired_difference(ours, taken(name, measure, source)) for name in (PLAIN, CACHE)}
        return {**spread(ours.values()), "difference": known[PLAIN], "to_cache": known[CACHE]}

    found = {}
    for way in seeds[0]["facts"]:
        before, after = (taken(way, name) for name in ("old_before", "old_after"))
        seconds, plain = (mean_of(taken(name, "seconds").values()) for name in (way, PLAIN))
        found[way] = {
            **{name: compared(way, name) for name in _MEASURES},
            "by_domain": {source: compared(way, "loss", source) for source in sources},
            "forgotten": paired_difference(after, before),
            **{
                name: spread(seed["facts"][way][name] for seed in seeds) for name in ("known_before", "known", "answer")
            },
            "seconds": seconds,
            "slowness": seconds / plain if seconds and plain else None,
            "kept": mean_of(taken(way, "kept").values()),
        }
    return found


def writing_finding(result: Mapping[str, Any]) -> Finding:
    """Say what rows that are written gain beside what a cache gains, and list all ways to read."""
    summary, names = result["summary"], result["domains"]
    tables = []
    for arm, ways in summary.items():
        rows = [
            [
                title_of(way),
                spread_text(found["loss"]["mean"], found["loss"]["std"]),
                *(("", "") if way == PLAIN else difference_cells(found["loss"]["difference"])),
                *(("", "") if way == CACHE else difference_cells(found["loss"]["to_cache"])),
            ]
            for way, found in ways.items()
        ]
        tables.append(
            Table(
                title=f"Loss on text of other kinds, {_ARMS[arm]}",
                columns=("Way to read", "Loss", "To no update", "p", "To the count cache", "p"),
                rows=rows,
                note=f"Nats per token, over {_streams(result)}; differences are paired by seed and stream. Streams of "
                "one seed share a model, so p counts too many independent pairs.",
            )
        )
        if len(names) > 1:
            tables.append(
                Table(
                    title=f"By kind of text, {_ARMS[arm]}",
                    columns=("Way to read", *(f"{name}: to no update" for name in names)),
                    rows=[
                        [
                            title_of(way),
                            *(
                                spread_text(one["mean"], one["std"])
                                if way == PLAIN
                                else difference_cells(one["difference"])[0]
                                for one in found["by_domain"].values()
                            ),
                        ]
                        for way, found in ways.items()
                    ],
                    note="Nats per token; the first line is the loss itself.",
                )
            )
        tables.append(
            Table(
                title=f"Afterwards, {_ARMS[arm]}",
                columns=("Way to read", "Forgotten", "p", "Back: to no update", "p"),
                rows=[
                    [
                        title_of(way),
                        *difference_cells(found["forgotten"]),
                        *difference_cells(found["back"]["difference"]),
                    ]
                    for way, found in ways.items()
                    if way != PLAIN
                ],
                note="Forgotten: by how much the loss on held-out text of the old kind is higher after the stream than "
                "before. Back: the loss on such text when reading goes on there, with updates.",
            )
        )
        tables.append(
            Table(
                title=f"Facts and costs, {_ARMS[arm]}",
                columns=("Way to read", "Facts known", "Answer", "Time", "Kept"),
                rows=[[title_of(way), *_costs(found)] for way, found in ways.items()],
                note="Facts known: share of the facts, each told once in text of the old kind, whose true answer is "
                f"the likeliest of four at the end; before, {_share(ways[PLAIN]['known_before'])}. Answer: nats of the "
                "true one. Time per token, as a multiple of no update, each read in turn. Kept: weights that changed, "
                "and counts.",
            )
        )
    return Finding(
        headline=_headline(summary), detail=f"{seeds_note(len(result['reading']))} {_choices(result)}", tables=tables
    )


def _costs(found: Mapping[str, Any]) -> list[str]:
    slowness = found["slowness"]
    return [
        _share(found["known"]),
        spread_text(found["answer"]["mean"], found["answer"]["std"]),
        NOTHING if slowness is None else f"{slowness:.1f}",
        count_text(found["kept"]),
    ]


def _share(found: Mapping[str, Any]) -> str:
    if found["mean"] is None:
        return NOTHING
    return f"{found['mean']:.0%}" + ("" if found["std"] is None else f" ± {found['std']:.0%}")


def _streams(result: Mapping[str, Any]) -> str:
    seeds, kinds = len(result["reading"]), len(result["domains"])
    return f"{seeds * kinds} streams ({seeds} seed{'s' * (seeds > 1)}, {kinds} kind{'s' * (kinds > 1)} of text)"


def _choices(result: Mapping[str, Any]) -> str:
    """What was chosen on the validation streams."""
    rates = result["choices"]["engram"]["rates"]
    words = ", ".join(f"{found['rate']:.3g} for {title_of(name)}" for name, found in rates.items() if name != PLAIN)
    return (
        f"Learning rates, chosen on streams that no result uses (with memory: {words}), and the cache's shares are the "
        "same for all kinds of text. Models of this size know little of any text, so a stream has much to teach "
        "them; "
        "that larger models gain as much does not follow."
    )


def _headline(summary: Mapping[str, Any]) -> str:
    ways = summary.get("engram", {})
    gains = {way: ways[way]["loss"]["difference"]["mean"] for way in (*_COMPARED, CACHE) if way in ways}
    known = {way: gain for way, gain in gains.items() if gain is not None}
    alone = {way: gain for way, gain in known.items() if way in _COMPARED[:2]}
    if not alone or CACHE not in known:
        return "No model with memory read its streams to their end"
    rows = min(alone, key=lambda way: alone[way])
    words = (
        f"On text of another kind, writing rows ({title_of(rows)}) changes the loss by {signed_text(known[rows])} nats "
        f"per token, a count cache without gradients by {signed_text(known[CACHE])}"
    )
    both = f"{rows}_and_cache"
    return words + (f", and both together by {signed_text(known[both])}" if both in known else "")


def figures(result: Mapping[str, Any]) -> Sequence[Picture]:
    """Draw what each way gains along the stream, averaged over seeds and streams, a panel for each model."""
    arms = list(result["summary"])
    if not arms:
        return []
    tokens = int(result["settings"]["stream_tokens"])

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(arms), squeeze=False, sharey=True)[0]
        order = list(result["summary"][arms[-1]])
        for axes, arm in zip(panels, arms, strict=True):
            curves = [one for run in result["reading"] for one in run["arms"][arm]["domains"].values()]
            for way in result["summary"][arm]:
                if way == PLAIN:
                    continue
                index = order.index(way)
                style = line_style(index, on_page=False) | {"marker": MARKERS[index % len(MARKERS)], "markersize": 4}
                gains = [_gains(one, way) for one in curves]
                means = [mean_of(column) for column in zip(*gains, strict=True)]
                points = [
                    ((place + 0.5) * tokens / len(means), mean) for place, mean in enumerate(means) if mean is not None
                ]
                axes.plot(*zip(*points, strict=True), **style, label=title_of(way))
            axes.axhline(0, color="0.3", linewidth=0.8)
            axes.set(xlabel="tokens read", title=_ARMS[arm])
            axes.grid(color="0.9")
        panels[0].set_ylabel("loss, to no update (nats per token)")
        panels[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))

    return [Picture(name="writing", title="What each way to read gains along a stream", size=(11.5, 4.2), draw=draw)]


def _gains(ways: Mapping[str, Any], way: str) -> list[float | None]:
    pairs = zip(ways[way]["curve"], ways[PLAIN]["curve"], strict=True)
    return [None if None in (ours, plain) else ours - plain for ours, plain in pairs]
