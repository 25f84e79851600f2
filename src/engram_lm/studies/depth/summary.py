"""What came out of the study: averages over seeds, and a table for the terminal."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engram_lm.page.number_text import NOTHING, mean_of, number_text, signed_text, spread_of, spread_text
from engram_lm.studies.depth.arms import BASELINE

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["summarize", "terminal_table"]


def summarize(seeds: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> dict[str, Any]:
    """Average over seeds.

    Args:
        seeds: What each seed gave: ``arms`` (what training gave, by arm), and ``lens`` and ``cka`` where asked for.
        titles: What to call each arm, the one without memory first.

    Returns:
        ``arms``, by name: ``loss`` in nats per token; ``gain`` over the model without memory, subtracted seed by seed;
        ``lens``: ``kl`` by entry, ``kl_depth`` and ``prediction_depth`` in layers; ``cka``: ``similarity``,
        ``alignment`` and ``gain`` by entry, and ``layers_ahead``, the mean gain over the outputs of all layers. Spreads
        are mean and standard deviation (None of one seed). Beside them ``best``, the arm with the lowest loss of those
        with one module, and ``kept_by_worst``, the share of its gain that the one with the highest loss keeps (None
        where no module gains anything).
    """
    arms: dict[str, Any] = {}
    for name, title in titles.items():
        runs = [seed["arms"][name] for seed in seeds]
        gains = [seed["arms"][BASELINE]["loss"] - seed["arms"][name]["loss"] for seed in seeds]
        arms[name] = {
            "title": title,
            "blocks": runs[0]["blocks"],
            "flops_per_token": runs[0]["flops_per_token"],
            "parameters": runs[0].get("parameters"),
            "loss": _spread(run["loss"] for run in runs),
            "gain": None if name == BASELINE else {**_spread(gains), "per_seed": gains},
            "lens": _lens([curve for seed in seeds if (curve := seed.get("lens", {}).get(name))]),
            "cka": _cka([found for seed in seeds if (found := seed.get("cka", {}).get(name))]),
        }
    single = [name for name, arm in arms.items() if len(arm["blocks"]) == 1]
    best, worst = (choose(single, key=lambda name: arms[name]["loss"]["mean"]) for choose in (min, max))
    best_gain, worst_gain = arms[best]["gain"]["mean"], arms[worst]["gain"]["mean"]
    return {"arms": arms, "best": best, "kept_by_worst": worst_gain / best_gain if best_gain > 0 else None}


def terminal_table(result: Mapping[str, Any]) -> "Table":
    """Lay out the arms, a line for each.

    Args:
        result: A result in the format ``engram.depth.1``.
    """
    from rich import box
    from rich.table import Table

    summary, seeds = result["summary"], len(result["seeds"])
    arms = summary["arms"]
    about = (
        "Losses in nats per token; mean ± standard deviation over the seeds. Gain: over no memory, at equal operations "
        "per token. KL depth: layers until half of the divergence from the model's own prediction is gone. Prediction "
        "depth: layers until its most likely token stays. Layers ahead: how much deeper a layer of the model without "
        "memory is that is alike (CKA), averaged over layers; a correlation."
    )
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"Memory by depth, {seeds} seed{'s' * (seeds > 1)}",
        title_justify="left",
        caption=about,
        caption_justify="left",
    )
    table.add_column("Memory in", no_wrap=True)
    for column in ("Held-out loss", "Gain", "KL depth", "Prediction depth", "Layers ahead"):
        table.add_column(column, justify="right")
    for name, arm in arms.items():
        gain, lens, cka = arm["gain"], arm["lens"], arm["cka"]
        ahead = None if cka is None else cka["layers_ahead"]
        table.add_row(
            arm["title"].removeprefix("memory in "),
            spread_text(arm["loss"]["mean"], arm["loss"]["std"]),
            NOTHING if gain is None else spread_text(gain["mean"], gain["std"], signed=True),
            NOTHING if lens is None else number_text(lens["kl_depth"]["mean"]),
            NOTHING if lens is None else number_text(lens["prediction_depth"]["mean"]),
            NOTHING if ahead is None or ahead["mean"] is None else signed_text(ahead["mean"]),
            style="bold" if name == summary["best"] else None,
        )
    return table


def _lens(curves: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not curves:
        return None
    return {
        "num_layers": curves[0]["num_layers"],
        "memory_blocks": curves[0]["memory_blocks"],
        "relative_depth": curves[0]["relative_depth"],
        "kl": _mean([curve["kl"] for curve in curves]),
        "kl_depth": _spread(curve["kl_depth"] for curve in curves),
        "prediction_depth": _spread(curve["prediction_depth"] for curve in curves),
    }


def _cka(maps: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not maps:
        return None
    return {
        "top_k": maps[0]["top_k"],
        "similarity": [_mean(rows) for rows in zip(*(found["similarity"] for found in maps), strict=True)],
        "alignment": _mean([found["alignment"] for found in maps]),
        "gain": _mean([found["gain"] for found in maps]),
        "layers_ahead": _spread(mean_of(found["gain"][1:]) for found in maps),
    }


def _mean(rows: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Average lists of one length, place by place."""
    return [mean_of(values) for values in zip(*rows, strict=True)]


def _spread(values: Iterable[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return {"mean": mean_of(known), "std": spread_of(known)}
