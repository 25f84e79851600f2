"""Whether a candidate wins: it must be better than the paper's layer and than bigrams alone, wherever it was tried."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engram_lm.page.number_text import NOTHING, count_text, signed_text
from engram_lm.studies.candidates import REFERENCE, listed_name
from engram_lm.studies.fits import arm_losses, is_whole
from engram_lm.studies.layers.arms import CONTROL
from engram_lm.studies.page import Table
from engram_lm.studies.summary import ENOUGH_SEEDS

STANDARD_ERRORS = 3.0
"""By how many standard errors a winner is better."""


def verdict(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compare the candidates that every result has with the paper's layer and with bigrams alone.

    Returns:
        ``settings``: names of the results, which differ in size, tokens or seeds. ``candidates``: for each candidate
        and setting ``to_engram`` and ``to_bigrams``, each with ``difference`` (nats per token, below 0 where the
        candidate is better), ``standard_error`` and ``ratio`` of the two; and ``wins``, whether both ratios are
        `STANDARD_ERRORS` below 0 in every setting. ``winners``: their names, the best first. ``enough``: whether there
        are seeds enough to say anything.
    """
    settings = [setting_words(result) for result in results]
    shared = [
        name
        for name, arm in results[0]["arms"].items()
        if name not in (REFERENCE, CONTROL) and not arm["is_control"] and all(name in one["arms"] for one in results)
    ]
    found: dict[str, Any] = {}
    for name in shared:
        compared = [{f"to_{other}": _difference(one, name, other) for other in (REFERENCE, CONTROL)} for one in results]
        known = [pair for one in compared for pair in one.values()]
        found[name] = {
            "title": results[0]["arms"][name]["title"],
            "settings": compared,
            "wins": all(pair is not None and pair["ratio"] <= -STANDARD_ERRORS for pair in known),
        }
    enough = all(len(one["seeds"]) >= ENOUGH_SEEDS and CONTROL in one["arms"] for one in results)

    def gain(name: str) -> float:
        return sum(one[f"to_{REFERENCE}"]["difference"] for one in found[name]["settings"])

    winners = sorted((name for name in found if found[name]["wins"] and enough), key=gain)
    return {"settings": settings, "candidates": found, "winners": winners, "enough": enough}


def setting_words(result: Mapping[str, Any]) -> str:
    """Name what sets a result apart from others of this study."""
    of = result["setting"]
    seeds = len(result["seeds"])
    return f"{of['size']}, {count_text(of['tokens'])} tokens, {seeds} seed{'s' * (seeds != 1)} from {of['first_seed']}"


def _difference(result: Mapping[str, Any], name: str, other: str) -> dict[str, float] | None:
    """The paired difference of two arms and its standard error; None where it is not known.

    The error is the larger of two: that of the differences of this pair, and that of all pairs of arms, which a few
    seeds tell more surely.
    """
    arms = [one for one, arm in result["arms"].items() if not arm["is_control"] and is_whole(arm)]
    losses = arm_losses(result, arms) if arms else None
    if losses is None or name not in arms or other not in arms or len(losses) < 2:
        return None
    num_seeds, num_arms = losses.shape
    pair = losses[:, arms.index(name)] - losses[:, arms.index(other)]
    errors = losses - losses.mean(1, keepdims=True) - losses.mean(0) + losses.mean()
    pooled = math.sqrt(2 * float(np.square(errors).sum()) / ((num_seeds - 1) * (num_arms - 1)))
    error = max(pooled, float(pair.std(ddof=1))) / math.sqrt(num_seeds)
    value = float(pair.mean())
    return {
        "difference": value,
        "standard_error": error,
        "ratio": value / error if error else math.copysign(1e9, value),
    }


def best_three(result: Mapping[str, Any]) -> list[str]:
    """The candidates of the lowest losses, to be tried again on other seeds."""
    losses = {
        name: arm["summary"]["loss"]["mean"]
        for name, arm in result["arms"].items()
        if name not in (REFERENCE, CONTROL) and not arm["is_control"] and is_whole(arm)
    }
    # A twin of equal operations is not chosen by its own name, but with --equal-flops.
    names = (listed_name(name) for name in sorted(losses, key=losses.__getitem__))
    return [name for name in dict.fromkeys(names) if name != REFERENCE][:3]


def verdict_words(found: Mapping[str, Any]) -> str:
    """Say the verdict in a sentence."""
    if not found["enough"]:
        return (
            f"A verdict needs {ENOUGH_SEEDS} seeds or more and bigrams alone in every setting; until then this is a "
            "screening"
        )
    where = "in every setting" if len(found["settings"]) > 1 else "in this setting"
    if not found["winners"]:
        return f"No candidate is {STANDARD_ERRORS:g} standard errors better than the paper's layer and bigrams {where}"
    names = ", ".join(found["candidates"][name]["title"] for name in found["winners"])
    return (
        f"Better than the paper's layer and bigrams alone by {STANDARD_ERRORS:g} standard errors or more, {where}: "
        f"{names}"
    )


def verdict_table(found: Mapping[str, Any]) -> Table:
    """List every candidate in every setting."""
    rows = []
    for one in found["candidates"].values():
        for number, (setting, pairs) in enumerate(zip(found["settings"], one["settings"], strict=True)):
            first = number == 0
            rows.append(
                [
                    one["title"] if first else "",
                    setting,
                    *(_cell(pairs[f"to_{other}"]) for other in (REFERENCE, CONTROL)),
                    ("yes" if one["wins"] and found["enough"] else "no") if first else "",
                ]
            )
    return Table(
        title="Verdict",
        columns=("Candidate", "Setting", "To the paper's layer", "To bigrams alone", "Wins"),
        rows=rows,
        note=f"Differences of held-out loss in nats per token, paired by seed, ± one standard error, and their ratio; "
        f"below 0 the candidate is better. A winner has ratios of −{STANDARD_ERRORS:g} or less in all cells.",
    )


def _cell(pair: Mapping[str, float] | None) -> str:
    if pair is None:
        return NOTHING
    return f"{signed_text(pair['difference'])} ± {pair['standard_error']:.4f} ({signed_text(pair['ratio'])})"
