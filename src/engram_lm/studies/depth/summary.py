"""What came out of the study: averages over seeds, in words and rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from engram_lm.page.number_text import NOTHING, mean_of, number_text, signed_text, spread_text
from engram_lm.studies.page import Finding, Table
from engram_lm.studies.summary import paired_difference, seeds_note, spread

__all__ = ["BASELINE", "depth_finding", "summarize"]

BASELINE = "baseline"
"""Name of the model without memory."""
_COLUMNS = ("Memory in", "Held-out loss", "Gain", "KL depth", "Prediction depth", "Layers ahead")
_ABOUT = (
    "Losses in nats per token; mean ± standard deviation over the seeds. Gain: over no memory, at equal operations "
    "per token. KL depth: layers until half of the divergence from the model's own prediction is gone. Prediction "
    "depth: layers until its most likely token stays. Layers ahead: how much deeper a layer of the model without "
    "memory is that is alike (CKA), averaged over layers; a correlation."
)
_UNKNOWN: Mapping[str, Any] = {"mean": None, "std": None}


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
    losses = {name: {number: seed["arms"][name]["loss"] for number, seed in enumerate(seeds)} for name in titles}
    for name, title in titles.items():
        run = seeds[0]["arms"][name]
        arms[name] = {
            "title": title,
            "blocks": run["blocks"],
            "flops_per_token": run["flops_per_token"],
            "parameters": run.get("parameters"),
            "loss": spread(losses[name].values()),
            "gain": None if name == BASELINE else paired_difference(losses[BASELINE], losses[name]),
            "lens": _lens([curve for seed in seeds if (curve := seed.get("lens", {}).get(name))]),
            "cka": _cka([found for seed in seeds if (found := seed.get("cka", {}).get(name))]),
        }
    single = {
        name: arm["loss"]["mean"] for name, arm in arms.items() if len(arm["blocks"]) == 1 and arm["loss"]["mean"]
    }
    best, worst = (choose(single, key=lambda name: single[name], default=None) for choose in (min, max))
    kept = None
    if best is not None and worst is not None and (arms[best]["gain"]["mean"] or 0) > 0:
        kept = arms[worst]["gain"]["mean"] / arms[best]["gain"]["mean"]
    return {"arms": arms, "best": best, "kept_by_worst": kept}


def depth_finding(result: Mapping[str, Any]) -> Finding:
    """Say which block is best and by how much, and list all arms.

    Args:
        result: A result in the format ``engram.depth.1``.
    """
    summary, rows = result["summary"], []
    for arm in summary["arms"].values():
        gain, lens, cka = arm["gain"] or _UNKNOWN, arm["lens"], arm["cka"]
        ahead = _UNKNOWN if cka is None else cka["layers_ahead"]
        rows.append(
            [
                arm["title"].removeprefix("memory in "),
                spread_text(arm["loss"]["mean"], arm["loss"]["std"]),
                spread_text(gain["mean"], gain["std"], signed=True),
                NOTHING if lens is None else number_text(lens["kl_depth"]["mean"]),
                NOTHING if lens is None else number_text(lens["prediction_depth"]["mean"]),
                NOTHING if ahead["mean"] is None else signed_text(ahead["mean"]),
            ]
        )
    headline = "No model with one memory module was trained to its end"
    if summary["best"] is not None:
        best = summary["arms"][summary["best"]]
        gain = best["gain"]["mean"]
        headline = f"Of single modules, {best['title']} is best"
        if gain is not None:
            headline += f": {abs(gain):.3f} nats per token {'better' if gain > 0 else 'worse'} than no memory"
    seeds = len(result["seeds"])
    table = Table(title=f"Memory by depth, {seeds} seed{'s' * (seeds > 1)}", columns=_COLUMNS, rows=rows, note=_ABOUT)
    return Finding(headline=headline, detail=seeds_note(seeds), tables=[table])


def _lens(curves: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not curves:
        return None
    return {
        "num_layers": curves[0]["num_layers"],
        "memory_blocks": curves[0]["memory_blocks"],
        "relative_depth": curves[0]["relative_depth"],
        "kl": _mean([curve["kl"] for curve in curves]),
        "kl_depth": spread(curve["kl_depth"] for curve in curves),
        "prediction_depth": spread(curve["prediction_depth"] for curve in curves),
    }


def _cka(maps: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not maps:
        return None
    return {
        "top_k": maps[0]["top_k"],
        "similarity": [_mean(rows) for rows in zip(*(found["similarity"] for found in maps), strict=True)],
        "alignment": _mean([found["alignment"] for found in maps]),
        "gain": _mean([found["gain"] for found in maps]),
        "layers_ahead": spread(mean_of(found["gain"][1:]) for found in maps),
    }


def _mean(rows: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Average lists of one length, place by place."""
    return [mean_of(values) for values in zip(*rows, strict=True)]
