"""The part of an analysis that suppresses the memory: what the loss and the answers to questions lose."""

from collections.abc import Iterator, Mapping
from typing import Any

from engram_lm.analysis.part import Entry, Part, Work
from engram_lm.analysis.suppression.effect import conditions, suppression_effect
from engram_lm.page.figure import Picture
from engram_lm.page.frame import escape, section, table
from engram_lm.page.number_text import NOTHING, count_text, number_text, signed_text

__all__ = ["SuppressionPart"]


class SuppressionPart(Part):
    """What is lost without the memory."""

    title = "suppression"

    def conclude(self, work: Work, found: Mapping[str, Any]) -> Iterator[Entry]:
        """Suppress the memory of each model that has one."""
        for subject in work.subjects:
            entry: Entry = {"models": [subject.name]}
            if not subject.memories:
                yield {**entry, "not_applicable": "it has no memory"}
            elif len(work.tokens) < 2:
                yield {**entry, "not_applicable": "a loss needs a text of at least two tokens"}
            else:
                chosen, most = conditions(subject), work.options.suppression_tokens
                work.on_stage(f"suppressing the memory of {subject.name}", len(chosen))
                effect = suppression_effect(
                    subject,
                    subject.tokenizer,
                    items=work.options.items,
                    tokens=work.tokens[: most + 1],
                    chosen=chosen,
                    length=work.length,
                    batch_size=work.options.batch_size,
                    on_progress=lambda condition: work.on_progress(1),
                )
                yield {**entry, "result": {**effect.to_dict(), "num_tokens": min(len(work.tokens) - 1, most)}}

    def by_model(self, result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Return the effect on each model with memory, by name."""
        entries = result["parts"].get(self.name) or ()
        return {entry["models"][0]: entry["result"] for entry in entries if "result" in entry}

    def headline(self, result: Mapping[str, Any]) -> str | None:
        """Say how the loss changes without the memory, which is what the memory is worth to the model."""
        for model, effect in self.by_model(result).items():
            full, zero = effect["loss"][:2]
            if full is not None and zero is not None:
                verb = "rises" if zero > full else "falls"
                return f"Without its memory the loss of {model} {verb} from {full:.3f} to {zero:.3f} nats per token"
        return None

    def warnings(self, result: Mapping[str, Any]) -> Iterator[str]:
        """Say for which models there is no loss."""
        for model, effect in self.by_model(result).items():
            if effect["loss"][0] is None:
                yield f"suppression of {model}: the loss is NaN or infinite"

    def summary(self, result: Mapping[str, Any]) -> Iterator[str]:
        """Return what each way of suppressing adds to the loss."""
        for model, effect in self.by_model(result).items():
            for name, added in _added(effect):
                yield f"{model}, {name}: loss {signed_text(added)}"

    def picture(self, result: Mapping[str, Any]) -> Picture | None:
        """Draw what each way of suppressing adds to the loss, as bars."""
        effects = self.by_model(result)
        if not effects:
            return None
        num_bars = sum(len(effect["conditions"]) - 1 for effect in effects.values())
        return self.drawn(
            7.2,
            1.0 + 0.36 * num_bars,
            lambda figure: _draw(figure.subplots(), effects),
        )

    def section(self, result: Mapping[str, Any], page_only: Mapping[str, Any]) -> str:
        """Return bars of the loss that each way of suppressing adds, and a table of the questions."""
        effects = self.by_model(result)
        if not effects:
            return ""
        body = [
            "<p>The memory’s output is set to zero, or each row is replaced by another one of the same head, while the "
            "rest of the model stays as it is. This is no comparison with a model that was trained without memory: the "
            "rest of the model still counts on it.</p>"
        ]
        for name, effect in effects.items():
            heading = f"<h3>{escape(name)}</h3>" if len(effects) > 1 else ""
            body.append(heading + _bars(effect) + _questions(effect))
        return section("suppression", "Without the memory", "\n".join(body))


def _added(effect: Mapping[str, Any]) -> list[tuple[str, float]]:
    """What each condition adds to the loss, where both losses are known."""
    full = effect["loss"][0]
    return [
        (condition["name"], loss - full)
        for condition, loss in zip(effect["conditions"][1:], effect["loss"][1:], strict=True)
        if loss is not None and full is not None
    ]


def _draw(axes: Any, effects: Mapping[str, Mapping[str, Any]]) -> None:
    bars = [
        (f"{model}: {name}" if len(effects) > 1 else name, added)
        for model, effect in effects.items()
        for name, added in _added(effect)
    ]
    axes.barh(range(len(bars)), [added for _, added in bars], color="C0")
    axes.set_yticks(range(len(bars)), [name for name, _ in bars])
    axes.invert_yaxis()
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.set_xlabel("nats per token added to the loss")


def _bars(effect: Mapping[str, Any]) -> str:
    added = _added(effect)
    most = max((value for _, value in added), default=0.0)
    if most <= 0:
        return ""
    bars = "".join(
        f'<dt>{escape(name)}</dt><dd class="track" style="--w: {100 * max(value, 0) / most:.1f}%"></dd>'
        f"<dd>{signed_text(value)}</dd>"
        for name, value in added
    )
    return (
        f'<dl class="bars">{bars}</dl><p class="note">Nats per token added to the loss of {effect["loss"][0]:.3f}, '
        f"over {count_text(effect.get('num_tokens'))} tokens.</p>"
    )


def _questions(effect: Mapping[str, Any]) -> str:
    families = effect["families"]
    if not families:
        return ""
    columns = ["Memory", "Loss"]
    for family, number in zip(families, effect["num_items"], strict=True):
        columns += [f"{family}: right of {number:,}", f"{family}: retained"]
    rows = []
    for condition, loss, exact, retained in zip(
        effect["conditions"], effect["loss"], effect["exact_match"], effect["retained"], strict=True
    ):
        shares = [share for pair in zip(exact, retained, strict=True) for share in pair]
        rows.append([condition["name"], number_text(loss, 3), *map(_percent, shares)])
    return table(columns, rows, label="Questions answered with the memory suppressed, a wide table")


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.0f} %"
