"""What an analysis found, in words: a headline, what is missing, and a summary for the terminal."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from engram_lm.analysis.part import load_parts
from engram_lm.page.number_text import count_text

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Headline", "headline", "print_summary", "remarks"]


class Headline(NamedTuple):
    """What should be read first."""

    title: str
    """The main finding, in a sentence."""
    detail: str
    """A few more sentences; may be empty."""


def headline(result: Mapping[str, Any]) -> Headline:
    """Say what was found, starting with the first part that has a headline."""
    parts = load_parts(result["parts"])
    names = [model["name"] for model in result["models"]]
    details = [_read(text) for text in result["texts"]] + [said for part in parts for said in part.details(result)]
    titles = filter(None, (part.headline(result) for part in parts))
    title = next(titles, f"What {', '.join(names)} {'does' if len(names) == 1 else 'do'} with a text")
    return Headline(title, " ".join(details))


def remarks(result: Mapping[str, Any]) -> list[str]:
    """Say what a reader must know: parts that do not apply and why, and positions that were left out."""
    parts = load_parts(result["parts"])
    left_out: dict[tuple[str, str], list[str]] = {}
    for part in parts:
        for entry in result["parts"][part.name]:
            reasons = dict((entry.get("result") or {}).get("left_out", {}))
            if "not_applicable" in entry:
                reasons[", ".join(entry["models"])] = entry["not_applicable"]
            for name, reason in reasons.items():
                left_out.setdefault((name, reason), []).append(part.title)
    said = [f"{', '.join(titles)} left out for {name}: {reason}" for (name, reason), titles in left_out.items()]
    return said + [warning for part in parts for warning in part.warnings(result)]


def print_summary(result: Mapping[str, Any], console: "Console") -> None:
    """Print the findings, a few lines for each part."""
    lines = [*headline(result), ""]
    for part in load_parts(result["parts"]):
        lines += [f"{part.title:<14}{line}" for line in part.summary(result)]
    lines += [f"{'note':<14}{remark}" for remark in remarks(result)]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _read(text: Mapping[str, Any]) -> str:
    amount = f"{count_text(text['num_tokens'])} tokens" + ("" if text["all"] else " from the start of the text")
    return f"Read {amount} with {', '.join(text['models'])}."
