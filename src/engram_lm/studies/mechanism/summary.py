"""What came out of the study: averages over seeds, in words, rows and pictures."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from engram_lm.analysis.lens import draw_lens
from engram_lm.page.figure import MARKERS, Picture, line_style
from engram_lm.page.number_text import NOTHING, mean_of, number_text, signed_text, spread_text
from engram_lm.studies.page import Finding, Table
from engram_lm.studies.summary import paired_difference, seeds_note, spread
from engram_lm.studies.suppression.summary import percent_text, suppression_bars
from engram_lm.studies.suppression.summary import summarize as summarize_suppression

BASELINE = "baseline"
"""Name of the model without memory."""
_COLUMNS = ("Memory in", "Held-out loss", "Gain", "KL depth", "Prediction depth", "Layers saved", "Layers ahead")
_ABOUT = (
    "Losses in nats per token; mean ± standard deviation over the seeds. Gain: over no memory, at equal operations "
    "per token. KL depth: layers until half of the divergence from the model's own prediction is gone. Prediction "
    "depth: layers until its most likely token stays. Layers saved: by the KL depth, seed "
    "by seed. Layers ahead: how much deeper a layer of the model without "
    "memory is that is alike (CKA), averaged over layers; a correlation."
)
_UNKNOWN: Mapping[str, Any] = {"mean": None, "std": None}


def summarize(result: Mapping[str, Any], looks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Average over seeds.

    Args:
        result: An ``engram.study.1`` of the arms; the one without memory is first.
        looks: For each seed ``lens``, ``cka`` and ``suppression`` by arm, where asked for.

    Returns:
        ``arms``, by name: ``loss`` in nats per token; ``gain`` over the model without memory, subtracted seed by seed;
        ``lens``: ``kl`` by entry, ``kl_depth`` and ``prediction_depth`` in layers, and ``layers_saved``, the KL depth
        of the model without memory minus this one's; ``cka``: ``similarity``, ``alignment`` and ``gain`` by entry, and
        ``layers_ahead``, the mean gain over the outputs of all layers; ``suppression`` as
        `engram_lm.studies.suppression.summary.summarize` has it. Spreads are mean and standard deviation (None of one
        seed). Beside them ``best``, the arm with the lowest loss of those with one module, and ``kept_by_worst``, the
        share of its gain that the one with the highest loss keeps (None where no module gains anything).
    """
    arms: dict[str, Any] = {}
    for name, arm in result["arms"].items():
        gain = arm["summary"]["loss"].get("difference")
        lenses = [look.get("lens", {}).get(name) for look in looks]
        effects = [found for look in looks if "effect" in (found := look.get("suppression", {}).get(name, {}))]
        scores = [found for look in looks if "scores" in (found := look.get("suppression", {}).get(name, {}))]
        arms[name] = {
            "title": arm["title"],
            "blocks": list(arm["recipe"]["model"].get("memory", {}).get("layers", ())),
            "loss": {key: arm["summary"]["loss"][key] for key in ("mean", "std")},
            "gain": gain and _negative(gain),
            "lens": _lens(lenses, [look.get("lens", {}).get(BASELINE) for look in looks]),
            "cka": _cka([found for look in looks if (found := look.get("cka", {}).get(name))]),
            "suppression": summarize_suppression([{"run": found} for found in effects]) if effects else None,
            "answers": {
                family: spread(found["scores"][family]["exact_match"] for found in scores)
                for family in (scores[0]["scores"] if scores else ())
            },
        }
    single = {
        name: arm["loss"]["mean"] for name, arm in arms.items() if len(arm["blocks"]) == 1 and arm["loss"]["mean"]
    }
    best, worst = (choose(single, key=lambda name: single[name], default=None) for choose in (min, max))
    kept = None
    if best is not None and worst is not None and (arms[best]["gain"]["mean"] or 0) > 0:
        kept = arms[worst]["gain"]["mean"] / arms[best]["gain"]["mean"]
    return {"arms": arms, "best": best, "kept_by_worst": kept}


def _negative(difference: Mapping[str, Any]) -> dict[str, Any]:
    """A difference the other way round: what an arm gains over the first one."""
    mean = None if difference["mean"] is None else -difference["mean"]
    return {**difference, "mean": mean, "per_seed": [-value for value in difference["per_seed"]]}


def _lens(
    curves: Sequence[Mapping[str, Any] | None], without: Sequence[Mapping[str, Any] | None]
) -> dict[str, Any] | None:
    known = [curve for curve in curves if curve]
    if not known:
        return None
    depths, others = (
        {seed: curve["kl_depth"] if curve else None for seed, curve in enumerate(one)} for one in (curves, without)
    )
    return {
        **{key: known[0][key] for key in ("num_layers", "memory_blocks", "relative_depth")},
        "kl": _mean([curve["kl"] for curve in known]),
        **{key: spread(curve[key] for curve in known) for key in ("kl_depth", "prediction_depth")},
        "layers_saved": paired_difference(others, depths),
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


def mechanism_finding(result: Mapping[str, Any]) -> Finding:
    """Say what the layers and the answers show, and list all arms of a result in the format ``engram.mechanism.1``."""
    summary, rows = result["summary"], []
    for arm in summary["arms"].values():
        gain, lens = arm["gain"] or _UNKNOWN, arm["lens"] or {}
        saved = lens.get("layers_saved", _UNKNOWN) if arm["gain"] else _UNKNOWN
        ahead = (arm["cka"] or {}).get("layers_ahead", _UNKNOWN)
        rows.append(
            [
                arm["title"].removeprefix("memory in "),
                spread_text(arm["loss"]["mean"], arm["loss"]["std"]),
                spread_text(gain["mean"], gain["std"], signed=True),
                *(number_text(lens.get(key, _UNKNOWN)["mean"]) for key in ("kl_depth", "prediction_depth")),
                *(spread_text(one["mean"], one["std"], signed=True) for one in (saved, ahead)),
            ]
        )
    headline = "No model with one memory module was trained to its end"
    if summary["best"] is not None:
        best = summary["arms"][summary["best"]]
        gain = best["gain"]["mean"]
        headline = f"Of single modules, {best['title']} is best"
        if gain is not None:
            headline += f": {abs(gain):.3f} nats per token {'better' if gain > 0 else 'worse'} than no memory"
        if best["lens"] is not None and (saved := best["lens"]["layers_saved"]["mean"]) is not None:
            headline += f", with {signed_text(saved)} layers saved by the logit lens"
    seeds = len(result["seeds"])
    table = Table(title=f"Memory by depth, {seeds} seed{'s' * (seeds > 1)}", columns=_COLUMNS, rows=rows, note=_ABOUT)
    return Finding(headline=headline, detail=seeds_note(seeds), tables=[table, *_answers_tables(summary)])


def _answers_tables(summary: Mapping[str, Any]) -> list[Table]:
    """What is answered rightly with memory on, and which share of it with all memory at zero."""
    asked = {name: arm for name, arm in summary["arms"].items() if arm["suppression"] or arm["answers"]}
    if not asked:
        return []
    families: list[str] = []
    rows = []
    for arm in asked.values():
        cells = [arm["title"].removeprefix("memory in ")]
        if arm["suppression"]:
            on, off = list(arm["suppression"]["conditions"].values())[:2]
            families = list(on)
            for family in families:
                cells += [percent_text(on[family]["exact_match"]), percent_text(off[family]["retained"])]
        else:
            cells += [cell for found in arm["answers"].values() for cell in (percent_text(found), NOTHING)]
        rows.append(cells)
    columns = ["Memory in", *(title for family in families for title in (family, "retained"))]
    note = (
        "Right answers of greedy decoding with memory on, and the share retained with all memory at zero. Recall: "
        "facts that the text states again and again; reading: facts of the passage before the question."
    )
    return [Table(title="Answers with memory suppressed", columns=columns, rows=rows, note=note)]


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
    if summary["best"] and (found := arms[summary["best"]]["suppression"]):
        pictures.append(suppression_bars(found["conditions"]))
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
