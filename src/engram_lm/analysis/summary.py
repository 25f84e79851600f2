"""What came out of an analysis, in words: a headline, what did not apply, and a summary for the terminal."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from engram_lm.page.number_text import count_text, number_text, signed_text

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Headline", "headline", "print_summary", "remarks"]

_TITLES = {
    "gates": "gates",
    "lens": "logit lens",
    "cka": "CKA",
    "suppression": "suppression",
    "rows": "rows",
}


class Headline(NamedTuple):
    """The first thing that is read."""

    title: str
    """In a sentence."""
    detail: str
    """In some more; may be empty."""


def headline(result: Mapping[str, Any]) -> Headline:
    """Say what was found, the effect of suppression first: it is what the memory is worth to the model."""
    names = [model["name"] for model in result["models"]]
    effects = dict(_results(result, "suppression"))
    details = [_read(text) for text in result["texts"]]
    for model, found in _gates(result):
        values = [value for block in found["mean"] for value in block if value is not None]
        if values:
            spread = f"{min(values):.2f} to {max(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"
            details.append(f"Mean gates of {model}: {spread}.")
    for model, found in effects.items():
        full, zero = found["loss"][0], found["loss"][1]
        if full is not None and zero is not None:
            verb = "rises" if zero > full else "falls"
            return Headline(
                f"Without its memory the loss of {model} {verb} from {full:.3f} to {zero:.3f} nats per token",
                " ".join(details),
            )
    return Headline(f"What {', '.join(names)} {'does' if len(names) == 1 else 'do'} with a text", " ".join(details))


def remarks(result: Mapping[str, Any]) -> list[str]:
    """What a reader must know: parts that do not apply and why, and positions that were left out."""
    left_out: dict[tuple[str, str], list[str]] = {}
    broken = []
    for part, entries in result["parts"].items():
        for entry in entries:
            found = entry.get("result") or {}
            if "not_applicable" in entry:
                left_out.setdefault((", ".join(entry["models"]), entry["not_applicable"]), []).append(_TITLES[part])
            for name, reason in found.get("left_out", {}).items():
                left_out.setdefault((name, reason), []).append(_TITLES[part])
            if part == "suppression" and "result" in entry and found["loss"][0] is None:
                broken.append(f"suppression of {', '.join(entry['models'])}: the loss is NaN or infinite")
            counts = {", ".join(entry["models"]): found, **(found.get("models") or {})}
            broken += [
                f"{_TITLES[part]} of {name}: {one['num_not_finite']:,} positions left out because values there are NaN "
                "or infinite"
                for name, one in counts.items()
                if one.get("num_not_finite")
            ]
    return [f"{', '.join(parts)} left out for {name}: {reason}" for (name, reason), parts in left_out.items()] + broken


def print_summary(result: Mapping[str, Any], console: "Console") -> None:
    """Print the findings in some lines for each part."""
    said = headline(result)
    lines = [said.title, said.detail, ""]
    for model, found in _gates(result):
        for index, block in enumerate(found["blocks"]):
            mean = " ".join(number_text(value, 3) for value in found["mean"][index])
            top = ", ".join(f"{item['text']!r} {item['mean_gate']:.2f}" for item in found["ngrams"][index][:4])
            lines.append(f"gates         {model}, block {block}: mean {mean}; widest at {top or 'no N-gram'}")
    for entry in result["parts"].get("lens") or ():
        for model, curve in ((entry.get("result") or {}).get("models") or {}).items():
            lines.append(
                f"logit lens    {model}: {number_text(curve['kl'][0])} nats from the final prediction at the "
                f"embedding, half of it gone after {number_text(curve['kl_depth'])} of {curve['num_layers']} layers"
            )
    for _, findings in _results(result, "cka"):
        for found in findings["maps"]:
            if found["row_model"] != found["column_model"]:
                gains = [value for value in found["gain"] if value is not None]
                ahead = sum(gains) / len(gains) if gains else 0.0
                lines.append(
                    f"CKA           layers of {found['column_model']} answer to layers of {found['row_model']} that "
                    f"lie {abs(ahead):.2f} layers {'further on' if ahead >= 0 else 'before'}, on average"
                    if gains
                    else f"CKA           layers of {found['column_model']} and {found['row_model']} cannot be aligned"
                )
    for model, found in _results(result, "suppression"):
        full = found["loss"][0]
        for condition, loss in zip(found["conditions"][1:], found["loss"][1:], strict=True):
            if loss is not None and full is not None:
                lines.append(f"suppression   {model}, {condition['name']}: loss {signed_text(loss - full)}")
    for _, findings in _results(result, "rows"):
        for model, usage in findings["models"].items():
            for block, share in zip(usage["blocks"], usage["occupancy_by_block"], strict=True):
                lines.append(f"rows          {model}, block {block}: {100 * share:.1f} % of the rows read")
    lines += [f"note          {remark}" for remark in remarks(result)]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _read(text: Mapping[str, Any]) -> str:
    amount = f"{count_text(text['num_tokens'])} tokens" + ("" if text["all"] else " from the start of the text")
    return f"Read {amount} with {', '.join(text['models'])}."


def _results(result: Mapping[str, Any], part: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for entry in result["parts"].get(part) or ():
        if "result" in entry:
            yield entry["models"][0], entry["result"]


def _gates(result: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for _, found in _results(result, "gates"):
        yield from found["models"].items()
