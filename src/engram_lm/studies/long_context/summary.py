"""What came out of the study: what each model finds again by length, and differences at equal steps and equal loss."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from engram_lm.page.figure import MARKERS, Picture, line_style
from engram_lm.page.number_text import NOTHING, signed_text, spread_text
from engram_lm.studies.page import Finding, Table
from engram_lm.studies.summary import ENOUGH_SEEDS, paired_difference, seeds_note, spread

MOE, ENGRAM, EQUAL = "moe", "engram", "equal-loss"
"""Names of the models: without memory, with it, and the one that was ahead as it was at the other's loss."""
_ARMS = {
    ("short", MOE): "experts alone, before the stage",
    ("short", ENGRAM): "with memory, before the stage",
    ("long", MOE): "experts alone",
    ("long", ENGRAM): "with memory",
    ("long", EQUAL): "the one ahead, stopped at equal loss",
}
_COMPARISONS = {"equal_steps": "equal steps", "equal_loss": "equal loss"}


def summarize(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Average over seeds.

    Args:
        seeds: What each seed gave: ``short`` and ``long``, by arm what was measured (``loss``, ``recall``), and
            ``equal_loss``, which says which ``arm`` was ahead.

    Returns:
        ``arms``: for ``short`` and ``long`` and each name, the spreads of ``loss`` and, by task and length, of
        ``recall``, the share of right answers, and of ``answer_loss``. ``differences``: for ``equal_steps`` and
        ``equal_loss``, memory minus experts alone, seed by seed, of the same, after the stage.
    """
    arms: dict[str, dict[str, Any]] = {"short": {}, "long": {}}
    for part, name in _ARMS:
        known = [seed[part][name] for seed in seeds if name in seed[part]]
        arms[part][name] = _numbers(known)
    pairs: dict[str, dict[int, tuple[Any, Any]]] = {name: {} for name in _COMPARISONS}
    for number, seed in enumerate(seeds):
        long = seed["long"]
        if MOE in long and ENGRAM in long:
            pairs["equal_steps"][number] = (long[ENGRAM], long[MOE])
        if EQUAL in long:
            other = MOE if seed["equal_loss"]["arm"] == ENGRAM else ENGRAM
            if other in long:
                both = (long[EQUAL], long[other])
                pairs["equal_loss"][number] = both if other == MOE else both[::-1]
    return {"arms": arms, "differences": {name: _differences(found) for name, found in pairs.items()}}


def _numbers(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    tasks = measured[0]["recall"] if measured else {}

    def by_length(key: str) -> dict[str, Any]:
        return {
            task: {length: spread(one["recall"][task][length][key] for one in measured) for length in tasks[task]}
            for task in tasks
        }

    losses = spread(one["loss"] for one in measured)
    return {"loss": losses, "recall": by_length("correct"), "answer_loss": by_length("loss")}


def _differences(pairs: Mapping[int, tuple[Any, Any]]) -> dict[str, Any]:
    def of(read: Any) -> dict[str, Any]:
        ours, theirs = ({number: read(pair[side]) for number, pair in pairs.items()} for side in (0, 1))
        return paired_difference(ours, theirs)

    tasks = next(iter(pairs.values()))[0]["recall"] if pairs else {}

    def by_length(key: str) -> dict[str, Any]:
        return {
            task: {
                length: of(lambda one, task=task, length=length: one["recall"][task][length][key])
                for length in tasks[task]
            }
            for task in tasks
        }

    losses = of(lambda one: one["loss"])
    return {"loss": losses, "recall": by_length("correct"), "answer_loss": by_length("loss")}


def long_context_finding(result: Mapping[str, Any]) -> Finding:
    """Say what memory changes at the longest length, and list every model by length."""
    summary, lengths, seeds = result["summary"], [str(length) for length in result["lengths"]], len(result["seeds"])
    tasks = list(summary["arms"]["long"][MOE]["recall"]) or ["single"]
    guess = result["num_values"]
    tables = []
    for task in tasks:
        needles = "one needle" if task == "single" else "eight needles"
        for key, title, note in (
            (
                "recall",
                "Notes found again",
                "Share of questions whose answer is the model's most likely continuation; mean ± standard deviation "
                f"over seeds. A guess among the values is right in {1 / guess:.1%}.",
            ),
            (
                "answer_loss",
                "Loss of the answer",
                "Nats per answer; mean ± standard deviation over seeds. Who knows the values, and not which one was "
                f"noted, has {math.log(guess):.2f}.",
            ),
        ):
            rows = [
                [title_of, *(_share(summary["arms"][part][name][key].get(task, {}).get(length)) for length in lengths)]
                for (part, name), title_of in _ARMS.items()
            ]
            rows += [
                [f"memory − experts, {title_of}", *(_change(found[key].get(task, {}).get(one)) for one in lengths)]
                for name, title_of in _COMPARISONS.items()
                for found in [summary["differences"][name]]
            ]
            columns = ("Model", *(f"{int(length):,} tokens" for length in lengths))
            tables.append(Table(title=f"{title}, {needles}", columns=columns, rows=rows, note=note))
    losses = [
        [title, spread_text(found["mean"], found["std"])]
        for (part, name), title in _ARMS.items()
        for found in [summary["arms"][part][name]["loss"]]
    ]
    tables.append(Table(title="Held-out loss", columns=("Model", "nats per token"), rows=losses))
    detail = seeds_note(seeds)
    if seeds < ENOUGH_SEEDS:
        detail += " Differences of a few questions are noise."
    return Finding(headline=_headline(summary, tasks[-1], lengths[-1]), detail=detail, tables=tables)


def _headline(summary: Mapping[str, Any], task: str, length: str) -> str:
    words = []
    for name, title in _COMPARISONS.items():
        found = summary["differences"][name]["recall"].get(task, {}).get(length)
        if found is not None and found["mean"] is not None:
            words.append(f"{signed_text(found['mean'])} at {title}")
    if not words:
        return "No pair of models was trained to its end"
    return f"Share of notes found again in {int(length):,} tokens, memory minus experts alone: {', '.join(words)}"


def _share(found: Mapping[str, Any] | None) -> str:
    return NOTHING if found is None else spread_text(found["mean"], found["std"])


def _change(found: Mapping[str, Any] | None) -> str:
    return NOTHING if found is None else spread_text(found["mean"], found["std"], signed=True)


def figures(result: Mapping[str, Any]) -> Sequence[Picture]:
    """Draw the share of notes that each model finds again, by length, a panel for each task."""
    arms = result["summary"]["arms"]
    tasks = list(arms["long"][MOE]["recall"])
    if not tasks:
        return []

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
        for axes, task in zip(panels, tasks, strict=True):
            for index, ((part, name), title) in enumerate(_ARMS.items()):
                found = arms[part][name]["recall"].get(task)
                if found is None:
                    continue
                style = line_style(index, on_page=False) | {"marker": MARKERS[index % len(MARKERS)], "markersize": 5}
                lengths = [int(length) for length in found]
                means = [one["mean"] for one in found.values()]
                axes.plot(lengths, means, **style, label=title)
            axes.set_xscale("log", base=2)
            axes.set_xticks(result["lengths"], [f"{length:,}" for length in result["lengths"]])
            axes.set(xlabel="tokens", title="one needle" if task == "single" else "eight needles", ylim=(-0.03, 1.03))
            axes.grid(color="0.9")
        panels[0].set_ylabel("share found again")
        panels[-1].legend(frameon=False, fontsize=8)

    return [Picture(name="recall", title="Notes found again", size=(9.6, 4.0), draw=draw)]
