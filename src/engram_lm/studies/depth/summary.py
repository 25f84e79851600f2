"""What came out of the study: averages over seeds, in words, rows and pictures."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from engram_lm.analysis.lens import draw_lens
from engram_lm.page.figure import MARKERS, Picture, line_style
from engram_lm.page.number_text import NOTHING, mean_of, number_text, signed_text, spread_text
from engram_lm.studies.page import Finding, Table
from engram_lm.studies.summary import paired_difference, seeds_note, spread

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


def _lens(curves: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not curves:
        return None
    return {
        **{key: curves[0][key] for key in ("num_layers", "memory_blocks", "relative_depth")},
        "kl": _mean([curve["kl"] for curve in curves]),
        **{key: spread(curve[key] for curve in curves) for key in ("kl_depth", "prediction_depth")},
    }


def _cka(maps: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not maps:
        return None
    return {
        "top_k": maps[0]["top_k"],
        "similarity": [_mean(rows) for rows in zip(*(found["similarity"] for found in maps), strict=True)],
        **{key: _mean([found[key] for found in maps]) for key in ("alignment", "gain")},
        "layers_ahead": spread(mean_of(found["gain"][1:]) for found in maps),
    }


def _mean(rows: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Average lists of one length, place by place."""
    return [mean_of(values) for values in zip(*rows, strict=True)]


def depth_finding(result: Mapping[str, Any]) -> Finding:
    """Say which block is best and by how much, and list all arms of a result in the format ``engram.depth.1``."""
    summary, rows = result["summary"], []
    for arm in summary["arms"].values():
        gain, lens = arm["gain"] or _UNKNOWN, arm["lens"] or {}
        ahead = (arm["cka"] or {}).get("layers_ahead", _UNKNOWN)["mean"]
        rows.append(
            [
                arm["title"].removeprefix("memory in "),
                spread_text(arm["loss"]["mean"], arm["loss"]["std"]),
                spread_text(gain["mean"], gain["std"], signed=True),
                *(number_text(lens.get(key, _UNKNOWN)["mean"]) for key in ("kl_depth", "prediction_depth")),
                NOTHING if ahead is None else signed_text(ahead),
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


def figures(result: Mapping[str, Any]) -> Sequence[Picture]:
    """Draw the loss by depth, the logit lens and CKA, where there is something to draw."""
    summary = result["summary"]
    arms = {name: arm for name, arm in summary["arms"].items() if arm["loss"]["mean"] is not None}
    curves = {arm["title"]: arm["lens"] for arm in arms.values() if arm["lens"]}
    maps = {name: arm["cka"] for name, arm in arms.items() if arm["cka"]}

    def draw_curves(figure: Any) -> None:
        axes = figure.subplots()
        draw_lens(curves, axes, key="kl", on_page=False)
        _finish(axes, "layers behind", "KL(final‖layer), nats")

    pictures = []
    if BASELINE in arms and sum(len(arm["blocks"]) == 1 for arm in arms.values()) > 1:
        draw = functools.partial(_draw_sweep, arms)
        pictures.append(Picture(name="sweep", title="Held-out loss by depth", size=(6.4, 3.8), draw=draw))
    if curves:
        pictures.append(Picture(name="lens", title="Logit lens", size=(6.4, 4.2), draw=draw_curves))
    if summary["best"] in maps:
        draw = functools.partial(_draw_cka, arms, maps, summary["best"])
        pictures.append(Picture(name="cka", title="Similarity of layers (CKA)", size=(10.4, 4.4), draw=draw))
    return pictures


def _draw_sweep(arms: Mapping[str, Any], figure: Any) -> None:
    """Loss by block: the mean, and a small point for every seed's gain subtracted from the mean without memory."""
    axes = figure.subplots()
    base = arms[BASELINE]["loss"]["mean"]
    single = {arm["blocks"][0]: arm for arm in arms.values() if len(arm["blocks"]) == 1}
    for block, arm in single.items():
        gains = arm["gain"]["per_seed"]
        axes.plot([block] * len(gains), [base - gain for gain in gains], ".", color="C0", alpha=0.5)
    losses = [arm["loss"]["mean"] for arm in single.values()]
    axes.plot(list(single), losses, "o-", color="C0", label="one module, by block")
    axes.axhline(base, color="0.3", linestyle="--", label=arms[BASELINE]["title"])
    for arm in arms.values():
        if len(arm["blocks"]) > 1:
            axes.axhline(arm["loss"]["mean"], color="C1", linestyle=":", label=f"divided: {arm['title']}")
            axes.plot(arm["blocks"], [arm["loss"]["mean"]] * len(arm["blocks"]), "s", color="C1")
    axes.set_xticks(list(single))
    _finish(axes, "block that reads memory, counted from 0", "held-out loss, nats per token")


def _draw_cka(arms: Mapping[str, Any], maps: Mapping[str, Any], best: str, figure: Any) -> None:
    """The map of the best arm with its soft alignment, and how many layers every arm is ahead."""
    left, right = figure.subplots(1, 2)
    found = maps[best]
    image = left.imshow([_numbers(row) for row in found["similarity"]], origin="lower", vmax=1, cmap="viridis")
    entries = list(range(len(found["alignment"])))
    left.plot(entries, entries, color="white", linestyle=":", linewidth=1.5)
    left.plot(entries, _numbers(found["alignment"]), "o-", color="red", label="soft alignment")
    left.set(xlabel=f"{arms[best]['title']}: layers behind", ylabel="no memory: layers behind")
    left.legend(loc="lower right", fontsize=8)
    figure.colorbar(image, ax=left, label="CKA")
    for index, (name, one) in enumerate(maps.items(), 1):  # styles as in the lens, which draws one more
        style = line_style(index, on_page=False) | {"marker": MARKERS[index % len(MARKERS)], "markersize": 4}
        right.plot(entries, _numbers(one["gain"]), **style, label=arms[name]["title"])
    right.axhline(0, color="0.3", linewidth=0.8)
    right.locator_params(axis="x", integer=True)
    _finish(right, "layers behind", "layers ahead of no memory")


def _finish(axes: Any, xlabel: str, ylabel: str) -> None:
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(axis="y", color="0.9")
    axes.legend(frameon=False, fontsize=8)


def _numbers(values: Any) -> list[float]:
    return [float("nan") if value is None else value for value in values]
