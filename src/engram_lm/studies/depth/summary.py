"""What came out of the study: averages over seeds, and a table for the terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engram_lm.page.number_text import NOTHING, mean_of, number_text, signed_text, spread_text
from engram_lm.studies.summary import paired_difference, spread

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["BASELINE", "COLUMNS", "rows", "summarize", "terminal_table"]

BASELINE = "baseline"
"""Name of the model without memory."""
COLUMNS = ("Memory in", "Held-out loss", "Gain", "KL depth", "Prediction depth", "Layers ahead")
"""What a table says of every arm, in order; see `rows`."""


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
    known = {name: {seed: loss for seed, loss in found.items() if loss is not None} for name, found in losses.items()}
    for name, title in titles.items():
        run = seeds[0]["arms"][name]
        arms[name] = {
            "title": title,
            "blocks": run["blocks"],
            "flops_per_token": run["flops_per_token"],
            "parameters": run.get("parameters"),
            "loss": spread(known[name].values()),
            "gain": None if name == BASELINE else paired_difference(known[BASELINE], known[name]),
            "lens": _lens([curve for seed in seeds if (curve := seed.get("lens", {}).get(name))]),
            "cka": _cka([found for seed in seeds if (found := seed.get("cka", {}).get(name))]),
        }
    single = {name: arm["loss"]["mean"] for name, arm in arms.items() if len(arm["blocks"]) == 1 and known[name]}
    best, worst = (choose(single, key=lambda name: single[name], default=None) for choose in (min, max))
    kept = None
    if best is not None and worst is not None and (arms[best]["gain"]["mean"] or 0) > 0:
        kept = arms[worst]["gain"]["mean"] / arms[best]["gain"]["mean"]
    return {"arms": arms, "best": best, "kept_by_worst": kept}


def rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Describe every arm: a cell for each of `COLUMNS`.

    Args:
        result: A result in the format ``engram.depth.1``.
    """
    found = []
    for arm in result["summary"]["arms"].values():
        gain, lens, cka = arm["gain"], arm["lens"], arm["cka"]
        ahead = None if cka is None else cka["layers_ahead"]
        found.append(
            [
                arm["title"].removeprefix("memory in "),
                spread_text(arm["loss"]["mean"], arm["loss"]["std"]),
                NOTHING if gain is None else spread_text(gain["mean"], gain["std"], signed=True),
                NOTHING if lens is None else number_text(lens["kl_depth"]["mean"]),
                NOTHING if lens is None else number_text(lens["prediction_depth"]["mean"]),
                NOTHING if ahead is None or ahead["mean"] is None else signed_text(ahead["mean"]),
            ]
        )
    return found


def terminal_table(result: Mapping[str, Any]) -> "Table":
    """Lay out the arms, a line for each.

    Args:
        result: A result in the format ``engram.depth.1``.
    """
    from rich import box
    from rich.table import Table

    summary, seeds = result["summary"], len(result["seeds"])
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
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if index else "left", no_wrap=not index)
    for name, row in zip(summary["arms"], rows(result), strict=True):
        table.add_row(*row, style="bold" if name == summary["best"] else None)
    return table


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
