"""The pictures of the study: loss by depth, the logit lens, CKA and the layers it says memory saves."""

from collections.abc import Mapping, Sequence
from typing import Any

from engram_lm.page.figure import MARKERS, Picture, line_style
from engram_lm.studies.depth.summary import BASELINE

__all__ = ["figures"]


def figures(result: Mapping[str, Any]) -> Sequence[Picture]:
    """Draw the sweep, the logit lens and CKA, those that there is something for.

    Args:
        result: A result in the format ``engram.depth.1``.
    """
    summary = result["summary"]
    arms = {name: arm for name, arm in summary["arms"].items() if arm["loss"]["mean"] is not None}
    curves = {arm["title"]: arm["lens"] for arm in arms.values() if arm["lens"]}
    maps = {name: arm["cka"] for name, arm in arms.items() if arm["cka"]}

    def draw_sweep(figure: Any) -> None:
        _draw_sweep(figure.subplots(), arms)

    def draw_lens(figure: Any) -> None:
        _draw_lens(figure.subplots(), curves)

    def draw_cka(figure: Any) -> None:
        _draw_cka(figure, arms, maps, summary["best"])

    pictures = []
    if BASELINE in arms and sum(len(arm["blocks"]) == 1 for arm in arms.values()) > 1:
        pictures.append(Picture(name="sweep", title="Held-out loss by depth", size=(6.4, 3.8), draw=draw_sweep))
    if curves:
        pictures.append(Picture(name="lens", title="Logit lens", size=(6.4, 4.2), draw=draw_lens))
    if summary["best"] in maps:
        pictures.append(Picture(name="cka", title="Similarity of layers (CKA)", size=(10.4, 4.4), draw=draw_cka))
    return pictures


def _draw_sweep(axes: Any, arms: Mapping[str, Any]) -> None:
    """Loss by block: the mean, and a small point for every seed's gain subtracted from the mean without memory."""
    base = arms[BASELINE]["loss"]["mean"]
    single = [arm for arm in arms.values() if len(arm["blocks"]) == 1]
    blocks = [arm["blocks"][0] for arm in single]
    for arm, block in zip(single, blocks, strict=True):
        gains = arm["gain"]["per_seed"]
        axes.plot([block] * len(gains), [base - gain for gain in gains], ".", color="C0", alpha=0.5)
    axes.plot(blocks, [arm["loss"]["mean"] for arm in single], "o-", color="C0", label="one module, by block")
    axes.axhline(base, color="0.3", linestyle="--", label=arms[BASELINE]["title"])
    for arm in arms.values():
        if len(arm["blocks"]) > 1:
            label = f"divided: {arm['title']}"
            axes.axhline(arm["loss"]["mean"], color="C1", linestyle=":", label=label)
            axes.plot(arm["blocks"], [arm["loss"]["mean"]] * len(arm["blocks"]), "s", color="C1")
    axes.set_xticks(blocks)
    axes.set_xlabel("block that reads memory, counted from 0")
    axes.set_ylabel("held-out loss, nats per token")
    axes.grid(axis="y", color="0.9")
    axes.legend(frameon=False, fontsize=8)


def _draw_lens(axes: Any, curves: Mapping[str, Any]) -> None:
    """Divergence by layers behind; the output of a block that reads memory has a large point."""
    for index, (title, curve) in enumerate(curves.items()):
        values = _numbers(curve["kl"])
        reading = [block + 1 for block in curve["memory_blocks"]]
        # The first has no color of its own, because other pictures leave it out.
        style = _style(index) | ({} if index else {"color": "0.2"})
        axes.plot(range(len(values)), values, **style, markevery=reading, label=title)
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("layers behind")
    axes.set_ylabel("KL(final‖layer), nats")
    axes.grid(axis="y", color="0.9")
    axes.legend(frameon=False, fontsize=8)


def _draw_cka(figure: Any, arms: Mapping[str, Any], maps: Mapping[str, Any], best: str) -> None:
    """The map of the best arm with its soft alignment, and how many layers every arm is ahead."""
    left, right = figure.subplots(1, 2)
    found = maps[best]
    image = left.imshow([_numbers(row) for row in found["similarity"]], origin="lower", vmax=1, cmap="viridis")
    entries = list(range(len(found["alignment"])))
    left.plot(entries, entries, color="white", linestyle=":", linewidth=1.5)
    left.plot(entries, _numbers(found["alignment"]), "o-", color="red", label="soft alignment")
    left.set_xlabel(f"{arms[best]['title']}: layers behind")
    left.set_ylabel("no memory: layers behind")
    left.legend(loc="lower right", fontsize=8)
    figure.colorbar(image, ax=left, label="CKA")
    for index, (name, one) in enumerate(maps.items(), 1):  # styles as in the lens, which draws one more
        right.plot(entries, _numbers(one["gain"]), **_style(index), label=arms[name]["title"])
    right.axhline(0, color="0.3", linewidth=0.8)
    right.set_xlabel("layers behind")
    right.locator_params(axis="x", integer=True)
    right.set_ylabel("layers ahead of no memory")
    right.grid(axis="y", color="0.9")
    right.legend(frameon=False, fontsize=8)


def _style(index: int) -> dict[str, Any]:
    return line_style(index, on_page=False) | {"marker": MARKERS[index % len(MARKERS)], "markersize": 4}


def _numbers(values: Any) -> list[float]:
    return [float("nan") if value is None else value for value in values]
