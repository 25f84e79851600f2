"""What a study of candidates found: a ranking by the difference to the paper's layer, with what each one costs."""

from collections.abc import Mapping, Sequence
from typing import Any

from engram_lm.page.figure import Picture
from engram_lm.page.number_text import NOTHING, count_text, signed_text, spread_text
from engram_lm.studies.figures import forest
from engram_lm.studies.fits import arm_losses, difference, estimate, estimate_text, is_whole
from engram_lm.studies.page import Finding, Table
from engram_lm.studies.summary import ENOUGH_SEEDS, seeds_note
from engram_lm.tables.byte_size import byte_size

_DIVISIONS = ("token_frequency", "rare_words", "ngrams_2", "ngrams_3")
"""Kinds of tokens that are shown."""
_ALIKE = 0.01
"""Relative difference of operations that counts as none."""


def tokens_per_second(arm: Mapping[str, Any]) -> float | None:
    """How fast an arm of a result was trained, over all of its seeds."""
    seconds = sum(run["seconds"] for run in arm["runs"])
    return sum(run["tokens"] for run in arm["runs"]) / seconds if seconds else None


def differences(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Differences of held-out loss to the first arm by name, with intervals of 95 % from errors paired by seed."""
    names = [name for name, arm in result["arms"].items() if is_whole(arm)]
    first = next(iter(result["arms"]))
    losses = arm_losses(result, names) if names else None
    if losses is None or first not in names:
        return {}
    place = names.index(first)
    return {
        name: estimate(losses, difference(place, number)).to_dict()
        for number, name in enumerate(names)
        if name != first
    }


def candidate_finding(result: Mapping[str, Any]) -> Finding:
    """Rank the candidates by their difference to the paper's layer, and say which of them are told from noise."""
    arms, found = result["arms"], differences(result)
    first = arms[next(iter(arms))]
    order = sorted(arms, key=lambda name: found.get(name, {"value": 0.0})["value"])
    rows = []
    for name in order:
        arm, cost = arms[name], arms[name]["cost"]
        losses = arm["summary"]["loss"]
        flops = cost["flops"] / first["cost"]["flops"] - 1
        rows.append(
            [
                arm["title"] + (" (control)" if arm["is_control"] else ""),
                spread_text(losses["mean"], losses["std"]),
                estimate_text(found.get(name), "+.4f"),
                byte_size(cost["bytes"]),
                count_text(cost["active"]),
                f"{flops:+.1%}",
                count_text(arm.get("tokens_per_second")),
            ]
        )
    tables = [
        Table(
            title="From the lowest loss to the highest",
            columns=("Memory", "Held-out loss", "To the paper's layer", "Bytes", "Active", "FLOPs", "Tokens/s"),
            rows=rows,
            note="Nats per token; differences with intervals of 95 % from errors paired by seed, below 0 where a "
            "candidate is better. Bytes: of the weights, and of what is needed beside them. Active: parameters that "
            "take part in a token, without the vocabulary's. FLOPs: of the training, relative to the paper's layer. "
            "Tokens/s: of the training here; models that were trained at the same time slowed each other down.",
        )
    ]
    if searches := [
        [arms[name]["title"], *_search_cells(arms[name]["searches"])] for name in order if arms[name].get("searches")
    ]:
        tables.append(
            Table(
                title="What searching takes",
                columns=("Memory", "Entries", "Bytes", "Neighbors", "Temperature", "Share", "Model, µs", "Search, µs"),
                rows=searches,
                note="Means over seeds. Neighbors, temperature and share are chosen on validation text; µs per token "
                "of held-out text, of which as many are searched for as the result says, and the change of the loss "
                "on them is added to the model's own loss on all of it.",
            )
        )
    others = [name for name in result["measures"] if name != "loss"]
    if others:
        columns = [f"{result['measures'][name]['title']}, difference" for name in others]
        tables.append(
            Table(
                title="Other texts, which nothing was trained on",
                columns=("Memory", *columns),
                rows=[[arms[name]["title"], *(_other_cell(arms[name], one) for one in others)] for name in order],
                note="Nats per token: the loss, and its difference to the paper's layer, ± the standard deviation over "
                "seeds.",
            )
        )
    tables += _by_kind(result, order)
    detail = f"{seeds_note(len(result['seeds']))} {_advice(result)}".strip()
    return Finding(headline=_headline(result, found), detail=detail, tables=tables)


def _advice(result: Mapping[str, Any]) -> str:
    """Say which memory to use for what budget, where enough seeds say so."""
    arms = result["arms"]
    known = {
        name: arm["summary"]["loss"]["mean"]
        for name, arm in arms.items()
        if not arm["is_control"] and is_whole(arm) and arm["summary"]["loss"]["mean"] is not None
    }
    first = next(iter(arms))
    if len(result["seeds"]) < ENOUGH_SEEDS or first not in known:
        return ""
    flops = {name: arms[name]["cost"]["flops"] for name in known}
    cheap = [name for name in known if flops[name] <= (1 + _ALIKE) * flops[first]]
    best, best_cheap = min(known, key=lambda name: known[name]), min(cheap, key=lambda name: known[name])
    words = (
        f"With these bytes, and no more operations than the paper's layer takes, {arms[best_cheap]['title']} has the "
        "lowest loss here"
    )
    if best != best_cheap:
        more = flops[best] / flops[first] - 1
        words += f"; where {more:.0%} more operations do not matter, {arms[best]['title']} has"
    return f"{words}."


def _by_kind(result: Mapping[str, Any], order: Sequence[str]) -> list[Table]:
    """Show for which tokens the candidates of the first seed need more bits than the paper's layer."""
    kinds = result.get("by_kind")
    if not kinds:
        return []
    tables = []
    for name in _DIVISIONS:
        division = kinds["divisions"][name]
        groups = division["groups"]
        rows = [["tokens", *(f"{group['num_tokens']:,}" for group in groups)]]
        for arm in order:
            cells = [group["bits"].get(arm, {}) for group in groups]
            if any(cells) and arm != next(iter(result["arms"])):
                rows.append([result["arms"][arm]["title"], *(_more_cell(cell) for cell in cells)])
        tables.append(
            Table(
                title=f"Where the difference is: {division['title']}",
                columns=("Memory", *(group["name"] for group in groups)),
                rows=rows,
                note=f"Bits per token above the paper's layer, ± the standard error over {kinds['num_blocks']:,} "
                f"{kinds['blocks']}; below 0 where a candidate is better. One seed. Occurrences are counted in "
                f"{kinds['reference']}.",
            )
        )
    return tables


def _more_cell(bits: Mapping[str, Any]) -> str:
    if bits.get("more") is None:
        return NOTHING
    error = "" if bits["more_error"] is None else f" ± {bits['more_error']:.3f}"
    return signed_text(bits["more"]) + error


def _search_cells(searches: Sequence[Mapping[str, Any]]) -> list[str]:
    mean = {name: sum(one[name] for one in searches) / len(searches) for name in searches[0]}
    return [
        count_text(mean["num_entries"]),
        byte_size(round(mean["num_bytes"])),
        f"{mean['neighbors']:.0f}",
        f"{mean['temperature']:.3g}",
        f"{mean['share']:.2f}",
        f"{1e6 * mean['model_seconds']:,.0f}",
        f"{1e6 * mean['search_seconds']:,.0f}",
    ]


def _other_cell(arm: Mapping[str, Any], measure: str) -> str:
    found = arm["summary"][measure]
    if found["mean"] is None:
        return NOTHING
    change = found.get("difference")
    words = spread_text(found["mean"], None)
    if change is None or change["mean"] is None:
        return words
    return f"{words} ({spread_text(change['mean'], change['std'], signed=True)})"


def _headline(result: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    tested = {
        name: one
        for name, one in found.items()
        if not result["arms"][name]["is_control"] and one["interval"] is not None
    }
    if not tested or len(result["seeds"]) < ENOUGH_SEEDS:
        return "There are too few seeds to tell the candidates from the paper's layer"
    better = sorted((one["value"], name) for name, one in tested.items() if one["interval"][1] < 0)
    if not better:
        return "No candidate is better than the paper's layer at equal bytes"
    words = ", ".join(f"{result['arms'][name]['title']} ({signed_text(value)})" for value, name in better[:3])
    return f"Better than the paper's layer at equal bytes: {words}" + (
        f" and {len(better) - 3} more" if len(better) > 3 else ""
    )


def candidate_figures(result: Mapping[str, Any]) -> Sequence[Picture]:
    """Draw all differences to the paper's layer with their intervals, the best first, and against the operations."""
    found, arms = differences(result), result["arms"]
    if not found:
        return []
    order = sorted(found, key=lambda name: (arms[name]["is_control"], found[name]["value"]))
    rows = [
        (arms[name]["title"], found[name], arms[name]["summary"]["loss"]["difference"]["per_seed"]) for name in order
    ]
    first = arms[next(iter(arms))]["cost"]["flops"]

    def by_flops(figure: Any) -> None:
        axes = figure.subplots()
        for name in (one for one in order if not arms[one]["is_control"]):
            place = (100 * (arms[name]["cost"]["flops"] / first - 1), found[name]["value"])
            axes.plot(*place, "o", color="C0")
            axes.annotate(arms[name]["title"], place, xytext=(4, 3), textcoords="offset points", fontsize=7)
        axes.axhline(0, color="0.3", linewidth=0.8)
        axes.set_xscale("symlog", linthresh=5)
        axes.grid(color="0.9")
        axes.set(xlabel="operations above the paper's layer, %", ylabel="held-out loss over it, nats per token")

    return [
        forest(
            rows,
            ["controls" if arms[name]["is_control"] else "candidates" for name in order],
            name=result["study"],
            title="Difference to the paper's layer",
            label="held-out loss over the paper's layer, nats per token",
        ),
        Picture(
            name=f"{result['study']}_flops",
            title="Difference to the paper's layer by operations, at equal bytes",
            size=(7.2, 4.6),
            draw=by_flops,
        ),
    ]
